"""The pictures that an adapter is shown by: samples, the board, and the thumbnail.

Owns choosing them from what a run has drawn (`kindling compare`, else the previews) and making the
thumbnail. Draws nothing.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data_tools.captions import has_trigger
from train.config import Config
from train.errors import CheckpointError

SIDE = 256
"""Of a thumbnail in pixels, as ModelSpec recommends."""
MOST = 64_000
"""Bytes of a thumbnail as a picture; as text it takes a third more."""


@dataclass(frozen=True)
class Sample:
    """A picture that the adapter drew."""

    path: Path
    prompt: str


@dataclass(frozen=True)
class Shown:
    """What a run has to show."""

    samples: tuple[Sample, ...] = ()
    board: Path | None = None
    origin: str = ""
    """Where the samples come from, in words."""
    fault: str | None = None
    """What is missing, and how to get it."""


def find(run: Path, config: Config, *, adapter: Path, step: int, average: bool) -> Shown:
    """Samples of the exported file by `kindling compare`, else the previews at its step.

    average: whether previews of averaged weights are the file's. Raises CheckpointError if the
    list of compared pictures is damaged.
    """
    listing, board = run / "compare" / "pictures.json", run / "compare" / "board.png"
    fault = f"no board of base and adapter; `kindling compare {run}` draws it"
    if listing.is_file() and board.is_file():
        if board.stat().st_mtime >= adapter.stat().st_mtime:
            samples = _compared(listing)
            if samples:
                return Shown(samples, board, "the published file, through diffusers' loader")
            fault = f"{board} has no column of the adapter alone; `kindling compare {run}` draws it"
        else:
            fault = f"{board} is older than the adapter; `kindling compare {run}` draws it anew"
    label = "-average" if average else ""
    names = [f"step-{step:06d}-{n}{label}.png" for n in range(len(config.preview.prompts))]
    pairs = zip(names, config.preview.prompts, strict=True)
    previews = [Sample(run / "previews" / name, prompt) for name, prompt in pairs]
    there = tuple(sample for sample in previews if sample.path.is_file())
    if not there and not config.preview.prompts:
        fault += ', with --prompt "..." as the config has no preview.prompts'
    return Shown(there, None, f"previews of the training at step {step}", fault)


def best(samples: Sequence[Sample], trigger: str | None) -> Sample | None:
    """The one for a thumbnail: the first that was asked for the subject, else the first."""
    for sample in samples:
        if trigger is None or has_trigger(sample.prompt, trigger=trigger):
            return sample
    return samples[0] if samples else None


def thumbnail(path: Path) -> str:
    """A small square JPEG of a picture, as a data URI. Raises CheckpointError."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise CheckpointError(f"{path}: isn't a picture that can be read ({error})") from None
    side = min(SIDE, *picture.size)
    picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    for quality in (90, 80, 60, 40, 20):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= MOST:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _compared(listing: Path) -> tuple[Sample, ...]:
    try:
        rows: list[dict[str, Any]] = json.loads(listing.read_text(encoding="utf-8"))
        found = [
            Sample(listing.parent / row["file"], row["prompt"])
            for row in rows
            if row["column"] == "adapter"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{listing}: is damaged ({error}). Draw the board anew.") from None
    return tuple(sample for sample in found if sample.path.is_file())
