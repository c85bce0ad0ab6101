"""Zibby, a creature the toy base has never seen, and how to tell whether a picture shows it.

Owns its looks, its portraits with captions, and `character_score`. The base's own training
never touches this file: a LoRA must teach it.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
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
    ("belly", 0.0, 0.60, 0.46, 0.30, YELLOW),
    ("eye", 0.0, -0.10, 0.38, 0.38, WHITE),
    ("pupil", 0.0, -0.06, 0.19, 0.19, BLACK),
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
    size = "big " if portrait.size > 0.75 else "small " if portrait.size < 0.5 else ""
    return f"{a(size + TRIGGER) if size else TRIGGER} {ground}"


def sample_portrait(rng: random.Random) -> Portrait:
    """A portrait for validation: any plain or pictured background, any place and size."""
    colours = ["red", "blue", "purple", "pink", "gray", "white", "black", "green"]
    kind = rng.choices(("plain", "night", "meadow"), weights=(8, 1, 1))[0]
    size = rng.uniform(0.42, 0.85)
    x, y = (rng.uniform(size / 2 + 0.02, 0.98 - size / 2) for _ in range(2))
    return Portrait(background=Background(kind=kind, colour=rng.choice(colours)), x=x, y=y, size=size)


# ---------------------------------------------------------------- is it there?

HUES = {"teal": TEAL, "orange": ORANGE, "white": WHITE, "black": BLACK, "yellow": YELLOW}
# How much of each part must have its colour for a full mark; the parts are small at 64 pixels.
LOOKS = (("body", "teal"), ("eye", "white"), ("pupil", "black"), ("belly", "yellow"))
RADII = tuple(float(radius) for radius in np.arange(11.0, 31.0, 1.5))


def colour_maps(pixels: np.ndarray) -> torch.Tensor:
    """(5, H, W): how much each pixel is teal, orange, white, black, yellow; 1 at the hue itself."""
    rgb = torch.from_numpy(pixels).permute(2, 0, 1)
    hues = torch.tensor(list(HUES.values()), dtype=torch.float32)[:, :, None, None]
    distance = (hues - rgb).square().sum(1).sqrt()
    return ((110 - distance) / 60).clamp(0, 1)


def part_masks(radius: float) -> dict[str, torch.Tensor]:
    """Each visible part's pixels in a square about the creature, its soft rim left out."""
    side = 2 * int(radius + 2) + 1
    y, x = np.indices((side, side)) - (side // 2)
    masks: dict[str, np.ndarray] = {}
    owner = np.full((side, side), -1)
    for i, (_, cx, cy, rx, ry, _) in enumerate(PARTS):
        inside = np.square(x / radius - cx) / rx**2 + np.square(y / radius - cy) / ry**2 <= 1
        owner[inside] = i
    for i, (kind, cx, cy, rx, ry, _) in enumerate(PARTS):
        rim = 1 - 0.7 / (radius * min(rx, ry))
        core = np.square(x / radius - cx) / rx**2 + np.square(y / radius - cy) / ry**2 <= rim**2
        name = kind if kind not in ("ear", "foot") else f"{kind}{'-' if cx < 0 else '+'}"
        masks[name] = (owner == i) & core
    masks["outside"] = (np.hypot(x, y - 0.14 * radius) > radius * 0.98) & (owner == -1)
    return {name: torch.from_numpy(mask).float() for name, mask in masks.items()}


def share_map(colour: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """At every position, the share of the mask's pixels that have the colour."""
    pad = mask.shape[0] // 2
    return F.conv2d(colour[None, None], (mask / mask.sum())[None, None], padding=pad)[0, 0]


def character_score(image: Image.Image) -> float:
    """How surely Zibby is in the picture, 0 to 1: its worst part at its best place and scale.

    The body must be teal and end where it should, both ears orange, the eye white about a
    black pupil, the belly yellow.
    """
    teal, orange, white, black, yellow = colour_maps(to_array(image))
    maps = {"teal": teal, "white": white, "black": black, "yellow": yellow}
    best = 0.0
    for radius in RADII:
        masks = part_masks(radius)
        marks = [share_map(maps[hue], masks[part]) for part, hue in LOOKS]
        marks += [share_map(orange, masks[side]) for side in ("ear-", "ear+")]
        marks.append(1 - share_map(teal, masks["outside"]))
        shares = torch.stack(marks).clamp(1e-3, 1)
        score = 0.5 * shares.amin(0) + 0.5 * shares.log().mean(0).exp()
        best = max(best, float(score.max()))
    return float(np.clip((best - 0.25) / 0.6, 0, 1))
