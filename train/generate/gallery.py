"""A folder of drawn pictures: PNG files that say how they were made, a list of them, a sheet.

Owns names and what is said of a picture: as JSON for us (`kindling` in the PNG, and a line of
pictures.jsonl), and in the words of AUTOMATIC1111's window (`parameters`), which other programs and
Civitai read. Pictures are numbered on from what is there; none is ever overwritten.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from train.board import contact_sheet
from train.files import writing

LISTING = "pictures.jsonl"
DIGITS = 4


class Gallery:
    """A folder, and what this call adds to it."""

    def __init__(self, folder: Path) -> None:
        """Raises MachineError where it can't be made."""
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        names = [path.stem for path in folder.glob("*.png")]
        self._next = max((int(name) for name in names if name.isdecimal()), default=0) + 1
        self._shown: list[tuple[Path, str]] = []

    def add(self, picture: Image.Image, facts: dict[str, Any]) -> Path:
        """Write a picture and its line of the list. facts: JSON-able, as `command` makes them."""
        name = f"{self._next:0{DIGITS}d}.png"
        path, partial = self.folder / name, self.folder / f".{name}.{os.getpid()}.partial"
        facts = {"file": name, **facts}
        info = PngInfo()
        info.add_text("parameters", parameters(facts))
        info.add_text("kindling", json.dumps(facts, ensure_ascii=False))
        with writing(path):
            picture.save(partial, format="PNG", pnginfo=info)
            os.replace(partial, path)
            with (self.folder / LISTING).open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts, ensure_ascii=False) + "\n")
        self._next += 1
        self._shown.append((path, f"{name[:-4]} · {facts['seed']} · {facts['prompt']}"))
        return path

    def sheet(self, title: str) -> Path:
        """Write all pictures of this call as one; its name is their numbers."""
        paths = [path for path, _ in self._shown]
        target = self.folder / f"sheet-{paths[0].stem}-{paths[-1].stem}.png"
        pictures = [_small(path) for path in paths]
        sheet = contact_sheet(pictures, [text for _, text in self._shown], title=title)
        with writing(target):
            sheet.save(target)
        return target


def parameters(facts: dict[str, Any]) -> str:
    """AUTOMATIC1111's text; the hashes are those that Civitai finds an adapter by (AutoV2)."""
    settings = {
        "Steps": facts["steps"],
        "Sampler": "Euler",
        "CFG scale": f"{facts['guidance']:g}",
        "Seed": facts["seed"],
        "Size": f"{facts['width']}x{facts['height']}",
        "Model": facts["base"].rsplit("/", 1)[-1],
    }
    hashes = [f"{Path(a['file']).stem}: {a['sha256'][:10]}" for a in facts["adapters"]]
    if hashes:
        settings["Lora hashes"] = f'"{", ".join(hashes)}"'
    settings["Version"] = f"Kindling {facts['version']}"
    return f"{facts['prompt']}\n" + ", ".join(f"{k}: {v}" for k, v in settings.items())


def _small(path: Path) -> Image.Image:
    """So that a thousand pictures of the sheet aren't in memory whole."""
    with Image.open(path) as picture:
        picture.thumbnail((512, 512))
        return picture.convert("RGB")


def describe(adapters: Sequence[dict[str, Any]]) -> str:
    """`mika at 0.8, style` for a title."""
    parts = [
        Path(a["file"]).stem + ("" if a["strength"] == 1 else f" at {a['strength']:g}")
        for a in adapters
    ]
    return ", ".join(parts) or "no adapter"
