"""Which part of a picture is to be learnt: its alpha channel, or a grey picture beside it.

Owns the names of mask files, what is wrong with a mask, and its share of each patch. White or
opaque is learnt. Doesn't weigh anything: floors and losses are the trainer's.
"""

from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data_tools import folder, pictures
from data_tools.buckets import Geometry
from data_tools.folder import Listing
from data_tools.pictures import PictureError
from train.config.schema import PIXEL_MULTIPLE

ENDINGS = (".mask", "-masklabel")
"""Of a mask's stem: `a.mask.png`, or as OneTrainer has it `a-masklabel.png`, for `a.png`."""


def split(found: Listing) -> tuple[Listing, dict[str, str]]:
    """A folder's listing without its mask files, and those by the stem of their picture."""
    stems = {folder.stem(name) for name in found.pictures}
    masks = {
        target: name
        for name in found.pictures
        if (target := _target(folder.stem(name))) is not None and target in stems
    }
    names = set(masks.values())
    return replace(found, pictures=[n for n in found.pictures if n not in names]), masks


def _target(stem: str) -> str | None:
    """Of a mask's stem that of its picture."""
    for ending in ENDINGS:
        if stem.endswith(ending) and PurePosixPath(stem).name != ending:
            return stem.removesuffix(ending)
    return None


def load(path: Path, *, alpha: bool) -> Image.Image:
    """The mask as 8-bit grey, upright: of `path` itself, or of its alpha channel.

    Raises PictureError; also if nothing at all is to be learnt.
    """
    image = pictures.load_alpha(path) if alpha else pictures.load_rgb(path).convert("L")
    if image.getextrema() == (0, 0):
        what = "wholly transparent" if alpha else "a mask that is black all over"
        raise PictureError(path, f"{what}: nothing of the picture would be learnt")
    return image


def shares(mask: Image.Image, geometry: Geometry) -> np.ndarray:
    """(h, w) float32 in [0, 1]: how much of each patch of the cropped picture is masked in."""
    grey = np.asarray(pictures.fit(mask, geometry), dtype=np.float32) / 255
    rows, columns = geometry.height // PIXEL_MULTIPLE, geometry.width // PIXEL_MULTIPLE
    return grey.reshape(rows, PIXEL_MULTIPLE, columns, PIXEL_MULTIPLE).mean(axis=(1, 3))
