"""The toy base's pictures and their judges: deterministic, described truly, read back rightly."""

import random
from dataclasses import replace

import numpy as np
import pytest

from scripts.toy.character import (
    TRIGGER,
    character_score,
    draw_portrait,
    portrait_caption,
    sample_portrait,
)
from scripts.toy.dataset import PORTRAITS, STICKERS, write_data
from scripts.toy.draw import COLOURS, SHAPES, Background, Scene, Thing, caption, draw, sample_scene
from scripts.toy.measure import obeys, read
from scripts.toy.style import draw_in_style, style_caption

RED_CIRCLE = Scene(
    background=Background(kind="plain", colour="blue"),
    things=(Thing(shape="circle", colour="red", size=0.5, x=0.5, y=0.5),),
)


def with_thing(**change) -> Scene:
    return replace(RED_CIRCLE, things=(replace(RED_CIRCLE.things[0], **change),))


def test_same_seed_same_picture():
    first, second = (draw(sample_scene(random.Random(7)), 64, 64).tobytes() for _ in range(2))
    assert first == second
    assert first != draw(sample_scene(random.Random(8)), 64, 64).tobytes()


def test_a_picture_has_the_size_asked_for():
    assert draw(RED_CIRCLE, 80, 48).size == (80, 48)


def test_canonical_captions():
    assert caption(RED_CIRCLE) == "a red circle on a blue background"
    assert caption(with_thing(colour="orange", x=0.27)).startswith("an orange circle at the left")
    twin = replace(RED_CIRCLE.things[0], shape="cross", size=0.3)
    row = tuple(replace(twin, x=x) for x in (0.2, 0.5, 0.8))
    assert caption(replace(RED_CIRCLE, things=row)) == "three red crosses on a blue background"


@pytest.mark.parametrize("seed", range(40))
def test_every_phrasing_names_what_is_drawn(seed):
    rng = random.Random(seed)
    scene = sample_scene(rng)
    words = caption(scene, rng)
    for thing in scene.things:
        assert thing.shape in words
        assert thing.colour in words
    if scene.background.kind in ("plain", "striped"):
        assert scene.background.colour in words


@pytest.mark.parametrize("seed", range(25))
def test_a_drawn_scene_is_read_back(seed):
    scene = sample_scene(random.Random(seed))
    assert obeys(draw(scene, 64, 64), scene).everything


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_told_from_the_others(shape):
    picture = draw(with_thing(shape=shape), 64, 64)
    right = [other for other in SHAPES if obeys(picture, with_thing(shape=other)).shape]
    assert right == [shape]


@pytest.mark.parametrize("colour", [name for name in COLOURS if name != "blue"])
def test_every_colour_is_told_from_the_others(colour):
    picture = draw(with_thing(colour=colour), 64, 64)
    right = [other for other in COLOURS if obeys(picture, with_thing(colour=other)).colour]
    assert right == [colour]


def test_a_wrong_picture_is_refused():
    picture = draw(RED_CIRCLE, 64, 64)
    gray = replace(RED_CIRCLE, background=Background(kind="plain", colour="gray"))
    assert not obeys(picture, gray).background
    assert not obeys(picture, with_thing(x=0.27)).places
    twins = tuple(replace(RED_CIRCLE.things[0], x=x, size=0.3) for x in (0.3, 0.7))
    assert not obeys(picture, replace(RED_CIRCLE, things=twins)).things
    empty = draw(replace(RED_CIRCLE, things=()), 64, 64)
    assert read(empty).things == ()
    assert not obeys(empty, RED_CIRCLE).things


def test_character_score_separates():
    rng = random.Random(0)
    there = [character_score(draw_portrait(sample_portrait(rng), 64, 64)) for _ in range(6)]
    absent = [character_score(draw(sample_scene(rng), 64, 64)) for _ in range(6)]
    assert min(there) > 0.85
    assert max(absent) < 0.15


def test_the_character_without_its_eye_scores_lower():
    portrait = next(iter(PORTRAITS.values()))[0]
    picture = draw_portrait(portrait, 64, 64)
    blind = picture.copy()
    blind.paste((0, 168, 160), (22, 18, 42, 38))
    assert character_score(blind) < character_score(picture) - 0.3


def test_training_captions_carry_their_trigger():
    assert all(TRIGGER in portrait_caption(portrait) for portrait, _ in PORTRAITS.values())
    assert all("piko style" in style_caption(scene) for scene, _ in STICKERS.values())


def test_the_style_is_not_the_base_domain():
    scene, _ = STICKERS["01-heart"]
    plain, styled = (np.asarray(painter(scene, 64, 64), float) for painter in (draw, draw_in_style))
    assert np.abs(plain - styled).mean() > 40


def test_training_data_is_written_in_pairs_and_always_the_same(tmp_path):
    write_data(tmp_path / "a")
    write_data(tmp_path / "b")
    for folder in ("character", "style"):
        pictures = sorted((tmp_path / "a" / folder).glob("*.png"))
        assert len(pictures) == 12
        for picture in pictures:
            assert picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
            assert picture.read_bytes() == (tmp_path / "b" / folder / picture.name).read_bytes()
