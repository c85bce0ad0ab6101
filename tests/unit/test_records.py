"""Folders of every kind: the right records in the right order, or every fault by name."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from data_tools import captions, folder, records
from data_tools.records import Collection
from data_tools.sources import Fault, Note
from tests.unit import hostile
from train.config import DataConfig
from train.errors import DataError


def settings(root: Path, **changes: object) -> DataConfig:
    return DataConfig.model_validate({"path": str(root), "resolution": 64} | changes)


def pair(root: Path, name: str, caption: str | bytes = "a picture", *, seed: int = 0) -> Path:
    path = hostile.picture(root / name, seed=seed)
    data = caption.encode() if isinstance(caption, str) else caption
    path.with_suffix(".txt").write_bytes(data)
    return path


def table(root: Path, *lines: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


def survey(root: Path, **changes: object) -> Collection:
    return records.survey(settings(root, **changes), progress=False)


def names(collection: Collection) -> list[str]:
    return [record.name for record in collection.records]


def faults(root: Path, **changes: object) -> list[tuple[str, str]]:
    return [(fault.path, fault.reason) for fault in survey(root, **changes).faults]


# ---- folders with sidecars


def test_sidecars_in_natural_order(tmp_path: Path) -> None:
    for seed, name in enumerate(["b/2.png", "a10.png", "a2.PNG", "B/1.jpg", "a2b.png"]):
        pair(tmp_path, name, f"caption of {name}", seed=seed)
    found = survey(tmp_path)
    assert names(found) == ["a2.PNG", "a2b.png", "a10.png", "B/1.jpg", "b/2.png"]
    assert [r.caption for r in found.records] == [f"caption of {name}" for name in names(found)]
    assert (found.faults, found.notes) == ((), ())
    first = found.records[0]
    assert first.target == tmp_path / "a2.PNG"
    assert (first.width, first.height, first.references) == (96, 64, ())
    assert first.caption_source == "a2.txt"
    assert list(found.records) == [found.records[i] for i in range(5)] == found.records[:]


def test_any_language_and_any_name(tmp_path: Path) -> None:
    texts = {
        "小火人.png": "小火人在森林里",
        "🔥 a'b\"c$.png": "🔥 emoji",
        "Ünïcödé.jpg": "שלום",
        "a.b.c.png": "x",
    }
    for seed, (name, text) in enumerate(texts.items()):
        pair(tmp_path, name, text, seed=seed)
    found = survey(tmp_path)
    assert {record.name: record.caption for record in found.records} == texts
    assert found.faults == found.notes == ()


def test_names_in_either_unicode_form_belong_together(tmp_path: Path) -> None:
    hostile.picture(tmp_path / "e\u0301.png")  # as macOS writes it
    (tmp_path / "\u00e9.txt").write_text("accent")  # as others do
    assert [record.caption for record in survey(tmp_path).records] == ["accent"]


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        (b"\xef\xbb\xbfwith a mark\r\n", "with a mark"),
        (b"  two\nlines \r\n\r\n and three\t\n", "two lines and three"),
        ("e\u0301\u3000x".encode(), "e\u0301\u3000x"),
        ("a\u2028b".encode(), "a b"),
    ],
)
def test_captions_are_one_trimmed_line(tmp_path: Path, data: bytes, caption: str) -> None:
    pair(tmp_path, "a.png", data)
    assert survey(tmp_path).records[0].caption == caption


@pytest.mark.parametrize(
    ("data", "where", "reason"),
    [
        (b"", "a.png", "no caption; write it in a.txt"),
        (b" \n\t\r\n", "a.png", "no caption; write it in a.txt"),
        (b"\xef\xbb\xbf", "a.png", "no caption; write it in a.txt"),
        (b"caf\xe9", "a.txt", "not UTF-8: byte 0xe9 at offset 3; save it as UTF-8"),
        (
            b"\xef\xbb\xbfab\xff",
            "a.txt",
            "not UTF-8: byte 0xff at offset 5; save it as UTF-8",
        ),
        (
            "abc".encode("utf-16"),
            "a.txt",
            "not UTF-8 but probably UTF-16; save it as UTF-8",
        ),
        (
            "abc".encode("utf-16-le"),
            "a.txt",
            "not UTF-8 but probably UTF-16; save it as UTF-8",
        ),
        (b"x" * 100_001, "a.txt", "over 100 kB; this can't be a caption"),
    ],
)
def test_unfit_captions(tmp_path: Path, data: bytes, where: str, reason: str) -> None:
    pair(tmp_path, "a.png", data)
    assert faults(tmp_path) == [(where, reason)]
    with pytest.raises(DataError) as caught:
        records.read(settings(tmp_path, bad_pictures="skip"), progress=False)
    assert str(caught.value) == f"{tmp_path}: these must be mended first:\n  {where}: {reason}"


def test_one_caption_file_for_two_pictures(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    hostile.picture(tmp_path / "a.jpg")
    claim = "captions a.jpg and a.png; give each picture one caption file of its own"
    assert faults(tmp_path) == [("a.txt", claim)]


def test_two_caption_files_for_one_picture(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    (tmp_path / "a.TXT").write_text("another")
    claim = "captions a.png; give each picture one caption file of its own"
    assert faults(tmp_path) == [("a.TXT and a.txt", claim)]


def test_what_is_left_over_is_named(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    for name in ("readme.txt", "notes.md", "sub/metadata.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    for junk in ("Thumbs.db", ".DS_Store", ".git/a.png", "__MACOSX/._a.png", "desktop.ini"):
        (tmp_path / junk).parent.mkdir(exist_ok=True)
        (tmp_path / junk).write_bytes(b"x")
    found = survey(tmp_path)
    assert names(found) == ["a.png"]
    assert found.faults == ()
    assert found.notes == (
        Note("notes.md", "not read: neither picture nor caption"),
        Note("readme.txt", "a caption without a picture"),
        Note("sub/metadata.jsonl", "not read: neither picture nor caption"),
    )


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    pair(tmp_path, "a/a.png")
    (tmp_path / "a/again").symlink_to(tmp_path)
    (tmp_path / "z").symlink_to(tmp_path / "a")
    reason = "a link to a folder that is read already; remove the link"
    assert faults(tmp_path) == [("a/again", reason), ("z", reason)]
    assert names(survey(tmp_path)) == ["a/a.png"]


def test_a_linked_folder_elsewhere_is_read(tmp_path: Path) -> None:
    pair(tmp_path / "store", "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "store")
    assert names(survey(tmp_path / "data")) == ["link/a.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
        pass
    assert faults(tmp_path) == [("caf\\udce9.png", "the file's name isn't UTF-8; rename it")]


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "file").write_text("x")
    cases = {
        "picture": "no such folder; did you mean 'pictures'?",
        "other": "no such folder; data.path must be a folder of pictures",
        "file": "a file, but data.path must be a folder of pictures",
        "pictures": "no pictures in this folder (Kindling reads JPEG, PNG, WebP, TIFF, BMP, "
        "GIF, AVIF, JPEG 2000 and PPM)",
    }
    for name, reason in cases.items():
        with pytest.raises(DataError) as caught:
            survey(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {reason}"


# ---- the trigger


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a photo of ohwx, smiling", "ohwx", True),
        ("ohwx", "ohwx", True),
        ("an ohwxy thing", "ohwx", False),
        ("an ohwxy thing by ohwx", "ohwx", True),
        ("my_ohwx", "ohwx", False),
        ("Ohwx smiles", "ohwx", False),
        ("一只小火人在森林", "小火人", True),
        ("ohwx人在森林", "ohwx", True),
        ("트리거는 달린다", "트리거", True),
        ("in <ohwx> style", "<ohwx>", True),
        ("a red fox dog", "red fox", True),
        ("a red foxes dog", "red fox", False),
    ],
)
def test_trigger_is_a_whole_word(caption: str, trigger: str, expected: bool) -> None:
    assert captions.has_trigger(caption, trigger=trigger) is expected


def test_trigger_required(tmp_path: Path) -> None:
    texts = ["ohwx runs", "he runs", "Ohwx runs", "ohwxs run"]
    for seed, text in enumerate(texts):
        pair(tmp_path, f"{seed}.png", text, seed=seed)
    lacks = "the caption lacks the trigger 'ohwx'"
    assert faults(tmp_path, trigger="ohwx") == [
        ("1.txt", lacks),
        ("2.txt", f"{lacks}, though it has it in other letters; write it exactly alike"),
        ("3.txt", f"{lacks} as a word of its own"),
    ]


def test_an_optional_trigger_leaves_captions_as_they_are(tmp_path: Path) -> None:
    pair(tmp_path, "a.png", "a red circle")
    found = survey(tmp_path, trigger="ohwx", trigger_mode="optional")
    assert found.faults == ()
    assert found.records[0].caption == "a red circle"


def test_trigger_prepended_only_where_it_lacks(tmp_path: Path) -> None:
    pair(tmp_path, "a.png", "ohwx runs")
    pair(tmp_path, "b.png", "he runs", seed=1)
    found = survey(tmp_path, trigger=" ohwx ", trigger_mode="prepend")
    assert [record.caption for record in found.records] == ["ohwx runs", "ohwx, he runs"]


def test_trigger_for_missing_captions(tmp_path: Path) -> None:
    hostile.picture(tmp_path / "a.png")
    hostile.picture(tmp_path / "a.jpg")  # no a.txt: nothing to quarrel over
    found = survey(tmp_path, trigger="ohwx", missing_captions="trigger")
    assert [record.caption for record in found.records] == ["ohwx", "ohwx"]
    assert found.faults == ()


@pytest.mark.parametrize(
    ("caption", "count"), [("a red fox", 3), ("小火人 runs - fast", 5), ("", 0), ("한국어", 3)]
)
def test_words(caption: str, count: int) -> None:
    assert captions.words(caption) == count


# ---- bad pictures


def spoiled(root: Path) -> list[str]:
    """Five pictures of which three are unfit, each in its own way."""
    pair(root, "1.png")
    (pair(root, "2.png", seed=1)).write_bytes(b"")
    pair(root, "3.png", seed=2)
    hostile.picture(root / "4.png", width=40, height=40, seed=3)
    (root / "4.txt").write_text("small")
    whole = hostile.picture(root / "5.png", seed=4).read_bytes()
    (root / "5.png").write_bytes(whole[: len(whole) // 2])
    return ["1.png", "3.png"]


def test_all_bad_pictures_are_listed_at_once(tmp_path: Path) -> None:
    spoiled(tmp_path)
    (tmp_path / "5.txt").write_text("cut")
    with pytest.raises(DataError) as caught:
        records.read(settings(tmp_path), progress=False)
    title, *lines = str(caught.value).splitlines()
    assert title == f"{tmp_path}: mend or remove these, or set data.bad_pictures to skip:"
    assert lines[0] == "  2.png: empty file (0 bytes); get it again or remove it"
    assert lines[1].startswith("  4.png: 40x40 pixels are too few: ")
    assert lines[2].startswith("  5.png: damaged or cut off (")
    assert len(lines) == 3


def test_bad_pictures_are_skipped_by_name(tmp_path: Path) -> None:
    good = spoiled(tmp_path)  # the caption that 5.png lacks doesn't matter either
    found = records.read(settings(tmp_path, bad_pictures="skip"), progress=False)
    assert names(found) == good
    assert sorted({fault.path for fault in found.faults}) == ["2.png", "4.png", "5.png"]
    assert all(fault.skippable for fault in found.faults)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    pair(tmp_path, "a.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"no picture is left; these can't be used:\n  a\.png: empty"
    ):
        records.read(settings(tmp_path, bad_pictures="skip"), progress=False)


def test_what_is_proven_is_not_decoded(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    sha256 = survey(tmp_path).records[0].sha256
    path = hostile.picture(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:5000])
    assert len(survey(tmp_path).faults) == 1
    cut = hashlib.sha256(path.read_bytes()).hexdigest()
    assert cut != sha256
    assert records.survey(settings(tmp_path), proven={cut}, progress=False).faults == ()


# ---- metadata.jsonl


def test_metadata(tmp_path: Path) -> None:
    for seed, name in enumerate(["小.png", "sub/b.png", "before/1.png", "before/2.png"]):
        hostile.picture(tmp_path / name, seed=seed)
    table(
        tmp_path,
        {"file_name": "sub/b.png", "text": " first\nline "},
        "",
        {
            "file_name": "./小.png",
            "caption": "第二",
            "references": ["before/2.png", "before/1.png"],
        },
    )
    found = survey(tmp_path)
    assert (found.faults, found.notes) == ((), ())
    first, second = found.records
    assert (first.name, first.caption, first.references) == ("sub/b.png", "first line", ())
    assert second.caption_source == "metadata.jsonl:3"
    assert second.references == (tmp_path / "before/2.png", tmp_path / "before/1.png")
    assert second.reference_sizes == ((96, 64), (96, 64))
    assert len(set(second.reference_sha256)) == 2


LINES: list[tuple[object, str]] = [
    (
        '{"file_name": "a.png", "text": "x"',
        "broken JSON: Expecting ',' delimiter, column 35",
    ),
    ("a.png, a text", "broken JSON: Expecting value, column 1"),
    ("[1]", 'a line must be an object like {"file_name": "a.png", "text": "..."}'),
    ("[" * 100_000, "broken JSON: nested too deep"),
    (
        '{"file_name": "a.png", "text": "x", "text": "y"}',
        "key 'text' stands twice",
    ),
    ({"filename": "a.png", "text": "x"}, "file_name is missing; the line has filename, text"),
    ({"file_name": "a.png", "text": "x", "caption": "y"}, "has both text and caption; keep one"),
    ({"file_name": "a.png", "text": 5}, "the caption must be text, not 5"),
    (
        '{"file_name": "a.png", "text": "\\ud800"}',
        "the caption holds half a character (a lone \\ud800 to \\udfff)",
    ),
    ({"file_name": 5, "text": "x"}, "a file name must be text, not 5"),
    ({"file_name": "b.png", "text": "x"}, "no file 'b.png'; did you mean 'a.png'?"),
    ({"file_name": "zzzz", "text": "x"}, "no file 'zzzz'"),
    (
        {"file_name": "sub\\c.png", "text": "x"},
        "no file 'sub\\\\c.png'; write / between folders",
    ),
    (
        {"file_name": "../a.png", "text": "x"},
        "'../a.png' leads out of the folder; give names relative to it",
    ),
    (
        {"file_name": "/etc/passwd", "text": "x"},
        "'/etc/passwd' leads out of the folder; give names relative to it",
    ),
    (
        {"file_name": "C:\\a.png", "text": "x"},
        "'C:\\\\a.png' leads out of the folder; give names relative to it",
    ),
    (
        {"file_name": "a.png", "text": "x", "references": "sub/c.png"},
        'references must be a list like ["a.png", "b.png"]',
    ),
    (
        {"file_name": "a.png", "text": "x", "references": ["sub/d.png"]},
        "no file 'sub/d.png'; did you mean 'sub/c.png'?",
    ),
    ({"file_name": "good.png", "text": "x"}, "'good.png' was on line 1 already"),
]


@pytest.mark.parametrize(("line", "reason"), LINES)
def test_a_bad_line_is_named_and_the_rest_is_kept(
    tmp_path: Path, line: object, reason: str
) -> None:
    for seed, name in enumerate(["good.png", "a.png", "sub/c.png"]):
        hostile.picture(tmp_path / name, seed=seed)
    table(tmp_path, {"file_name": "good.png", "text": "x"}, line)
    assert faults(tmp_path) == [("metadata.jsonl:2", reason)]
    assert names(survey(tmp_path)) == ["good.png"]


def test_a_line_without_a_caption(tmp_path: Path) -> None:
    hostile.picture(tmp_path / "a.png")
    for row in ({"file_name": "a.png"}, {"file_name": "a.png", "text": None}):
        table(tmp_path, row)
        assert faults(tmp_path) == [("a.png", "no caption; write it in metadata.jsonl:1")]


def test_a_line_that_is_not_utf8(tmp_path: Path) -> None:
    hostile.picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'\n{"file_name": "a.png", "text": "caf\xe9"}\n')
    reason = "not UTF-8: byte 0xe9 at offset 35; save it as UTF-8"
    assert faults(tmp_path) == [("metadata.jsonl:2", reason)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\n \n", "empty; write one line for each picture"),
        ("{}".encode("utf-16"), "not UTF-8 but UTF-16; save it as UTF-8"),
    ],
)
def test_unfit_metadata(tmp_path: Path, data: bytes, reason: str) -> None:
    hostile.picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(data)
    assert faults(tmp_path) == [("metadata.jsonl", reason)]


def test_metadata_alone_says_what_is_used(tmp_path: Path) -> None:
    pair(tmp_path, "a.png", "not this")
    pair(tmp_path, "b.png", seed=1)
    table(tmp_path, {"file_name": "a.png", "text": "this", "width": 3, "mood": "x"})
    found = survey(tmp_path)
    assert [record.caption for record in found.records] == ["this"]
    assert found.notes == (
        Note("a.txt", "not read: metadata.jsonl has the captions"),
        Note("b.png", "not used: not in metadata.jsonl"),
        Note("b.txt", "not read: metadata.jsonl has the captions"),
        Note("metadata.jsonl", "keys that are not read: mood, width"),
    )


def test_a_bad_reference_spoils_its_record(tmp_path: Path) -> None:
    hostile.picture(tmp_path / "a.png")
    (tmp_path / "ref.png").write_bytes(b"")
    table(tmp_path, {"file_name": "a.png", "text": "x", "references": ["ref.png"]})
    found = survey(tmp_path)
    assert found.faults == (
        Fault("a.png", "its reference ref.png can't be used", skippable=True),
        Fault("ref.png", "empty file (0 bytes); get it again or remove it", skippable=True),
    )
    assert len(found.records) == 0


# ---- the data set as a whole


def test_digest_follows_contents_not_places(tmp_path: Path) -> None:
    for top in ("one", "two"):
        pair(tmp_path / top, "a.png", "x")
        pair(tmp_path / top, "b.png", "y", seed=1)
    one = survey(tmp_path / "one").digest
    assert one == survey(tmp_path / "two").digest
    (tmp_path / "two/a.txt").write_text("x!")
    changed = survey(tmp_path / "two").digest
    assert changed != one
    hostile.picture(tmp_path / "one/a.png", seed=7)
    assert survey(tmp_path / "one").digest not in (one, changed)


def test_digest_covers_references(tmp_path: Path) -> None:
    for seed, name in enumerate(["a.png", "b.png", "c.png"]):
        hostile.picture(tmp_path / name, seed=seed)
    digests = set()
    for references in ([], ["b.png"], ["b.png", "c.png"], ["c.png", "b.png"]):
        table(tmp_path, {"file_name": "a.png", "text": "x", "references": references})
        digests.add(survey(tmp_path).digest)
    assert len(digests) == 4


def test_nothing_is_written_into_the_folder(tmp_path: Path) -> None:
    pair(tmp_path, "a.png")
    before = sorted(tmp_path.rglob("*")), os.stat(tmp_path).st_mtime_ns
    records.read(settings(tmp_path), progress=False)
    assert (sorted(tmp_path.rglob("*")), os.stat(tmp_path).st_mtime_ns) == before


def test_the_table_is_a_dataset(tmp_path: Path) -> None:
    import datasets

    pair(tmp_path, "a.png")
    found = survey(tmp_path).records
    assert isinstance(found.table, datasets.Dataset)
    assert found.table[0]["caption"] == "a picture"
    assert found[-1] == found[0]
    with pytest.raises(IndexError):
        found[1]


def test_natural_order_is_total() -> None:
    listed = ["a", "a1", "a1b", "a01", "A", "10", "9", "a/b", "a-b", "1a", ""]
    ordered = sorted(listed, key=folder.natural)
    listed.reverse()
    assert ordered == sorted(listed, key=folder.natural)
    assert ordered.index("9") < ordered.index("10")
