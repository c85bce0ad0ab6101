"""metadata.jsonl: its rows, and every way in which one can be wrong."""

from pathlib import Path

import pytest

from data_tools.sources import Fault, Note
from tests.unit import hostile
from tests.unit.folders import faults, names, pair, survey, table


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
