"""What draws the eye."""

import numpy as np
from PIL import Image

from data_tools.curate import saliency


def test_saliency_finds_what_stands_out() -> None:
    pixels = np.random.default_rng(0).normal(120, 2, (200, 300)).astype(np.uint8)
    pixels[60:90, 220:250] = 250
    found = saliency.saliency(Image.fromarray(pixels))
    assert found.shape == (43, 64)
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert 12 <= row <= 20
    assert 46 <= column <= 54
