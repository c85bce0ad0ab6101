"""Captions out of file names."""

from pathlib import Path

import pytest
from PIL import Image

from data_tools.caption.captioners.filename import words
from scripts import kindling


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("red-fox_in  snow (3).jpg", "red fox in snow"),
        ("sub/01-pink.png", "pink"),
        ("a.b.c 2024 12.png", "a b c"),
        ("3 foxes 3d.png", "foxes 3d"),
        ("小狐狸_02.webp", "小狐狸"),
        ("IMG_0001.jpg", ""),
        ("DSC-12.jpg", ""),
        ("12_34.png", ""),
        ("___.png", ""),
    ],
)
def test_words_of_a_file_name(name: str, text: str) -> None:
    assert words(name) == text


def test_filename(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("red_fox-1", "IMG_2", "zibby runs"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    argv = [str(tmp_path), "--captioner", "filename", "--trigger", "zibby"]
    assert kindling.main(["caption", *argv, "--write", "sidecars"]) == 2
    found = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert found == {"red_fox-1": "zibby, red fox\n", "zibby runs": "zibby runs\n"}
    output = capsys.readouterr().out
    assert "1 lacked 'zibby' and got it put in front" in output
    assert "IMG_2.png: the file name has no words" in output
