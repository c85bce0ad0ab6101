"""The whole table of what training takes on a GPU: `python -m scripts.bench_gpu --out DIR`.

Owns the list of rows, their order and their time. Each is `kindling bench train` in a process of
its own, so its command can be repeated alone. What is done is written after every row: whoever is
cut off has all up to then, and `--after` goes on from there. The most important rows come first.
This process never touches the GPU: its context would take memory from the rows.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts import bench_report

REPORT, LOG = "bench-gpu.json", "bench-gpu.log"

TESTS = tuple(
    f"tests/unit/{name}.py"
    for name in (
        *("memory/test_transfer", "memory/test_offload", "memory/test_recompute", "test_waits"),
        *("lora/test_branch", "test_speed", "loading/test_frozen", "test_optim"),
        "planning/test_footprint",
    )
)
"""Those marked gpu: they prove streams, kernels and a step without waiting, where numbers can't."""

TESTS_SECONDS = 150

STEPS = "--steps 5 --warmup 2"
TINY = "--shape small --size 64 --text-tokens 16 --steps 1 --warmup 1"
REPLACED = ("--shape", "--size", "--limit-gb", "--steps", "--warmup")
DEV = "--shape dev --optimizer adamw8bit"
KLEIN = "--optimizer adamw8bit --steps 20 --warmup 3"
PEER = "--peer diffusers"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    arguments: str
    """Of `kindling bench train`."""
    seconds: int = 120
    """Given up after so long, about thrice what it should take; with less than a third of it left
    it isn't begun."""


AIMS = (
    Row("dev", f"{DEV} {PEER}", 180),
    Row("dev in 24 GB", "--config configs/dev-24gb.yaml --limit-gb 24", 180),
    Row("dev in 16 GB, 512", "--config configs/dev-16gb.yaml --limit-gb 16 --size 512", 180),
    Row("dev in 80 GB", "--config configs/dev-80gb.yaml --limit-gb 80"),
    Row("dev half streamed", f"{DEV} --resident 28", 210),
    Row(
        "dev compiled, least recomputed",
        f"{DEV} --compile --checkpointing auto {PEER}",
        420,
    ),
)
"""What `bench_aims` needs. The one that compiles comes last: it alone may take minutes."""

ROWS = (
    *AIMS,
    Row("dev, least recomputed", f"{DEV} --checkpointing auto"),
    Row("dev compiled", f"{DEV} --compile", 300),
    Row("dev fp8", f"{DEV} --quantize fp8"),
    Row("dev nf4", f"{DEV} --quantize nf4"),
    Row("dev int8", f"{DEV} --quantize int8"),
    Row("dev fp8 half streamed", f"{DEV} --quantize fp8 --resident 28", 180),
    Row("klein-4b", f"--shape klein-4b {KLEIN} {PEER}", 90),
    Row("klein-9b", f"--shape klein-9b {KLEIN} {PEER}", 90),
    Row("dev fp8 products", f"{DEV} --quantize fp8 --fp8-matmul"),
    Row("dev fp8 products compiled", f"{DEV} --quantize fp8 --fp8-matmul --compile", 300),
    Row("klein-4b compiled", f"--shape klein-4b {KLEIN} --compile --checkpointing auto", 240),
    Row("klein-9b compiled", f"--shape klein-9b {KLEIN} --compile --checkpointing auto", 240),
    Row("dev, branch in fp32", f"{DEV} --branch fp32"),
    Row("klein-4b, 512", f"--shape klein-4b {KLEIN} --size 512", 75),
    Row("klein-9b, 512", f"--shape klein-9b {KLEIN} --size 512", 75),
    Row("dev, 512", f"{DEV} --size 512"),
    Row("dev in 32 GB", "--config configs/dev-32gb.yaml --limit-gb 32", 180),
    Row("dev in 48 GB", "--config configs/dev-48gb.yaml --limit-gb 48"),
    Row("dev in 16 GB, 1024", "--config configs/dev-16gb.yaml --limit-gb 16 --size 1024", 180),
    Row("klein-4b in 12 GB", "--config configs/klein-4b-12gb.yaml --limit-gb 12", 75),
    Row("klein-9b in 24 GB", "--config configs/klein-9b-24gb.yaml --limit-gb 24", 75),
    Row("klein-4b in 24 GB", "--config configs/klein-4b-24gb.yaml --limit-gb 24", 75),
    Row("klein-9b in 48 GB", "--config configs/klein-9b-48gb.yaml --limit-gb 48", 75),
    Row("dev in 141 GB", "--config configs/dev-141gb.yaml --limit-gb 141"),
    Row("dev fp8 x2", f"{DEV} --quantize fp8 --batch 2 --steps 3"),
    Row("dev x2", f"{DEV} --batch 2 --steps 3"),
    Row("klein-4b x4, 512", f"--shape klein-4b {KLEIN} --size 512 --batch 4", 75),
    Row("klein-9b x4, 512", f"--shape klein-9b {KLEIN} --size 512 --batch 4", 75),
    Row("klein-4b, 768", f"--shape klein-4b {KLEIN} --size 768", 75),
    Row("klein-9b, 768", f"--shape klein-9b {KLEIN} --size 768", 75),
    Row("dev, 768", f"{DEV} --size 768"),
    Row("dev fp8 x4", f"{DEV} --quantize fp8 --batch 4 --steps 3 --warmup 1", 180),
    Row("dev x4", f"{DEV} --batch 4 --steps 3 --warmup 1", 180),
)

HOPELESS = 3
"""If so many rows have failed and none has not, the time that is left is better spent on why."""

COMPARED = (
    ("dev half streamed", "dev"),
    ("dev fp8 half streamed", "dev fp8"),
    ("dev, branch in fp32", "dev"),
)
"""Rows whose difference the end of the table says."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows, print the table. 0 unless nothing could be measured."""
    options = _parser().parse_args(argv)
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"command": sys.argv[1:] if argv is None else list(argv), "rows": []}
    if options.after:
        report |= json.loads(options.after.read_text(encoding="utf-8"))
        _check_same_gpu(report, options.after)
    rows = [row for row in ROWS if any(fnmatchcase(row.name, p) for p in options.rows)]
    rows = list(smoke(rows)) if options.smoke else rows
    tests = not (options.smoke or options.no_tests or "tests" in report)
    with (options.out / LOG).open("a", encoding="utf-8") as log:
        for _ in run_all(rows, report, tests=tests, log=log, end=end):
            bench_report.write(report, options.out / REPORT)
    print(text(report))
    return 0 if any("result" in row for row in report["rows"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"{REPORT}, {LOG}")
    parser.add_argument("--minutes", type=float, default=18.0, help="in all; default 18")
    parser.add_argument("--after", type=Path, metavar="FILE", help=f"go on from this {REPORT}")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="NAME", help="such as 'dev*'")
    parser.add_argument("--no-tests", action="store_true", help="without the tests marked gpu")
    parser.add_argument("--smoke", action="store_true", help="all rows tiny, on any machine")
    return parser


def smoke(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows on the small shape, without what only a GPU has; equal ones once."""
    seen = set()
    for row in rows:
        words = iter(row.arguments.replace("--compile", "").split())
        # of what is replaced, the value goes as well: `next` takes it
        keep = [word for word in words if word not in REPLACED or not next(words)]
        if "--resident" in keep:
            keep[keep.index("--resident") + 1] = "3"
        arguments = " ".join([*keep, TINY])
        if arguments not in seen:
            seen.add(arguments)
            yield Row(row.name, arguments, row.seconds)


# ---- processes


def run_all(
    rows: Sequence[Row], report: dict[str, Any], *, tests: bool, log: Any, end: float
) -> Iterator[None]:
    """Whatever the report lacks, in its order, what failed before last; yields when it has more.

    tests: those marked gpu, too, once the aims have been tried.
    """
    before = {row["name"]: row for row in report["rows"]}
    missing = [row for row in rows if "result" not in before.get(row.name, {})]
    missing.sort(key=lambda row: "failed" in before.get(row.name, {}))
    failures = 0
    for number, row in enumerate(missing):
        left = end - time.monotonic()
        if tests and row not in AIMS and left >= TESTS_SECONDS / 3:
            report["tests"] = run_tests(log, seconds=min(TESTS_SECONDS, left))
            tests, left = False, end - time.monotonic()
            yield
        if number == failures == HOPELESS and not any("result" in one for one in report["rows"]):
            print("nothing works, so nothing more is tried", file=sys.stderr)
            return
        found = run(row, report, log=log, left=left)
        failures += "failed" in found
        if "left_out" in found and "failed" in before.get(row.name, {}):
            continue  # why it failed says more
        others = [one for one in report["rows"] if one["name"] != row.name]
        report["rows"] = [*others, found]
        yield


def run_tests(log: Any, *, seconds: float) -> dict[str, Any]:
    """The tests marked gpu: `status` is pytest's, or why there are none."""
    if find_spec("pytest") is None:
        return {"status": "pytest isn't installed"}
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *options, *TESTS]
    status, output = _run(command, log=log, seconds=seconds)
    return {"status": status, "end": output[-5:]}


def run(row: Row, report: dict[str, Any], *, log: Any, left: float) -> dict[str, Any]:
    """A row's result, or what became of it. The first one tells the report of the machine."""
    found: dict[str, Any] = {"name": row.name, "arguments": row.arguments}
    if left < row.seconds / 3:
        return {**found, "left_out": "no time left"}
    print(f"{row.name} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        status, output = measure(row, path, log=log, seconds=min(row.seconds, left))
        found["took"] = time.monotonic() - began
        if path.exists():  # written whole and last; how the process ended is another matter
            whole = json.loads(path.read_text(encoding="utf-8"))
            for key in ("date", "machine", "versions"):
                report.setdefault(key, whole[key])
            ended = {} if status == 0 else {"ended": status}
            return {**found, **ended, "result": whole["results"][0]}
    if isinstance(status, str) and left < row.seconds:  # not its fault: it keeps its place
        return {**found, "left_out": f"{status}, when the time was over"}
    return {**found, "failed": status, "end": output[-5:]}


def measure(row: Row, path: Path, *, log: Any, seconds: float) -> tuple[int | str, list[str]]:
    """The row's own command, in a process of its own."""
    command = [sys.executable, "-m", "scripts.kindling", "bench", "train", *STEPS.split()]
    command += row.arguments.split()
    if find_spec("bitsandbytes") is None:
        command += ["--optimizer", "adamw"]  # 0.6 GB more on dev
    return _run([*command, "--json", str(path)], log=log, seconds=seconds)


def _run(command: list[str], *, log: Any, seconds: float) -> tuple[int | str, list[str]]:
    """Status, and lines of output; past its time the process is killed with all it started.

    In a group of its own, not in a session: whoever ends this program's session ends it as well.
    """
    log.write(f"\n$ {' '.join(command)}\n")
    log.flush()
    start = log.tell()
    cache = Path(tempfile.gettempdir()) / "kindling-bench-inductor"  # rows share compiled kernels
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        cwd=bench_report.ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    status: int | str
    try:
        status = process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        status = f"stopped after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for ever
                process.wait(timeout=30)
    with Path(log.name).open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        lines = [line for line in file.read().splitlines() if line.strip()]
    return status, lines


def _check_same_gpu(report: dict[str, Any], path: Path) -> None:
    """Rows of two kinds of GPU in one table would compare the GPUs."""
    before = (report.get("machine", {}).get("gpu") or {}).get("name")
    if before is None or shutil.which("nvidia-smi") is None:
        return
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.splitlines()
    if names and names[0].strip() != before:
        sys.exit(
            f"{path} was measured on {before}, this machine has {names[0].strip()}: start a table "
            "of its own, without --after"
        )


# ---- what is said of it


def text(report: dict[str, Any]) -> str:
    """The table, what has no figures, comparisons, and at the end the aims one by one."""
    from scripts import bench_aims, bench_shape

    measured = [row for row in report["rows"] if "result" in row]
    lines = [bench_shape.row(row["result"], name=row["name"]) for row in measured]
    parts = [bench_report.table(bench_shape.HEADER, lines)] if lines else []
    for row in report["rows"]:
        if "result" not in row:
            end = row.get("end", [])
            why = row.get("left_out") or f"failed ({row['failed']}): {end[-1] if end else ''}"
            parts.append(f"{row['name']}: {why}")
    if "tests" in report:
        tests = report["tests"]
        parts.append(f"tests marked gpu: {tests['status']} {' '.join(tests.get('end', [])[-1:])}")
    return "\n".join([*parts, *findings(measured), "", *bench_aims.lines(measured)])


def findings(measured: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Comparisons across rows; only those whose rows have figures."""
    results = {row["name"]: row["result"] for row in measured}
    seconds = {
        name: result["kindling"]["seconds"]["median"]
        for name, result in results.items()
        if "seconds" in result["kindling"]
    }
    for changed, plain in COMPARED:
        if changed in seconds and plain in seconds:
            cost = seconds[changed] / seconds[plain] - 1
            yield f"{changed}: {100 * cost:+.1f} % time beside {plain}"
    errors = {
        name: result["plan"]["allocated"] / peak - 1
        for name, result in results.items()
        if (peak := result["kindling"].get("peaks", {}).get("allocated"))
    }
    if errors:
        worst = max(errors, key=lambda name: abs(errors[name]))
        mean = sum(map(abs, errors.values())) / len(errors)
        yield (
            f"the plan's peaks: off by {100 * mean:.1f} % on average over {len(errors)} rows, "
            f"{100 * errors[worst]:+.1f} % at most ({worst})"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends its row, too
    sys.exit(main())
