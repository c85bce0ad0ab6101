"""Sizes: bounds that hold for any picture, and the cases people meet."""

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from data_tools.buckets import (
    SMALLEST,
    Bucket,
    Geometry,
    equal_geometries,
    geometries,
    levels,
    place,
    plan,
)
from data_tools.pictures import Probe
from train.config import DataConfig
from train.errors import DataError

RESOLUTIONS = (64, 80, 128, 256, 512, 640, 768, 1024, 1328, 2048)


def some_sizes(count: int, *, low: int = 1, high: int = 9000) -> list[tuple[int, int]]:
    """Sides spread evenly on a log scale."""
    source = random.Random(0)
    span = math.log(low), math.log(high)
    return [
        (round(math.exp(source.uniform(*span))), round(math.exp(source.uniform(*span))))
        for _ in range(count)
    ]


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("max_aspect", [1.0, 1.05, 1.5, 2.0, 3.0, 4.0, 8.0])
def test_sizes_keep_their_bounds(resolution: int, max_aspect: float) -> None:
    found = geometries(resolution, max_aspect=max_aspect)
    assert Geometry(resolution, resolution) in found
    assert len(set(found)) == len(found) <= 37
    for size in found:
        assert size.width % 16 == size.height % 16 == 0
        assert min(size.width, size.height) >= 32
        area = size.width * size.height
        assert 0.75 * resolution**2 <= area <= resolution**2
        assert resolution < 512 or area >= 0.93 * resolution**2
        assert max(size.width, size.height) <= max_aspect * min(size.width, size.height)
        assert Geometry(size.height, size.width) in found
        assert size.tokens == area / 256


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("max_aspect", [1.0, 1.05, 2.0, 3.0, 8.0])
def test_equal_sizes_have_one_number_of_tokens(resolution: int, max_aspect: float) -> None:
    found = equal_geometries(resolution, max_aspect=max_aspect)
    (tokens,) = {size.tokens for size in found}
    assert 0.75 * resolution**2 <= tokens * 256 <= resolution**2
    for size in found:
        assert min(size.width, size.height) >= 32
        assert max(size.width, size.height) <= max_aspect * min(size.width, size.height)
        assert Geometry(size.height, size.width) in found


@pytest.mark.parametrize("resolution", [512, 768, 1024])
def test_equal_sizes_suit_squares_and_lose_no_common_shape_much(resolution: int) -> None:
    def crop(shape: float) -> float:
        limits = {"resolution": resolution, "max_upscale": 1.0, "max_aspect": 3.0}
        return place(round(3000 * shape), 3000, equal_tokens=True, **limits).crop

    assert crop(1) < 0.07
    assert max(crop(shape) for shape in (4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3)) <= 0.2


@pytest.mark.parametrize("max_upscale", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("max_aspect", [1.0, 3.0, 8.0])
def test_any_picture_has_a_place_or_is_too_small(max_upscale: float, max_aspect: float) -> None:
    for resolution in RESOLUTIONS:
        for width, height in some_sizes(120):
            try:
                placed = place(
                    width,
                    height,
                    resolution=resolution,
                    max_upscale=max_upscale,
                    max_aspect=max_aspect,
                )
            except DataError:
                short = min(width, height) * max_upscale
                assert short < SMALLEST, (width, height, resolution)
                continue
            size = placed.geometry
            assert placed.scale <= max_upscale
            # covers: no side of the scaled picture is shorter than the bucket's
            assert width * placed.scale >= size.width - 1e-6
            assert height * placed.scale >= size.height - 1e-6
            kept = size.width * size.height / (width * height * placed.scale**2)
            assert placed.crop == pytest.approx(1 - kept, abs=1e-6)
            assert 0 <= placed.crop < 1


@pytest.mark.parametrize("resolution", [r for r in RESOLUTIONS if r >= 512])
def test_the_promised_crop(resolution: int) -> None:
    """At most 9 % within aspect 3, from 512 up: what the docstring of `place` says."""
    for width, height in some_sizes(5000, low=2000, high=9000):
        if max(width, height) <= 3 * min(width, height):
            placed = place(width, height, resolution=resolution, max_upscale=4, max_aspect=3)
            assert placed.crop <= 0.09, (width, height)


@pytest.mark.parametrize("resolution", [r for r in RESOLUTIONS if r >= 512])
@pytest.mark.parametrize("shape", [(1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (21, 9)])
def test_common_shapes_lose_little(resolution: int, shape: tuple[int, int]) -> None:
    for long, short in (shape, shape[::-1]):
        placed = place(
            long * 500, short * 500, resolution=resolution, max_upscale=4, max_aspect=3.0
        )
        assert placed.crop <= 0.025


@pytest.mark.parametrize(
    ("picture", "resolution", "expected"),
    [
        ((64, 64), 64, (64, 64)),
        ((80, 48), 64, (80, 48)),
        ((48, 80), 64, (48, 80)),
        ((1000, 600), 64, (80, 48)),
        ((6000, 6000), 1024, (1024, 1024)),
        ((6000, 4000), 1024, (1248, 832)),
        ((4032, 3024), 1024, (1184, 880)),
        ((1080, 1920), 1024, (768, 1360)),
        ((9000, 1000), 1024, (1760, 592)),  # beyond max_aspect: cropped to it
        ((1024, 768), 1024, (1024, 768)),  # too small for 1184 x 880, exactly right lower down
        ((1000, 1000), 1024, (896, 896)),
        ((70, 70), 1024, (64, 64)),
    ],
)
def test_sizes_people_meet(
    picture: tuple[int, int], resolution: int, expected: tuple[int, int]
) -> None:
    found = place(*picture, resolution=resolution, max_upscale=1.0, max_aspect=3.0).geometry
    assert (found.width, found.height) == expected


def test_upscaling_goes_to_its_limit_and_not_beyond() -> None:
    limits = {"resolution": 1024, "max_aspect": 3.0}
    assert place(512, 512, max_upscale=2.0, **limits).geometry == Geometry(1024, 1024)
    assert place(511, 511, max_upscale=2.0, **limits).geometry == Geometry(896, 896)
    assert place(512, 512, max_upscale=1.99, **limits).geometry == Geometry(896, 896)


def test_too_small_says_by_how_much() -> None:
    with pytest.raises(DataError) as caught:
        place(40, 50, resolution=1024, max_upscale=1.0, max_aspect=3.0)
    assert str(caught.value) == (
        "40x50 pixels are too few: the smallest bucket for this shape would need enlarging "
        "1.28 times and max_upscale is 1; use a larger picture or raise max_upscale"
    )


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_levels_fall_by_an_eighth_or_little_more(resolution: int) -> None:
    found = levels(resolution)
    assert found[0] == resolution
    assert found[-1] == 64
    for high, low in pairwise(found):
        assert low % 16 == 0
        assert high * 0.875 - 16 < low < high


def probe(width: int, height: int) -> Probe:
    return Probe(Path("a.png"), width, height, "PNG", "0" * 64)


def test_plan_keeps_every_picture_in_order() -> None:
    data = DataConfig(path="x", resolution=512)
    sizes = [(600, 600), (512, 512), (768, 512), (1000, 505), (300, 300), (2000, 2000)]
    result = plan([probe(*size) for size in sizes], data=data)
    found = [placement.geometry for placement in result.placements]
    expected = [(512, 512), (512, 512), (624, 416), (704, 352), (288, 288), (512, 512)]
    assert [(size.width, size.height) for size in found] == expected
    first = result.buckets[0]
    assert (first.geometry, first.pictures, first.scale) == (Geometry(512, 512), 3, 1.0)
    assert isinstance(first, Bucket)
    assert sum(line.pictures for line in result.buckets) == len(sizes)


def test_a_picture_keeps_its_size_whatever_comes_beside_it() -> None:
    data = DataConfig(path="x", resolution=512)
    sizes = [probe(*size) for size in some_sizes(200, low=100)]
    together = plan(sizes, data=data).placements
    alone = tuple(plan([size], data=data).placements[0] for size in sizes)
    assert together == alone


def test_no_other_size_would_cut_off_less() -> None:
    found = geometries(1024, max_aspect=3.0)
    for width, height in some_sizes(300, low=2000):
        crops = []
        for size in found:
            scale = max(size.width / width, size.height / height)
            crops.append(1 - size.width * size.height / (width * height * scale**2))
        placed = place(width, height, resolution=1024, max_upscale=1.0, max_aspect=3.0)
        assert placed.crop == pytest.approx(min(crops), abs=1e-6)
