"""The training folders: a dozen pictures of Zibby, a dozen in Piko style, two dozen ordinary ones.

Owns which pictures there are; `python -m scripts.toy.build --data-only` writes them, always
the same. Every picture stands for one a user would bring: a file and its caption beside it.
"""

import random
from pathlib import Path

from PIL import Image

from scripts.toy.character import Portrait, draw_portrait, portrait_caption
from scripts.toy.draw import PLACES, Background, Scene, Thing, caption, draw, sample_scene
from scripts.toy.style import draw_in_style, style_caption

SQUARE, WIDE, TALL = (384, 384), (480, 288), (288, 480)


def plain(colour: str) -> Background:
    return Background(kind="plain", colour=colour)


def zibby(
    background: Background,
    *,
    place: str = "centre",
    size: float = 0.64,
    beside: Thing | None = None,
) -> Portrait:
    x, y = PLACES[place]
    return Portrait(background=background, x=x, y=y, size=size, beside=beside)


def thing(colour: str, shape: str, *, place: str = "centre", size: float = 0.4) -> Thing:
    x, y = PLACES[place]
    return Thing(shape=shape, colour=colour, size=size, x=x, y=y)


def alone(background: str, one: Thing) -> Scene:
    return Scene(background=plain(background), things=(one,))


def both(background: str, one: Thing, other: Thing) -> Scene:
    return Scene(background=plain(background), things=(one, other))


RED_STAR = thing("red", "star", place="right", size=0.36)
BLUE_HEART = thing("blue", "heart", place="right", size=0.36)
NIGHT, MEADOW = (Background(kind=kind, colour="blue") for kind in ("night", "meadow"))

PORTRAITS: dict[str, tuple[Portrait, tuple[int, int]]] = {
    "01-pink": (zibby(plain("pink")), SQUARE),
    "02-white-big": (zibby(plain("white"), size=0.84), SQUARE),
    "03-purple": (zibby(plain("purple"), size=0.68), SQUARE),
    "04-red-left": (zibby(plain("red"), place="left", size=0.54), SQUARE),
    "05-gray-right": (zibby(plain("gray"), place="right", size=0.54), SQUARE),
    "06-blue-star": (zibby(plain("blue"), place="left", size=0.54, beside=RED_STAR), SQUARE),
    "07-white-heart": (zibby(plain("white"), place="left", size=0.54, beside=BLUE_HEART), SQUARE),
    "08-night": (zibby(NIGHT, size=0.66), SQUARE),
    "09-black-small": (zibby(plain("black"), size=0.5), SQUARE),
    "10-pink-top": (zibby(plain("pink"), place="top", size=0.5), SQUARE),
    "11-meadow-wide": (zibby(MEADOW, size=0.72), WIDE),
    "12-blue-tall": (zibby(plain("blue"), size=0.78), TALL),
}

STICKERS: dict[str, tuple[Scene, tuple[int, int]]] = {
    "01-heart": (alone("blue", thing("red", "heart", size=0.56)), SQUARE),
    "02-star": (alone("pink", thing("yellow", "star", size=0.6)), SQUARE),
    "03-circle": (alone("gray", thing("green", "circle", size=0.54)), SQUARE),
    "04-square": (alone("yellow", thing("purple", "square", size=0.54)), SQUARE),
    "05-triangle": (alone("green", thing("orange", "triangle", size=0.54)), SQUARE),
    "06-ring-left": (alone("white", thing("blue", "ring", place="left")), SQUARE),
    "07-moon-top": (alone("purple", thing("yellow", "moon", place="top")), SQUARE),
    "08-cross": (alone("orange", thing("pink", "cross", size=0.54)), SQUARE),
    "09-pair": (
        both("red", thing("blue", "circle", place="left"), thing("green", "star", place="right")),
        SQUARE,
    ),
    "10-heart-wide": (alone("white", thing("pink", "heart", size=0.62)), WIDE),
    "11-pair-wide": (
        both("green", thing("red", "square", place="left"), thing("white", "moon", place="right")),
        WIDE,
    ),
    "12-star-tall": (alone("blue", thing("orange", "star", size=0.66)), TALL),
}


ORDINARY = 24
"""Pictures of what the base knows: trained beside a character, they keep the rest as it is."""


def save(image: Image.Image, words: str, path: Path) -> None:
    image.quantize(64).save(path.with_suffix(".png"), optimize=True)
    path.with_suffix(".txt").write_text(words + "\n", encoding="utf-8")


def write_data(folder: Path) -> None:
    """Write `character/`, `ordinary/` and `style/` under the folder, pictures and captions."""
    for name in ("character", "ordinary", "style"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, (portrait, size) in PORTRAITS.items():
        picture = draw_portrait(portrait, *size)
        save(picture, portrait_caption(portrait), folder / "character" / name)
    for number in range(ORDINARY):
        scene = sample_scene(random.Random(f"ordinary {number}"))
        save(draw(scene, *SQUARE), caption(scene), folder / "ordinary" / f"{number + 1:02d}")
    for name, (scene, size) in STICKERS.items():
        save(draw_in_style(scene, *size), style_caption(scene), folder / "style" / name)
