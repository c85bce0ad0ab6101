"""Each picture of a data set read and decoded once: for its record, its measures, its thumbnail.

Owns the walk over all of them. What is measured is `examine`'s; where thumbnails wait is `page`'s.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools import examine, pictures, workers
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
    small = None
    if thumbnail:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=75)
        small = data.getvalue()
    return Look(probe, examine.measure(image), small)


def _look_with_thumbnail(path: Path) -> Look | PictureError:
    return _look(path, thumbnail=True)
