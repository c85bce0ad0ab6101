"""Procedural pictures: the toy base's whole world, and the words for it.

Owns what a scene is, how it is drawn and how it is described. Knows nothing of models,
nor of the character and the style that the demo teaches (see `character.py`).
"""

import math
import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Points = list[tuple[float, float]]

COLOURS: dict[str, RGB] = {
    "red": (218, 38, 44),
    "orange": (248, 138, 28),
    "yellow": (250, 216, 50),
    "green": (46, 160, 70),
    "blue": (40, 92, 214),
    "purple": (128, 52, 170),
    "pink": (246, 140, 190),
    "white": (250, 250, 248),
    "black": (26, 26, 30),
}
PAPERS: dict[str, RGB] = COLOURS | {"gray": (150, 152, 156)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
KINDS = ("plain", "striped", "night", "meadow")
STRIPES = ("red", "green", "blue", "purple", "gray")

PLACES = {
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "centre": (0.5, 0.5),
}
SMALL, ASIDE, MEDIUM, BIG = 0.34, 0.42, 0.50, 0.66
# What cannot be told apart at a glance: white on yellow reads as paper, blue on night as sky.
CLOSE = {("plain", "white"): {"yellow"}, ("plain", "yellow"): {"white"}}
HIDDEN = {"night": {"black", "blue", "purple"}, "meadow": {"blue", "green", "white"}}


@dataclass(frozen=True)
class Thing:
    """One shape: `size` is its diameter in units of the picture's short side."""

    shape: str
    colour: str
    size: float
    x: float
    y: float

    @property
    def place(self) -> str:
        """The nearest named place."""
        return min(PLACES, key=lambda name: math.dist(PLACES[name], (self.x, self.y)))


@dataclass(frozen=True)
class Background:
    """`colour` matters for the kinds plain and striped only."""

    kind: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """One to three things before a background; positions are fractions of width and height."""

    background: Background
    things: tuple[Thing, ...]


# ---------------------------------------------------------------- sampling


def sample_background(rng: random.Random) -> Background:
    kind = rng.choices(KINDS, weights=(76, 10, 7, 7))[0]
    return Background(kind=kind, colour=rng.choice(list(PAPERS if kind == "plain" else STRIPES)))


def colours_before(background: Background) -> list[str]:
    """Object colours that stand out from this background."""
    if background.kind in HIDDEN:
        return [name for name in COLOURS if name not in HIDDEN[background.kind]]
    hidden = {background.colour} | CLOSE.get((background.kind, background.colour), set())
    if background.kind == "striped":
        hidden |= {"white", "pink"}
    return [name for name in COLOURS if name not in hidden]


def sample_scene(rng: random.Random) -> Scene:
    """Mostly one thing, sometimes two or three alike, sometimes two different ones."""
    background = sample_background(rng)
    palette = colours_before(background)
    form = rng.choices(("one", "alike", "pair"), weights=(68, 14, 18))[0]
    if form == "one":
        things = (sample_one(rng, palette),)
    elif form == "alike":
        things = sample_alike(rng, palette)
    else:
        things = sample_pair(rng, palette)
    return Scene(background=background, things=things)


def jitter(rng: random.Random, place: str, *, by: float) -> tuple[float, float]:
    x, y = PLACES[place]
    return x + rng.uniform(-by, by), y + rng.uniform(-by, by)


def sample_one(rng: random.Random, palette: list[str]) -> Thing:
    shape, colour = rng.choice(SHAPES), rng.choice(palette)
    if rng.random() < 0.62:
        place, size = "centre", rng.choice((SMALL, MEDIUM, BIG))
    else:
        place, size = rng.choice(("left", "right", "top", "bottom")), ASIDE
    x, y = jitter(rng, place, by=0.02)
    return Thing(shape=shape, colour=colour, size=size + rng.uniform(-0.02, 0.02), x=x, y=y)


def sample_alike(rng: random.Random, palette: list[str]) -> tuple[Thing, ...]:
    """Two side by side or three in a triangle, of the same shape, colour and size."""
    spots = rng.choice((((0.27, 0.5), (0.73, 0.5)), ((0.27, 0.71), (0.5, 0.27), (0.73, 0.71))))
    shape, colour = rng.choice(SHAPES), rng.choice(palette)
    size = (0.40 if len(spots) == 2 else 0.36) + rng.uniform(-0.01, 0.01)
    return tuple(Thing(shape=shape, colour=colour, size=size, x=x, y=y) for x, y in spots)


def sample_pair(rng: random.Random, palette: list[str]) -> tuple[Thing, ...]:
    """Two different things, side by side or one above the other."""
    places = rng.choice((("left", "right"), ("left", "right"), ("top", "bottom")))
    shapes = rng.sample(SHAPES, 2)
    colours = rng.sample(palette, 2)
    size = 0.40 + rng.uniform(-0.01, 0.01)
    things = []
    for place, shape, colour in zip(places, shapes, colours, strict=True):
        x, y = jitter(rng, place, by=0.01)
        things.append(Thing(shape=shape, colour=colour, size=size, x=x, y=y))
    return tuple(things)


# ---------------------------------------------------------------- drawing


def arc(radius: float, *, cx: float = 0.0, cy: float = 0.0) -> Points:
    turns = [2 * math.pi * i / 64 for i in range(64)]
    return [(cx + radius * math.cos(a), cy + radius * math.sin(a)) for a in turns]


def star_points() -> Points:
    radii = [1.0 if i % 2 == 0 else 0.46 for i in range(10)]
    return [
        (r * math.sin(math.pi * i / 5), 0.06 - r * math.cos(math.pi * i / 5))
        for i, r in enumerate(radii)
    ]


def heart_points() -> Points:
    turns = [2 * math.pi * i / 64 for i in range(64)]
    return [
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
        )
        for a in turns
    ]


@cache
def outline(shape: str) -> tuple[Points, Points]:
    """(filled polygon, hole) in the square [-1, 1]^2, y downwards; the hole may be empty."""
    if shape == "circle":
        return arc(0.95), []
    if shape == "ring":
        return arc(1.0), arc(0.52)
    if shape == "moon":
        return arc(0.98), arc(0.80, cx=0.50, cy=-0.10)
    if shape == "star":
        return star_points(), []
    if shape == "heart":
        return heart_points(), []
    if shape == "square":
        return [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)], []
    if shape == "triangle":
        return [(0.0, -0.92), (1.0, 0.82), (-1.0, 0.82)], []
    if shape == "cross":
        a, b = 0.34, 0.96
        return [
            (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
            (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
        ], []  # fmt: skip
    raise AssertionError(f"no outline for {shape!r}")


def stencil(shape: str, *, size: tuple[int, int], centre: tuple[float, float], radius: float):
    """The shape as an L image: 255 inside, 0 outside; `centre` and `radius` in its pixels."""

    def place(points: Points) -> Points:
        return [(centre[0] + radius * x, centre[1] + radius * y) for x, y in points]

    image = Image.new("L", size)
    pen = ImageDraw.Draw(image)
    body, hole = outline(shape)
    pen.polygon(place(body), fill=255)
    if hole:
        pen.polygon(place(hole), fill=0)
    return image


def mix(one: RGB, other: RGB, amount: float) -> RGB:
    red, green, blue = (round(a + (b - a) * amount) for a, b in zip(one, other, strict=True))
    return red, green, blue


NIGHT_STARS = ((0.12, 0.14), (0.86, 0.1), (0.08, 0.6), (0.93, 0.52), (0.2, 0.9), (0.8, 0.88))


def draw_background(background: Background, width: int, height: int) -> Image.Image:
    """The background alone, not antialiased: draw it large and shrink it."""
    short = min(width, height)
    image = Image.new("RGB", (width, height), PAPERS[background.colour])
    pen = ImageDraw.Draw(image)
    if background.kind == "striped":
        band, light = short / 8, mix(PAPERS[background.colour], (255, 255, 255), 0.45)
        for i in range(0, math.ceil(width / band), 2):
            pen.rectangle((i * band, 0, (i + 1) * band - 1, height), fill=light)
    elif background.kind == "night":
        for y in range(height):
            pen.line((0, y, width, y), fill=mix((10, 14, 52), (64, 60, 128), y / height))
        for x, y in NIGHT_STARS:
            r = short / 60
            pen.ellipse(
                (x * width - r, y * height - r, x * width + r, y * height + r), fill=(250, 246, 210)
            )
    elif background.kind == "meadow":
        pen.rectangle((0, 0, width, height), fill=(150, 208, 240))
        pen.rectangle((0, round(0.62 * height), width, height), fill=(112, 190, 84))
    return image


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """The scene at any size, antialiased."""
    factor = 4 if max(width, height) <= 128 else 2
    big = (width * factor, height * factor)
    image = draw_background(scene.background, *big)
    short = min(big)
    for thing in scene.things:
        centre = (thing.x * big[0], thing.y * big[1])
        mask = stencil(thing.shape, size=big, centre=centre, radius=thing.size * short / 2)
        image.paste(COLOURS[thing.colour], (0, 0, *big), mask)
    return image.resize((width, height), Image.Resampling.BOX)


# ---------------------------------------------------------------- words


def a(words: str) -> str:
    """The words with their indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def size_word(thing: Thing) -> str:
    """`big ` or `small ` for a lone thing of an extreme size, else nothing."""
    return "small " if thing.size <= 0.36 else "big " if thing.size >= 0.6 else ""


def name_of(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def describe_background(background: Background) -> list[str]:
    """Ways to say it after the things, the canonical one first."""
    if background.kind == "night":
        return ["in the night sky", "in a night sky", "at night"]
    if background.kind == "meadow":
        return ["on a meadow", "over a meadow", "on a green meadow"]
    if background.kind == "striped":
        colour = a(background.colour)
        return [f"on {colour} striped background", f"on {background.colour} stripes"]
    colour = a(background.colour)
    return [
        f"on {colour} background",
        f"against {colour} background",
        f"on {background.colour} paper",
    ]


def describe_one(thing: Thing, rng: random.Random | None) -> list[str]:
    size = size_word(thing) if rng is None or rng.random() < 0.6 else ""
    words = a(f"{size}{name_of(thing)}")
    if thing.place == "centre":
        return [words, words, f"{words} in the middle"]
    return [f"{words} at the {thing.place}", f"{words} on the {thing.place} side"]


def describe_pair(one: Thing, other: Thing) -> list[str]:
    first, second = a(name_of(one)), a(name_of(other))
    placed = f"{first} at the {one.place} and {second} at the {other.place}"
    if one.place == "top":
        return [placed, f"{first} above {second}", f"{second} below {first}"]
    return [placed, f"{first} and {second}", f"{first} next to {second}"]


def describe_things(things: tuple[Thing, ...], rng: random.Random | None) -> list[str]:
    if len(things) == 1:
        return describe_one(things[0], rng)
    if len({name_of(thing) for thing in things}) > 1:
        return describe_pair(*things)
    words = f"{('two', 'three')[len(things) - 2]} {things[0].colour} {plural(things[0].shape)}"
    return [words]


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """One natural phrasing; without `rng` the canonical one."""
    things = describe_things(scene.things, rng)
    backgrounds = describe_background(scene.background)
    if rng is None:
        return f"{things[0]} {backgrounds[0]}"
    words, ground = rng.choice(things), rng.choice(backgrounds)
    form = rng.random()
    if form < 0.1:
        return f"a picture of {words} {ground}"
    if form < 0.25 and scene.background.kind == "plain":
        return f"{a(scene.background.colour)} background with {words}"
    return f"{words} {ground}"
