"""Crops: their boxes, and that their pixels are what training would see."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import pictures
from data_tools.curate import crops
from data_tools.curate.recipe import Crop
from tests.unit import hostile


@pytest.mark.parametrize(
    ("to", "aspect", "size", "box"),
    [
        ("centre", "1:1", (300, 200), (50, 0, 250, 200)),
        ("centre", "3:1", (300, 200), (0, 50, 300, 150)),
        ("centre", "3:2", (300, 200), (0, 0, 300, 200)),
        ("centre", "1:2", (301, 200), (100, 0, 200, 200)),
        ("subject", "1:1", (300, 200), (50, 0, 250, 200)),  # nothing stands out
        ("centre", "9999:1", (300, 200), (0, 99, 300, 100)),
    ],
)
def test_boxes(to: str, aspect: str, size: tuple[int, int], box: tuple[int, ...]) -> None:
    rule = Crop.model_validate({"match": "*", "to": to, "aspect": aspect})
    assert crops.box(rule, Image.new("RGB", size, "grey")) == box


@pytest.mark.parametrize("upright", [False, True])
def test_a_crop_follows_the_subject(upright: bool) -> None:
    pixels = np.random.default_rng(0).normal(120, 2, (200, 400)).astype(np.uint8)
    pixels[60:100, 330:370] = 250
    image = Image.fromarray(pixels.T if upright else pixels)
    left, top, right, bottom = crops.box(Crop(match="*", to="subject", aspect="1:1"), image)
    assert (right - left, bottom - top) == (200, 200)
    start, other = (top, left) if upright else (left, top)
    assert other == 0
    assert 170 <= start <= 200


def test_cropped_pixels_are_what_training_would_see(tmp_path: Path) -> None:
    upright, box = hostile.quadrants(), (10, 5, 90, 60)
    rgba = Image.fromarray(np.dstack([upright, np.full((64, 96), 90, np.uint8)]))
    grey = Image.fromarray((np.arange(96 * 64).reshape(64, 96) * 10).astype(np.uint16))
    profile = hostile.rgb_profile(
        red=(0.51, 0.24, 0.001), green=(0.29, 0.69, 0.04), blue=(0.16, 0.07, 0.78), gamma=1.8
    )
    hostile.oriented(tmp_path / "turned.jpg", upright, 6)
    hostile.oriented(tmp_path / "turned.webp", upright, 3)
    hostile.oriented(tmp_path / "turned.tif", upright, 8)
    rgba.save(tmp_path / "alpha.png")
    grey.save(tmp_path / "grey16.png")
    Image.fromarray(upright).save(tmp_path / "profile.png", icc_profile=profile)
    Image.fromarray(upright).quantize(8).save(tmp_path / "palette.gif")
    Image.fromarray(upright).quantize(8).save(tmp_path / "clear.png", transparency=2)
    Image.fromarray(upright).save(tmp_path / "key.png", transparency=(200, 30, 30))
    Image.fromarray(upright).convert("CMYK").save(tmp_path / "ink.jpg", quality=99)
    for path in sorted(tmp_path.iterdir()):
        cropped = tmp_path / "out" / f"{path.name}.png"
        cropped.parent.mkdir(exist_ok=True)
        cropped.write_bytes(crops.png(path, box))
        expected = np.asarray(pictures.load_rgb(path).crop(box))
        np.testing.assert_array_equal(np.asarray(pictures.load_rgb(cropped)), expected, path.name)
    assert Image.open(tmp_path / "out/alpha.png.png").mode == "RGBA"
    assert Image.open(tmp_path / "out/grey16.png.png").mode == "I;16"
    assert Image.open(tmp_path / "out/profile.png.png").info["icc_profile"] == profile
