"""Each picture of a data set read and decoded once: for its record, its measures, its thumbnail.

Owns the walk over all of them, and the second one over masks where there are any. What is measured
is `examine`'s, what a mask is `masks`'; where thumbnails wait is `page`'s.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data_tools import examine, masks, pictures, workers
from data_tools.examine import Measures
from data_tools.pictures import PictureError, Probe

PROCESSES_FROM = 400
"""Pictures from which on it is done by processes: starting them takes as long as so many."""


class Look(NamedTuple):
    """What one reading gives."""

    probe: Probe
    measures: Measures
    thumbnail: bytes | None
    """JPEG of examine.SIDE pixels a side at most, some 10 kB."""


class Mask(NamedTuple):
    """What there is to know of a mask."""

    learnt: float
    """Share of the whole picture that is learnt, 0 to 1."""
    thumbnail: bytes


class Looks:
    """Looks at pictures, and keeps the measures of those that can be read, by sha256."""

    def __init__(self, *, put_thumbnail: Callable[[str, bytes], None] | None) -> None:
        """put_thumbnail: takes sha256 and JPEG of each; without it none are made."""
        self.measures: dict[str, Measures] = {}
        self._put = put_thumbnail

    def __call__(self, paths: Sequence[Path]) -> Iterator[Probe | PictureError]:
        """What is found of each, in order."""
        many = len(paths) >= PROCESSES_FROM and workers.cores() > 1
        ordered = workers.ordered_in_processes if many else workers.ordered
        for found in ordered(_look_with_thumbnail if self._put else _look, paths):
            if isinstance(found, PictureError):
                yield found
                continue
            self.measures[found.probe.sha256] = found.measures
            if self._put and found.thumbnail is not None:
                self._put(found.probe.sha256, found.thumbnail)
            yield found.probe


def _look(path: Path, *, thumbnail: bool = False) -> Look | PictureError:
    try:
        probe, image = pictures.look(path, side=examine.SIDE)
    except PictureError as error:
        return error
    return Look(probe, examine.measure(image), _jpeg(image) if thumbnail else None)


def _look_with_thumbnail(path: Path) -> Look | PictureError:
    return _look(path, thumbnail=True)


def of_masks(paths: Iterable[Path], *, alpha: bool) -> Iterator[Mask | PictureError]:
    """What masks say, in order; alpha: of the pictures themselves."""
    return workers.ordered(partial(_mask, alpha=alpha), paths)


def _mask(path: Path, *, alpha: bool) -> Mask | PictureError:
    try:
        mask = masks.load(path, alpha=alpha)
    except PictureError as error:
        return error
    learnt = sum(level * count for level, count in enumerate(mask.histogram()))
    learnt /= 255 * mask.width * mask.height
    mask.thumbnail((examine.SIDE, examine.SIDE))
    return Mask(learnt, _jpeg(mask))


def _jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=75)
    return data.getvalue()
