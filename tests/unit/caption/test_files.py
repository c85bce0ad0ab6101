"""The files that are written, and that nothing they replace is lost."""

from pathlib import Path

import pytest
from PIL import Image

from tests.unit.caption.fake_server import serve
from tests.unit.caption.shades import SHADES, plain, rows, run


def test_replace_keeps_the_old_ones(root: Path) -> None:
    (root / "1.txt").write_text("mine\n")
    with serve(plain) as target:
        for _ in range(2):  # once more changes nothing
            assert run(target, root, "--write", "sidecars", "--replace") == 0
        assert len(target.requests) == 6
    assert (root / "1.txt").read_text() == "zibby stands in shade 1.\n"
    assert (root / "1.txt.bak").read_text() == "mine\n"
    assert len(list(root.glob("*.bak*"))) == 1


def test_an_older_backup_stays(root: Path) -> None:
    (root / "1.txt").write_text("second\n")
    (root / "1.txt.bak").write_text("first\n")
    with serve(plain) as target:
        assert run(target, root, "--write", "sidecars", "--replace") == 0
    kept = [(root / f"1.txt.{name}").read_text() for name in ("bak", "bak2")]
    assert kept == ["first\n", "second\n"]


def test_metadata_is_filled_in(root: Path, capsys: pytest.CaptureFixture) -> None:
    old = (
        '{"file_name": "0.png", "caption": "", "score": 3}\n\n'
        '{"text": "mine", "file_name": "1.png", "mood": "小.png"}'
    )
    (root / "metadata.jsonl").write_text(old, encoding="utf-8")
    with serve(plain) as target:
        assert run(target, root) == 0
    assert rows(root / "metadata.jsonl") == {
        "0.png": {"caption": "zibby stands in shade 0.", "score": 3},
        "1.png": {"text": "mine", "mood": "小.png"},
    }
    assert (root / "metadata.jsonl.bak").read_text(encoding="utf-8") == old
    output = capsys.readouterr().out
    assert f"what it held before is in {root}/metadata.jsonl.bak" in output
    assert "left alone (--add-unlisted takes them in): 2.png, 3.png, 4.png, 5.png" in output


def test_pictures_that_would_share_a_sidecar(root: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("RGB", (64, 48), SHADES[0]).save(root / "1.jpg")
    with serve(plain) as target:
        assert run(target, root, "--write", "sidecars") == 2
    assert "1.jpg: another picture would share 1.txt; rename one" in capsys.readouterr().out
    assert sorted(path.stem for path in root.glob("*.txt")) == ["0", "2", "3", "4", "5"]
