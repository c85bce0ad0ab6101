"""The arms: the demo's job with one thing changed each. Which run is next, given the results.

Owns the plan. Doesn't train (`job`) and doesn't judge (`judge`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEMO_RATE = "2e-3"
BASELINE = "baseline"


@dataclass(frozen=True)
class Arm:
    """One way to train. All else is as in the baseline."""

    what: str
    """For the page."""
    overrides: tuple[str, ...] = ()
    """Settings, as on the command line."""
    rates: tuple[str, ...] = (DEMO_RATE,)
    """Learning rates: all are tried with the first seed, the others take the best of them."""
    against: str = BASELINE
    """The arm that it differs from in one thing."""


ARMS: dict[str, Arm] = {
    BASELINE: Arm("shift, guidance 1, all Linears, rank 16, AdamW 2e-3 with cosine"),
    "no-shift": Arm("no timestep shift", ("flow.shift=none",)),
    "guidance-4": Arm("guidance 4 in training", ("flow.guidance=4",)),
    "attention": Arm("attention Linears only", ("lora.targets=attention",)),
    "rank-4": Arm("rank 4", ("lora.rank=4",)),
    "rank-64": Arm("rank 64", ("lora.rank=64",)),
    "adamw-4e-3": Arm("AdamW at twice the rate", rates=("4e-3",)),
    "prodigy": Arm("Prodigy", ("optim.name=prodigy",), rates=("1", "2")),
    "schedulefree": Arm(
        "schedule-free AdamW",
        ("optim.name=schedulefree", "optim.schedule=constant"),
        rates=("2e-3", "6e-3"),
    ),
    "adamw8bit-64": Arm(
        "8-bit AdamW at rank 64",
        ("optim.name=adamw8bit", "lora.rank=64"),
        rates=("2e-3", "1e-3"),
        against="rank-64",
    ),
    "adamw8bit-64-2e-3": Arm(
        "8-bit AdamW at rank 64, at that one's rate",
        ("optim.name=adamw8bit", "lora.rank=64"),
        against="rank-64",
    ),
    "dropout": Arm("caption dropout 0.05", ("data.caption_dropout=0.05",)),
    "lora-plus": Arm("LoRA+ 16", ("optim.lora_plus=16",), rates=("5e-4", "2e-3")),
}

GONE: dict[str, str] = {
    "timestep-rank": "fewer ranks at high noise (T-LoRA)",
    "timestep-rank (cut when drawing, too)": "the same files, as no other program draws them",
    "nearest-noise": "the nearest of 8 noises (immiscible diffusion)",
}
"""Arms whose mechanism didn't help and was taken out again; it is in commit 9a22af2."""


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: str
    seed: int
    rate: str


def missing(
    arms: Mapping[str, Arm], seeds: Sequence[int], results: Sequence[Mapping[str, Any]]
) -> Run | None:
    """The next run, a seed after the other, so that every arm is known early; None at the end."""
    done = {Run(row["arm"], row["seed"], row["rate"]) for row in results}
    return next((run for run in _wanted(arms, seeds, results) if run not in done), None)


def _wanted(
    arms: Mapping[str, Arm], seeds: Sequence[int], results: Sequence[Mapping[str, Any]]
) -> Iterator[Run]:
    """In order. Rates after the first seed are known only when that is done."""
    for seed in seeds:
        for name, arm in arms.items():
            if seed == seeds[0]:
                yield from (Run(name, seed, rate) for rate in arm.rates)
            else:
                yield Run(name, seed, best_rate(arm, rows_of(results, name), seed=seeds[0]))


def rows_of(results: Sequence[Mapping[str, Any]], arm: str) -> list[Mapping[str, Any]]:
    """An arm's results."""
    return [row for row in results if row["arm"] == arm]


def best_rate(arm: Arm, rows: Sequence[Mapping[str, Any]], *, seed: int) -> str:
    """By held-out loss of the first seed; the arm's own first rate while there is none."""
    tried = {row["rate"]: row["held_out"] for row in rows if row["seed"] == seed}
    return min(arm.rates, key=lambda rate: tried.get(rate, float("inf")))
