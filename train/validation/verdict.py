"""What a run's checks say: which checkpoint is best, and whether it overfits. Pure functions.

Owns the rules. Doesn't measure (`validate`). All losses are of the same pictures at the same noise,
so two checks are compared picture by picture: pictures differ far more than checks do, and in the
differences that falls out.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

CRITICAL: dict[int, float] = dict(
    zip(
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 30),
        (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.753, 1.725, 1.697),
        strict=True,
    )
)
"""Degrees of freedom -> Student's t that chance exceeds once in 20 times."""

BEST_RULE = (
    "the first checkpoint, or a later one whose held-out loss is lower than the best's so far by "
    "more than one standard error of the difference"
)
ALARM_RULE = (
    "in two checks in a row the held-out loss is higher than at its lowest, picture by picture, "
    "beyond chance (t-test, 5 %), while the training loss has fallen since"
)


TABLES = ("losses", "bands", "worth")
"""Of a check: its figures of which there are several."""


@dataclass(frozen=True)
class Check:
    """What was measured after some step; all processes have the same."""

    step: int
    losses: tuple[float, ...]
    """Of each picture, the mean over its noise levels."""
    bands: tuple[float, ...]
    """Of each noise level, the mean over pictures."""
    drift: float | None = None
    """How far velocities at neutral prompts are from the base's, relative to those."""
    worth: tuple[float, ...] | None = None
    """Of each picture with references, how much higher its loss is without them."""
    training_loss: float | None = None
    """Mean over the steps since the check before; None before the first step."""
    saved: bool = False
    """Whether there is a checkpoint of this step."""

    @property
    def loss(self) -> float:
        """Mean over pictures."""
        return _mean(self.losses)


@dataclass(frozen=True)
class History:
    """All checks of a run. A checkpoint holds it, so that a resumed run goes on with it."""

    held_out: bool
    """Whether the pictures are ones that aren't trained."""
    measure: str
    """Digest of what the checks are made of; checks of another one don't compare."""
    checks: tuple[Check, ...] = ()
    losses_since: tuple[float, int] = (0.0, 0)
    """Sum and number of the training losses since the last check."""

    def trained(self, loss: float) -> "History":
        """After a step of that loss."""
        total, count = self.losses_since
        return replace(self, losses_since=(total + loss, count + 1))

    def checked(self, check: Check) -> "History":
        """With one check more, which takes up the training losses."""
        total, count = self.losses_since
        check = replace(check, training_loss=total / count if count else None)
        return replace(self, checks=(*self.checks, check), losses_since=(0.0, 0))

    def saved(self, step: int) -> "History":
        """With a checkpoint of that step."""
        checks = [replace(c, saved=True) if c.step == step else c for c in self.checks]
        return replace(self, checks=tuple(checks))

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def of_json(cls, facts: dict[str, Any]) -> "History":
        """The inverse, to the bit."""
        checks = [
            Check(**row | {key: tuple(row[key]) for key in TABLES if row.get(key)})
            for row in facts["checks"]
        ]
        since = (facts["losses_since"][0], facts["losses_since"][1])
        return cls(facts["held_out"], facts["measure"], tuple(checks), since)


@dataclass(frozen=True)
class Change:
    """A mean over pictures, such as of a difference, and its standard error."""

    mean: float
    error: float | None
    """None for a single picture, which tells nothing of others."""
    pictures: int

    def __str__(self) -> str:
        return format(self)

    def __format__(self, sign: str) -> str:
        """sign: "+" shows it on positive means too."""
        error = "" if self.error is None else f" ± {self.error:.5f}"
        return f"{self.mean:{sign}.5f}{error}"

    @property
    def rises(self) -> bool:
        """Whether it is above zero beyond chance: the one-sided t-test at 5 %."""
        if self.error is None or self.pictures < 2:
            return False
        freedom = max(known for known in CRITICAL if known < self.pictures)
        return self.mean > CRITICAL[freedom] * self.error


def summary(values: Sequence[float]) -> Change:
    """Mean and standard error of one value a picture."""
    count, mean = len(values), _mean(values)
    if count < 2:
        return Change(mean, None, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Change(mean, math.sqrt(variance / count), count)


def change(check: Check, *, since: Check) -> Change:
    """The loss of a check against that of another, picture by picture."""
    return summary([a - b for a, b in zip(check.losses, since.losses, strict=True)])


def best(checks: Sequence[Check]) -> Check | None:
    """Of the checks that have a checkpoint, the best by BEST_RULE; None if there is none.

    The order in which they come decides, so the best so far is all that has to be kept; among
    equals that is the earlier one, which has drifted less.
    """
    found: Check | None = None
    for check in (check for check in checks if check.saved):
        if found is None:
            found = check
        else:
            gain = change(check, since=found)
            found = check if -gain.mean > (gain.error or 0.0) else found
    return found


def overfits(history: History) -> bool:
    """Whether the last check gives the alarm, by ALARM_RULE. Never for trained pictures."""
    checks = history.checks
    if not history.held_out or len(checks) < 3:
        return False
    lowest = min(range(len(checks)), key=lambda number: checks[number].loss)
    if not all(change(check, since=checks[lowest]).rises for check in checks[-2:]):
        return False
    known = [check.training_loss for check in checks[lowest:] if check.training_loss is not None]
    return len(known) > 1 and _mean(known[-2:]) < known[0]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
