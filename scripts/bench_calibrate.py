"""What `kindling plan` says beside what a GPU took: `python -m scripts.bench_calibrate FILE`.

Reads the file of `bench_gpu`, prints each row's error and the values that the plan's assumed
constants should have. Changes nothing: the constants have docstrings that say where they are from.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts import bench_report
from train.planning import budget, machine

HEADER = ("row", "GB", "plan", "error", "reserved", "outside GB", "s/step", "plan", "error")

COMPARED = 1.1
"""Streaming that makes a step longer by less says nothing of the link."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the constants. 1 if the file has no row with figures."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_calibrate", description=__doc__)
    parser.add_argument("file", type=Path, help="bench-gpu.json")
    options = parser.parse_args(argv)
    rows = list(measured(json.loads(options.file.read_text(encoding="utf-8"))))
    if not rows:
        print("no row has figures of a GPU")
        return 1
    print(bench_report.table(HEADER, [_line(row) for row in rows]))
    print("\n".join(constants(rows)))
    return 0


def measured(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows that ran, flat: bytes and seconds."""
    for row in report["rows"]:
        result = row.get("result", {})
        peaks = result.get("kindling", {}).get("peaks", {})
        if peaks.get("allocated"):
            yield {
                "name": row["name"],
                **{key: peaks[key] for key in ("allocated", "reserved", "outside")},
                "seconds": result["kindling"]["seconds"]["median"],
                "rate": statistics.mean(result["rates"]),
                "compiled": result["settings"]["speed"]["compile"],
                "quantize": result["settings"]["base"]["quantize"],
                "plan": result["plan"],
                "gpu": report["machine"]["gpu"],
            }


def constants(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Each assumed constant with the value that these rows speak for."""
    outside = max(row["outside"] for row in rows)
    slack = max(row["reserved"] / row["allocated"] - 1 for row in rows)
    short = max(row["allocated"] / row["plan"]["allocated"] - 1 for row in rows)
    yield _said("budget.CONTEXT", budget.CONTEXT / 1e9, outside / 1e9, "GB, the most outside torch")
    yield _said("budget.FRAGMENTATION", budget.FRAGMENTATION, slack, "the most reserved beyond use")
    yield _said("budget.MARGIN", budget.MARGIN, max(0.0, short), "at least: the worst shortfall")
    plain = [row for row in rows if row["plan"]["seconds"] and not _streamed(row)]
    eager = [row for row in plain if not row["compiled"] and row["quantize"] == "none"]
    if eager:
        ratio = statistics.median(row["plan"]["seconds"] / row["seconds"] for row in eager)
        share = machine.SHARE_MEASURED * ratio
        yield _said("machine.SHARE_MEASURED", machine.SHARE_MEASURED, share, "eager, not quantised")
        yield from _share(eager, share)
    yield from _link(rows)


def _share(rows: Sequence[dict[str, Any]], share: float) -> Iterator[str]:
    """By the card's published rate, where it is one of the table's."""
    for card in machine.CARDS.values():
        if card.name.split()[0] in rows[0]["gpu"]:
            published = share * statistics.median(row["rate"] for row in rows) / card.matmul
            yield _said("machine.SHARE", machine.SHARE, published, f"of the {card.name}'s rate")


def _link(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Bytes a second of streams that held the step up."""
    seconds = {row["name"]: row["seconds"] for row in rows}
    for row in rows:
        plain = seconds.get(row["name"].removesuffix(" half streamed"))
        if _streamed(row) and plain and row["seconds"] > COMPARED * plain:
            rate = 2 * row["plan"]["pinned"] / row["seconds"] / 1e9
            yield f"machine.LINK_SHARE: {row['name']} moved {rate:.1f} GB/s; divide by the link's"


def _streamed(row: dict[str, Any]) -> bool:
    return row["plan"]["resident"] < row["plan"]["blocks"]


def _said(name: str, now: float, found: float, why: str) -> str:
    return f"{name}: {now:.3g} is assumed, {found:.3g} measured ({why})"


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    plan, seconds = row["plan"], row["plan"]["seconds"]
    return (
        row["name"],
        f"{row['allocated'] / 1e9:.1f}",
        f"{plan['allocated'] / 1e9:.1f}",
        f"{100 * (plan['allocated'] / row['allocated'] - 1):+.1f} %",
        f"{row['reserved'] / row['allocated']:.3f}",
        f"{row['outside'] / 1e9:.2f}",
        f"{row['seconds']:.3f}",
        f"{seconds:.3f}" if seconds else "-",
        f"{100 * (seconds / row['seconds'] - 1):+.0f} %" if seconds else "-",
    )


if __name__ == "__main__":
    sys.exit(main())
