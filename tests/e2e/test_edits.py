"""Edit training whole: pairs in a folder, previews that start from references, and their board."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests import runs
from tests.e2e.conftest import TrainRun
from train.commands import compare
from train.errors import ConfigError


@pytest.fixture
def pairs(shared: Path) -> Path:
    folder = runs.make_pictures(shared / "pairs", sizes=[runs.SQUARE, runs.WIDE])
    runs.draw_picture(folder / "0.ref.png", size=(80, 64), seed=10)
    runs.draw_picture(folder / "1.ref1.png", size=(64, 64), seed=11)
    runs.draw_picture(folder / "1.ref2.png", size=(64, 80), seed=12)
    return folder


def test_pairs_become_an_adapter_with_previews_and_a_board(
    pairs: Path, train_run: TrainRun, capsys: pytest.CaptureFixture[str]
):
    edit = {"prompt": "make it red", "references": (str(pairs / "0.ref.png"),)}
    preview = {"prompts": ("zibby",), "edits": (edit,), "steps": 2}
    train = {"steps": 2, "batch_size": 1}
    checked = {"pictures": "training", "sigmas": 2}
    folder = train_run("edit", pictures="pairs", preview=preview, train=train, validation=checked)
    output = capsys.readouterr().err
    rows = (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    worth = [json.loads(row)["references_worth"] for row in rows]
    assert len(set(worth)) == 2
    assert all(f"without the references the loss is {value:.5f} ± " in output for value in worth)
    assert json.loads((folder / "tiny.certificate.json").read_text(encoding="utf-8"))["passed"]
    first, last = (Image.open(folder / "previews" / f"step-00000{n}-1.png") for n in (0, 2))
    assert first.size == last.size == (64, 48)
    assert compare.main([str(folder)]) == 0
    facts = json.loads((folder / "compare" / "pictures.json").read_text(encoding="utf-8"))
    sources = list(edit["references"])
    assert [fact.get("references") for fact in facts] == [None, None, sources, sources]
    width = Image.open(folder / "compare" / "board.png").width
    assert compare.main([str(folder), "--prompt", "a fox"]) == 0
    assert Image.open(folder / "compare" / "board.png").width < width  # no column of references


def test_references_change_what_is_learnt(pairs: Path, shared: Path, train_run: TrainRun):
    """Or the test above could pass with references that nothing looks at."""
    for picture in pairs.iterdir():
        if ".ref" not in picture.name:
            (shared / "alone").mkdir(exist_ok=True)
            (shared / "alone" / picture.name).write_bytes(picture.read_bytes())
    steps = {"train": {"steps": 1, "batch_size": 1}}
    losses = [
        runs.metrics(train_run(f"on {name}", pictures=name, **steps))[0]["loss"]
        for name in ("pairs", "alone")
    ]
    assert losses[0] != losses[1]


def test_a_missing_reference_stops_before_anything_is_made(shared: Path, train_run: TrainRun):
    edit = {"prompt": "make it red", "references": ("nowhere.png",)}
    with pytest.raises(ConfigError, match=r"preview.edits: the reference nowhere.png: "):
        train_run("missing", preview={"edits": (edit,)})
    assert not (shared / "missing").exists()
