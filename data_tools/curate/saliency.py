"""Where a picture draws the eye: its spectral residual.

Owns the measure alone; what is cropped by it is `crops`' matter.
"""

import numpy as np
from PIL import Image

SIDE = 64
"""Pixels of the longer side it is taken at; the paper found about 64 to suit most scenes."""


def saliency(image: Image.Image) -> np.ndarray:
    """(height, width) float64, the longer side SIDE or less: the spectral residual.

    Source: Hou and Zhang, Saliency Detection: A Spectral Residual Approach, CVPR 2007.
    """
    grey = image.convert("L")
    scale = SIDE / max(grey.size)
    if scale < 1:
        size = (max(1, round(grey.width * scale)), max(1, round(grey.height * scale)))
        grey = grey.resize(size, Image.Resampling.BOX)
    spectrum = np.fft.fft2(np.asarray(grey, np.float64))
    log_amplitude = np.log(np.abs(spectrum) + 1e-9)
    residual = log_amplitude - _box_mean(log_amplitude)
    phase = np.angle(spectrum)
    found = np.abs(np.fft.ifft2(np.exp(residual + 1j * phase))) ** 2
    return _smooth(_smooth(found).T).T


def _smooth(values: np.ndarray, *, sigma: float = 2.5) -> np.ndarray:
    """Each row convolved with a Gaussian, the border repeated."""
    reach = int(3 * sigma)
    kernel = np.exp(-np.square(np.arange(-reach, reach + 1) / sigma) / 2)
    padded = np.pad(values, ((0, 0), (reach, reach)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=1)
    return windows @ (kernel / kernel.sum())


def _box_mean(values: np.ndarray) -> np.ndarray:
    """The mean over 3 x 3, wrapping around as the spectrum does."""
    shifts = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    return np.mean([np.roll(values, shift, axis=(0, 1)) for shift in shifts], axis=0)
