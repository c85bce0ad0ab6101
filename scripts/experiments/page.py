"""Results to a page: each arm's mean and spread over seeds, and its difference, paired by seed.

Two runs of one seed share pictures, order, noise levels and noise (but for the arm that changes
just that), so what the seed does falls out of their difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scripts.experiments.arms import ARMS, BASELINE, GONE, best_rate, rows_of

Row = Mapping[str, Any]

COLUMNS = {
    "held_out": "held-out loss",
    "likeness": "likeness",
    "character": "character",
    "obeyed": "others obeyed",
    "intruded": "intruded",
    "drift": "drift",
}
PERCENT = ("character", "obeyed", "intruded", "drift")
CRITICAL = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
"""Degrees of freedom -> Student's |t| that chance exceeds once in 20 times."""


@dataclass(frozen=True)
class Difference:
    """Of an arm to another, over the seeds that both have."""

    mean: float
    error: float | None
    """Standard error; None for one seed."""
    seeds: int

    @property
    def beyond_chance(self) -> bool:
        """By a two-sided t-test at 5 %. One seed never is, nor are seeds that agree to the bit."""
        return bool(self.error) and abs(self.mean) > CRITICAL[self.seeds - 1] * (self.error or 0)


def difference(own: Mapping[int, Row], other: Mapping[int, Row], key: str) -> Difference | None:
    """By seed; None where they share none."""
    both = sorted(own.keys() & other.keys())
    if not both:
        return None
    values = [own[seed][key] - other[seed][key] for seed in both]
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Difference(fmean(values), error, len(values))


def chosen(results: Sequence[Row], name: str, *, first: int) -> dict[int, Row]:
    """An arm's rows by seed, at the rate that its first seed preferred."""
    rows = rows_of(results, name)
    arm = ARMS.get(name)
    rate = best_rate(arm, rows, seed=first) if arm else None
    return {row["seed"]: row for row in rows if rate in (None, row["rate"])}


def page(report: Mapping[str, Any]) -> str:
    """docs/experiments/README.md, but for what a person concludes from it."""
    results, first = report["results"], report["job"]["seeds"][0]
    names = list(dict.fromkeys([*ARMS, *(row["arm"] for row in results)]))
    table = [_line(["arm", "rate", *COLUMNS.values(), "seeds"])]
    table.append("|---" * (len(COLUMNS) + 3) + "|")
    base = {first: report["base"]}
    table.append(_line(["*the base alone*", "", *(_cell(base, {}, key) for key in COLUMNS), ""]))
    for name in names:
        own = chosen(results, name, first=first)
        if not own:
            continue
        against = ARMS[name].against if name in ARMS else BASELINE
        other = chosen(results, against, first=first) if name != against else {}
        what = f"**{name}**: {ARMS[name].what if name in ARMS else GONE[name]}"
        what += "" if against == BASELINE else f" (against {against})"
        rate = next(iter(own.values()))["rate"]
        cells = [_cell(own, other, key) for key in COLUMNS]
        table.append(_line([what, rate, *cells, str(len(own))]))
    parts = [*_head(report), "", *table, "", *_rates(results, first), "", *_levels(results, first)]
    parts += ["", *_noise(results, first), "", *_course(report.get("course", []))]
    return "\n".join(parts).rstrip() + "\n"


def _head(report: Mapping[str, Any]) -> list[str]:
    job, machine = report["job"], report["machine"]
    return [
        "# Experiments on the toy base",
        "",
        f"`{' '.join(report['command'])}`, {report['date'][:10]}, {machine['cores']} cores of an "
        f"{machine['cpu']} that other work shared, torch {report['versions']['torch']}. Every "
        "figure is in [toy.json](toy.json), what follows from them in [reading.md](reading.md); "
        "`--page` writes this page anew.",
        "",
        f"The demo's job ({job['steps']} steps of 4 pictures, cosine), one thing changed in each "
        f"arm, seeds {', '.join(map(str, job['seeds']))}. All arms are judged alike, by their "
        "exported file:",
        "",
        f"- *held-out loss*: of {job['portraits']} portraits at other places and sizes than the "
        f"trained ones, at fixed noise and {job['levels']} noise levels of the default density, "
        "told guidance 1",
        f"- *character*: of {job['count']} prompts with the trigger, those whose picture shows it "
        "(score of 0.5 or more); *likeness*: the mean score, in [0, 1]",
        f"- *others obeyed*, *intruded*: of {job['count']} prompts without it, those that show "
        "what was asked for, and those that show the character",
        "- *drift*: how far velocities at two neutral prompts are from the base's",
        "",
        f"Pictures are drawn in {job['drawing']['steps']} steps at guidance "
        f"{job['drawing']['guidance']:g}. Each cell is the mean over seeds ± their standard "
        "deviation, and in parentheses the difference to the baseline (or to the arm named), "
        "paired by seed, ± its standard error. **Bold** differences are beyond chance by a "
        "two-sided t-test at 5 %, uncorrected: of 20 differences between equals one is bold, too. "
        "What isn't bold may still differ: three seeds see large effects only.",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(own: Mapping[int, Row], other: Mapping[int, Row], key: str) -> str:
    values = [row[key] for row in own.values() if key in row]
    if not values:
        return ""
    scale, digits = (100, 0) if key in PERCENT else (1, 3)
    unit = " %" if key in PERCENT else ""
    text = f"{scale * fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * stdev(values):.{digits}f}"
    found = difference(own, other, key)
    if found is None:
        return text + unit
    change = f"{scale * found.mean:+.{digits}f}"
    if found.error is not None:
        change += f" ± {scale * found.error:.{digits}f}"
    return f"{text}{unit} ({f'**{change}**' if found.beyond_chance else change})"


def _rates(results: Sequence[Row], first: int) -> list[str]:
    """What was tried with the first seed."""
    lines = [
        f"Rates, tried with seed {first}; the one of lower held-out loss went on:",
        "",
        _line(["arm", "rate", "held-out loss", "likeness", "character"]),
        "|---|---|---|---|---|",
    ]
    for name, arm in ARMS.items():
        for row in rows_of(results, name) if len(arm.rates) > 1 else ():
            if row["seed"] == first:
                figures = [f"{row[key]:.3f}" for key in ("held_out", "likeness")]
                lines.append(
                    _line([name, row["rate"], *figures, f"{100 * row['character']:.0f} %"])
                )
    return lines


def _levels(results: Sequence[Row], first: int) -> list[str]:
    """Held-out loss by noise level: the baseline's, and the arms' differences to it."""
    baseline = chosen(results, BASELINE, first=first)
    if not baseline:
        return []
    sigmas = list(next(iter(baseline.values()))["by_sigma"])
    means = [fmean(row["by_sigma"][sigma] for row in baseline.values()) for sigma in sigmas]
    lines = ["Held-out loss by noise level; arms as differences to the baseline:", ""]
    lines += [_line(["sigma", *sigmas]), "|---" * (len(sigmas) + 1) + "|"]
    lines.append(_line(["baseline", *(f"{mean:.3f}" for mean in means)]))
    for name in dict.fromkeys([*ARMS, *(row["arm"] for row in results)]):
        own = chosen(results, name, first=first)
        if name == BASELINE or not own.keys() & baseline.keys():
            continue
        levels = {seed: row["by_sigma"] for seed, row in own.items()}
        others = {seed: row["by_sigma"] for seed, row in baseline.items()}
        found = [difference(levels, others, sigma) for sigma in sigmas]
        cells = [
            f"**{one.mean:+.3f}**" if one.beyond_chance else f"{one.mean:+.3f}"
            for one in found
            if one is not None
        ]
        lines.append(_line([name, *cells]))
    return lines


def _noise(results: Sequence[Row], first: int) -> list[str]:
    """How far apart runs of one arm are by their seeds alone."""
    arms = [chosen(results, name, first=first) for name in ARMS]
    several = [list(rows.values()) for rows in arms if len(rows) > 1]
    if not several:
        return []
    parts = []
    for key in ("held_out", "likeness", "character", "obeyed"):
        spread = math.sqrt(fmean(stdev([row[key] for row in rows]) ** 2 for rows in several))
        shown = f"{100 * spread:.0f} %" if key in PERCENT else f"{spread:.3f}"
        parts.append(f"{COLUMNS[key]} {shown}")
    return [
        "Standard deviation between seeds of one arm, pooled over arms: " + ", ".join(parts) + "."
    ]


def _course(rows: Sequence[Row]) -> list[str]:
    """Figures while training."""
    if not rows:
        return []
    keys = {
        "trained": "loss, the 12 trained",
        "at_home": "loss, their places, other grounds",
        "held_out": "loss, other places and sizes",
        "likeness": "likeness",
        "character": "character",
        "obeyed": "others obeyed",
    }
    lines = [f"While training, seed {rows[0]['seed']} (`--course`):", ""]
    lines += [_line(["arm", "step", *keys.values()]), "|---" * (len(keys) + 2) + "|"]
    for row in rows:
        cells = [f"{100 * row[k]:.0f} %" if k in PERCENT else f"{row[k]:.3f}" for k in keys]
        lines.append(_line([row["arm"], str(row["step"]), *cells]))
    return lines
