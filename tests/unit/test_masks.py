"""Masks: which files they are, what is wrong with them, and what share of a patch they leave."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import masks, records
from data_tools.buckets import Geometry
from data_tools.pictures import PictureError
from tests import runs
from tests.unit.folders import survey
from train.config import DataConfig
from train.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return runs.make_pictures(tmp_path, sizes=[runs.SQUARE] * 2)


def write_mask(path: Path, *, size: tuple[int, int] = runs.SQUARE, value: int = 255) -> None:
    Image.new("L", size, value).save(path)


@pytest.mark.parametrize("name", ["0.mask.png", "0-masklabel.png", "0.mask.webp"])
def test_a_mask_goes_with_its_picture_and_is_none_itself(folder, name):
    write_mask(folder / name)
    found = survey(folder, mask="files")
    assert [row.name for row in found.records] == ["0.png", "1.png"]
    assert [row.mask for row in found.records] == [folder / name, None]
    assert found.faults == found.notes == ()


def test_another_mask_is_another_data_set(folder):
    digests = {survey(folder, mask="files").digest}
    for value in (255, 100):
        write_mask(folder / "0.mask.png", value=value)
        digests.add(survey(folder, mask="files").digest)
    assert len(digests) == 3


def test_masks_that_are_not_asked_for_are_noted(folder):
    write_mask(folder / "0.mask.png")
    found = survey(folder)
    assert [row.mask for row in found.records] == [None, None]
    assert found.notes == (("0.mask.png", "a mask, not used: data.mask is not 'files'"),)


def test_a_picture_that_only_looks_like_a_mask_is_a_picture(folder):
    runs.draw_picture(folder / "other.mask.png")
    (folder / "other.mask.txt").write_text("zibby")
    found = survey(folder, mask="files")
    assert [row.name for row in found.records] == ["0.png", "1.png", "other.mask.png"]


def test_faults_of_masks(folder):
    write_mask(folder / "0.mask.png", size=(64, 32))
    (folder / "1.mask.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        records.read(DataConfig(path=str(folder), resolution=64, mask="files"), progress=False)
    assert str(caught.value) == (
        f"{folder}: these must be mended first:\n"
        "  0.mask.png: a mask of another size than its picture: 64x32, the picture 64x64\n"
        "  1.mask.png: empty file (0 bytes); get it again or remove it\n"
        "  1.png: its mask 1.mask.png can't be used"
    )


@pytest.mark.parametrize("alpha", [True, False])
def test_a_mask_of_nothing_is_an_error(tmp_path, alpha):
    path = tmp_path / "a.png"
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(path)
    if not alpha:
        write_mask(path, value=0)
    with pytest.raises(PictureError, match="nothing of the picture would be learnt"):
        masks.load(path, alpha=alpha)


def test_alpha_stands_upright_and_is_white_where_there_is_none(tmp_path):
    picture = Image.new("RGBA", (64, 32), (9, 9, 9, 255))
    picture.paste((9, 9, 9, 0), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter to the right: the left half is the upper one
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = np.asarray(masks.load(tmp_path / "turned.png", alpha=True))
    assert turned.shape == (64, 32)
    assert (turned[:32] == 0).all()
    assert (turned[32:] == 255).all()
    Image.new("RGB", (8, 4)).save(tmp_path / "plain.jpg")
    assert np.asarray(masks.load(tmp_path / "plain.jpg", alpha=True)).min() == 255


def test_shares_are_means_over_patches_of_what_the_crop_keeps():
    mask = Image.new("L", (96, 32), 0)
    mask.paste(255, (32, 0, 40, 32))  # half of the first patch column of the middle 32 x 32
    shares = masks.shares(mask, Geometry(32, 32))
    assert shares.dtype == np.float32
    np.testing.assert_allclose(shares, [[0.5, 0], [0.5, 0]], atol=0.01)
