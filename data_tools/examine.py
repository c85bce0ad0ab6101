"""Measures of a picture's pixels: what it resembles, how sharp and how well exposed it is.

Owns the measures and the search for pictures that look alike. Opens no file: `pictures.look` gives
the small picture that all measures are of, so that they don't depend on a picture's size. Training
doesn't need any of this.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 512
"""Pixels of the long side that measures are taken at; see `pictures.look`."""

SOFT = 5.0
"""Sharpness below which a picture is called soft. See `sharpness`."""
CLIPPED = 0.25
"""Share of pixels without any drawing in them above which a picture is called dark or bright."""
HASH_DISTANCE = 10
"""Of the 64 bits of two hashes, how many differ at most in pictures that look alike."""
COLOUR_DISTANCE = 10.0
"""Levels of 255 by which their colours differ at most, on average over a grid of 8 x 8."""

_TILES = 4
_EVERY = 5
"""One row in so many is enough for sharpness."""
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


def measure(image: Image.Image, *, half: Image.Image | None = None) -> Measures:
    """All measures of an RGB picture, which `pictures.look(path, side=SIDE)` has made small.

    half: `halved(image)`, if it is at hand. About a millisecond.
    """
    import imagehash  # with scipy, a fifth of a second: not before it is needed

    # sharpness needs all pixels; the rest is the same, and a quarter of the work, at half the size
    half = half or halved(image)
    grey = half.convert("L")
    counts = grey.histogram()
    pixels = grey.width * grey.height
    # the hash is of 32 x 32 pixels: reduced in two steps it takes a tenth of the time
    bits = imagehash.phash(grey.reduce(max(1, min(grey.size) // 64))).hash
    return Measures(
        phash=int.from_bytes(np.packbits(bits).tobytes(), "big"),
        colours=half.resize((_GRID, _GRID), Image.Resampling.BOX).tobytes(),
        sharpness=sharpness(np.asarray(image.getchannel("G"))),
        brightness=sum(level * count for level, count in enumerate(counts)) / pixels / 255,
        black=sum(counts[:3]) / pixels,
        white=sum(counts[253:]) / pixels,
    )


def halved(image: Image.Image) -> Image.Image:
    """A picture at half its size, for measures and thumbnails."""
    return image.reduce(2) if min(image.size) > 1 else image


def sharpness(grey_HW: np.ndarray) -> float:
    """Variance of the Laplacian over that of the pixels, times 100; (H, W), levels of 255.

    Of the one of 4 x 4 tiles that has the strongest edges, because a sharp subject before a blurred
    background is a sharp picture. The Laplacian is Pech-Pacheco et al. 2000, "Diatom autofocusing
    in brightfield microscopy"; the quotient keeps a dim or hazy picture from counting as blurred.
    White noise has 2000, a photo in focus 20 to 200, one blurred by a hundredth of its side under
    1. It finds candidates to look at, not verdicts.
    """
    grey = grey_HW.astype(np.int16)
    inner = grey[1:-1:_EVERY, 1:-1]
    above, below = grey[:-2:_EVERY, 1:-1], grey[2::_EVERY, 1:-1]
    edges = above + below + grey[1:-1:_EVERY, :-2] + grey[1:-1:_EVERY, 2:]
    edges -= 4 * inner
    if not edges.size:
        return 0.0
    energy = _variances(edges)
    tile = int(energy.argmax())
    return float(100 * energy.flat[tile] / (_variances(inner).flat[tile] + 1))


def _variances(values_HW: np.ndarray) -> np.ndarray:
    """Of each of 4 x 4 tiles, fewer where the picture is that small."""
    rows, columns = (min(_TILES, side) for side in values_HW.shape)
    height, width = values_HW.shape[0] // rows, values_HW.shape[1] // columns
    tiles = values_HW[: rows * height, : columns * width].astype(np.float32)
    tiles = tiles.reshape(rows, height, columns, width)
    square, mean = np.einsum("rhcw,rhcw->rc", tiles, tiles), np.einsum("rhcw->rc", tiles)
    return square / (height * width) - (mean / (height * width)) ** 2


def alike(measures: Sequence[Measures]) -> list[list[int]]:
    """Groups of pictures that look alike, as places in `measures`; the same bytes count, too.

    Two are alike if both their hashes and their colours are near; a group is all that hang
    together, so that a burst of shots is one group even if its ends differ more. For each picture
    one pass of numpy over those not yet in a group: 10,000 take under a second.
    """
    hashes = np.array([each.phash for each in measures], np.uint64)
    colours = np.frombuffer(b"".join(each.colours for each in measures), np.uint8)
    colours = colours.reshape(len(measures), _GRID * _GRID * 3)
    free = np.arange(len(measures))
    groups = []
    while free.size:
        group, free = [free[0]], free[1:]
        for member in group:  # grows as it goes
            near = np.bitwise_count(hashes[free] ^ hashes[member]) <= HASH_DISTANCE
            close = np.flatnonzero(near)
            apart = np.abs(colours[free[close]].astype(np.int16) - colours[member])
            near[close] = apart.mean(axis=1) <= COLOUR_DISTANCE
            group += list(free[near])
            free = free[~near]
        if len(group) > 1:
            groups.append(sorted(map(int, group)))
    return groups
