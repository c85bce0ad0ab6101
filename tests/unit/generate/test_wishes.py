"""Prompt files, sizes and references, and what is said of wrong ones."""

import json
from pathlib import Path

import pytest

from tests import runs
from train.errors import ConfigError, DataError
from train.generate import wishes
from train.generate.wishes import Wish

PLAIN = Wish("", 7, 1024, 768)


def read(tmp_path: Path, text: str, name: str = "prompts.jsonl") -> list[Wish]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return wishes.read(path, PLAIN)


def test_text_file(tmp_path: Path) -> None:
    found = read(tmp_path, "a fox \r\n角色, waving\n\n", "prompts.txt")
    assert found == [Wish("a fox", 7, 1024, 768), Wish("角色, waving", 7, 1024, 768)]


def test_jsonl_file(tmp_path: Path) -> None:
    runs.draw_picture(tmp_path / "pictures" / "a.png", size=(64, 80))
    rows = [
        {"prompt": "a fox"},
        {"prompt": "a cat", "seed": 3, "size": "64x80", "references": ["pictures/a.png"]},
    ]
    plain, other = read(tmp_path, "\n".join(map(json.dumps, rows)))
    assert plain == Wish("a fox", 7, 1024, 768)
    assert (other.prompt, other.seed, other.width, other.height) == ("a cat", 3, 64, 80)
    assert [one.path for one in other.references] == [tmp_path / "pictures" / "a.png"]


def test_all_wrong_lines_are_named(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "good"}',
        "",
        "{prompt: x}",
        '["x"]',
        '{"text": "x"}',
        '{"prompt": "x", "sed": 1}',
        '{"prompt": " "}',
        '{"prompt": "x", "seed": -1}',
        '{"prompt": "x", "seed": true}',
        '{"prompt": "x", "size": "1000x1024"}',
        '{"prompt": "x", "size": "big"}',
        '{"prompt": "x", "references": "a.png"}',
        '{"prompt": "x", "references": ["none.png"]}',
    ]
    with pytest.raises(DataError) as error:
        read(tmp_path, "\n".join(lines))
    head, *told = str(error.value).splitlines()
    path = tmp_path / "prompts.jsonl"
    assert head == f"{path}: 12 lines can't be used:"
    assert [line.strip().partition(": ")[0] for line in told] == [
        f"{path}:{number}" for number in range(2, 14)
    ]
    reasons = [line.strip().partition(": ")[2] for line in told]
    for reason, words in zip(
        reasons,
        [
            "empty line; remove it, or write a prompt",
            "not JSON",
            'not an object; {"prompt": "..."} is meant',
            "unknown key 'text'; there are prompt, seed, size, references",
            "unknown key 'sed'; did you mean 'seed'?",
            "has no prompt",
            "seed: -1 is no whole number from 0",
            "seed: True is no whole number from 0",
            "1000x1024: both sides must be multiples of 16, 64 or more; the nearest is 992x1024",
            "'big' is no size; 1024x768 is meant, or 1024 for a square",
            "references: a list of paths is meant",
            "can't be opened",
        ],
        strict=True,
    ):
        assert words in reason


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_prompts(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no prompts"):
        read(tmp_path, text, "prompts.txt")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: can't be read \(No such file"):
        wishes.read(tmp_path / "none.txt", PLAIN)
    with pytest.raises(ConfigError, match=r"must be a \.txt or \.jsonl file"):
        wishes.read(tmp_path / "prompts.csv", PLAIN)
    (tmp_path / "wide.txt").write_text("a fox", encoding="utf-16")
    with pytest.raises(DataError, match=r"wide\.txt: not UTF-8 but probably UTF-16"):
        wishes.read(tmp_path / "wide.txt", PLAIN)


@pytest.mark.parametrize(
    ("text", "found"), [("1024x768", (1024, 768)), ("512", (512, 512)), ("64×96", (64, 96))]
)
def test_size(text: str, found: tuple[int, int]) -> None:
    assert wishes.size(text) == found


@pytest.mark.parametrize("text", ["48x64", "1x2x3", "x64", "-64", "1024.5", "0"])
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|multiples"):
        wishes.size(text)


@pytest.mark.parametrize(
    ("size", "words"),
    [((63, 200), "needs 64 pixels"), ((64, 520), "at most 8:1"), ((64, 512), None)],
)
def test_references_are_as_the_pipeline_wants_them(
    size: tuple[int, int], words: str | None, tmp_path: Path
) -> None:
    path = runs.draw_picture(tmp_path / "a.png", size=size)
    if words is None:
        assert len(wishes.reference(path).sha256) == 64
        return
    with pytest.raises(DataError, match=words):
        wishes.reference(path)
