"""What a captioner is told."""

from pathlib import Path

import pytest

from data_tools.caption import instructions
from tests.unit.caption.fake_server import completion, serve
from tests.unit.caption.shades import plain, rows, run


@pytest.mark.parametrize("language", instructions.LANGUAGES)
@pytest.mark.parametrize("purpose", instructions.PURPOSES)
def test_every_instruction_is_complete(language: str, purpose: str) -> None:
    named = purpose in instructions.NAMED
    found = set()
    for traits in ("out", "in"):
        for constant in ("", "one eye") if named else ("",):
            made = instructions.build(
                purpose, language=language, trigger="zibby", traits=traits, constant=constant
            )
            words = made.system + made.task
            assert "{" not in words
            assert ("zibby" in words) == named
            assert ("one eye" in words) == bool(constant)
            chinese = sum("\u3400" <= character <= "\u9fff" for character in words)
            assert (chinese > 100) == (language == "zh")
            found.add(made.digest)
    assert len(found) == (4 if named else 1)


def test_a_character_is_named_and_its_traits_are_left_out(root: Path) -> None:
    with serve(plain) as target:
        assert run(target, root, "--constant", "red scarf, {one} eye", "--limit", "1") == 0
    words = target.requests[0].words
    assert "Call the character zibby" in words
    assert "never mention them: red scarf, {one} eye" in words
    assert words.endswith("The picture:")


def test_own_words(root: Path, tmp_path: Path) -> None:
    (tmp_path / "task.txt").write_text("Describe the {light}.", encoding="utf-8")
    with serve(plain) as target:
        run(target, root, "--instruction", str(tmp_path / "task.txt"), "--limit", "1")
    assert target.requests[0].words.startswith("Describe the {light}.")


def test_chinese(root: Path) -> None:
    with serve(lambda *_: completion("说明：“一只狐狸。”")) as target:
        more = ("--for", "style", "--language", "zh", "--trigger", "水墨风", "--limit", "1")
        assert run(target, root, *more) == 0
    assert "绝不写风格" in target.requests[0].words
    row = rows(root / "metadata.jsonl")["0.png"]
    assert row["text"] == "水墨风, 一只狐狸。"
