"""The whole table: its rows are valid, nothing that was measured is lost, and it runs anywhere."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import bench, bench_aims, bench_case, bench_gpu
from scripts.bench_gpu import Row

RESULT = {
    "case": {},
    "plan": {"allocated": 9e9},
    "kindling": {
        "seconds": {"median": 2.0, "min": 1.9, "max": 2.1},
        "images_per_second": 0.5,
        "share_of_rate": 0.61,
        "peaks": {"allocated": 10e9, "reserved": 11e9, "ram": 4e9},
    },
}
REPORT = {"date": "today", "machine": {"gpu": None}, "versions": {}, "results": [RESULT]}


def fake(monkeypatch: pytest.MonkeyPatch, *, fails: tuple[str, ...] = ()) -> list[str]:
    """Rows without processes; the names of those that were run."""
    ran = []

    def measure(row: Row, path: Path, **_: Any) -> tuple[int | str, list[str]]:
        ran.append(row.name)
        if row.name in fails:
            return 1, ["Traceback", "ImportError: no such thing"]
        path.write_text(json.dumps(REPORT), encoding="utf-8")
        return 0, []

    monkeypatch.setattr(bench_gpu, "measure", measure)
    return ran


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / bench_gpu.REPORT).read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", bench_gpu.ROWS, ids=lambda row: row.name)
def test_every_row_can_be_asked_for(tmp_path: Path, row: Row) -> None:
    options = bench.build_parser().parse_args(["train", *row.arguments.split()])
    (case,) = bench_case.of_options(options)
    config = case.config(tmp_path)
    assert case.size in (512, 768, 1024)
    if case.limit_gb is not None:
        assert f"{case.limit_gb:g} GB" in row.name
    if case.peer:
        assert (config.base.quantize, config.memory.resident_blocks) == ("none", "all")


def test_rows_have_names_of_their_own_and_the_first_call_the_aims() -> None:
    names = [row.name for row in bench_gpu.ROWS]
    assert len(set(names)) == len(names)
    assert bench_gpu.ROWS[: len(bench_gpu.AIMS)] == bench_gpu.AIMS
    assert sum(row.seconds for row in bench_gpu.AIMS) / 3 < 9 * 60
    assert {*bench_aims.PLAIN, "dev half streamed"} < {*names}


def test_the_tests_for_a_gpu_are_all_of_the_engines() -> None:
    """A file that has moved would leave pytest with nothing to run."""
    root = bench_gpu.bench_report.ROOT
    marked = {
        str(path.relative_to(root))
        for path in (root / "tests" / "unit").rglob("test_*.py")
        if "\n@pytest.mark.gpu\n" in path.read_text(encoding="utf-8")
    }
    assert {*bench_gpu.TESTS} == marked - {"tests/unit/caption/test_local.py"}


def test_tiny_rows_need_no_gpu_and_are_run_once(tmp_path: Path) -> None:
    rows = list(bench_gpu.smoke(bench_gpu.ROWS))
    assert 8 <= len(rows) < len(bench_gpu.ROWS)
    for row in rows:
        assert "--limit-gb" not in row.arguments
        assert "--compile" not in row.arguments
        assert row.arguments.count("--steps") == 1
        options = bench.build_parser().parse_args(["train", *row.arguments.split()])
        (case,) = bench_case.of_options(options)
        assert (case.shape, case.size) == ("small", 64)
        case.config(tmp_path)
    kinds = " ".join(row.arguments for row in rows)
    for word in ("fp8", "nf4", "int8", "--resident 3", "--peer", "--config", "--batch 4"):
        assert word in kinds


def test_what_is_measured_is_written_after_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ran = fake(monkeypatch, fails=("dev nf4",))
    written = []
    real = bench_gpu.bench_report.write

    def write(what: dict[str, Any], path: Path) -> None:
        real(what, path)
        written.append(len(report(tmp_path)["rows"]))

    monkeypatch.setattr(bench_gpu.bench_report, "write", write)
    names = ["dev", "dev fp8*", "dev nf4", "dev half streamed"]
    arguments = ["--out", str(tmp_path), "--no-tests", "--rows", *names]
    assert bench_gpu.main(arguments) == 0
    assert written == list(range(1, len(ran) + 1))
    found = report(tmp_path)
    assert found["machine"] == {"gpu": None}
    assert [row["name"] for row in found["rows"]] == ran
    assert [row["name"] for row in found["rows"] if "failed" in row] == ["dev nf4"]
    shown = capsys.readouterr().out
    assert "dev nf4: failed (1): ImportError: no such thing" in shown
    assert "dev half streamed: +0.0 % time beside dev" in shown
    assert "off by 10.0 % on average" in shown
    assert "-10.0 % at most" in shown


def test_it_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = fake(monkeypatch, fails=("dev int8",))
    before = tmp_path / "before"
    rows = ["dev", "dev int8", "klein-4b"]
    common = ["--no-tests", "--rows", *rows]
    assert bench_gpu.main(["--out", str(before), *common[:2], *rows[:2]]) == 0
    after = ["--after", str(before / bench_gpu.REPORT)]
    assert bench_gpu.main(["--out", str(tmp_path), *common, *after]) == 0
    assert ran == ["dev", "dev int8", "klein-4b", "dev int8"]
    rows = report(tmp_path)["rows"]
    assert [row["name"] for row in rows] == ["dev", "klein-4b", "dev int8"]
    assert bench_gpu.main(["--out", str(tmp_path), *common, *after, "--minutes", "0"]) == 0
    assert len(ran) == 4
    assert [row.get("failed") for row in report(tmp_path)["rows"]] == [None, 1, None]


def test_who_was_cut_off_by_the_end_keeps_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by its own limit a row comes last the next time; stopped by the end, first."""
    given = []

    def measure(row: Row, path: Path, *, seconds: float, **_: Any) -> tuple[str, list[str]]:
        given.append(seconds)
        return f"stopped after {seconds:.0f} s", []

    monkeypatch.setattr(bench_gpu, "measure", measure)
    row = Row("dev", "", 90)
    with (tmp_path / "log").open("w") as log:
        assert "failed" in bench_gpu.run(row, {}, log=log, left=91)
        found = bench_gpu.run(row, {}, log=log, left=40)
        assert "left_out" in bench_gpu.run(row, {}, log=log, left=29)
    assert found["left_out"] == "stopped after 40 s, when the time was over"
    assert given == [90, 40]


def test_what_a_row_wrote_counts_however_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that hold much take seconds to end, and some crash at it."""

    def measure(row: Row, path: Path, **_: Any) -> tuple[str, list[str]]:
        path.write_text(json.dumps(REPORT), encoding="utf-8")
        return "stopped after 90 s", []

    monkeypatch.setattr(bench_gpu, "measure", measure)
    with (tmp_path / "log").open("w") as log:
        found = bench_gpu.run(Row("dev", "", 90), {}, log=log, left=91)
    assert (found["result"], found["ended"]) == (RESULT, "stopped after 90 s")


def test_the_gpus_tests_come_after_the_aims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = fake(monkeypatch)
    monkeypatch.setattr(bench_gpu, "run_tests", lambda *_, **__: {"status": len(ran)})
    assert bench_gpu.main(["--out", str(tmp_path), "--rows", "dev*"]) == 0
    assert report(tmp_path)["tests"] == {"status": len(bench_gpu.AIMS)}


def test_where_nothing_works_nothing_more_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tuple(row.name for row in bench_gpu.ROWS)
    ran = fake(monkeypatch, fails=names)
    assert bench_gpu.main(["--out", str(tmp_path), "--no-tests"]) == 1
    assert ran == [*names[: bench_gpu.HOPELESS]]
    ran = fake(monkeypatch, fails=names[1:])
    assert bench_gpu.main(["--out", str(tmp_path), "--no-tests"]) == 0
    assert ran == [*names]


def test_a_table_is_of_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = fake(monkeypatch)
    before = tmp_path / "before.json"
    before.write_text(json.dumps({"machine": {"gpu": {"name": "NVIDIA H200"}}, "rows": []}))
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    arguments = ["--out", str(tmp_path), "--no-tests", "--rows", "dev", "--after", str(before)]
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        tool.write_text(f"#!/bin/sh\necho {name}\n")
        tool.chmod(0o755)
        if "H200" in name:
            assert bench_gpu.main(arguments) == 0
        else:
            with pytest.raises(SystemExit, match=r"on NVIDIA H200, this machine has NVIDIA H100"):
                bench_gpu.main(arguments)
    assert ran == ["dev"]


def test_without_time_rows_are_left_out_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ran = fake(monkeypatch)
    arguments = ["--out", str(tmp_path), "--minutes", "0.1", "--no-tests", "--rows", "dev"]
    assert bench_gpu.main(arguments) == 1
    assert not ran
    assert "dev: no time left" in capsys.readouterr().out


def test_a_process_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1); {}'])"
    code = child.format("import time; time.sleep(60)")
    with (tmp_path / "log").open("a", encoding="utf-8") as log:
        status, _ = bench_gpu._run([sys.executable, "-c", code], log=log, seconds=1)
        assert status == "stopped after 1 s"
        status, lines = bench_gpu._run([sys.executable, "-c", "print(7)"], log=log, seconds=60)
    assert (status, lines) == (0, ["7"])


def test_whoever_ends_it_ends_the_row(tmp_path: Path) -> None:
    def end(*_: Any) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 1)
    number = tmp_path / "pid"
    command = ["sh", "-c", f"echo $$ > {number}; sleep 60"]
    try:
        with (tmp_path / "log").open("a") as log, pytest.raises(SystemExit):
            bench_gpu._run(command, log=log, seconds=60)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_killed_while_it_writes_it_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    bench_gpu.bench_report.write({"rows": [1]}, path)

    def killed(self: Path, text: str, **_: Any) -> None:
        with self.open("w", encoding="utf-8") as file:
            file.write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.bench_report.write({"rows": [1, 2]}, path)
    assert json.loads(path.read_text()) == {"rows": [1]}


ABSENT = """
import sys
from importlib.machinery import PathFinder


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            return None
        return super().find_spec(name, path, target)


sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.slow
def test_a_row_of_its_own_process_needs_no_data_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine for measuring has torch and diffusers, and little else of ours."""
    absent = ("datasets", "wandb", "imagehash", "trackio", "prodigyopt", "schedulefree", "kindling")
    (tmp_path / "sitecustomize.py").write_text(ABSENT.format(absent=absent), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["--out", str(tmp_path / "out"), "--smoke", "--rows", "dev in 24 GB"]
    assert bench_gpu.main(arguments) == 0
    (row,) = report(tmp_path / "out")["rows"]
    assert row["result"]["plan"]["blocks"] == 6
    log = (tmp_path / "out" / bench_gpu.LOG).read_text(encoding="utf-8")
    assert "--config configs/dev-24gb.yaml" in log
