"""Requests of previews: sizes, seeds, and references that can't be used. Pixels: tests/parity."""

from pathlib import Path

import pytest
import torch

from tests import runs
from train import sample
from train.config import DataConfig, PreviewConfig
from train.errors import ConfigError

DATA = DataConfig(path="x", resolution=256)
TEXTS = [torch.zeros(2, 3)] * 2


def requests(paths: list[Path], **settings: object) -> list[tuple[int, int, int]]:
    """Seed, width and height of a prompt and of an edit of `paths`."""
    edit = {"prompt": "make it red", "references": list(map(str, paths))}
    preview = PreviewConfig.model_validate(
        {"prompts": ("a fox",), "edits": (edit,), "seed": 5} | settings, strict=False
    )
    assert preview.texts == ("a fox", "make it red")
    made = sample.requests(TEXTS, preview.references, preview=preview, data=DATA, seeds=range(2))
    assert [request.references for request in made] == [(), tuple(paths)]
    return [(request.seed, request.width, request.height) for request in made]


def test_an_edit_has_the_shape_of_its_first_reference(tmp_path: Path) -> None:
    paths = [runs.draw_picture(tmp_path / f"{w}.png", size=(w, 100)) for w in (200, 100)]
    assert requests(paths) == [(5, 256, 256), (6, 352, 176)]
    assert requests(paths[::-1]) == [(5, 256, 256), (6, 256, 256)]
    assert requests(paths, width=64, height=80) == [(5, 64, 80), (6, 64, 80)]


def test_references_that_cannot_be_used(tmp_path: Path) -> None:
    small = runs.draw_picture(tmp_path / "small.png", size=(63, 80))
    with pytest.raises(ConfigError, match=r"reference .*small.png is 63x80; a reference needs 64"):
        requests([small])
    long = runs.draw_picture(tmp_path / "long.png", size=(641, 80))
    with pytest.raises(ConfigError, match=r"long.png is 641x80; a reference may be 8 times as"):
        requests([long])
    with pytest.raises(ConfigError, match=r"preview.edits: the reference .*none.png: "):
        requests([tmp_path / "none.png"])
