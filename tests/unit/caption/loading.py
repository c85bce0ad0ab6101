"""Loads tiny captioners and asks them about pictures of noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.caption.captioners import Question, models
from data_tools.caption.captioners.local import Local, Settings

SETTINGS = Settings(batch_size=2, max_tokens=24, dtype="fp32")


def load(folders: dict[str, Path], kind: str, settings: Settings = SETTINGS) -> Any:
    """A fresh captioner."""
    if kind == "dev":
        return models.of_base(str(folders["dev"]), settings=settings)
    source = str(folders[kind])
    return models.of_hub(source, settings=settings, purpose="style", language="en")


def hub(source: str | Path, **changes: str) -> Local:
    """A captioner of a repository or folder."""
    asked = {"purpose": "style", "language": "en", **changes}
    return models.of_hub(
        str(source), settings=SETTINGS, purpose=asked["purpose"], language=asked["language"]
    )


def questions(sizes: Sequence[tuple[int, int]] = ((64, 48), (96, 48), (40, 90))) -> list[Question]:
    """One about a picture of noise for each size."""
    found = []
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        parts = ("describe it\n\nThe picture:", Image.fromarray(pixels))
        found.append(Question(f"{number}.png", "be brief", parts))
    return found
