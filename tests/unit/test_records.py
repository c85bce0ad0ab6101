"""Folders of every kind: the right records in the right order, or every fault by name."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

from data_tools import folder, records
from data_tools.sources import Note
from tests.unit import hostile
from tests.unit.folders import faults, names, pair, settings, survey, table
from train.errors import DataError

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


def test_a_reference_that_is_too_small_is_named(tmp_path: Path) -> None:
    hostile.picture(tmp_path / "a.png")
    hostile.picture(tmp_path / "b.png", width=100, height=63)
    table(tmp_path, {"file_name": "a.png", "text": "x", "references": ["b.png"]})
    found = survey(tmp_path)
    assert [(fault.path, fault.reason) for fault in found.faults] == [
        ("a.png", "its reference b.png is 100x63; a reference needs 64 pixels a side")
    ]
    assert not found.records


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
