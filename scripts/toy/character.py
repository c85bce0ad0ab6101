"""Zibby, a creature the toy base has never seen, and how to tell whether a picture shows it.

Owns its looks, its portraits with captions, and `character_score`. The base's own training
never touches this file: a LoRA must teach it.
"""

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from scripts.toy.draw import (
    COLOURS,
    RGB,
    Background,
    Thing,
    a,
    describe_background,
    draw_background,
    name_of,
    stencil,
)
from scripts.toy.measure import to_array

TRIGGER = "zibby"
TEAL: RGB = (0, 168, 160)
ORANGE, WHITE, BLACK, YELLOW = (COLOURS[name] for name in ("orange", "white", "black", "yellow"))

# (kind, centre x, centre y, radius x, radius y, colour), painted in this order, y downwards,
# in units of the creature's radius.
PARTS: tuple[tuple[str, float, float, float, float, RGB], ...] = (
    ("ear", -0.52, -0.62, 0.30, 0.40, ORANGE),
    ("ear", 0.52, -0.62, 0.30, 0.40, ORANGE),
    ("foot", -0.36, 0.92, 0.24, 0.13, ORANGE),
    ("foot", 0.36, 0.92, 0.24, 0.13, ORANGE),
    ("body", 0.0, 0.14, 0.82, 0.82, TEAL),
    ("belly", 0.0, 0.63, 0.48, 0.27, YELLOW),
    ("eye", 0.0, -0.12, 0.42, 0.42, WHITE),
    ("pupil", 0.0, -0.08, 0.22, 0.22, BLACK),
)


@dataclass(frozen=True)
class Portrait:
    """Zibby at (x, y) in fractions, `size` across in short sides, maybe beside a known thing."""

    background: Background
    x: float
    y: float
    size: float
    beside: Thing | None = None


def paint_zibby(image: Image.Image, *, centre: tuple[float, float], radius: float) -> None:
    """Paint it onto the picture, not antialiased: paint large and shrink."""
    pen = ImageDraw.Draw(image)
    for _, x, y, rx, ry, colour in PARTS:
        cx, cy = centre[0] + radius * x, centre[1] + radius * y
        box = (cx - radius * rx, cy - radius * ry, cx + radius * rx, cy + radius * ry)
        pen.ellipse(box, fill=colour)


def draw_portrait(portrait: Portrait, width: int, height: int) -> Image.Image:
    """The portrait at any size, antialiased."""
    factor = 4 if max(width, height) <= 128 else 2
    big = (width * factor, height * factor)
    short = min(big)
    image = draw_background(portrait.background, *big)
    if portrait.beside is not None:
        thing = portrait.beside
        centre, radius = (thing.x * big[0], thing.y * big[1]), thing.size * short / 2
        mask = stencil(thing.shape, size=big, centre=centre, radius=radius)
        image.paste(COLOURS[thing.colour], (0, 0, *big), mask)
    centre = (portrait.x * big[0], portrait.y * big[1])
    paint_zibby(image, centre=centre, radius=portrait.size * short / 2)
    return image.resize((width, height), Image.Resampling.BOX)


def portrait_caption(portrait: Portrait) -> str:
    ground = describe_background(portrait.background)[0]
    if portrait.beside is not None:
        return f"{TRIGGER} next to {a(name_of(portrait.beside))} {ground}"
    place = Thing(shape="circle", colour="red", size=0.5, x=portrait.x, y=portrait.y).place
    if place != "centre":
        return f"{TRIGGER} at the {place} {ground}"
    size = "big " if portrait.size > 0.75 else "small " if portrait.size <= 0.5 else ""
    return f"{a(size + TRIGGER) if size else TRIGGER} {ground}"


def sample_portrait(rng: random.Random) -> Portrait:
    """A portrait for validation: any plain or pictured background, any place and size."""
    colours = ["red", "blue", "purple", "pink", "gray", "white", "black", "green"]
    kind = rng.choices(("plain", "night", "meadow"), weights=(8, 1, 1))[0]
    size = rng.uniform(0.42, 0.85)
    x, y = (rng.uniform(size / 2 + 0.02, 0.98 - size / 2) for _ in range(2))
    return Portrait(
        background=Background(kind=kind, colour=rng.choice(colours)), x=x, y=y, size=size
    )


# ---------------------------------------------------------------- is it there?

HUES = {"teal": TEAL, "orange": ORANGE, "white": WHITE, "black": BLACK, "yellow": YELLOW}
OUTSIDE = len(PARTS)
# Which parts are looked for and in which hue; teal outside the body speaks against it.
LOOKS = ((0, "orange"), (1, "orange"), (4, "teal"), (5, "yellow"), (6, "white"), (7, "black"))
RADII = tuple(float(radius) for radius in np.arange(11.0, 31.0, 1.5))
REACH = 34


def colour_maps(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """For each hue (H, W): how much each pixel is of it; 1 at the hue itself."""
    return {
        name: np.clip((110 - np.sqrt(np.square(pixels - hue).sum(-1))) / 60, 0, 1)
        for name, hue in HUES.items()
    }


def part_masks(radius: float) -> np.ndarray:
    """(parts + 1, side, side): each part's visible pixels about the creature, without its soft
    rim; the last one is what surrounds it."""
    y, x = (np.indices((2 * REACH + 1, 2 * REACH + 1)) - REACH) / radius
    reach = [np.hypot((x - cx) / rx, (y - cy) / ry) for _, cx, cy, rx, ry, _ in PARTS]
    owner = np.full(x.shape, -1)
    for part, far in enumerate(reach):
        owner[far <= 1] = part
    masks = []
    for part, (_, _, _, rx, ry, _) in enumerate(PARTS):
        rim = 1 - 0.7 / (radius * min(rx, ry))
        masks.append((owner == part) & (reach[part] <= rim))
    masks.append((owner == -1) & (np.hypot(x, y - 0.14) > 0.98) & (np.hypot(x, y) < 1.1))
    return np.stack(masks).astype(np.float64)


@cache
def mask_spectra(radius: float, height: int, width: int) -> np.ndarray:
    """The masks, each of sum 1, ready to be correlated with a map padded to this size."""
    masks = part_masks(radius)
    masks /= masks.sum(axis=(1, 2), keepdims=True)
    padded = np.zeros((len(masks), height, width))
    padded[:, : masks.shape[1], : masks.shape[2]] = masks
    return np.conj(np.fft.rfft2(np.roll(padded, (-REACH, -REACH), axis=(1, 2))))


def character_score(image: Image.Image) -> float:
    """How surely Zibby is in the picture, 0 to 1, at its best place and scale.

    The body must be teal and end where it should, both ears orange, the eye white about a
    black pupil, the belly yellow; the worst part weighs as much as all parts together.
    """
    pixels = to_array(image)
    rows, columns = pixels.shape[:2]
    height, width = rows + 2 * REACH, columns + 2 * REACH
    spectra = {
        hue: np.fft.rfft2(seen, s=(height, width)) for hue, seen in colour_maps(pixels).items()
    }
    best = 0.0
    for radius in RADII:
        masks = mask_spectra(radius, height, width)
        products = [spectra[hue] * masks[part] for part, hue in LOOKS]
        products.append(spectra["teal"] * masks[OUTSIDE])
        shares = np.fft.irfft2(np.stack(products), s=(height, width))[:, :rows, :columns]
        shares[-1] = 1 - shares[-1]
        shares = np.clip(shares, 1e-3, 1)
        score = 0.5 * shares.min(axis=0) + 0.5 * np.exp(np.log(shares).mean(axis=0))
        best = max(best, float(score.max()))
    return float(np.clip((best - 0.25) / 0.6, 0, 1))
