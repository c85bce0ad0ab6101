"""Pictures for `kindling bench data`: as many as asked for, made once, the same every time.

Owns what they look like: octaves of noise and grain give a JPEG about as many bytes as a photo has
(some 270 kB at a megapixel), which is what decoding costs by.
"""

import io
import json
import os
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_tools import workers

SIZES = ((1024, 1024), (1024, 1024), (1024, 768), (768, 1024), (1024, 683), (1024, 576))
QUARTERS = 4
FIELDS = 24
METADATA = "metadata.jsonl"


def default_folder() -> Path:
    """Where generated pictures stay from one benchmark to the next."""
    return Path(tempfile.gettempdir()) / "kindling-bench-data"


def photos(folder: Path, *, count: int) -> Path:
    """A folder of `count` JPEGs with captions, a quarter in each of four folders of it."""
    root = folder / f"photos-{count}"

    def make(number: int) -> None:
        path = root / str(number * QUARTERS // count) / f"{number:06}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".txt").write_text(f"a bench photo of scene {number % 97}, {number}\n")
            _write(path, photo(number))

    for _ in tqdm(workers.ordered(make, range(count)), "make pictures", count, delay=2):
        pass
    return root


def photo(number: int) -> bytes:
    """A JPEG: noise with a photo's spectrum, tinted, with the grain of a camera."""
    random = np.random.default_rng(number)
    bank = _fields()
    first, second, grain = (_rolled(bank[random.integers(FIELDS)], random) for _ in range(3))
    tint = random.uniform(0.5, 1.2, (2, 3)).astype(np.float32)
    pixels = 128 + 26 * (first[..., None] * tint[0] + second[..., None] * tint[1])
    pixels += 25 * np.diff(grain, axis=1, append=0)[..., None]
    width, height = SIZES[random.integers(len(SIZES))]
    data = io.BytesIO()
    image = Image.fromarray(pixels[:height, :width].clip(0, 255).astype(np.uint8))
    image.save(data, "JPEG", quality=90)
    return data.getvalue()


def records(folder: Path, *, count: int) -> Path:
    """A folder of `count` tiny pictures, no two alike, with a metadata.jsonl."""
    root = folder / f"records-{count}"
    if (root / METADATA).exists():
        return root
    root.mkdir(parents=True, exist_ok=True)
    blanks = list(_blanks())
    lines = []
    for number in tqdm(range(count), "make records", delay=2):
        name = f"{number // 1000:03}/{number:06}.png"
        path = root / name
        path.parent.mkdir(exist_ok=True)
        # what comes behind a PNG's end isn't part of the picture
        path.write_bytes(blanks[number % len(blanks)] + number.to_bytes(4, "big"))
        text = f"a record of a thing, number {number}, as it may be described in a dozen words"
        lines.append(json.dumps({"file_name": name, "text": text}))
    _write(root / METADATA, ("\n".join(lines) + "\n").encode())
    return root


def _blanks() -> Iterator[bytes]:
    for width in range(640, 2048, 96):
        for height in range(640, 2048, 96):
            data = io.BytesIO()
            Image.new("1", (width, height)).save(data, "PNG")
            yield data.getvalue()


@lru_cache(maxsize=1)
def _fields() -> list[np.ndarray]:
    """(1024, 1024) each: octaves of noise whose amplitude falls as their frequency rises."""
    random = np.random.default_rng(0)
    fields = []
    for _ in range(FIELDS):
        field = np.zeros((1024, 1024), np.float32)
        for octave in range(2, 11):
            noise = random.normal(0, 1, (2**octave, 2**octave)).astype(np.float32)
            image = Image.fromarray(noise).resize((1024, 1024), Image.Resampling.BICUBIC)
            field += np.asarray(image) * 0.72 ** (octave - 2)
        fields.append(field)
    return fields


def _rolled(field: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.roll(field, tuple(random.integers(0, 1024, 2)), (0, 1))


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing: an interrupted benchmark goes on where it was."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
