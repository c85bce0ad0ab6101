"""What the table of `bench_gpu` is to show: each aim met, missed or not measured, with its figure.

Reads rows, measures nothing. Only rows of dev on a GPU count, so tiny ones say nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from scripts.bench_case import GB

Result = Mapping[str, Any]
Results = Mapping[str, Result]
"""By the rows' names."""
Verdict = tuple[bool, str] | None
"""Whether it is met and by what figure; None if no row tells."""

SHARE, TIMES, COST = 0.65, 1.6, 0.25

PLAIN = ("dev", "dev compiled", "dev, least recomputed", "dev compiled, least recomputed")
"""bf16, 1024, batch 1, rank 16, nothing streamed: the best of them counts."""


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """An aim each."""
    results = {row["name"]: row["result"] for row in rows if "result" in row}
    results = {name: result for name, result in results.items() if _counts(result)}
    for aim, judge in AIMS.items():
        found = judge(results)
        if found is None:
            yield f"not measured: {aim}"
        else:
            met, figure = found
            yield f"{'met' if met else 'MISSED'}: {aim}: {figure}"


def _counts(result: Result) -> bool:
    on_gpu = str(result.get("device", "")).startswith("cuda")
    return on_gpu and result["case"].get("shape") == "dev"


def _share(results: Results) -> Verdict:
    """By the higher one of both rates, that of the model's own matrices and that of large ones."""
    found = {}
    for name in PLAIN:
        if "share_of_rate" in (result := results.get(name, {})).get("kindling", {}):
            own = sum(result["rates"]) / len(result["rates"])
            highest = max(own, result["square_rate"])
            found[name] = (result["kindling"]["share_of_rate"] * own / highest, highest)
    if not found:
        return None
    name = max(found, key=lambda one: found[one])
    share, rate = found[name]
    return share >= SHARE, f"{100 * share:.1f} % of {rate / 1e12:.0f} TFLOP/s ({name})"


def _times(results: Results) -> Verdict:
    found = {name: results[name]["ratio"] for name in PLAIN if "ratio" in results.get(name, {})}
    if not found:
        return None
    name = max(found, key=lambda one: found[one])
    peer = results[name]["peer"]
    return found[name] >= TIMES, (
        f"{found[name]:.2f} times, {peer['seconds']['median']:.3f} s a step with "
        f"{peer['optimizer']} ({name})"
    )


def _fits(results: Results, row: str, *, resident: bool = False) -> Verdict:
    """Trained, and torch's memory and all else on the GPU together within the limit.

    resident: no block may be streamed.
    """
    if row not in results:
        return None
    result = results[row]
    ours, limit = result["kindling"], result["case"]["limit_gb"] * GB
    if "seconds" not in ours:
        return False, f"no room ({ours['out_of_memory']})"
    peaks, plan = ours["peaks"], result["plan"]
    used = peaks["reserved"] + peaks["outside"]
    stays = plan["resident"] == plan["blocks"]
    return used <= limit and (stays or not resident), (
        f"{used / GB:.1f} GB of GPU, {peaks['ram'] / GB:.1f} GB of RAM, "
        f"{plan['resident']} of {plan['blocks']} blocks resident, "
        f"{ours['seconds']['median']:.3f} s a step at {result['case']['size']}"
    )


def _cost(results: Results) -> Verdict:
    if "dev half streamed" not in results or "dev" not in results:
        return None
    streamed, plain = results["dev half streamed"], results["dev"]["kindling"]
    if "seconds" not in streamed["kindling"] or "seconds" not in plain:
        return False, "no room"
    cost = streamed["kindling"]["seconds"]["median"] / plain["seconds"]["median"] - 1
    plan = streamed["plan"]
    return cost < COST, f"{100 * cost:+.1f} %, {plan['resident']} of {plan['blocks']} resident"


AIMS: dict[str, Callable[[Results], Verdict]] = {
    "dev, bf16, 1024, batch 1, rank 16: at least 65 % of the measured matmul rate": _share,
    "the same: at least 1.6 times as many images a second as diffusers' plain recipe": _times,
    "dev trains at 1024 within 24 GB": partial(_fits, row="dev in 24 GB"),
    "dev trains at 512 within 16 GB": partial(_fits, row="dev in 16 GB, 512"),
    "dev trains within 80 GB without streaming": partial(_fits, row="dev in 80 GB", resident=True),
    "half of the blocks streamed cost less than 25 % time": _cost,
}
