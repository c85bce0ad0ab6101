"""The aims at the table's end: each is judged by its own rows, and by nothing tiny or absent."""

from typing import Any

import pytest

from scripts import bench_aims

SHARE, TIMES, IN_24, IN_16, IN_80, STREAMED = range(6)


def row(name: str, *, seconds: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    ours: dict[str, Any] = {"out_of_memory": "training"}
    if seconds is not None:
        peaks = {"reserved": 20e9, "outside": 1e9, "ram": 30e9}
        ours = {"seconds": {"median": seconds}, "share_of_rate": 0.7, "peaks": peaks}
    result = {
        "device": "cuda",
        "case": {"shape": "dev", "limit_gb": 24.0, "size": 1024},
        "plan": {"resident": 56, "blocks": 56},
        "rates": [7e14, 7e14],
        "square_rate": 7e14,
        "kindling": ours,
        **changes,
    }
    return {"name": name, "result": result}


def said(*rows: dict[str, Any]) -> list[str]:
    return list(bench_aims.lines(rows))


def test_without_rows_nothing_was_measured() -> None:
    failed = {"name": "dev", "failed": 1}
    assert [line.split(":")[0] for line in said(failed)] == ["not measured"] * 6


@pytest.mark.parametrize(
    "changes", [{"device": "cpu"}, {"case": {"shape": "small"}}, {"case": {"shape": "klein-4b"}}]
)
def test_only_dev_on_a_gpu_counts(changes: dict[str, Any]) -> None:
    assert all(line.startswith("not measured") for line in said(row("dev", **changes)))


def test_the_best_plain_row_counts_by_the_higher_rate() -> None:
    slow, fast = row("dev"), row("dev compiled")
    slow["result"]["kindling"]["share_of_rate"] = 0.5
    assert said(slow, fast)[SHARE].startswith("met")
    assert said(slow, fast)[SHARE].endswith("70.0 % of 700 TFLOP/s (dev compiled)")
    assert said(slow)[SHARE].startswith("MISSED")
    fast["result"]["square_rate"] = 8e14  # 70 % of 700 are 61.25 % of 800
    assert said(fast)[SHARE].startswith("MISSED")
    assert "61.3 % of 800 TFLOP/s" in said(fast)[SHARE]
    assert said(row("dev fp8"))[SHARE].startswith("not measured")


def test_times_as_fast_need_a_peer() -> None:
    peer = {"seconds": {"median": 2.0}, "optimizer": "AdamW8bit"}
    assert said(row("dev"))[TIMES].startswith("not measured")
    assert said(row("dev", ratio=1.59, peer=peer))[TIMES].startswith("MISSED")
    best = said(row("dev", ratio=1.2, peer=peer), row("dev compiled", ratio=1.6, peer=peer))
    assert best[TIMES].startswith("met")
    assert best[TIMES].endswith("1.60 times, 2.000 s a step with AdamW8bit (dev compiled)")


def test_a_limit_is_of_all_that_is_on_the_gpu() -> None:
    fits = row("dev in 24 GB")
    assert said(fits)[IN_24].startswith("met")
    assert "21.0 GB of GPU, 30.0 GB of RAM" in said(fits)[IN_24]
    fits["result"]["kindling"]["peaks"]["outside"] = 4.1e9
    assert said(fits)[IN_24].startswith("MISSED")
    full = said(row("dev in 24 GB", seconds=None))
    assert full[IN_24].endswith("no room (training)")
    assert full[IN_24].startswith("MISSED")
    assert full[IN_16].startswith("not measured")


def test_only_80_gb_forbid_streaming() -> None:
    partly = {"resident": 50, "blocks": 56}
    assert said(row("dev in 80 GB"))[IN_80].startswith("met")
    assert said(row("dev in 80 GB", plan=partly))[IN_80].startswith("MISSED")
    assert said(row("dev in 16 GB, 512", plan=partly))[IN_16].startswith("met")


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(1.24, "met"), (1.26, "MISSED"), (None, "MISSED")]
)
def test_streaming_is_compared_with_the_same_row_without(
    seconds: float | None, verdict: str
) -> None:
    half = row("dev half streamed", seconds=seconds, plan={"resident": 28, "blocks": 56})
    assert said(half, row("dev"))[STREAMED].startswith(verdict)
    assert said(half)[STREAMED].startswith("not measured")
