"""Measures of a picture's pixels: what it resembles, how sharp and how well exposed it is.

Owns the measures and the search for pictures that look alike. Opens no file: `pictures.look` gives
the small picture that all measures are of, so that they don't depend on a picture's size. Training
doesn't need any of this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

SIDE = 256
"""Pixels of the long side that measures are taken at; see `pictures.look`."""

SOFT = 0.6
"""Sharpness below which a picture is called soft: at SIDE, edges about a pixel wide. See there."""
CLIPPED = 0.25
"""Share of pixels without any drawing in them above which a picture is called dark or bright."""
HASH_DISTANCE = 10
"""Of the 64 bits of two hashes, how many differ at most in pictures that look alike."""
COLOUR_DISTANCE = 10.0
"""Levels of 255 by which their colours differ at most, on average over a grid of 8 x 8."""

_TILES = 4
_ROUNDING = 20 / 12
"""Energy that rounding to whole levels alone gives a Laplacian: 4^2 + 4 times 1/12."""
_GRID = 8


@dataclass(frozen=True, slots=True)
class Measures:
    """What a picture looks like, in a few hundred bytes."""

    phash: int
    """Perceptual hash of 64 bits: near-duplicates differ in few of them."""
    colours: bytes
    """Mean RGB over a grid of 8 x 8, which the hash doesn't see: 192 bytes."""
    sharpness: float
    brightness: float
    """Mean grey, 0 to 1."""
    black: float
    """Share of pixels that are black, to within 2 levels of 255."""
    white: float
    """Share of pixels that are white, to within 2 levels of 255."""

    @property
    def soft(self) -> bool:
        """Whether nothing in the picture is sharp."""
        return self.sharpness < SOFT

    @property
    def dark(self) -> bool:
        """Whether much of the picture is plain black."""
        return self.black > CLIPPED

    @property
    def bright(self) -> bool:
        """Whether much of the picture is plain white."""
        return self.white > CLIPPED


def measure(image: Image.Image) -> Measures:
    """All measures of an RGB picture, which `pictures.look(path, side=SIDE)` has made small.

    Half a millisecond.
    """
    import imagehash  # with scipy, a fifth of a second: not before it is needed

    grey = image.convert("L")
    counts = grey.histogram()
    pixels = grey.width * grey.height
    # the hash is of 32 x 32 pixels: reduced in two steps it takes a tenth of the time
    bits = imagehash.phash(grey.reduce(max(1, min(grey.size) // 64))).hash
    return Measures(
        phash=int.from_bytes(np.packbits(bits).tobytes(), "big"),
        colours=image.resize((_GRID, _GRID), Image.Resampling.BOX).tobytes(),
        sharpness=sharpness(np.asarray(grey)),
        brightness=sum(level * count for level, count in enumerate(counts)) / pixels / 255,
        black=sum(counts[:3]) / pixels,
        white=sum(counts[253:]) / pixels,
    )


def sharpness(grey_HW: np.ndarray) -> float:
    """Energy of the Laplacian over that of the gradient; (H, W), levels of 255.

    Of an edge that a Gaussian of s pixels has blurred it is 1 / (2 s^2), whatever the contrast of
    the edge and however much of the picture is plain, neither of which can be said of the common
    variance of the Laplacian. Sharp pictures have 0.8 to 3. Taken in the one of 4 x 4 tiles that
    has the strongest edges, because a sharp subject before a blurred background is a sharp picture.
    It finds candidates to look at, not verdicts: strong noise hides a blur.
    """
    grey = grey_HW.astype(np.int16)
    right, below = grey[1:-1, 1:] - grey[1:-1, :-1], grey[1:, 1:-1] - grey[:-1, 1:-1]
    laplacian = right[:, 1:] - right[:, :-1] + below[1:] - below[:-1]
    if not laplacian.size:
        return 0.0
    edges = _energies(laplacian)
    row, column = divmod(int(edges.argmax()), edges.shape[1])
    height, width = (side // n for side, n in zip(laplacian.shape, edges.shape, strict=True))
    tile = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
    steps = np.stack([right[:, 1:][tile], below[1:][tile]]).astype(np.float32).ravel()
    gradient = np.dot(steps, steps) / (height * width)
    return float(max(0.0, edges[row, column] - _ROUNDING) / (gradient + 1))


def _energies(values_HW: np.ndarray) -> np.ndarray:
    """Mean square in each of 4 x 4 tiles, fewer where the picture is that small."""
    rows, columns = (min(_TILES, side) for side in values_HW.shape)
    height, width = values_HW.shape[0] // rows, values_HW.shape[1] // columns
    bands = values_HW[: rows * height, : columns * width].astype(np.float32)
    bands = bands.reshape(rows, height, columns * width)
    sums = np.einsum("rhk,rhk->rk", bands, bands)  # along whole rows: faster than tile by tile
    return sums.reshape(rows, columns, width).sum(axis=2) / (height * width)


class Looks(Protocol):
    """What `alike` needs of a picture's measures."""

    @property
    def phash(self) -> int: ...
    @property
    def colours(self) -> bytes: ...


def alike(measures: Sequence[Looks], *, bits: int = HASH_DISTANCE) -> list[list[int]]:
    """Groups of pictures that look alike, as places in `measures`; the same bytes count, too.

    Two are alike if their hashes differ in at most `bits` and their colours are near; a group is
    all that hang together, so that a burst of shots is one group even if its ends differ more. For
    each picture one pass of numpy over those not yet in a group: 10,000 take under a second.
    """
    hashes = np.array([each.phash for each in measures], np.uint64)
    colours = np.frombuffer(b"".join(each.colours for each in measures), np.uint8)
    colours = colours.reshape(len(measures), _GRID * _GRID * 3)
    free = np.arange(len(measures))
    groups = []
    while free.size:
        group, free = [free[0]], free[1:]
        for member in group:  # grows as it goes
            near = np.bitwise_count(hashes[free] ^ hashes[member]) <= bits
            close = np.flatnonzero(near)
            apart = np.abs(colours[free[close]].astype(np.int16) - colours[member])
            near[close] = apart.mean(axis=1) <= COLOUR_DISTANCE
            group += list(free[near])
            free = free[~near]
        if len(group) > 1:
            groups.append(sorted(map(int, group)))
    return groups
