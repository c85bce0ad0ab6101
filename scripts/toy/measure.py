"""Does a picture show what the words say? Reads pictures back into scenes and scores the base.

Reading is independent of the prompt: find the background that explains most pixels, cut out
what it does not explain, name each piece by colour and by the best-fitting drawn shape.
`python -m scripts.toy.measure` draws held-out prompts through the real pipeline and counts.
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.toy.draw import (
    COLOURS,
    PAPERS,
    SHAPES,
    STRIPES,
    Background,
    Scene,
    caption,
    draw_background,
    sample_scene,
    stencil,
)

BASE = Path(__file__).parent / "base"
HELD_OUT_SEED = 1_000_000
SHORT = 64
FAR = 60.0
SMALLEST_PIECE = 24
POOREST_FIT = 0.6
PLACE_TOLERANCE = 0.17


@dataclass(frozen=True)
class Seen:
    """A piece of a picture; `shape` is None when no drawn shape fits, x and y are fractions."""

    shape: str | None
    colour: str
    x: float
    y: float
    fit: float


@dataclass(frozen=True)
class Reading:
    background: Background
    things: tuple[Seen, ...]


@dataclass(frozen=True)
class Verdict:
    """What of the scene is there; `things`: each in its own shape and colour, and no other."""

    colour: bool
    shape: bool
    things: bool
    background: bool
    places: bool

    @property
    def everything(self) -> bool:
        return self.things and self.background and self.places


# ---------------------------------------------------------------- reading


@cache
def backgrounds(width: int, height: int) -> tuple[list[Background], np.ndarray]:
    """Every background there is, and their pictures as (N, H, W, 3) floats."""
    known = [Background(kind="plain", colour=name) for name in PAPERS]
    known += [Background(kind="striped", colour=name) for name in STRIPES]
    known += [Background(kind=kind, colour="blue") for kind in ("night", "meadow")]
    pictures = [
        draw_background(one, 4 * width, 4 * height).resize((width, height), Image.Resampling.BOX)
        for one in known
    ]
    return known, np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])


def to_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) floats with the short side at 64 pixels."""
    scale = SHORT / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BOX)
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """Its 4-connected parts, each as a mask, largest first; specks are dropped."""
    left, found = mask.copy(), []
    while left.any():
        part = np.zeros_like(mask)
        part.flat[left.argmax()] = True
        size = 0
        while size != (size := int(part.sum())):
            part[1:] |= part[:-1]
            part[:-1] |= part[1:]
            part[:, 1:] |= part[:, :-1]
            part[:, :-1] |= part[:, 1:]
            part &= left
        left &= ~part
        if size >= SMALLEST_PIECE:
            found.append(part)
    return sorted(found, key=lambda part: -part.sum())


@cache
def shape_moments(shape: str) -> tuple[float, float, float]:
    """Area and centroid of the shape of radius 1 about the origin."""
    inside = np.asarray(stencil(shape, size=(256, 256), centre=(128, 128), radius=120)) > 0
    y, x = np.nonzero(inside)
    return inside.sum() / 120**2, (x.mean() + 0.5 - 128) / 120, (y.mean() + 0.5 - 128) / 120


def fit_of(shape: str, cover: np.ndarray) -> float:
    """Soft IoU of a coverage map in [0, 1] with the drawn shape of equal area and centroid."""
    area, dx, dy = shape_moments(shape)
    y, x = np.indices(cover.shape)
    total = cover.sum()
    radius = math.sqrt(total / area)
    cx = ((x + 0.5) * cover).sum() / total - dx * radius
    cy = ((y + 0.5) * cover).sum() / total - dy * radius
    height, width = cover.shape
    big = stencil(shape, size=(4 * width, 4 * height), centre=(4 * cx, 4 * cy), radius=4 * radius)
    drawn = np.asarray(big.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255
    return float(np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum())


def grow(mask: np.ndarray) -> np.ndarray:
    wide = np.pad(mask, 1)
    return wide[1:-1, 1:-1] | wide[2:, 1:-1] | wide[:-2, 1:-1] | wide[1:-1, 2:] | wide[1:-1, :-2]


def look_at(piece: np.ndarray, pixels: np.ndarray, ground: np.ndarray) -> Seen:
    """Name one piece; its edge is put where a pixel is half object, half background."""
    core = piece & ~grow(~piece)
    inner = pixels[core if core.sum() >= 8 else piece]
    hue = np.median(inner, axis=0)
    colour = min(COLOURS, key=lambda name: float(np.square(hue - COLOURS[name]).sum()))
    span = hue - ground
    share = ((pixels - ground) * span).sum(-1) / np.maximum(np.square(span).sum(-1), 1.0)
    cover = np.clip(share, 0, 1) * grow(piece)
    fits = {shape: fit_of(shape, cover) for shape in SHAPES}
    shape = max(fits, key=lambda name: fits[name])
    y, x = np.nonzero(piece)
    return Seen(
        shape=shape if fits[shape] >= POOREST_FIT else None,
        colour=colour,
        x=(x.min() + x.max() + 1) / 2 / piece.shape[1],
        y=(y.min() + y.max() + 1) / 2 / piece.shape[0],
        fit=fits[shape],
    )


def read(image: Image.Image) -> Reading:
    """What is in the picture, without being told what should be."""
    pixels = to_array(image)
    known, pictures = backgrounds(pixels.shape[1], pixels.shape[0])
    distance = np.sqrt(np.square(pictures - pixels).sum(-1))
    best = int((distance < FAR).mean(axis=(1, 2)).argmax())
    parts = pieces(distance[best] > FAR)
    things = tuple(look_at(part, pixels, pictures[best]) for part in parts)
    return Reading(background=known[best], things=things)


def obeys(image: Image.Image, scene: Scene) -> Verdict:
    """Compare what is read with what was asked for."""
    seen = read(image)
    asked = Counter((thing.shape, thing.colour) for thing in scene.things)
    there = Counter((thing.shape, thing.colour) for thing in seen.things)
    plain = scene.background.kind in ("plain", "striped")
    return Verdict(
        colour=Counter(t.colour for t in scene.things) == Counter(t.colour for t in seen.things),
        shape=Counter(t.shape for t in scene.things) == Counter(t.shape for t in seen.things),
        things=asked == there,
        background=seen.background.kind == scene.background.kind
        and (not plain or seen.background.colour == scene.background.colour),
        places=all(
            any(
                (one.shape, one.colour) == (thing.shape, thing.colour)
                and math.dist((one.x, one.y), (thing.x, thing.y)) < PLACE_TOLERANCE
                for one in seen.things
            )
            for thing in scene.things
        ),
    )


# ---------------------------------------------------------------- the base, measured

Painter = Callable[[list[str], list[int]], list[Image.Image]]


def pipeline_painter(
    base: Path, *, steps: int, guidance: float, size: int = 64, adapter: Path | None = None
) -> Painter:
    """prompts and seeds -> pictures, through the real Flux2Pipeline in fp32."""
    from diffusers import Flux2Pipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline: Any = Flux2Pipeline.from_pretrained(base, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(
            str(adapter.parent), weight_name=adapter.name, use_safetensors=True
        )

    def paint(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return pipeline(
            prompt=prompts,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            max_sequence_length=pipeline.tokenizer.model_max_length,
        ).images

    return paint


def measure(paint: Painter, *, count: int, batch: int = 20) -> dict[str, float]:
    """Shares of held-out prompts obeyed, in [0, 1]; `single` counts one-thing scenes alone."""
    scenes = [sample_scene(random.Random(HELD_OUT_SEED + i)) for i in range(count)]
    verdicts: list[Verdict] = []
    for start in range(0, count, batch):
        some = scenes[start : start + batch]
        images = paint([caption(scene) for scene in some], list(range(start, start + len(some))))
        verdicts += [obeys(image, scene) for image, scene in zip(images, some, strict=True)]
    shares = {
        name: sum(asdict(one)[name] for one in verdicts) / count for name in asdict(verdicts[0])
    }
    single = [
        one.things for one, scene in zip(verdicts, scenes, strict=True) if len(scene.things) == 1
    ]
    shares["everything"] = sum(one.everything for one in verdicts) / count
    shares["single_things"] = sum(single) / len(single)
    return {name: round(share, 4) for name, share in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=4.0)
    options = parser.parse_args()
    started = time.monotonic()
    paint = pipeline_painter(options.base, steps=options.steps, guidance=options.guidance)
    shares = measure(paint, count=options.count)
    settings = {"prompts": options.count, "steps": options.steps, "guidance": options.guidance}
    took = {"seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(settings | shares | took, indent=2))


if __name__ == "__main__":
    main()
