"""Constants of the plan from measured rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import bench_calibrate
from train.planning import machine


def row(name: str, seconds: float, *, allocated: float = 10e9, **changes: Any) -> dict[str, Any]:
    plan = {"allocated": 9e9, "seconds": 2.0, "pinned": 20e9, "resident": 56, "blocks": 56}
    settings = {"speed": {"compile": False}, "base": {"quantize": "none"}}
    peaks = {"allocated": allocated, "reserved": 1.1 * allocated, "outside": 7e8}
    return {
        "name": name,
        "result": {
            "plan": plan | changes,
            "rates": [6e14, 7e14],
            "settings": settings,
            "kindling": {"peaks": peaks, "seconds": {"median": seconds}},
        },
    }


def test_each_constant_follows_from_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row("dev", 4.0),
        row("dev half streamed", 5.0, resident=28),
        row("klein-4b", 4.0, allocated=9e9),
        {"name": "dev nf4", "failed": 1, "end": []},
        {"name": "dev x4", "result": {"kindling": {"out_of_memory": "training"}}},
    ]
    path = tmp_path / "bench-gpu.json"
    path.write_text(json.dumps({"machine": {"gpu": "NVIDIA H200"}, "rows": rows}))
    assert bench_calibrate.main([str(path)]) == 0
    text = capsys.readouterr().out
    share = machine.SHARE_MEASURED / 2
    for line in (
        "budget.CONTEXT: 0.6 is assumed, 0.7 measured (GB, the most outside torch)",
        "budget.FRAGMENTATION: 0.05 is assumed, 0.1 measured (the most reserved beyond use)",
        "budget.MARGIN: 0.03 is assumed, 0.111 measured (at least: the worst shortfall)",
        f"machine.SHARE_MEASURED: 0.6 is assumed, {share:.3g} measured (eager, not quantised)",
        f"machine.SHARE: 0.5 is assumed, {share * 6.5e14 / 989.4e12:.3g} measured (of the H200's",
        "machine.LINK_SHARE: dev half streamed moved 8.0 GB/s; divide by the link's",
    ):
        assert line in text
    lines = [line.split() for line in text.splitlines()]
    assert ["dev", "10.0", "9.0", "-10.0", "%", "1.100", "0.70"] in [line[:7] for line in lines]


def test_a_file_without_figures_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench-gpu.json"
    path.write_text(json.dumps({"rows": [{"name": "dev", "left_out": "no time left"}]}))
    assert bench_calibrate.main([str(path)]) == 1
    assert capsys.readouterr().out == "no row has figures of a GPU\n"
