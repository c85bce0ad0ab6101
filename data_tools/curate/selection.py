"""Which pictures a recipe keeps, how often each is shown, and which are held out.

Owns these decisions, as pure functions of what is known of the pictures. Opens no file.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from data_tools import examine, folder
from data_tools.curate.recipe import Recipe
from data_tools.drafts import Draft
from data_tools.examine import Measures
from train.errors import DataError, bullet_list

REST = ""
"""The concept of a picture that is of none."""
TOLERANCE = 0.05
"""Balanced concepts' shares may differ from what is asked by this fraction."""
MAX_SCALE = 20
"""Repeats that the largest concept gets at most so that others can be balanced against it."""


@dataclass(frozen=True)
class Picture:
    """What is known of one picture. Sizes in pixels, upright."""

    draft: Draft
    sha256: str
    width: int
    height: int
    measures: Measures

    @property
    def shape(self) -> str:
        """wide, square or tall; between them lies 8:7, half way to the next bucket."""
        ratio = self.width / self.height
        return "wide" if ratio > 8 / 7 else "tall" if ratio < 7 / 8 else "square"


def excluded(pictures: Sequence[Picture], recipe: Recipe) -> dict[str, list[str]]:
    """Name -> reasons. Near-duplicates are looked for among what nothing else excludes.

    Raises DataError if the recipe excludes a name that isn't there.
    """
    names = [picture.draft.name for picture in pictures]
    unknown = [name for name in recipe.exclude.names if name not in set(names)]
    if unknown:
        lines = [f"{name}{folder.nearest(name, names)}" for name in unknown]
        raise DataError(bullet_list("exclude.names: not among the pictures:", lines))
    reasons = {picture.draft.name: _reasons(picture, recipe) for picture in pictures}
    kept = [picture for picture in pictures if not reasons[picture.draft.name]]
    if recipe.exclude.near_duplicates:
        for group in groups(kept, bits=recipe.near_duplicate_bits):
            best = min(group, key=_quality)
            for picture in group:
                if picture is not best:
                    bits = (picture.measures.phash ^ best.measures.phash).bit_count()
                    text = f"near-duplicate of {best.draft.name} ({bits} of 64 bits differ)"
                    reasons[picture.draft.name].append(text)
    return {name: found for name, found in reasons.items() if found}


def _reasons(picture: Picture, recipe: Recipe) -> list[str]:
    rules, draft = recipe.exclude, picture.draft
    found = ["by name"] if draft.name in rules.names else []
    found += [f"matches {pattern!r}" for pattern in rules.match if matches(draft.name, pattern)]
    found += [
        f"caption has {pattern!r}"
        for pattern in rules.captions
        if re.search(pattern, draft.caption)
    ]
    if min(picture.width, picture.height) < rules.min_side:
        found.append(f"{picture.width}x{picture.height} is below min_side {rules.min_side}")
    if picture.measures.sharpness < rules.min_sharpness:
        found.append(f"sharpness {picture.measures.sharpness:.2f} is below {rules.min_sharpness:g}")
    return found


def _quality(picture: Picture) -> tuple:
    return (
        -picture.width * picture.height,
        -picture.measures.sharpness,
        picture.sha256,
        picture.draft.name,
    )


def groups(pictures: Sequence[Picture], *, bits: int) -> list[list[Picture]]:
    """Pictures that are near-duplicates of each other, and single ones, in order of content."""
    ordered = sorted(pictures, key=lambda picture: (picture.sha256, picture.draft.name))
    found = examine.alike([picture.measures for picture in ordered], bits=bits)
    grouped = {index for group in found for index in group}
    found += [[index] for index in range(len(ordered)) if index not in grouped]
    return [[ordered[index] for index in group] for group in sorted(found)]


def matches(name: str, pattern: str) -> bool:
    """Whether a picture's name is one that a recipe's pattern means."""
    return fnmatchcase(name, pattern)


def idle(names: Sequence[str], recipe: Recipe) -> list[str]:
    """Patterns of the recipe that match no picture's name; new pictures may."""
    patterns = [("exclude.match", pattern) for pattern in recipe.exclude.match]
    patterns += [("crop", rule.match) for rule in recipe.crop]
    patterns += [("concepts", concept.match) for concept in recipe.concepts]
    return [
        f"{key}: {pattern!r} matches no picture"
        for key, pattern in patterns
        if not any(matches(name, pattern) for name in names)
    ]


def concept_of(picture: Picture, recipe: Recipe) -> str:
    """The name of the first concept whose pattern matches, or REST."""
    for concept in recipe.concepts:
        if matches(picture.draft.name, concept.match):
            return concept.name
    return REST


def held_out(pictures: Sequence[Picture], recipe: Recipe) -> set[str]:
    """Names of the validation pictures. Raises DataError if the fraction is too small for any.

    Of each concept, `fraction` of its near-duplicate groups (rounded, never all), spread over wide,
    square and tall ones by their number; among equals those of the lowest hash of their content.
    So order and names don't matter, and a new picture changes little: it may join, may raise its
    concept's number by one, and may take the place of one whose hash is higher.
    """
    fraction = recipe.validation.fraction
    strata: dict[str, dict[str, list[tuple[bytes, list[Picture]]]]] = {}
    for group in groups(pictures, bits=recipe.near_duplicate_bits):
        rank, leader = min((_rank(picture), index) for index, picture in enumerate(group))
        concept, shape = concept_of(group[leader], recipe), group[leader].shape
        strata.setdefault(concept, {}).setdefault(shape, []).append((rank, group))
    names: set[str] = set()
    for shapes in strata.values():
        sizes = {shape: len(members) for shape, members in sorted(shapes.items())}
        total = sum(sizes.values())
        count = min(int(fraction * total + 0.5), total - 1)
        for shape, quota in _spread(count, sizes).items():
            chosen = sorted(shapes[shape], key=lambda member: member[0])[:quota]
            names |= {picture.draft.name for _, group in chosen for picture in group}
    if fraction and not names:
        few = f"{fraction:g} of {len(pictures)} pictures holds none out"
        raise DataError(f"validation.fraction: {few}; raise it or add pictures")
    return names


def _rank(picture: Picture) -> bytes:
    return hashlib.sha256(f"kindling validation 1 {picture.sha256}".encode()).digest()


def _spread(count: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """`count` shared out by size: whole parts first, then the largest remainders."""
    total = sum(sizes.values())
    quota = {name: count * size // total for name, size in sizes.items()}
    rest = sorted(sizes, key=lambda name: (-(count * sizes[name] % total), name))
    for name in rest[: count - sum(quota.values())]:
        quota[name] += 1
    return quota


def repeats(pictures: Sequence[Picture], recipe: Recipe) -> dict[str, int]:
    """Name -> how often an epoch shows it. Raises DataError if balance leaves one out."""
    concepts = {picture.draft.name: concept_of(picture, recipe) for picture in pictures}
    factors = {REST: 1} | {concept.name: concept.repeats for concept in recipe.concepts}
    if recipe.balance:
        strangers = [name for name, concept in concepts.items() if concept == REST]
        if strangers:
            title = "balance: these are of no concept; add one for them, or exclude them:"
            raise DataError(bullet_list(title, strangers))
        shown: dict[str, int] = defaultdict(int)
        for picture in pictures:
            shown[concepts[picture.draft.name]] += picture.draft.repeats
        empty = [concept.name for concept in recipe.concepts if not shown[concept.name]]
        if empty:
            raise DataError(f"balance: the concept {empty[0]!r} has no pictures to train")
        weights = {concept.name: concept.weight for concept in recipe.concepts}
        factors = balanced(shown, weights)
    return {p.draft.name: p.draft.repeats * factors[concepts[p.draft.name]] for p in pictures}


def balanced(shown: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """The smallest whole factors that bring each concept's showings to its weight.

    Within TOLERANCE if MAX_SCALE allows, else as near as it does.
    """
    ideal = {name: weights[name] / count for name, count in shown.items()}
    least = min(ideal.values())

    def attempt(scale: int) -> tuple[float, dict[str, int]]:
        factors = {name: round(scale * value / least) for name, value in ideal.items()}
        got = {name: shown[name] * factor / weights[name] for name, factor in factors.items()}
        mean = sum(shown[n] * f for n, f in factors.items()) / sum(weights.values())
        return max(abs(value / mean - 1) for value in got.values()), factors

    attempts = [attempt(scale) for scale in range(1, MAX_SCALE + 1)]
    good = [factors for error, factors in attempts if error <= TOLERANCE]
    return good[0] if good else min(attempts, key=lambda found: found[0])[1]
