"""The benchmark: that it measures what it says and writes all of it down, at a tiny size."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from scripts import bench, bench_data, bench_options, bench_pictures, bench_report, bench_start


@pytest.mark.parametrize(("text", "number"), [("60M", 60_000_000), ("1.5K", 1500), ("7", 7)])
def test_counts(text: str, number: int) -> None:
    assert bench_options.count(text) == number


def test_a_wrong_count_is_named() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'many' isn't a number"):
        bench_options.count("many")


def test_ratios_are_taken_pair_by_pair() -> None:
    # something else began amid the second pair: a ratio of medians would say 0.1
    found = bench_report.ratios([1.0, 1.0, 11.0], [1.0, 10.0, 10.0])
    assert found["samples"] == pytest.approx([1.0, 0.1, 1.1])
    assert found["median"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="zip"):
        bench_report.ratios([1.0], [1.0, 2.0])


def test_all_samples_are_kept() -> None:
    found = bench_report.spread([3.0, 1.0, 2.0])
    assert found == {"median": 2.0, "min": 1.0, "max": 3.0, "samples": [3.0, 1.0, 2.0]}


def test_tables_align() -> None:
    lines = bench_report.table(("what", "s"), [("a", "1.00"), ("longer", "2")]).splitlines()
    assert lines == ["what       s", "------  ----", "a       1.00", "longer     2"]


def test_both_sides_train_the_same_thing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--parameters", "600K", "--text-tokens", "8", "--rank", "2", "--no-memory"]
    arguments = ["train", *small, "--size", "64", "--steps", "3", "--json", "bench/t.json"]
    assert bench.main(arguments) == 0
    report = json.loads(Path("bench/t.json").read_text(encoding="utf-8"))
    assert report["command"] == ["kindling", "bench", *arguments]
    assert {"cpu", "cores", "ram", "gpu", "threads"} <= report["machine"].keys()
    assert {"python", "torch", "diffusers", "peft"} <= report["versions"].keys()
    (result,) = report["results"]
    assert result["loss_difference"] < 1e-5
    assert result["image_tokens"] == 16
    assert 500_000 < result["parameters"] < 800_000
    for key in ("kindling", "bare", "ratio"):
        assert len(result[key]["samples"]) == 3
        assert result[key]["min"] <= result[key]["median"] <= result[key]["max"]
    assert capsys.readouterr().out.startswith("pixels  tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["bench"]


def test_phases_add_up(tmp_path: Path) -> None:
    ends = {"begin": 103.0, "data": 104.0, "encode": 104.5, "load": 106.0}
    (tmp_path / bench_start.TIMINGS).write_text(json.dumps(ends))
    for name, at in (
        (bench_start.METRICS, 109.0),
        ("previews/step-000000-0.png", 107.0),
        ("previews/step-000000-1.png", 108.0),
        ("previews/step-000001-0.png", 110.0),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (at, at))
    assert bench_start.phases(tmp_path, began=100.0) == {
        "imports": 3.0,
        "data": 1.0,
        "encode": 0.5,
        "load": 1.5,
        "preview": 2.0,
        "first step": 1.0,
        "to first step": 9.0,
    }


def test_a_job_without_previews_has_an_empty_phase(tmp_path: Path) -> None:
    (tmp_path / bench_start.TIMINGS).write_text(
        json.dumps({"begin": 1.0, "data": 2.0, "encode": 3.0, "load": 4.0})
    )
    (tmp_path / bench_start.METRICS).touch()
    os.utime(tmp_path / bench_start.METRICS, (5.0, 5.0))
    found = bench_start.phases(tmp_path, began=0.0)
    assert (found["preview"], found["first step"]) == (0.0, 1.0)
    header, _, line = bench_report.table(
        bench_start.HEADER,
        bench_start.rows({"warm": {k: bench_report.spread([v]) for k, v in found.items()}}),
    ).splitlines()
    assert len(header) == len(line)


def test_a_job_alone_has_its_own_memory() -> None:
    """Its imports are here, too: torch's alone take 0.2 GB, with CUDA 0.5 GB."""
    held = bytearray(b"1") * 300_000_000
    cost = bench_data.alone(bench_data.bucket, 10, cores=1)
    assert 0 < cost.seconds < 5
    assert 10_000_000 < cost.peak < psutil.Process().memory_info().rss - len(held) // 2


def test_the_costs_of_a_job_are_those_of_its_processes_too() -> None:
    code = "import time; a = bytearray(b'1' * 100_000_000); sum(range(20_000_000)); time.sleep(0.5)"
    with bench_data.Family() as family:
        before = family.costs()
        subprocess.run([sys.executable, "-c", code], check=True)
        cpu, peak = family.costs()
    assert cpu - before[0] > 0.2
    assert peak > psutil.Process().memory_info().rss + 90_000_000


def test_the_data_benchmark_measures_all_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a process each would take most of a minute here, for their imports
    monkeypatch.setattr(
        bench_data,
        "alone",
        lambda job, *rest, cores: bench_data.Cost(job(*rest) or 1.0, 1.0, bench_data.peak_ram()),
    )
    arguments = ["data", "--pictures", "8", "--plan", "30", "--encode", "2"]
    places = ["--folder", str(tmp_path), "--json", str(tmp_path / "x.json")]
    assert bench.main([*arguments, *places]) == 0
    results = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["results"]
    counts = {kind: phase["pictures"] for kind, phase in results["phases"].items()}
    assert counts == {
        "bare Pillow": 8,
        "inspect": 8,
        "inspect, a quarter of them": 2,
        "inspect, with page and JSON": 8,
        "inspect, with page and JSON, a quarter": 2,
        "bucketing": 8,
        "toy encoding at 256 pixels": 2,
        "plan, without decoding": 30,
    }
    for phase in results["phases"].values():
        assert phase["seconds"]["median"] > 0
        assert phase["peak"] > 10_000_000
    assert results["times as fast as bare Pillow"].keys() == {"inspect", bench_data.PAGE}
    assert "plan, without decoding" in capsys.readouterr().out


def test_generated_pictures_are_made_once_and_alike_everywhere(tmp_path: Path) -> None:
    root = bench_pictures.photos(tmp_path, count=4)
    files = sorted(root.rglob("*.jpg"))
    assert [path.parent.name for path in files] == ["0", "1", "2", "3"]
    assert files[2].read_bytes() == bench_pictures.photo(2)
    files[0].write_bytes(b"kept")
    bench_pictures.photos(tmp_path, count=4)
    assert files[0].read_bytes() == b"kept"
