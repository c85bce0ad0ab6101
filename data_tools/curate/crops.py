"""Where to crop a picture, and the cropped picture as a lossless PNG.

Owns boxes: left, top, right, bottom in pixels of the upright picture. There is no crop to faces: a
detector that is any good needs a model file, and none may be fetched here; give boxes instead.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_tools import pictures
from data_tools.curate import saliency
from data_tools.curate.recipe import Crop
from train.errors import DataError

Box = tuple[int, int, int, int]

_AS_IT_IS = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "WEBP": ("RGB", "RGBA")}
_AS_IT_IS |= {"JPEG": ("L", "RGB"), "MPO": ("L", "RGB")}
"""Pixels that a PNG can hold, so that alpha, 16 bits and colour profile survive a crop."""


def box(rule: Crop, image: Image.Image) -> Box:
    """The box that a rule means for an upright picture. Raises DataError if it doesn't fit in."""
    width, height = image.size
    if rule.box:
        if rule.box[2] > width or rule.box[3] > height:
            given = ", ".join(map(str, rule.box))
            raise DataError(f"the box {given} leads out of its {width}x{height} pixels")
        return rule.box
    assert rule.aspect
    wide, high = map(int, rule.aspect.split(":"))
    size = (width, max(1, round(width * high / wide)))
    if size[1] > height:
        size = (min(width, max(1, round(height * wide / high))), height)
    if rule.to == "centre":
        left, top = (width - size[0]) // 2, (height - size[1]) // 2
    else:
        left, top = _salient_place(image, size)
    return left, top, left + size[0], top + size[1]


def png(path: Path, box: Box) -> bytes:
    """The box of a picture that is known to decode, as PNG, with its alpha and colour profile."""
    with Image.open(path) as image:
        if image.mode in _AS_IT_IS.get(image.format or "", ()):
            upright = ImageOps.exif_transpose(image)
            profile = image.info.get("icc_profile")
        else:  # CMYK and the like: converted as training would
            upright, profile = pictures.load_rgb(path), None
        cropped = upright.crop(box)
        cropped.info = {k: v for k, v in image.info.items() if k == "transparency"}
        if upright.mode != image.mode:
            cropped.info = {}
        stream = io.BytesIO()
        cropped.save(stream, "PNG", icc_profile=profile)
    return stream.getvalue()


def _salient_place(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Left and top of the box of `size`, as long or as high as the picture, that holds the most.

    Of equal places, the one nearest to the centre.
    """
    weights = saliency.saliency(image)
    left, top = image.width - size[0], image.height - size[1]
    axis, free, span = (1, left, size[0]) if left else (0, top, size[1])
    if not free:
        return 0, 0
    profile = weights.sum(axis=1 - axis)
    length = image.width if axis else image.height
    # cumulated over the cells, read off between them: a place is a pixel, finer than a cell
    cells = np.concatenate([[0.0], np.cumsum(profile)])
    edges = np.linspace(0, length, len(cells))
    starts = np.arange(free + 1)
    held = np.interp(starts + span, edges, cells) - np.interp(starts, edges, cells)
    best = np.flatnonzero(held >= held.max() * (1 - 1e-9))
    start = int(min(best, key=lambda place: abs(place - free / 2)))
    return (start, 0) if axis else (0, start)
