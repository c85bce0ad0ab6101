"""Out to parquet, tar and imagefolder and back without loss."""

from pathlib import Path

import datasets
import pytest

from data_tools import records
from data_tools.exchange import import_data, pack
from tests.unit import hostile
from tests.unit.exchange.data_sets import contents, drafts, rich
from train.config import DataConfig
from train.errors import DataError


@pytest.mark.parametrize("container", ["x.parquet", "x.tar"])
def test_a_round_trip_loses_nothing(tmp_path: Path, container: str) -> None:
    root = rich(tmp_path / "in")
    assert pack.run(root, tmp_path / container) == 3
    assert import_data.run(str(tmp_path / container), tmp_path / "out") == (3, [])
    assert drafts(tmp_path / "out") == drafts(root)
    assert contents(tmp_path / "out") == contents(root)
    assert pack.run(tmp_path / "out", tmp_path / f"2{container}") == 3
    assert (tmp_path / f"2{container}").read_bytes() == (tmp_path / container).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["in", "out", container, f"2{container}"]
    )


def test_an_imagefolder_is_a_copy(tmp_path: Path) -> None:
    root = rich(tmp_path / "in")
    pack.run(root, tmp_path / "out")
    assert drafts(tmp_path / "out") == drafts(root)
    assert contents(tmp_path / "out") == contents(root)


@pytest.mark.parametrize("container", ["x.parquet", "x.tar", "x"])
def test_other_conventions_keep_captions_and_repeats(tmp_path: Path, container: str) -> None:
    root = tmp_path / "in"
    hostile.picture(root / "10_shs dog/a.png")
    hostile.picture(root / "2_cat/b.png", seed=1)
    (root / "2_cat/b.txt").write_text("a cat")
    pack.run(root, tmp_path / container)
    out = tmp_path / container
    if out.is_file():
        out = tmp_path / "out"
        import_data.run(str(tmp_path / container), out)
    assert [(d.caption, d.repeats) for d in drafts(out)] == [("shs dog", 10), ("a cat", 2)]
    assert contents(out) == {k: v for k, v in contents(root).items() if k.endswith(".png")}
    data = DataConfig.model_validate({"path": str(out), "resolution": 64})
    assert [record.repeats for record in records.read(data, progress=False).records] == [2, 10]


@pytest.mark.parametrize("container", ["x.parquet", "x.tar", "x"])
def test_masks_stay_masks(tmp_path: Path, container: str) -> None:
    root = tmp_path / "in"
    for name in ("a.png", "a.mask.png", "b.png"):
        hostile.picture(root / name, seed=len(name))
    assert pack.run(root, tmp_path / container) == 2
    out = tmp_path / container
    if out.is_file():
        out = tmp_path / "out"
        import_data.run(str(tmp_path / container), out)
    assert contents(out) == contents(root)
    data = DataConfig.model_validate(
        {"path": str(out), "resolution": 64, "mask": "files", "trigger": "x"}
        | {"missing_captions": "trigger"}
    )
    found = records.read(data, progress=False).records
    assert [(row.name, row.mask) for row in found] == [
        ("a.png", out / "a.mask.png"),
        ("b.png", None),
    ]


def test_datasets_reads_what_is_packed(tmp_path: Path) -> None:
    root = tmp_path / "in"
    hostile.picture(root / "a.png")
    (root / "a.txt").write_text("x")
    for name in ("x.parquet", "x.tar", "x"):
        pack.run(root, tmp_path / name)
    kinds = {"parquet": "x.parquet", "webdataset": "x.tar", "imagefolder": "x/**"}
    for kind, name in kinds.items():
        files = str(tmp_path / name)
        [row] = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        assert row["png" if kind == "webdataset" else "image"].size == (96, 64)
        assert row["txt" if kind == "webdataset" else "text"] == "x"


@pytest.mark.parametrize("name", ["out", "x.parquet", "x.tar"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    root = rich(tmp_path / "in")
    taken = tmp_path / name
    if name == "out":
        taken.mkdir()
        taken = taken / "mine.txt"
    taken.write_text("mine")
    with pytest.raises(DataError, match="is there already, and nothing is overwritten"):
        pack.run(root, tmp_path / name)
    assert taken.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in", name])


def test_pack_lists_all_faults(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        hostile.picture(tmp_path / "in" / name)
        (tmp_path / "in" / name).with_suffix(".txt").write_bytes(b"\xff")
    with pytest.raises(DataError) as caught:
        pack.run(tmp_path / "in", tmp_path / "x.tar")
    title, *lines = str(caught.value).splitlines()
    assert title == f"{tmp_path}/in: these must be mended first:"
    assert [line.split(":")[0].strip() for line in lines] == ["a.txt", "b.txt"]
