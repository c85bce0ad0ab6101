"""Parquet, saved data sets and the hub's: foreign ones are read, hostile ones refused."""

import os
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from data_tools.exchange import containers, import_data, pack
from data_tools.exchange.containers import Columns
from data_tools.sources import Draft
from tests.unit.exchange.data_sets import contents, cut, drafts, fails, parquet, png, rich


def test_row_groups_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = rich(tmp_path / "in")
    monkeypatch.setattr(containers, "ROW_GROUP", 1)
    pack.run(root, tmp_path / "x.parquet")
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 3
    import_data.run(str(tmp_path / "x.parquet"), tmp_path / "out")
    assert drafts(tmp_path / "out") == drafts(root)


def test_a_foreign_parquet(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": png(i), "path": path}, "caption": f"no. {i}", "label": i, "nan": i / 2}
        for i, path in enumerate(["/home/x/cat.png", "cat.png", None, "https://e.org/dog.png"])
    ]
    rows[1]["nan"] = float("nan")
    parquet(tmp_path / "p/train-00000.parquet", rows[:2])
    parquet(tmp_path / "p/train-00001.parquet", rows[2:])
    parquet(tmp_path / "p/test-00000.parquet", rows[:1])
    count, notes = import_data.run(str(tmp_path / "p"), tmp_path / "out")
    assert (count, notes) == (4, ["not carried over: nan"])
    found = {d.name: (d.caption, d.extra) for d in drafts(tmp_path / "out")}
    assert found == {
        "cat.png": ("no. 0", {"label": 0, "nan": 0.0}),
        "cat-000002.png": ("no. 1", {"label": 1}),
        "000003.png": ("no. 2", {"label": 2}),
        "dog.png": ("no. 3", {"label": 3}),
    }
    assert contents(tmp_path / "out")["000003.png"] == png(2)
    assert import_data.run(str(tmp_path / "p"), tmp_path / "t", split="test")[0] == 1
    said = fails(tmp_path / "p", tmp_path / "v", split="validation")
    assert "no files of the split 'validation'; splits: test, train; choose with --split" in said


def test_columns_are_chosen(tmp_path: Path) -> None:
    rows = [{"before": png(1), "after": png(2), "prompt": "make it night", "junk": png(3)}]
    path = parquet(tmp_path / "x.parquet", rows)
    several = "several columns for the picture (before, after, junk); name it with --image"
    assert fails(path, tmp_path / "out") == f"{path}: {several}"
    columns = Columns(image="after", references=("before",))
    none = "no caption column (there are before, after, prompt, junk)"
    assert none in fails(path, tmp_path / "out", columns=columns)
    wrong = "no column 'promt'; there are before, after, prompt, junk"
    assert wrong in fails(path, tmp_path / "out", columns=replace(columns, text="promt"))
    result = import_data.run(str(path), tmp_path / "out", columns=replace(columns, text="prompt"))
    assert result == (1, ["not carried over: junk"])
    assert drafts(tmp_path / "out") == [
        Draft("000001.png", "make it night", "", ("references/000001-1.png",))
    ]
    assert contents(tmp_path / "out")["references/000001-1.png"] == png(1)
    import_data.run(str(path), tmp_path / "mute", columns=replace(columns, text="-"))
    assert drafts(tmp_path / "mute")[0].caption == ""


def test_a_saved_dataset(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": png(), "path": "a.png"}], "text": ["x"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    import_data.run(str(tmp_path / "saved"), tmp_path / "out")
    assert contents(tmp_path / "out") == {"a.png": png()}


def stand_in(monkeypatch: pytest.MonkeyPatch, rows: list[dict]) -> list[tuple]:
    """Rows in the hub's place; the list grows by what it is asked for."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    asked = []

    def load(name: str, subset: str | None, **options: object) -> datasets.IterableDataset:
        asked.append((name, subset, options))
        return datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_hub_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's part is played by a generator; only what we ask of it is checked."""
    rows = [{"image": {"bytes": png(i), "path": f"{i}.png"}, "text": "x"} for i in range(3)]
    asked = stand_in(monkeypatch, rows)
    import_data.run("hf:org/cats@v1", tmp_path / "out", subset="small")
    options = {"split": "train", "revision": "v1", "streaming": True}
    assert asked == [("org/cats", "small", options)]
    assert sorted(contents(tmp_path / "out")) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("file", ["@v1/a.png", "/a.png", "@@/a.png", "/@"])
def test_a_file_of_the_hub_that_cant_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    path = f"hf://datasets/org/cats{file}"
    stand_in(monkeypatch, [{"image": {"bytes": None, "path": path}, "text": "x"}])
    said = fails("hf:org/cats", tmp_path / "out")
    assert said.startswith(f"{path}: can't be read (")
    assert said.endswith("`kindling doctor --online` says whether hub and login work")


def test_a_fault_of_our_own_is_not_the_datas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its traceback, where a message would send the user to get good data again."""
    rows = [{"image": {"bytes": png(), "path": "a.png"}, "text": "x"}]
    path = parquet(tmp_path / "x.parquet", rows, **IMAGE)
    monkeypatch.setattr(containers, "_sample", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        import_data.run(str(path), tmp_path / "out")


def test_no_hub(tmp_path: Path) -> None:
    said = fails("hf:org/cats", tmp_path / "out")
    assert said.startswith("hf:org/cats: can't be read (")
    assert said.endswith("`kindling doctor --online` says whether hub and login work")


# ---- hostile ones


IMAGE = {"image": datasets.Image(), "text": datasets.Value("string")}


ROWS: list[tuple[dict, str]] = [
    ({"file_name": "../x.png"}, "'../x.png' leads out of the folder"),
    ({"file_name": "/x.png"}, "'/x.png' leads out of the folder"),
    ({"file_name": "a.png"}, "'a.png' was there already"),
    ({"file_name": "run.sh"}, "'run.sh' isn't a picture's file name"),
    ({"file_name": ""}, 'a file name must be text, not ""'),
    ({"image": None}, "no picture in the column image"),
    ({"image": {"bytes": b"", "path": "x.png"}}, "the picture in the column image is empty"),
    (
        {"image": {"bytes": None, "path": "/etc/passwd"}},
        "the picture names a file ('/etc/passwd') instead of holding its bytes",
    ),
    ({"image": {"bytes": None, "path": "hf://datasets/o/n/x.png"}}, "instead of holding its bytes"),
    (
        {"file_name": None, "image": {"bytes": b"text", "path": None}},
        "a picture without a name, and its bytes don't look like a picture's",
    ),
    ({"repeats": 0}, "repeats must be a whole number from 1 to 1000, not 0"),
    ({"extra": '{"a": 1, "a": 2}'}, "key 'a' stands twice"),
]


@pytest.mark.parametrize(("change", "reason"), ROWS)
def test_a_hostile_row(tmp_path: Path, change: dict, reason: str) -> None:
    good = {"file_name": "a.png", "image": {"bytes": png(), "path": None}, "text": "x"}
    good |= {"repeats": 1, "extra": None}
    bad = good | {"file_name": "b.png"} | change
    text, number = datasets.Value("string"), datasets.Value("int32")
    features = IMAGE | {"file_name": text, "repeats": number, "extra": text}
    path = parquet(tmp_path / "x.parquet", [good, bad], **features)
    [_, line] = fails(path, tmp_path / "out").splitlines()
    assert line.startswith("  row 2: ")
    assert reason in line
    assert import_data.run(str(path), tmp_path / "out", skip_bad=True)[0] == 1
    assert contents(tmp_path / "out") == {"a.png": png()}


def test_a_parquet_that_is_cut_off(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": os.urandom(9000), "path": "a.png"}, "text": "x"}]
    path = parquet(tmp_path / "x.parquet", rows, **IMAGE)
    cut(path, 5000)
    said = fails(path, tmp_path / "out")
    assert said.startswith(f"{path}: can't be read (")
    (tmp_path / "y.parquet").write_bytes(b"")
    assert "y.parquet: can't be read (" in fails(tmp_path / "y.parquet", tmp_path / "out")
