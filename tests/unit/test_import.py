"""Containers: out to parquet, tar and imagefolder and back without loss; hostile ones refused."""

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import folder, records, sources
from data_tools.exchange import import_data, pack, samples
from data_tools.exchange.containers import Columns
from data_tools.sources import Draft
from tests.unit import hostile
from train.config import DataConfig
from train.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))


def drafts(root: Path) -> list[Draft]:
    """All that a folder says, but for the place where it says it."""
    gathered = sources.gather(root, folder.listing(root))
    assert gathered.faults == []
    found = [replace(draft, source="", extra=dict(draft.extra)) for draft in gathered.drafts]
    return sorted(found, key=lambda draft: draft.name)


def contents(root: Path) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def rich(root: Path) -> Path:
    """A folder with everything that a table can say, and pictures that decoding would change."""
    for seed, name in enumerate(["a.png", "sub/b.JPG", "小 x.webp", "before/1.png", "m.png"]):
        hostile.picture(root / name, seed=seed)
    (root / "sub/b.JPG").write_bytes((root / "sub/b.JPG").read_bytes() + b"trailing bytes")
    lines = [
        {"file_name": "a.png", "text": "[trigger] runs", "repeats": 3, "mood": ["x", 1.5]},
        {"file_name": "sub/b.JPG", "text": "", "references": ["before/1.png", "小 x.webp"]},
        {"file_name": "小 x.webp", "text": "第\"二'", "mask": "m.png", "extra": "{no json"},
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (root / "metadata.jsonl").write_text(text, encoding="utf-8")
    return root


def parquet(path: Path, rows: list[dict], **features: object) -> Path:
    schema = datasets.Features(features).arrow_schema if features else None
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def png(seed: int = 0) -> bytes:
    return hostile.png(width=4, height=4, depth=8, color=0, rows=bytes([seed] * 16))


def fails(source: Path | str, output: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        import_data.run(str(source), output, **options)  # pyright: ignore[reportArgumentType]
    assert not output.exists()
    return str(caught.value)


# ---- round trips


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


def test_row_groups_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_tools.exchange import containers

    root = rich(tmp_path / "in")
    monkeypatch.setattr(containers, "ROW_GROUP", 1)
    pack.run(root, tmp_path / "x.parquet")
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 3
    import_data.run(str(tmp_path / "x.parquet"), tmp_path / "out")
    assert drafts(tmp_path / "out") == drafts(root)


# ---- foreign data sets


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


def test_a_hub_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's part is played by a generator; only what we ask of it is checked."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    asked = []

    def load(name: str, subset: str | None, **options: object) -> datasets.IterableDataset:
        asked.append((name, subset, options))
        rows = [{"image": {"bytes": png(i), "path": f"{i}.png"}, "text": "x"} for i in range(3)]
        return datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    import_data.run("hf:org/cats@v1", tmp_path / "out", subset="small")
    options = {"split": "train", "revision": "v1", "streaming": True}
    assert asked == [("org/cats", "small", options)]
    assert sorted(contents(tmp_path / "out")) == ["0.png", "1.png", "2.png"]


def test_no_hub(tmp_path: Path) -> None:
    said = fails("hf:org/cats", tmp_path / "out")
    assert said.startswith("hf:org/cats: can't be read (")
    assert said.endswith("`kindling doctor --online` says whether hub and login work")


def test_a_foreign_tar(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "x.tar.gz",
        ("./d/0001.JPG", png(1)),
        ("./d/0001.txt", b"a\ncat\n"),
        ("d/0001.pkl", b"cos\nsystem\n(S'touch pwned'\ntR."),
        ("d/._0001.txt", b"apple"),
        ("0002.json", b'{"caption": "dog", "repeats": 2, "score": 5}'),
        ("0002.png", png(2)),
        ("0003.png", png(3)),
        ("0003.ref0.png", png(4)),
        ("0003.mask.png", png(5)),
        ("0003.txt", b"edit"),
    )
    count, notes = import_data.run(str(path), tmp_path / "out")
    assert (count, notes) == (3, ["not carried over: pkl"])
    assert drafts(tmp_path / "out") == [
        Draft("0002.png", "dog", "", repeats=2, extra={"score": 5}),
        Draft("0003.png", "edit", "", ("0003-ref0.png",), mask="0003-mask.png"),
        Draft("d/0001.jpg", "a cat", ""),
    ]
    assert contents(tmp_path / "out")["0003-ref0.png"] == png(4)


# ---- hostile ones


def member(kind: bytes, name: str, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


GOOD = (("good.png", png(9)), ("good.txt", b"x"))
LINK = "is a link; a tar must hold the files themselves"
TARS: list[tuple[list, str]] = [
    ([("../up.png", png()), ("../up.txt", b"x")], "'../up.png' leads out of the folder"),
    ([("/tmp/abs.png", png())], "'/tmp/abs.png' leads out of the folder"),
    ([("a/../../b.png", png())], "'a/../../b.png' leads out of the folder"),
    ([("C:/x.png", png())], "'C:/x.png' leads out of the folder"),
    ([("a\\b.png", png())], "has a backslash or a control character in it"),
    ([("a\nb.png", png())], "has a backslash or a control character in it"),
    ([(".git/a.png", png())], "is a hidden file's name"),
    ([(f"{'x' * 300}.png", png())], "is too long a name"),
    ([member(tarfile.SYMTYPE, "s.png", "/etc/passwd")], f"'s.png' {LINK}"),
    ([member(tarfile.LNKTYPE, "h.png", "good.png")], f"'h.png' {LINK}"),
    ([member(tarfile.CHRTYPE, "c.png")], "'c.png' is a device or pipe, not a file"),
    ([member(tarfile.FIFOTYPE, "f.png")], "'f.png' is a device or pipe, not a file"),
    ([("d.png", png(1)), ("d.png", png(2))], "two fields 'png'"),
    ([("k.png", png()), ("l.png", png()), ("k.txt", b"x")], "k: this key was there already"),
    ([("e.png", b"")], "the field 'png' is missing or empty"),
    ([("t.txt", b"only text")], "no picture; its fields are txt"),
    ([("m.png", png()), ("m.jpg", png())], "several pictures (png, jpg); name the one to train"),
    ([("j.png", png()), ("j.json", b"{")], "its json: broken JSON"),
    ([("j.png", png()), ("j.json", b'{"text": 5}')], "the caption must be text, not 5"),
    ([("j.png", png()), ("j.json", b'{"file_name": "../x.png"}')], "'../x.png' leads out"),
    (
        [("j.png", png()), ("j.json", b'{"file_name": "metadata.jsonl"}')],
        "'metadata.jsonl' isn't a picture's file name",
    ),
    ([("j.png", png()), ("j.json", b'{"file_name": "good.png"}')], "'good.png' was there already"),
    ([("u.png", png()), ("u.txt", b"caf\xe9")], "not UTF-8: byte 0xe9 at offset 3"),
    (
        [("j.png", png()), ("j.ref0.png", png(1)),
         ("j.json", b'{"file_name": "n.png", "references": ["good.png"]}')],
        "'good.png' was there already, as another picture",
    ),
    (
        [("j.png", png()), ("j.json", b'{"file_name": "good.png/n.png"}')],
        "'good.png/n.png' is a file here and a folder there",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("members", "reason"), TARS)
def test_a_hostile_tar(tmp_path: Path, members: list, reason: str) -> None:
    path = tar(tmp_path / "x.tar", *GOOD, *members)
    said = fails(path, tmp_path / "out" / "set")
    title, *lines = said.splitlines()
    assert title == f"{path}: these can't be imported; --skip-bad leaves them out:"
    assert len(lines) == 1
    assert reason in lines[0]
    count, [note, *_] = import_data.run(str(path), tmp_path / "out" / "set", skip_bad=True)
    assert count == 1 + ("l.png" in str(members)) + ("k.txt" in str(members))
    assert reason in note
    inside = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert all(name.parts[0] == "out" or name == Path("x.tar") for name in inside)
    assert contents(tmp_path / "out" / "set")["good.png"] == png(9)


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def test_a_tar_that_is_cut_off(tmp_path: Path) -> None:
    big = os.urandom(20_000)
    for kind, size in [("x.tar", 600), ("x.tar", 2048), ("x.tar", 5000), ("x.tar.gz", 9000)]:
        path = cut(tar(tmp_path / kind, ("a.png", png()), ("b.png", big)), size)
        said = fails(path, tmp_path / "out")
        assert said.startswith(f"{path}: damaged or cut off"), (kind, size)
        assert said.endswith("get it again")
        samples.discard(tmp_path / "out.part")
    spoiled = tar(tmp_path / "y.tar", ("a.png", png()), ("b.png", png()))
    data = bytearray(spoiled.read_bytes())
    data[1024 + 20] ^= 0xFF  # in the second header, which tarfile alone takes for the end
    spoiled.write_bytes(data)
    assert "damaged or cut off behind 'a' (bad checksum)" in fails(spoiled, tmp_path / "out")
    (tmp_path / "z.tar").write_bytes(b"no tar" * 1000)
    assert "z.tar: damaged or cut off" in fails(tmp_path / "z.tar", tmp_path / "out2")


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


def test_what_is_no_container(tmp_path: Path) -> None:
    hostile.picture(tmp_path / "set/a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"x")
    out = tmp_path / "out"
    assert "training reads in place: set data.path to it" in fails(tmp_path / "set", out)
    assert fails(tmp_path / "empty", out).endswith("holds no parquet or tar files")
    assert fails(tmp_path / "a.zip", out).endswith("not a parquet or tar file")
    hint = "no such file or folder; for a data set on the hub write hf:org/name"
    assert fails("org/name", out) == f"org/name: {hint}"


# ---- nothing is overwritten, and nothing is done twice


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


def test_somebody_elses_part_folder_is_left_alone(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", *GOOD)
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/mine.txt").write_text("mine")
    assert "out.part: is there already, and not ours" in fails(path, tmp_path / "out")
    with pytest.raises(DataError, match="not ours"):
        pack.run(rich(tmp_path / "in"), tmp_path / "out")
    assert (tmp_path / "out.part/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["x.parquet", "x.tar"])
def test_a_killed_import_goes_on(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "in"
    for i in range(6):
        hostile.picture(root / f"{i}.png", seed=i)
        (root / f"{i}.txt").write_text(str(i))
    pack.run(root, tmp_path / kind)
    add, added, limit = samples.Folder.add, [], 0

    def until_the_limit(self: samples.Folder, sample: samples.Sample) -> None:
        if len(added) == limit:
            (self.part / sample.draft.name).write_bytes(b"half")  # killed while writing it
            raise KeyboardInterrupt
        added.append(sample.draft.name)
        add(self, sample)

    monkeypatch.setattr(samples.Folder, "add", until_the_limit)
    journal = tmp_path / "out.part" / samples.JOURNAL
    for limit in (0, 3, 5):  # noqa: B007 - the function above reads it
        with pytest.raises(KeyboardInterrupt):
            import_data.run(str(tmp_path / kind), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        journal.write_text(journal.read_text() + '{"row": {"fi')  # and while noting it

    def count(self: samples.Folder, sample: samples.Sample) -> None:
        added.append(sample.draft.name)
        add(self, sample)

    monkeypatch.setattr(samples.Folder, "add", count)
    import_data.run(str(tmp_path / kind), tmp_path / "out")
    assert added == [f"{i}.png" for i in range(6)]
    assert drafts(tmp_path / "out") == drafts(root)
    assert contents(tmp_path / "out") == {
        name: data for name, data in contents(root).items() if name.endswith(".png")
    }
    assert not (tmp_path / "out.part").exists()


def test_an_unfinished_import_of_something_else(tmp_path: Path) -> None:
    bad = tar(tmp_path / "x.tar", *GOOD, ("e.png", b""))
    fails(bad, tmp_path / "out")
    other = tar(tmp_path / "y.tar", *GOOD)
    assert "an unfinished import of other data; remove it first" in fails(other, tmp_path / "out")
    tar(bad, *GOOD)  # mended
    assert "an unfinished import of other data" in fails(bad, tmp_path / "out")


def test_a_part_that_changed(tmp_path: Path) -> None:
    bad = tar(tmp_path / "x.tar", *GOOD, ("e.png", b""))
    fails(bad, tmp_path / "out")
    (tmp_path / "out.part/good.png").write_bytes(b"x")
    assert "good.png: changed since the import was stopped" in fails(bad, tmp_path / "out")


# ---- the commands


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = rich(tmp_path / "in")
    assert pack.main([str(root), str(tmp_path / "x.tar")]) == 0
    assert import_data.main([str(tmp_path / "x.tar"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{tmp_path}/x.tar: 3 pictures",
        f"{tmp_path}/out: 3 pictures; now set data.path to it",
    ]
    assert import_data.main([str(tmp_path / "x.tar"), str(tmp_path / "out")]) == 2
    assert pack.main([str(root), str(tmp_path / "x.zip")]) == 2
    assert pack.main([str(tmp_path / "x.tar"), str(tmp_path / "y")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "nothing is overwritten" in lines[0]
    assert "name a .parquet, a .tar or a new folder" in lines[1]
    assert "kindling import" in lines[2]


def test_pack_lists_all_faults(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        hostile.picture(tmp_path / "in" / name)
        (tmp_path / "in" / name).with_suffix(".txt").write_bytes(b"\xff")
    with pytest.raises(DataError) as caught:
        pack.run(tmp_path / "in", tmp_path / "x.tar")
    title, *lines = str(caught.value).splitlines()
    assert title == f"{tmp_path}/in: these must be mended first:"
    assert [line.split(":")[0].strip() for line in lines] == ["a.txt", "b.txt"]
