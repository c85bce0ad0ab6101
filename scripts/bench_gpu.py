"""The whole table of what training takes on a GPU: `python -m scripts.bench_gpu --out DIR`.

Owns the list of rows, their order and their time. Each is `kindling bench train` in a process of
its own, so its command can be repeated alone. What is done is written after every row: whoever is
cut off has all up to then, and `--after` goes on from there. The most important rows come first.
This process never touches the GPU: its context would take memory from the rows.
"""

import argparse
import json
import os
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

TESTS_SECONDS, EAGER, COMPILED, LEAST = 150, 150, 300, 25
"""Limits of the tests and of a row; with less left than the last, none is begun."""

STEPS = "--steps 5 --warmup 2"
DEV = "--shape dev --optimizer adamw8bit"
PEER = "--peer diffusers"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    arguments: str
    """Of `kindling bench train`."""
    seconds: int = EAGER
    """Given up after so long."""


ROWS = (
    Row("dev", f"{DEV} {PEER}"),
    Row("dev compiled", f"{DEV} --compile {PEER}", COMPILED),
    Row("dev compiled, least recomputed", f"{DEV} --compile --checkpointing auto {PEER}", COMPILED),
    Row("dev, branch in fp32", f"{DEV} --branch fp32"),
    Row("dev fp8", f"{DEV} --quantize fp8"),
    Row("dev nf4", f"{DEV} --quantize nf4"),
    Row("dev int8", f"{DEV} --quantize int8"),
    Row("dev in 24 GB", "--config configs/dev-24gb.yaml --limit-gb 24", 200),
    Row("dev in 16 GB, 512", "--config configs/dev-16gb.yaml --limit-gb 16 --size 512", 200),
    Row("dev in 80 GB", "--config configs/dev-80gb.yaml --limit-gb 80"),
    Row("dev half streamed", f"{DEV} --resident 28", 200),
    Row("dev fp8 half streamed", f"{DEV} --quantize fp8 --resident 28", 200),
    Row("dev fp8 products", f"{DEV} --quantize fp8 --fp8-matmul"),
    Row("dev fp8 products compiled", f"{DEV} --quantize fp8 --fp8-matmul --compile", COMPILED),
    Row("klein-4b", f"--shape klein-4b {PEER}"),
    Row("klein-9b", f"--shape klein-9b {PEER}"),
    Row("klein-4b compiled", "--shape klein-4b --compile --checkpointing auto", COMPILED),
    Row("klein-9b compiled", "--shape klein-9b --compile --checkpointing auto", COMPILED),
    Row("klein-4b, 512", "--shape klein-4b --size 512"),
    Row("klein-9b, 512", "--shape klein-9b --size 512"),
    Row("klein-4b, 768", "--shape klein-4b --size 768"),
    Row("klein-9b, 768", "--shape klein-9b --size 768"),
    Row("dev, 512", f"{DEV} --size 512"),
    Row("dev, 768", f"{DEV} --size 768"),
    Row("dev fp8 x2", f"{DEV} --quantize fp8 --batch 2"),
    Row("dev fp8 x4", f"{DEV} --quantize fp8 --batch 4"),
    Row("dev x2", f"{DEV} --batch 2"),
    Row("dev x4", f"{DEV} --batch 4"),
    Row("klein-4b x4, 512", "--shape klein-4b --size 512 --batch 4"),
    Row("klein-9b x4, 512", "--shape klein-9b --size 512 --batch 4"),
    Row("dev in 32 GB", "--config configs/dev-32gb.yaml --limit-gb 32", 200),
    Row("dev in 48 GB", "--config configs/dev-48gb.yaml --limit-gb 48"),
    Row("dev in 16 GB, 1024", "--config configs/dev-16gb.yaml --limit-gb 16 --size 1024", 200),
    Row("klein-4b in 12 GB", "--config configs/klein-4b-12gb.yaml --limit-gb 12"),
    Row("klein-9b in 24 GB", "--config configs/klein-9b-24gb.yaml --limit-gb 24"),
    Row("klein-4b in 24 GB", "--config configs/klein-4b-24gb.yaml --limit-gb 24"),
    Row("klein-9b in 48 GB", "--config configs/klein-9b-48gb.yaml --limit-gb 48"),
    Row("dev in 141 GB", "--config configs/dev-141gb.yaml --limit-gb 141"),
)

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
    rows = [row for row in ROWS if any(fnmatchcase(row.name, p) for p in options.rows)]
    rows = list(smoke(rows)) if options.smoke else rows
    with (options.out / LOG).open("a", encoding="utf-8") as log:
        if "tests" not in report and not (options.smoke or options.no_tests):
            report["tests"] = run_tests(log, seconds=min(TESTS_SECONDS, end - time.monotonic()))
            bench_report.write(report, options.out / REPORT)
        done = {row["name"] for row in report["rows"] if "result" in row}
        failed = {row["name"] for row in report["rows"] if "failed" in row}
        rows.sort(key=lambda row: row.name in failed)  # what may fail again comes last
        report["rows"] = [row for row in report["rows"] if row["name"] in done]
        for row in rows:
            if row.name not in done:
                report["rows"].append(run(row, report, log=log, left=end - time.monotonic()))
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
        words = row.arguments.replace("--compile", "").replace("--resident 28", "--resident 3")
        given = words.split()
        if "--limit-gb" in given:
            place = given.index("--limit-gb")
            del given[place : place + 2]
        keep = [w for n, w in enumerate(given) if "--shape" not in given[max(0, n - 1) : n + 1]]
        arguments = " ".join([*keep, "--shape small --size 64 --text-tokens 16"])
        if arguments not in seen:
            seen.add(arguments)
            yield Row(row.name, arguments, row.seconds)


# ---- processes


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
    if left < LEAST:
        return {**found, "left_out": "no time left"}
    print(f"{row.name} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        status, output = measure(row, path, log=log, seconds=min(row.seconds, left))
        found["took"] = time.monotonic() - began
        if status == 0:
            whole = json.loads(path.read_text(encoding="utf-8"))
            for key in ("date", "machine", "versions"):
                report.setdefault(key, whole[key])
            return {**found, "result": whole["results"][0]}
    return {**found, "failed": status, "end": output[-5:]}


def measure(row: Row, path: Path, *, log: Any, seconds: float) -> tuple[int | str, list[str]]:
    """The row's own command, in a process of its own."""
    command = [sys.executable, "-m", "scripts.kindling", "bench", "train"]
    steps = "--steps 1 --warmup 1" if "--shape small" in row.arguments else STEPS
    lacking = "" if find_spec("bitsandbytes") else "--optimizer adamw"  # 0.6 GB more on dev
    arguments = [*row.arguments.split(), *lacking.split(), *steps.split(), "--json", str(path)]
    return _run([*command, *arguments], log=log, seconds=seconds)


def _run(command: list[str], *, log: Any, seconds: float) -> tuple[int | str, list[str]]:
    """Status, and lines of output; past its time the process is killed with all it started."""
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
        start_new_session=True,
    )
    status: int | str
    try:
        status = process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status = f"stopped after {seconds:.0f} s"
    with Path(log.name).open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        lines = [line for line in file.read().splitlines() if line.strip()]
    return status, lines


# ---- what is said of it


def text(report: dict[str, Any]) -> str:
    """The table, what has no figures, and what the issue of this table asks for."""
    from scripts import bench_shape

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
    return "\n".join([*parts, *findings(measured)])


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
    sys.exit(main())
