"""Which pictures of a set are held out of training, decided by their content alone.

Owns the choice and the memo of what pictures look like. A picture's name, its place in the folder
and the run's seed don't matter, so every run on the same pictures holds out the same ones; a new
picture may join them or take the place of one, no more. Near-duplicates stay together: a picture
whose twin is trained would only measure memory.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_tools import examine, pictures, workers

FEWEST = 4
"""Pictures held out at least: of three or fewer, the standard error is itself a guess."""
LARGEST_PART = 5
"""At most one picture of so many is held out; so a set of fewer than 20 is trained whole."""


@dataclass(frozen=True)
class Look:
    """What tells near-duplicates; see `examine.Measures`."""

    phash: int
    colours: bytes


class Looks:
    """Looks of pictures by the sha256 of their files, kept in a text file: one line for each.

    A picture of 12 megapixels takes a twentieth of a second to look at.
    """

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        self._known: dict[str, Look] = {}
        lines = memo.read_text(encoding="utf-8").splitlines() if memo.exists() else []
        for words in (line.split() for line in lines):
            if len(words) == 3 and len(words[2]) == 384:  # not cut short by a kill
                self._known[words[0]] = Look(int(words[1], 16), bytes.fromhex(words[2]))

    def of(self, files: Iterable[tuple[str, Path]], *, progress: bool) -> dict[str, Look]:
        """sha256 -> look of each file, looking only at those that are new."""
        wanted = dict(files)
        new = {sha256: path for sha256, path in wanted.items() if sha256 not in self._known}
        found = tqdm(
            workers.ordered(_look, new.values()),
            total=len(new),
            desc="look for near-duplicates",
            delay=2,
            disable=not progress,
        )
        lines = [""]
        for sha256, look in zip(new, found, strict=True):
            self._known[sha256] = look
            lines.append(f"{sha256} {look.phash:x} {look.colours.hex()}")
        if new:
            self._memo.parent.mkdir(parents=True, exist_ok=True)
            with self._memo.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        return {sha256: self._known[sha256] for sha256 in wanted}


def _look(path: Path) -> Look:
    _, small = pictures.look(path, side=examine.SIDE)
    measures = examine.measure(small)
    return Look(measures.phash, measures.colours)


def count(size: int, *, fraction: float, most: int) -> int:
    """How many of `size` pictures to hold out; 0 if they are too few."""
    wanted = min(max(FEWEST, round(fraction * size)), most)
    return wanted if wanted * LARGEST_PART <= size else 0


def choose(
    digests: Sequence[str], looks: Sequence[Look], *, own: int, wanted: int
) -> list[list[int]]:
    """Places, of the first `own`, to hold out: up to `wanted` groups of near-duplicates or one.

    Groups are taken in the order of a hash of their content, the first of each by that hash first;
    not those that would hold out too large a part, and not those that reach beyond the first `own`
    pictures, into sets that are trained.
    """
    chosen: list[list[int]] = []
    groups = [sorted(group, key=lambda i: rank(digests[i])) for group in _groups(looks)]
    for group in sorted(groups, key=lambda group: rank(digests[group[0]])):
        to_come = wanted - len(chosen) - 1
        held = sum(map(len, chosen)) + len(group) + to_come  # room for the others, at one each
        if to_come >= 0 and max(group) < own and held * LARGEST_PART <= own:
            chosen.append(group)
    return chosen


def twins(looks: Sequence[Look], *, own: int) -> list[int]:
    """Of the first `own` pictures, those that have a near-duplicate among the others."""
    groups = [group for group in _groups(looks) if max(group) >= own]
    return sorted(index for group in groups for index in group if index < own)


def rank(sha256: str) -> bytes:
    """A place in a row that has nothing to do with the picture."""
    return hashlib.sha256(f"kindling validation 1 {sha256}".encode()).digest()


def _groups(looks: Sequence[Look]) -> list[list[int]]:
    """Near-duplicates, and pictures that are alone."""
    found = examine.alike(looks)
    grouped = {index for group in found for index in group}
    return found + [[index] for index in range(len(looks)) if index not in grouped]
