"""Measures of pixels, and the search for pictures that look alike."""

import io
import time
from dataclasses import replace
from math import erf, sqrt
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from data_tools import examine, pictures
from data_tools.examine import Measures
from tests.unit import hostile


def scene(seed: int) -> Image.Image:
    """Shapes on a ground, twice as large as measures need it: edges as a photo has them."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((512, 512), Image.Resampling.BICUBIC)
    for _ in range(12):
        left, top = (int(place) for place in random.integers(0, 400, 2))
        size = int(random.integers(30, 110))
        colour = tuple(int(level) for level in random.integers(0, 255, 3))
        image.paste(colour, (left, top, left + size, top + size))
    return image


def look(image: Image.Image) -> Measures:
    """What this picture measures, at the size at which a file is looked at."""
    scale = min(1.0, examine.SIDE / max(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    return examine.measure(image.resize(size, Image.Resampling.BILINEAR))


def found(*images: Image.Image) -> list[list[int]]:
    return examine.alike([look(image) for image in images])


def test_a_picture_is_like_its_copies_and_no_other() -> None:
    image = scene(0)
    data = hostile.encoded(image, "JPEG", quality=40)
    copies = [
        Image.open(io.BytesIO(data)).convert("RGB"),
        image.resize((300, 300)),
        image.crop((4, 4, 508, 508)),
        ImageEnhance.Brightness(image).enhance(0.96),
    ]
    others = [scene(seed) for seed in range(1, 30)]
    assert found(*others, image, *copies) == [[29, 30, 31, 32, 33]]


def test_the_same_drawing_in_other_colours_is_another_picture() -> None:
    red, blue = (Image.new("RGB", (200, 200), colour) for colour in ("#803030", "#303080"))
    assert found(red, blue) == []
    assert found(red, red.copy()) == [[0, 1]]


def measured(path: Path) -> Measures:
    """What a file measures, through the one way to open it."""
    return examine.measure(pictures.look(path, side=examine.SIDE)[1])


def test_like_pictures_are_one_group_and_blur_shows(tmp_path: Path) -> None:
    for name, seed, blur in [("a.png", 1, 0), ("b.jpg", 1, 3), ("c.png", 2, 0)]:
        scene(seed).filter(ImageFilter.GaussianBlur(blur)).save(tmp_path / name)
    sharp, soft, other = (measured(tmp_path / name) for name in ("a.png", "b.jpg", "c.png"))
    assert (sharp.phash ^ soft.phash).bit_count() <= 6 < (sharp.phash ^ other.phash).bit_count()
    assert examine.alike([sharp, soft, other], bits=6) == [[0, 1]]
    noise = hostile.picture(tmp_path / "n.png")
    blurred = tmp_path / "blurred.png"
    pictures.load_rgb(noise).filter(ImageFilter.GaussianBlur(2)).save(blurred)
    assert measured(noise).sharpness > 5 * measured(blurred).sharpness


def test_a_burst_is_one_group_though_its_ends_differ() -> None:
    base = Measures(0, bytes(192), 1, 0.5, 0, 0)
    steps = [0, (1 << 10) - 1, (1 << 20) - 1, (1 << 30) - 1]
    burst = [Measures(bits, base.colours, 1, 0.5, 0, 0) for bits in steps]
    assert (steps[0] ^ steps[3]).bit_count() > examine.HASH_DISTANCE
    assert examine.alike(burst) == [[0, 1, 2, 3]]
    assert examine.alike([burst[0], burst[2]]) == []
    assert examine.alike([]) == []


def test_chains_are_one_group() -> None:
    one = look(scene(1))

    def groups(*hashes: int, bits: int) -> list[list[int]]:
        return examine.alike([replace(one, phash=value) for value in hashes], bits=bits)

    assert groups(0b0, 0b1111, 0b11, 0xFFFF, bits=2) == [[0, 1, 2]]
    assert groups(bits=2) == []
    assert groups(2**64 - 1, 0, bits=16) == []


def test_ten_thousand_are_searched_in_seconds() -> None:
    random = np.random.default_rng(0)
    hashes = [int(bits) for bits in random.integers(0, 2**63, 10_000)]
    hashes[9_000] = hashes[17] ^ 0b111
    rows = [Measures(bits, bytes(192), 1, 0.5, 0, 0) for bits in hashes]
    began = time.process_time()
    assert [17, 9_000] in examine.alike(rows)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("blur", [1.0, 1.5, 2.0])
def test_sharpness_tells_how_wide_an_edge_is(blur: float) -> None:
    places = np.arange(128)
    edge = np.vectorize(lambda x: 40 + 80 * (1 + erf((x - 47) / blur / sqrt(2))))(places)
    image = np.tile(edge, (128, 1)).round().astype(np.uint8)
    assert examine.sharpness(image) == pytest.approx(1 / (2 * blur**2), rel=0.2)
    assert examine.sharpness(image.T) == pytest.approx(examine.sharpness(image), rel=0.01)


@pytest.mark.parametrize("contrast", [1.0, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_blur_is_seen_and_dimness_is_no_blur(contrast: float, seed: int) -> None:
    image = ImageEnhance.Contrast(scene(seed)).enhance(contrast)
    assert not look(image).soft
    assert look(image.filter(ImageFilter.GaussianBlur(3))).soft


def test_a_blurred_background_is_no_blur() -> None:
    image = scene(4)
    sharp = image.crop((128, 128, 384, 384))
    image = image.filter(ImageFilter.GaussianBlur(6))
    assert look(image).soft
    image.paste(sharp, (128, 128))
    assert not look(image).soft


def test_exposure() -> None:
    image = Image.new("RGB", (512, 512), (120, 120, 120))
    assert examine.measure(image).brightness == pytest.approx(120 / 255, abs=0.01)
    image.paste((0, 0, 0), (0, 0, 512, 256))
    image.paste((255, 255, 255), (0, 256, 512, 320))
    measures = examine.measure(image)
    assert (measures.black, measures.white) == (0.5, 0.125)
    assert (measures.dark, measures.bright) == (True, False)


@pytest.mark.parametrize("size", [(1, 1), (1, 512), (2, 3), (512, 5)])
def test_tiny_pictures_have_measures_too(size: tuple[int, int]) -> None:
    measures = examine.measure(Image.new("RGB", size, "white"))
    assert (measures.white, measures.sharpness, len(measures.colours)) == (1, 0, 192)
