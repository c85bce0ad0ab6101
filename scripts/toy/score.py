"""What an adapter changed, in numbers: `python -m scripts.toy.score runs/demo`.

The character: how often it appears when its trigger word is said, in the base and with the adapter.
The rest: how often prompts without the word are obeyed, and whether the character intrudes. Each
picture comes from a fresh Flux2Pipeline, the adapter from its exported file. None of the prompts'
seeds were seen in training.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from scripts.toy.character import character_score, portrait_caption, sample_portrait
from scripts.toy.draw import caption, sample_scene
from scripts.toy.measure import BASE, HELD_OUT_SEED, Painter, obeys, pipeline_painter

THERE = 0.5
"""A character score from which a person would say that this is it."""
BATCH = 16


@dataclass(frozen=True)
class Score:
    """Shares of pictures, in [0, 1]."""

    character: float
    """Of the prompts with the trigger word: those that show the character."""
    obeyed: float
    """Of the prompts without it: those whose things have the shapes and colours asked for."""
    intruded: float
    """Of the prompts without it: those that show the character all the same."""


def score(paint: Painter, *, count: int, title: str) -> Score:
    """Draw and look at `count` pictures of each kind."""
    rngs = [random.Random(HELD_OUT_SEED + number) for number in range(count)]
    called = [portrait_caption(sample_portrait(rng)) for rng in rngs]
    scenes = [sample_scene(random.Random(HELD_OUT_SEED + number)) for number in range(count)]
    prompts = called + [caption(scene) for scene in scenes]
    pictures = _draw(paint, prompts, title=title)
    portraits, others = pictures[:count], pictures[count:]
    obeyed = [obeys(image, scene).things for image, scene in zip(others, scenes, strict=True)]
    return Score(_share(portraits), sum(obeyed) / count, _share(others))


def _draw(paint: Painter, prompts: Sequence[str], *, title: str) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    with tqdm(total=len(prompts), desc=title, unit="picture", delay=2) as bar:
        for start in range(0, len(prompts), BATCH):
            some = list(prompts[start : start + BATCH])
            pictures += paint(some, list(range(start, start + len(some))))
            bar.update(len(some))
    return pictures


def _share(pictures: Sequence[Image.Image]) -> float:
    return sum(character_score(picture) >= THERE for picture in pictures) / len(pictures)


def main() -> None:
    """Score a run on the toy base; prints a table and writes score.json into the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run on the toy base")
    parser.add_argument("--count", type=int, default=32, help="pictures of each kind")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=4.0)
    options = parser.parse_args()
    adapter = next(iter(sorted(options.run.glob("*.safetensors"))))
    scores = {
        title: score(
            pipeline_painter(BASE, steps=options.steps, guidance=options.guidance, adapter=file),
            count=options.count,
            title=title,
        )
        for title, file in (("base", None), ("adapter", adapter))
    }
    lines = {
        "prompts with the trigger word that show the character": "character",
        "prompts without it whose shapes and colours are obeyed": "obeyed",
        "prompts without it that show the character": "intruded",
    }
    print(f"{f'of {options.count} pictures each':<56}{'base':>7}{'adapter':>9}")
    for line, name in lines.items():
        base, adapted = (asdict(scores[title])[name] for title in ("base", "adapter"))
        print(f"{line:<56}{base:>7.0%}{adapted:>9.0%}")
    facts = {"count": options.count, "steps": options.steps, "guidance": options.guidance}
    facts |= {title: asdict(one) for title, one in scores.items()}
    (options.run / "score.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
