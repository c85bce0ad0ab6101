"""All data sets of a config, with masks and references on their pages."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import kindling
from tests.unit import hostile
from tests.unit.folders import table

CONFIG = """\
name: x
data: {{path: {0}/plain, resolution: 64}}
more_data:
  - {{path: {0}/masked, resolution: 64, mask: files}}
  - {{path: {0}/cut, resolution: 64, mask: alpha, mask_floor: 0.25}}
  - {{path: {0}/edits, resolution: 64}}
train: {{steps: 10}}
"""


@pytest.fixture
def config(root: Path) -> Path:
    """A plain set of four pictures, one masked, one with alpha, and an edit set."""
    top = root.rename(root.with_name("plain")).parent
    for name in ("masked/a.png", "masked/b.png", "edits/after.png", "edits/before.png"):
        hostile.picture(top / name, width=80, height=80, seed=len(name))
    mask = np.zeros((80, 80), np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(top / "masked" / "a.mask.png")
    picture = Image.open(top / "masked" / "b.png").convert("RGB")
    picture.putalpha(Image.fromarray(255 - mask))
    (top / "cut").mkdir()
    picture.save(top / "cut" / "a.png")
    for name in ("masked/a", "masked/b", "cut/a"):
        (top / f"{name}.txt").write_text(f"picture {name}")
    line = {"file_name": "after.png", "text": "make it green", "references": ["before.png"]}
    table(top / "edits", line)
    path = top / "x.yaml"
    path.write_text(CONFIG.format(top))
    return path


def thumbnails(page: Path, kind: str) -> list[np.ndarray]:
    """Pixels of the pictures of a CSS class, or in an element of it."""
    text = page.read_text(encoding="utf-8")
    cards = re.findall(rf'class="{kind}"(.*?)</?(?:button|span class="crop)', text, re.DOTALL)
    found = [data for card in cards for data in re.findall(r"jpeg;base64,([^\"]+)", card)]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_every_set_of_a_config_is_reported(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "x.html"
    argv = ["--config", str(config), "--html", str(page), "--json", str(tmp_path / "x.json")]
    assert kindling.main(["inspect", *argv]) == 0
    heads = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("Data", "/"))
    ]
    assert heads == [
        "Data set 1 of 4",
        f"{tmp_path}/plain: 4 usable pictures",
        "Data set 2 of 4",
        f"{tmp_path}/masked: 2 usable pictures, 1 masked (25% is learnt on average)",
        "Data set 3 of 4",
        f"{tmp_path}/cut: 1 usable picture, 1 masked (75% is learnt on average)",
        "Data set 4 of 4",
        f"{tmp_path}/edits: 1 usable picture, 1 with references",
    ]
    pages = [page, *(tmp_path / f"x-{number}.html" for number in (2, 3, 4))]
    for path in pages:
        links = re.findall(r'<a href="([^"]+)"( aria-current="page")?>', path.read_text("utf-8"))
        assert [name for name, _ in links] == [other.name for other in pages]
        assert [name for name, here in links if here] == [path.name]
    reports = [json.loads((tmp_path / f"x{n}.json").read_text("utf-8")) for n in ("", "-2", "-4")]
    assert [row["learnt"] for row in reports[0]["records"]] == [None] * 4
    assert [row["learnt"] for row in reports[1]["records"]] == [0.25, None]
    assert [row["references"] for row in reports[2]["records"]] == [["before.png"]]

    assert thumbnails(page, "mask") == thumbnails(page, "references") == []
    for path, dark in ((pages[1], np.s_[:, 30:]), (pages[2], np.s_[:, :10])):
        [mask] = thumbnails(path, "mask")
        assert mask.shape == (80, 80)
        assert mask[dark].max() < 20
        assert mask.max() > 235
    assert "75% of the picture; what is dark counts 0.25" in pages[2].read_text("utf-8")
    [reference] = thumbnails(pages[3], "references")
    before = np.asarray(Image.open(tmp_path / "edits" / "before.png").convert("RGB"), np.float32)
    blocks = (before - reference).reshape(10, 8, 10, 8, 3).mean(axis=(1, 3))  # JPEG keeps those
    assert np.abs(blocks).max() < 10


def test_one_bad_set_is_told_and_the_others_go_on(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain").rename(tmp_path / "elsewhere")
    Image.new("L", (80, 80)).save(tmp_path / "masked" / "b.mask.png")
    assert (
        kindling.main(["inspect", "--config", str(config), "--html", str(tmp_path / "x.html")]) == 2
    )
    out, err = capsys.readouterr()
    assert err.startswith(f"{tmp_path}/plain: no such folder")
    black = "b.png: a mask that is black all over: nothing of the picture would be learnt"
    assert f"Faults (mend these)\n  {black}\n\nNot ready for training.\n" in out
    assert out.count("\nReady for training.") == 2
    assert not (tmp_path / "x.html").exists()
    assert (tmp_path / "x-4.html").exists()
