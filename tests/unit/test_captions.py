"""Captions: what is in the file, what is wrong with it, and the trigger's rules."""

from pathlib import Path

import pytest

from data_tools import captions, records
from tests.unit import hostile
from tests.unit.folders import faults, pair, settings, survey
from train.errors import DataError


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
