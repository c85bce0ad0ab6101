"""Every kind of picture that can be read: the right pixels."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from data_tools import pictures
from data_tools.buckets import Geometry
from data_tools.pictures import PictureError
from tests.unit import hostile

# pytest undoes the filter that data_tools.pictures sets
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

P3 = {
    "red": (0.51512, 0.24120, -0.00105),
    "green": (0.29198, 0.69225, 0.04189),
    "blue": (0.15710, 0.06657, 0.78407),
    "gamma": 2.19921875,
}
SRGB_D50 = np.array(
    [[0.43607, 0.38515, 0.14308], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)


def pixels(path: Path) -> np.ndarray:
    image = pictures.load_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, 8 bits."""
    linear = np.clip(linear, 0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(curve * 255)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = hostile.quadrants()
    path = hostile.oriented(tmp_path / f"a{suffix}", upright, orientation)
    found = pictures.probe(path)
    assert (found.width, found.height) == (96, 64)
    assert pictures.probe(path, proven={found.sha256}) == found
    result = pixels(path)
    assert result.shape == upright.shape
    assert np.abs(result.astype(int) - upright).max() <= (3 if suffix == ".jpg" else 0)


def test_orientation_behind_the_pixels(tmp_path: Path) -> None:
    """PNG allows eXIf at the end, where reading the header alone doesn't see it."""
    rows = hostile.stored(hostile.quadrants(), 6)
    data = hostile.png(
        width=64,
        height=96,
        depth=8,
        color=2,
        rows=rows.tobytes(),
        late=((b"eXIf", hostile.exif(6)),),
    )
    path = written(tmp_path / "a.png", data)
    first = pictures.probe(path)
    again = pictures.probe(path, proven={first.sha256})
    assert (first.width, first.height) == (again.width, again.height) == (96, 64)
    assert (pixels(path) == hostile.quadrants()).all()


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_senseless_orientation_is_upright(tmp_path: Path, value: int) -> None:
    tags = Image.Exif()
    tags[hostile.ORIENTATION] = value
    Image.fromarray(hostile.quadrants()).save(tmp_path / "a.png", exif=tags)
    assert (pixels(tmp_path / "a.png") == hostile.quadrants()).all()


def test_damaged_exif_is_no_fault(tmp_path: Path) -> None:
    image = Image.fromarray(hostile.quadrants())
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=98)
    assert pixels(tmp_path / "a.jpg").shape == (64, 96, 3)
    assert pictures.probe(tmp_path / "a.jpg").width == 96


def test_alpha_is_put_on_white(tmp_path: Path) -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 128]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255, 255, 255], [132, 137, 142]]]
    assert pictures.probe(tmp_path / "a.png").notes == ("transparency is put on white",)


def test_grey_with_alpha(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[40, 255], [40, 0]]], np.uint8)).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[40] * 3, [255] * 3]]


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=bytes([255, 0, 255]))
    image.save(tmp_path / "plain.gif")
    opaque = [[[10, 20, 30], [200, 100, 0], [0, 0, 255]]]
    assert pixels(tmp_path / "plain.png").tolist() == opaque
    assert pixels(tmp_path / "plain.gif").tolist() == opaque
    opaque[0][1] = [255, 255, 255]
    assert pixels(tmp_path / "clear.png").tolist() == opaque


@pytest.mark.parametrize(("mode", "clear", "other"), [("L", 7, 8), ("RGB", (7, 7, 7), (8, 8, 8))])
def test_a_transparent_colour(tmp_path: Path, mode: str, clear: Any, other: Any) -> None:
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), other)
    image.save(tmp_path / "a.png", transparency=clear)
    assert pixels(tmp_path / "a.png").tolist() == [[[255] * 3, [8] * 3]]


def test_one_bit(tmp_path: Path) -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[0] * 3, [255] * 3]]


GREY_16 = np.array([[0, 128, 129, 256, 32768, 65407, 65535]], np.uint16)
GREY_8 = [0, 0, 1, 1, 128, 255, 255]  # round(v / 257), worked out by hand


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_grey_of_16_bits_is_scaled(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(GREY_16).save(path)
    assert pixels(path)[0, :, 0].tolist() == GREY_8
    assert (pixels(path) == pixels(path)[..., :1]).all()


def test_big_endian_tiff_of_16_bits(tmp_path: Path) -> None:
    tags = [(256, 7), (257, 1), (258, 16), (259, 1), (262, 1), (273, 8), (278, 1), (279, 14)]
    body = GREY_16.astype(">u2").tobytes()
    directory = len(tags).to_bytes(2, "big") + b"".join(
        tag.to_bytes(2, "big") + b"\0\4\0\0\0\1" + value.to_bytes(4, "big") for tag, value in tags
    )
    path = written(
        tmp_path / "a.tif", b"MM\0*" + (8 + 14).to_bytes(4, "big") + body + directory + bytes(4)
    )
    assert pixels(path)[0, :, 0].tolist() == GREY_8


def test_png_of_16_bits_and_one_transparent_grey(tmp_path: Path) -> None:
    data = hostile.png(
        width=7,
        height=1,
        depth=16,
        color=0,
        rows=GREY_16.astype(">u2").tobytes(),
        early=((b"tRNS", (32768).to_bytes(2, "big")),),
    )
    path = written(tmp_path / "a.png", data)
    assert pixels(path)[0, :, 0].tolist() == [0, 0, 1, 1, 255, 255, 255]


def test_rgb_png_of_16_bits(tmp_path: Path) -> None:
    """Pillow keeps the high byte: at most one level below rounding."""
    rgb = np.array([[[0, 32768, 65535], [257, 51400, 12850]]], ">u2")
    data = hostile.png(width=2, height=1, depth=16, color=2, rows=rgb.tobytes())
    assert pixels(written(tmp_path / "a.png", data)).tolist() == [[[0, 128, 255], [1, 200, 50]]]


def test_display_p3_becomes_srgb(tmp_path: Path) -> None:
    profile = hostile.rgb_profile(**P3)
    colours = np.array([[[100, 150, 120], [200, 180, 160], [40, 40, 90], [255, 0, 0]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png", icc_profile=profile)
    matrix = np.array([P3["red"], P3["green"], P3["blue"]]).T
    linear = (colours / 255) ** P3["gamma"]
    expected = srgb(linear @ (np.linalg.inv(SRGB_D50) @ matrix).T)
    result = pixels(tmp_path / "a.png")
    assert np.abs(result - expected).max() <= 1
    assert np.abs(expected[0, 0] - colours[0, 0]).max() > 5  # the profile does matter here


def test_profile_and_alpha_together(tmp_path: Path) -> None:
    rgba = np.array([[[100, 150, 120, 255], [100, 150, 120, 0]]], np.uint8)
    profile = hostile.rgb_profile(**P3)
    Image.fromarray(rgba).save(tmp_path / "a.png", icc_profile=profile)
    Image.fromarray(rgba[:, :1, :3]).save(tmp_path / "b.png", icc_profile=profile)
    result = pixels(tmp_path / "a.png")
    assert result[0, 0].tolist() == pixels(tmp_path / "b.png")[0, 0].tolist()
    assert result[0, 1].tolist() == [255] * 3


@pytest.mark.parametrize("depth", [8, 16])
def test_linear_grey_becomes_srgb(tmp_path: Path, depth: int) -> None:
    value = np.array([[128 if depth == 8 else 128 * 257]], np.uint8 if depth == 8 else np.uint16)
    profile = hostile.grey_profile(gamma=1.0)
    Image.fromarray(value).save(tmp_path / "a.png", icc_profile=profile)
    assert np.abs(pixels(tmp_path / "a.png") - srgb(np.array(128 / 255))).max() <= 1


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_by_its_profile(tmp_path: Path, suffix: str) -> None:
    """The profile says that full cyan is a red, which no conversion without it would give."""
    profile = hostile.cmyk_profile({(0, 0, 0, 0): (100, 0, 0), (1, 0, 0, 0): (50, 60, 40)})
    for name, inks in {"paper": (0, 0, 0, 0), "ink": (255, 0, 0, 0)}.items():
        image = Image.new("CMYK", (16, 16), inks)
        image.save(tmp_path / f"{name}{suffix}", icc_profile=profile)
    assert pixels(tmp_path / f"paper{suffix}").min() >= 253
    # Lab (50, 60, 40) in sRGB by the published formulas
    lab = np.array([(50 + 16) / 116 + 60 / 500, (50 + 16) / 116, (50 + 16) / 116 - 40 / 200])
    xyz = np.where(lab > 6 / 29, lab**3, 3 * (6 / 29) ** 2 * (lab - 4 / 29))
    expected = srgb(np.linalg.inv(SRGB_D50) @ (xyz * [0.9642, 1.0, 0.8249]))
    assert np.abs(pixels(tmp_path / f"ink{suffix}").astype(int) - expected).max() <= 4
    assert pictures.probe(tmp_path / f"ink{suffix}").notes == ()


@pytest.mark.parametrize("profile", [None, b"rubbish", hostile.rgb_profile(**P3)])
def test_cmyk_without_a_usable_profile_is_noted(tmp_path: Path, profile: bytes | None) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.tif", icc_profile=profile)
    assert np.abs(pixels(tmp_path / "a.tif") - np.array([0, 255, 255])).max() <= 1
    note = "CMYK without a usable colour profile: its colours are a guess"
    assert pictures.probe(tmp_path / "a.tif").notes == (note,)


def test_damaged_rgb_profile_counts_as_none(tmp_path: Path) -> None:
    image = Image.fromarray(hostile.quadrants())
    image.save(tmp_path / "a.png", icc_profile=hostile.rgb_profile(**P3)[:200])
    assert (pixels(tmp_path / "a.png") == hostile.quadrants()).all()


def test_a_jpeg_with_an_appended_preview_is_one_picture(tmp_path: Path) -> None:
    big, small = (Image.new("RGB", size, "red") for size in ((96, 64), (48, 32)))
    big.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[small])
    found = pictures.probe(tmp_path / "a.jpg")
    assert (found.format, found.width, found.height) == ("MPO", 96, 64)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_avif(tmp_path: Path) -> None:
    path = hostile.oriented(tmp_path / "a.avif", hostile.quadrants(), 6)
    assert (pictures.probe(path).width, pictures.probe(path).height) == (96, 64)
    assert np.abs(pixels(path).astype(int) - hostile.quadrants()).mean() < 10


def test_names_in_any_language(tmp_path: Path) -> None:
    for name in ("小火人 🔥.png", "Ünïcode'\"; $(x).png", "a" * 200 + ".png"):
        found = pictures.probe(hostile.picture(tmp_path / name))
        assert (found.width, found.height, found.path.name) == (96, 64, name)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (17, 900), (1000, 999)])
@pytest.mark.parametrize("geometry", [Geometry(64, 64), Geometry(96, 48), Geometry(48, 80)])
def test_fit_gives_the_exact_size(size: tuple[int, int], geometry: Geometry) -> None:
    result = pictures.fit(Image.new("RGB", size, "red"), geometry)
    assert result.size == (geometry.width, geometry.height)
    assert (np.asarray(result) == (255, 0, 0)).all()


def test_fit_keeps_the_centre() -> None:
    """A white middle third between black ends: covering and cropping leaves the middle alone."""
    wide = Image.new("L", (300, 100))
    wide.paste(255, (100, 0, 200, 100))
    square = np.asarray(pictures.fit(wide.convert("RGB"), Geometry(64, 64)))
    assert square[:, 2:-2].min() > 245
    tall = wide.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    assert np.asarray(pictures.fit(tall, Geometry(64, 64)))[2:-2].min() > 245


def test_fit_of_the_right_size_changes_nothing() -> None:
    image = Image.fromarray(hostile.quadrants())
    assert pictures.fit(image, Geometry(96, 64)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 98}, {"optimize": True}]
)
def test_a_jpeg_decoded_small_is_as_sure_as_one_decoded_in_full(options: dict) -> None:
    """Cut anywhere: `probe` decodes at an eighth of the size, `look` in between."""
    data = hostile.noise("JPEG", **options)
    cuts = [*range(len(data) - 100, len(data)), *range(650, len(data), 211)]
    for cut in cuts:
        found = []
        for side in (None, 32, 1):
            image = Image.open(io.BytesIO(data[:cut]))
            if side:
                image.draft(None, (side, side))
            try:
                image.load()
                found.append("whole")
            except OSError:
                found.append("cut off")
        assert found == ["cut off"] * 3, f"cut at {cut} of {len(data)}"


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(1000, 700), (90, 1400), (50, 40)])
def test_look_gives_what_load_rgb_gives_but_small(
    tmp_path: Path, size: tuple[int, int], orientation: int
) -> None:
    width, height = size
    upright = hostile.quadrants(width=width, height=height)
    path = hostile.oriented(tmp_path / "a.jpg", upright, orientation)
    found, image = pictures.look(path, side=200)
    assert found == pictures.probe(path)
    scale = min(1, 200 / max(size))
    assert image.size == (max(1, round(width * scale)), max(1, round(height * scale)))
    whole = pictures.load_rgb(path).resize(image.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(whole).astype(int) - np.asarray(image)).mean() < 2.5


def test_look_puts_transparency_on_white_before_it_shrinks(tmp_path: Path) -> None:
    rgba = np.zeros((400, 400, 4), np.uint8)
    rgba[:200, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = pictures.look(tmp_path / "a.png", side=50)[1]
    assert image.getpixel((25, 10)) == (0, 0, 0)
    assert image.getpixel((25, 40)) == (255, 255, 255)


def test_the_crop_box_is_what_fit_keeps() -> None:
    left, top, right, bottom = pictures.crop_box(300, 100, geometry=Geometry(64, 64))
    assert (left, top, right, bottom) == (100, 0, 200, 100)
    assert pictures.crop_box(64, 128, geometry=Geometry(32, 64)) == (0, 0, 64, 128)


def test_a_proven_picture_is_not_decoded_again(tmp_path: Path) -> None:
    whole = hostile.noise("JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(whole[: len(whole) // 2])
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert pictures.probe(path, proven={sha256}).sha256 == sha256
    with pytest.raises(PictureError):
        pictures.probe(path, proven={"0" * 64})
