"""Which size each picture is trained at.

Owns geometry: the shapes allowed at a resolution and the choice among them. Pure functions, no
files, no pixels.

Every sample of a batch must share one size, so sizes come from a short ladder of common picture
shapes rather than from each picture. A size depends on its own picture and the settings only:
adding pictures to a set never changes the size of another.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol

from train.config import DataConfig
from train.config.schema import PIXEL_MULTIPLE
from train.errors import DataError

SMALLEST = 64
"""Pixels: the smallest area used is that of a square of this side."""
MIN_SIDE = 2
"""Patches: no side is shorter than 32 pixels."""
MIN_FILL = 0.75
"""Fraction of the area asked for that a size has at least; from 512 up it is 0.93."""

REFERENCE_AREA = 1024 * 1024
"""Pixels of a reference picture at most, as in Flux2Pipeline."""
REFERENCE_SIDE = 64
"""Pixels of its sides at least, as in Flux2Pipeline."""
REFERENCE_ASPECT = 8
"""Long side over short side at most, as in Flux2Pipeline."""

# Long side over short side: 1:1, 8:7, 5:4, 4:3, A4, 3:2, 5:3, 16:9, 2:1, 21:9, 8:3, 3:1 and on.
SHAPES = (1, 8 / 7, 5 / 4, 4 / 3, 7 / 5, 3 / 2, 5 / 3, 16 / 9, 2, 7 / 3, 8 / 3)
LONG_SHAPES = (3, 3.5, 4, 4.6, 5.3, 6, 7, 8)
SQUARES = 4
"""Where one number of tokens serves all: squares expected for one picture of another shape."""


@dataclass(frozen=True, order=True)
class Geometry:
    """Pixels of a training picture; both are multiples of 16."""

    width: int
    height: int

    @property
    def tokens(self) -> int:
        """Packed latent tokens: one for 16 x 16 pixels."""
        return self.width // PIXEL_MULTIPLE * (self.height // PIXEL_MULTIPLE)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Placement:
    """How one picture gets into its bucket."""

    geometry: Geometry
    scale: float
    """Enlargement before cropping; over 1 is upscaling."""
    crop: float
    """Fraction of the picture's area that is cut off."""


@dataclass(frozen=True)
class Bucket:
    """One line of a plan's table."""

    geometry: Geometry
    pictures: int
    crop: float
    """Largest fraction of a picture that is cut off."""
    scale: float
    """Largest enlargement."""


class Sized(Protocol):
    """A picture as far as this module cares."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...


@dataclass(frozen=True)
class Plan:
    """A placement for each picture, in the order given, and their sums."""

    placements: tuple[Placement, ...]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Fullest first."""
        groups: dict[Geometry, list[Placement]] = {}
        for placement in self.placements:
            groups.setdefault(placement.geometry, []).append(placement)
        counts = Counter({geometry: len(group) for geometry, group in groups.items()})
        order = sorted(counts, key=lambda geometry: (-counts[geometry], geometry))
        return tuple(
            Bucket(
                geometry,
                counts[geometry],
                crop=max(placement.crop for placement in groups[geometry]),
                scale=max(placement.scale for placement in groups[geometry]),
            )
            for geometry in order
        )


def plan(pictures: Sequence[Sized], *, data: DataConfig) -> Plan:
    """Placements for all of `pictures`, none left out: for every picture one at each resolution.

    Raises DataError if one is too small.
    """
    return Plan(
        tuple(
            place(
                picture.width,
                picture.height,
                resolution=resolution,
                max_upscale=data.max_upscale,
                max_aspect=data.max_aspect,
                equal_tokens=data.equal_tokens,
            )
            for picture in pictures
            for resolution in data.resolutions
        )
    )


@lru_cache(maxsize=10_000)  # cameras make many pictures of few sizes
def place(
    width: int,
    height: int,
    *,
    resolution: int,
    max_upscale: float,
    max_aspect: float,
    equal_tokens: bool = False,
) -> Placement:
    """The size at which a picture of width x height is trained, and what that costs it.

    The shape is the nearest of `geometries(resolution)` by log aspect, which for cover-resize and
    centre crop is the one that cuts off least: 1 - exp(-|log aspect difference|) of the area. From
    512 up, a picture within `max_aspect` 3 loses at most 9 % that way, a common shape (1:1, 5:4,
    4:3, 3:2, 16:9, 2:1, 21:9) at most 2.5 %.

    A picture that would have to be enlarged by more than `max_upscale` gets the same kind of shape
    at a smaller resolution, in steps of an eighth, down to `SMALLEST`.

    Raises DataError if even that is too large for it.
    """
    assert width > 0
    assert height > 0
    needed = math.inf
    for level in levels(resolution):
        ladder = equal_geometries if equal_tokens else geometries
        geometry = _nearest(width / height, ladder(level, max_aspect=max_aspect))
        scale = max(geometry.width / width, geometry.height / height)
        if scale <= max_upscale:
            kept = geometry.width * geometry.height / (width * height * scale**2)
            return Placement(geometry, scale, crop=max(0.0, round(1.0 - kept, 9)))
        needed = scale
    raise DataError(
        f"{width}x{height} pixels are too few: the smallest bucket for this shape would need "
        f"enlarging {needed:.2f} times and max_upscale is {max_upscale:g}; "
        "use a larger picture or raise max_upscale"
    )


def reference_fault(width: int, height: int) -> str:
    """Why a picture of this size can't be a reference; empty if it can."""
    if min(width, height) < REFERENCE_SIDE:
        return f"is {width}x{height}; a reference needs {REFERENCE_SIDE} pixels a side"
    if max(width, height) > REFERENCE_ASPECT * min(width, height):
        return f"is {width}x{height}; a reference may be {REFERENCE_ASPECT} times as long as wide"
    return ""


def reference_geometry(width: int, height: int) -> Geometry:
    """Size of a reference picture: at most REFERENCE_AREA, sides cut to multiples of 16."""
    assert not reference_fault(width, height)
    scale = min(1.0, math.sqrt(REFERENCE_AREA / (width * height)))
    sides = (int(side * scale) // PIXEL_MULTIPLE * PIXEL_MULTIPLE for side in (width, height))
    return Geometry(*sides)


@cache
def levels(resolution: int) -> tuple[int, ...]:
    """Resolutions from `resolution` down to SMALLEST, each about an eighth below the last."""
    steps = [resolution]
    while steps[-1] > SMALLEST:
        lower = math.floor(steps[-1] * 0.875 / PIXEL_MULTIPLE) * PIXEL_MULTIPLE
        steps.append(max(SMALLEST, lower))
    return tuple(steps)


@cache
def geometries(resolution: int, *, max_aspect: float) -> tuple[Geometry, ...]:
    """All sizes at a resolution, sorted; never above its area, nor beyond `max_aspect`."""
    budget = (resolution // PIXEL_MULTIPLE) ** 2
    ladder = [shape for shape in (*SHAPES, *LONG_SHAPES) if shape < max_aspect] + [max_aspect]
    sides = {_sides(shape, budget, max_aspect) for shape in ladder}
    found = {Geometry(long * PIXEL_MULTIPLE, short * PIXEL_MULTIPLE) for long, short in sides}
    return tuple(sorted(found | {Geometry(size.height, size.width) for size in found}))


@cache
def equal_geometries(resolution: int, *, max_aspect: float) -> tuple[Geometry, ...]:
    """Sizes that all have the same number of tokens, sorted; within `geometries`' area limits.

    Of the numbers of tokens that the area allows, the one with which the common shapes together
    lose least to the crop, squares counting `SQUARES` times; area weighs as in `_sides`.
    """
    budget = (resolution // PIXEL_MULTIPLE) ** 2
    shapes = [math.log(shape) for shape in SHAPES if shape <= max_aspect] + [0.0] * (SQUARES - 1)

    def sides(tokens: int) -> list[tuple[int, int]]:
        shorts = range(MIN_SIDE, math.isqrt(tokens) + 1)
        pairs = [(tokens // short, short) for short in shorts if tokens % short == 0]
        return [(long, short) for long, short in pairs if long <= short * max_aspect]

    def cost(tokens: int) -> float:
        aspects = [math.log(long / short) for long, short in sides(tokens)]
        aspects += [-aspect for aspect in aspects]
        crops = [min(abs(shape - aspect) for aspect in aspects) for shape in shapes]
        return sum(crops) / len(crops) + 0.5 * (1 - tokens / budget)

    allowed = range(math.ceil(MIN_FILL * budget), budget + 1)
    best = min((tokens for tokens in allowed if sides(tokens)), key=lambda n: (cost(n), -n))
    found = {Geometry(long * PIXEL_MULTIPLE, short * PIXEL_MULTIPLE) for long, short in sides(best)}
    return tuple(sorted(found | {Geometry(size.height, size.width) for size in found}))


def _sides(shape: float, budget: int, max_aspect: float) -> tuple[int, int]:
    """Long and short side in patches nearest to `shape`, of at most `budget` patches.

    One percent of area given up weighs as much as half a percent of crop.
    """
    shorts = range(MIN_SIDE, math.isqrt(budget) + 1)
    pairs = [
        (long, short)
        for short in shorts
        for long in (math.floor(short * shape), math.ceil(short * shape), budget // short)
        if short <= long <= short * max_aspect
        if MIN_FILL * budget <= long * short <= budget
    ]

    def cost(pair: tuple[int, int]) -> float:
        long, short = pair
        return abs(math.log(long / short / shape)) + 0.5 * (1 - long * short / budget)

    return min(pairs, key=lambda pair: (cost(pair), pair))


def _nearest(aspect: float, sizes: Sequence[Geometry]) -> Geometry:
    def distance(size: Geometry) -> tuple[float, int]:
        return abs(math.log(size.width / size.height / aspect)), -size.tokens

    return min(sizes, key=distance)
