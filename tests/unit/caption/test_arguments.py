"""Options that can't be meant."""

from pathlib import Path

import pytest

from scripts import kindling
from tests.unit.caption.shades import snapshot


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--captioner", "gpt"], "there is no captioner 'gpt'; there are base, hf:MODEL"),
        (["--captioner", "hf"], "there is no captioner 'hf'"),
        (["--captioner", "base:x"], "there is no captioner 'base:x'"),
        (["--captioner", "base"], "say what the captions are for: --for style|character"),
        (["--captioner", "base", "--for", "character"], "--for character needs --trigger"),
        (["--captioner", "base", "--for", "style", "--traits", "in"], "--traits is for --for char"),
        (["--captioner", "base", "--for", "style", "--constant", "x"], "--constant is for char"),
        (["--captioner", "filename", "--quantize", "4bit"], "--quantize is for base and hf"),
        (
            ["--captioner", "hf:x", "--for", "style", "--base", "y"],
            "--base is for base, not for hf",
        ),
        (["--captioner", "filename", "--output", "x.txt"], "--output must be a .jsonl file"),
        (["--captioner", "filename", "--output", "no/x.jsonl"], "there is no folder no"),
        (
            ["--captioner", "filename", "--write", "sidecars", "--output", "x.jsonl"],
            "--output is for --write metadata",
        ),
        (
            ["--captioner", "base", "--for", "style", "--instruction", "no.txt"],
            "--instruction no.txt: can't be read",
        ),
    ],
)
def test_wrong_options(
    root: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    before = snapshot(root)
    assert kindling.main(["caption", str(root), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert snapshot(root) == before
    assert not list(root.glob(".*"))
