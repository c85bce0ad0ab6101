"""`kindling import` and `kindling pack` as a user runs them."""

from pathlib import Path

import pytest

from scripts import kindling
from tests.unit import hostile
from tests.unit.exchange.data_sets import fails, rich


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = rich(tmp_path / "in")
    assert kindling.main(["pack", str(root), str(tmp_path / "x.tar")]) == 0
    assert kindling.main(["import", str(tmp_path / "x.tar"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{tmp_path}/x.tar: 3 pictures",
        f"{tmp_path}/out: 3 pictures; now set data.path to it",
    ]
    assert kindling.main(["import", str(tmp_path / "x.tar"), str(tmp_path / "out")]) == 2
    assert kindling.main(["pack", str(root), str(tmp_path / "x.zip")]) == 2
    assert kindling.main(["pack", str(tmp_path / "x.tar"), str(tmp_path / "y")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "nothing is overwritten" in lines[0]
    assert "name a .parquet, a .tar or a new folder" in lines[1]
    assert "kindling import" in lines[2]


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
