"""Which pictures are held out, and how often the others are shown."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_tools.curate import selection
from data_tools.curate.selection import Picture
from data_tools.drafts import Draft
from data_tools.examine import Measures
from tests.unit.curate.studio import rules
from train.errors import DataError


def picture(name: str, *, seed: int, width: int = 96, height: int = 96) -> Picture:
    """A picture that is like none of another seed."""
    random = np.random.default_rng(seed)
    unlike = Measures(int(random.integers(0, 2**63)) * 2, bytes(192), 1.0, 0.5, 0.0, 0.0)
    return Picture(Draft(name, "", ""), f"{seed:064x}", width, height, unlike)


def library(count: int, *, first: int = 0, top: str = "") -> list[Picture]:
    sizes = [(96, 96), (192, 96), (96, 192), (96, 96)]
    return [
        picture(f"{top}{i}.png", seed=i, width=sizes[i % 4][0], height=sizes[i % 4][1])
        for i in range(first, first + count)
    ]


def test_the_held_out_set_is_representative(tmp_path: Path) -> None:
    concepts = [{"name": "a", "match": "a/*"}, {"name": "b", "match": "b/*"}]
    recipe = rules(tmp_path, validation={"fraction": 0.1}, concepts=concepts)
    known = library(80, top="a/") + library(40, first=80, top="b/")
    held = selection.held_out(known, recipe)
    shapes = {p.draft.name: p.shape for p in known}
    chosen = sorted((name[0], shapes[name]) for name in held)
    assert chosen == [("a", "square")] * 4 + [("a", "tall")] * 2 + [("a", "wide")] * 2 + [
        *([("b", "square")] * 2),
        ("b", "tall"),
        ("b", "wide"),
    ]
    assert selection.held_out(known[::-1], recipe) == held
    renamed = [
        replace(p, draft=replace(p.draft, name=f"{p.draft.name[:2]}x{i}"))
        for i, p in enumerate(known)
    ]
    places = [i for i, p in enumerate(known) if p.draft.name in held]
    assert {p.draft.name for i, p in enumerate(renamed) if i in places} == selection.held_out(
        renamed, recipe
    )


def test_new_pictures_dont_reshuffle(tmp_path: Path) -> None:
    recipe = rules(tmp_path, validation={"fraction": 0.1})
    changes = []
    for count in range(40, 140):
        before = selection.held_out(library(count), recipe)
        after = selection.held_out(library(count + 1), recipe)
        changes.append(len((before ^ after) - {f"{count}.png"}))
    assert max(changes) <= 4
    assert sum(changes) <= 40  # of 100 pictures that came, in sets of 4 to 14 held out
    assert len(selection.held_out(library(140), recipe)) == 14


def test_near_duplicates_never_straddle(tmp_path: Path) -> None:
    recipe = rules(tmp_path, validation={"fraction": 0.3}, near_duplicate_bits=2)
    known = library(30)
    twins = [
        Picture(
            Draft(f"twin{i}.png", "", ""),
            f"{i + 500:064x}",
            p.width,
            p.height,
            replace(p.measures, phash=p.measures.phash ^ 3),
        )
        for i, p in enumerate(known)
    ]
    held = selection.held_out(known + twins, recipe)
    assert len(held) == 18
    assert all((f"{i}.png" in held) == (f"twin{i}.png" in held) for i in range(30))


def test_a_fraction_that_holds_none_out(tmp_path: Path) -> None:
    recipe = rules(tmp_path, validation={"fraction": 0.1})
    with pytest.raises(DataError, match=r"0\.1 of 4 pictures holds none out; raise it"):
        selection.held_out(library(4), recipe)
    half = rules(tmp_path, validation={"fraction": 0.5})
    with pytest.raises(DataError, match="holds none out"):
        selection.held_out(library(1), half)  # never all of a concept


@pytest.mark.parametrize(
    ("shown", "weights", "factors"),
    [
        ({"a": 10, "b": 10}, {"a": 1, "b": 1}, {"a": 1, "b": 1}),
        ({"a": 10, "b": 30}, {"a": 1, "b": 1}, {"a": 3, "b": 1}),
        ({"a": 10, "b": 25}, {"a": 1, "b": 1}, {"a": 5, "b": 2}),
        ({"a": 10, "b": 30}, {"a": 2, "b": 1}, {"a": 6, "b": 1}),
        ({"a": 100, "b": 104}, {"a": 1, "b": 1}, {"a": 1, "b": 1}),
        ({"a": 12, "b": 24, "c": 7}, {"a": 1, "b": 1, "c": 1}, {"a": 4, "b": 2, "c": 7}),
    ],
)
def test_balance(shown: dict, weights: dict, factors: dict) -> None:
    found = selection.balanced(shown, weights)
    assert found == factors
    parts = [shown[name] * factor / weights[name] for name, factor in found.items()]
    assert max(parts) / min(parts) <= 1.11


def test_repeats_multiply(tmp_path: Path) -> None:
    concepts = [{"name": "a", "match": "a*", "repeats": 3}]
    own = [replace(p, draft=replace(p.draft, repeats=2)) for p in library(1, top="a")]
    found = selection.repeats([*own, picture("z.png", seed=9)], rules(tmp_path, concepts=concepts))
    assert found == {"a0.png": 6, "z.png": 1}


def test_balance_leaves_nobody_out(tmp_path: Path) -> None:
    concepts = [{"name": "a", "match": "a*"}, {"name": "b", "match": "b*"}]
    recipe = rules(tmp_path, concepts=concepts, balance=True)
    with pytest.raises(DataError, match=r"these are of no concept; .*\n  z0\.png"):
        selection.repeats(library(2, top="a") + library(1, first=0, top="z"), recipe)
    with pytest.raises(DataError, match="the concept 'b' has no pictures to train"):
        selection.repeats(library(2, top="a"), recipe)
