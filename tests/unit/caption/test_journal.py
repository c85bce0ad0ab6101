"""The journal: captions that are finished are kept, for the same question only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools.caption import journal
from tests.unit.caption.fake_server import Reply, serve
from tests.unit.caption.shades import SHADES, plain, run, shade_of


def test_a_server_that_dies_leaves_what_was_done(root: Path, capsys: pytest.CaptureFixture) -> None:
    dead = Reply({"error": "quota used up"}, status=402)
    with serve(lambda request, _: dead if shade_of(request) == 3 else plain(request)) as target:
        assert run(target, root) == 2
    error = capsys.readouterr().err
    assert "3 of 6 captions are finished and kept; the same command goes on from there" in error
    assert "status 402 (quota used up)" in error
    kept = (root / journal.NAME).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in kept] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        (lambda root: None, 0),
        (lambda root: (root / "0.png").rename(root / "new.png"), 0),
        (lambda root: Image.new("RGB", (64, 50), SHADES[0]).save(root / "0.png"), 1),
        (lambda root: ["--constant", "one eye"], 6),
        (lambda root: ["--longest-side", "40"], 6),
        (lambda root: ["--model", "other"], 6),
        (lambda root: ["--timeout", "50"], 0),
    ],
)
def test_the_journal_is_for_the_same_question_only(
    root: Path, change: Callable[[Path], Any], asked: int
) -> None:
    with serve(plain) as target:
        assert run(target, root) == 0
        (root / "metadata.jsonl").unlink()
        more = change(root)
        before = len(target.requests)
        assert run(target, root, *(more if isinstance(more, list) else [])) == 0
        assert len(target.requests) - before == asked


def test_a_torn_journal_is_used_as_far_as_it_goes(root: Path) -> None:
    path = root / journal.NAME
    with serve(plain) as target:
        run(target, root)
        (root / "metadata.jsonl").unlink()
        path.write_bytes(path.read_bytes()[:-20])
        assert run(target, root) == 0
        assert len(target.requests) == 7
        (root / "metadata.jsonl").unlink()
        assert run(target, root) == 0
        assert len(target.requests) == 7


def test_a_folder_that_cant_be_written(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / journal.NAME).mkdir()  # root may write into any folder, but not into this
    with serve(plain) as target:
        assert run(target, root) == 2
        assert not target.requests
    assert "write elsewhere with --output" in capsys.readouterr().err
