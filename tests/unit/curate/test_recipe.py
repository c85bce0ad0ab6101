"""Recipes: the example is valid, and a fault has its line."""

from pathlib import Path

import pytest

from data_tools.curate import recipe
from tests.runs import ROOT
from train.errors import ConfigError


def test_the_example_is_valid() -> None:
    found = recipe.load(ROOT / "configs/curate/example.yaml")
    assert [concept.name for concept in found.concepts] == ["hero", "world"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source: a", ": output: missing; it must be text, not empty"),
        ("source: a\noutput: b\nexlude: {}", ":3: exlude: unknown key; did you mean 'exclude'?"),
        (
            "source: a\noutput: b\nexclude:\n  blur: 3",
            ":4: exclude.blur: unknown key; allowed here: names, match, captions",
        ),
        (
            "source: a\noutput: b\nexclude:\n  captions: ['(']",
            ":4: exclude.captions: '(' isn't a regular expression",
        ),
        (
            "source: a\noutput: b\nvalidation: {fraction: 0.6}",
            ":3: validation.fraction: must be a number from 0 to 0.5; got 0.6",
        ),
        (
            "source: a\noutput: b\ncrop:\n  - {match: x, to: face}",
            ":4: crop, item 1.to: must be 'centre', 'subject' or 'box'; got 'face'",
        ),
        (
            "source: a\noutput: b\ncrop:\n  - {match: x, to: centre}",
            ":4: crop, item 1.aspect: missing; a crop to 'centre' needs it",
        ),
        (
            "source: a\noutput: b\ncrop:\n  - {match: x, to: centre, aspect: '1.5'}",
            ":4: crop, item 1.aspect: must be width:height in whole numbers",
        ),
        (
            "source: a\noutput: b\ncrop:\n  - {match: x, to: box, box: [5, 0, 5, 9]}",
            ":4: crop, item 1.box: is empty; write left, top, right, bottom",
        ),
        (
            "source: a\noutput: b\nbalance: true\nconcepts:\n  - {name: a, match: x}",
            ":3: balance: needs at least two concepts",
        ),
        (
            "source: a\noutput: b\nconcepts:\n  - {name: a, match: x, weight: 2}",
            ":3: concepts: weight has no effect without balance; remove it",
        ),
    ],
)
def test_a_fault_has_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        recipe.load(path)
    assert str(caught.value).startswith(f"{path}{said}")
