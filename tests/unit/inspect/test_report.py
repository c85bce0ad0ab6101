"""What is known of a data set: buckets, marks, words; and the same as JSON."""

import json
from pathlib import Path

from data_tools.inspect import command as inspect
from data_tools.inspect.command import Settings
from tests.unit import hostile
from tests.unit.inspect.reading import report_of


def test_json(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert inspect.main([str(root), "--resolution", "64", "--json", str(file)]) == 0
    facts = json.loads(file.read_text(encoding="utf-8"))
    assert facts["ready"] is True
    assert facts["pictures"] == 4
    assert facts["duplicates"] == facts["same_caption"] == [["b.png", "c.png"]]
    assert facts["buckets"][0] == {
        "geometry": {"width": 64, "height": 64},
        "pictures": 3,
        "showings": 3,
        "batches": 3,
        "partial": [],
        "crop": 0.0,
        "scale": 0.8,
    }
    assert facts["records"][3]["caption"] == "小火 ohwx"


def test_an_epoch_is_what_training_takes(root: Path) -> None:
    """The table's batches against the order that the trainer draws, references included."""
    lines = [
        {"file_name": "a.png", "text": "a"},
        {"file_name": "b.png", "text": "b", "references": ["a.png"]},
        {"file_name": "c.png", "text": "c", "references": ["d.png"]},
        {"file_name": "d.png", "text": "d"},
    ]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    [settings] = inspect._settings(
        inspect._parser().parse_args([str(root), "--resolution", "64", "--batch-size", "2"])
    )
    data = settings.data.model_copy(update={"repeats": 3})
    found = inspect.inspect(Settings(data, settings.schedule, None))
    square, wide = found.buckets
    assert (square.pictures, square.showings, square.batches) == (3, 9, 6)
    assert (square.partial, wide.partial) == ((1, 1, 1), (1,))
    assert found.batches == 8


def test_several_resolutions_are_counted_each(root: Path) -> None:
    [settings] = inspect._settings(inspect._parser().parse_args([str(root), "--resolution", "64"]))
    data = settings.data.model_copy(update={"resolution": (64, 80)})
    found = inspect.inspect(Settings(data, settings.schedule, None))
    assert sum(bucket.pictures for bucket in found.buckets) == 2 * len(found.rows) == 8
    assert all(len(row.placements) == 2 for row in found.rows)


def test_enlarging_adds_no_pixels(tmp_path: Path) -> None:
    hostile.picture(tmp_path / "a.png", width=96, height=96)
    (tmp_path / "a.txt").write_text("x")
    facts = report_of(tmp_path, tmp_path, "--resolution", "128", "--max-upscale", "2")
    assert facts["records"][0]["geometry"] == {"width": 128, "height": 128}
    assert facts["records"][0]["effective"] == [96, 96]
    assert facts["records"][0]["marks"] == ["enlarged"]


def test_words_and_tags(tmp_path: Path) -> None:
    captions = ["a red fox, forest, night", "the red fox, snow, day", "小火人，森林，夜晚"]
    for seed, caption in enumerate(captions):
        hostile.picture(tmp_path / f"{seed}.png", seed=seed)
        (tmp_path / f"{seed}.txt").write_text(caption, encoding="utf-8")
    facts = report_of(tmp_path, tmp_path, "--resolution", "64")
    assert facts["words"]["red"] == facts["words"]["fox"] == 2
    assert facts["words"]["小火"] == facts["words"]["火人"] == 1
    assert "the" not in facts["words"]
    assert facts["tags"]["小火人"] == facts["tags"]["a red fox"] == 1
    (tmp_path / "2.txt").write_text("a long sentence without any commas that goes on and on")
    assert report_of(tmp_path, tmp_path, "--resolution", "64")["tags"] == {}
