"""Numbers about a picture's pixels: perceptual hash, sharpness, and where it is salient.

Owns the measures and near-duplicate groups. Decodes nothing and judges nothing.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

SHARPNESS_SIDE = 1024
"""Pixels of the longer side at which sharpness is measured; smaller pictures stay as they are."""
SALIENCY_SIDE = 64
"""Pixels of the longer side for saliency; the paper found about 64 to suit most scenes."""


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of ImageHash's pHash; like pictures differ in few of them."""
    import imagehash  # brings SciPy, some 0.2 s

    return int(str(imagehash.phash(image)), 16)


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of 8-bit grey, low for a blurred picture.

    Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000.
    """
    grey = image.convert("L")
    if max(grey.size) > SHARPNESS_SIDE:
        grey.thumbnail((SHARPNESS_SIDE, SHARPNESS_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(grey).astype(np.int32)
    if min(pixels.shape) < 3:
        return 0.0
    inner = pixels[1:-1, 1:-1]
    around = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    return round(float((around - 4 * inner).var()), 2)


def near_duplicates(hashes: Sequence[int], *, bits: int) -> list[int]:
    """For each hash the index of the first of its group.

    Groups are what chains of pairs that differ in at most `bits` bits connect. n hashes cost n²/2
    comparisons: some seconds for 20,000.
    """
    values = np.array(hashes, np.uint64)
    first = list(range(len(values)))

    def root(index: int) -> int:
        while first[index] != index:
            first[index] = first[first[index]]
            index = first[index]
        return index

    for index in range(1, len(values)):
        distances = np.bitwise_count(values[:index] ^ values[index])
        for other in np.flatnonzero(distances <= bits):
            low, high = sorted((root(int(other)), root(index)))
            first[high] = low
    return [root(index) for index in range(len(values))]


def saliency(image: Image.Image) -> np.ndarray:
    """(height, width) float64, the longer side SALIENCY_SIDE or less: the spectral residual.

    Source: Hou and Zhang, Saliency Detection: A Spectral Residual Approach, CVPR 2007.
    """
    grey = image.convert("L")
    scale = SALIENCY_SIDE / max(grey.size)
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
