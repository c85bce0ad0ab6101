"""Numbers, what a PNG says of itself, the list and the sheet."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from train import board
from train.errors import MachineError
from train.generate import gallery
from train.generate.gallery import Gallery

RED = Image.new("RGB", (64, 96), "red")


def facts(prompt: str = "a fox", seed: int = 3) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "seed": seed,
        "width": 64,
        "height": 96,
        "steps": 20,
        "guidance": 4.0,
        "base": "black-forest-labs/FLUX.2-dev",
        "adapters": [{"file": "mika.safetensors", "sha256": "0123456789abcdef", "strength": 0.8}],
        "version": "0.1.0",
    }


def test_a_picture_says_how_it_was_made(tmp_path: Path) -> None:
    path = Gallery(tmp_path / "out").add(RED, facts("角色, a fox"))
    with Image.open(path) as picture:
        texts = picture.text  # pyright: ignore[reportAttributeAccessIssue]
        assert picture.tobytes() == RED.tobytes()
    assert json.loads(texts["kindling"]) == {"file": "0001.png", **facts("角色, a fox")}
    assert texts["parameters"] == (
        "角色, a fox\nSteps: 20, Sampler: Euler, CFG scale: 4, Seed: 3, Size: 64x96, "
        'Model: FLUX.2-dev, Lora hashes: "mika: 0123456789", Version: Kindling 0.1.0'
    )
    lines = (tmp_path / "out" / "pictures.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"file": "0001.png", **facts("角色, a fox")}]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    first = Gallery(tmp_path)
    names = [first.add(RED, facts()).name for _ in range(2)]
    sheet = first.sheet("one")
    again = Gallery(tmp_path)
    names.append(again.add(RED, facts()).name)
    assert names == ["0001.png", "0002.png", "0003.png"]
    assert (sheet.name, again.sheet("two").name) == ("sheet-0001-0002.png", "sheet-0003-0003.png")
    assert len((tmp_path / "pictures.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".jsonl"}


def test_a_folder_that_cant_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="can't be written"):
        Gallery(tmp_path / "file")


def test_sheet_has_all_pictures_and_cut_captions() -> None:
    colours = ["red", "green", "blue", "black", "orange"]
    pictures = [Image.new("RGB", (32, 64), colour) for colour in colours]
    captions = ["short", "x" * 500, "many words " * 50, "", "角色" * 200]
    sheet = board.contact_sheet(pictures, captions, title="five")
    # bicubic on one colour is that colour
    shown = {colour for _, colour in sheet.getcolors(1 << 24) or []}
    assert shown > {picture.getpixel((0, 0)) for picture in pictures}
    assert sheet.width == 2 * board.MARGIN + 4 * (board.CELL + board.GAP) - board.GAP
    edge = sheet.crop((sheet.width - board.MARGIN, 0, sheet.width, sheet.height))
    assert edge.getcolors() == [(edge.width * edge.height, board.PAPER)]


def test_names_of_adapters_in_a_title() -> None:
    adapters = [{"file": "a.safetensors", "strength": 1.0}, {"file": "b.b", "strength": 0.5}]
    assert gallery.describe(adapters) == "a, b at 0.5"
    assert gallery.describe([]) == "no adapter"
