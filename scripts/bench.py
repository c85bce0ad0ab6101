"""`kindling bench`: speed and memory of this machine, as a table and JSON. Never passes or fails.

Owns the command line. What is measured is `bench_step`'s, `bench_start`'s and `bench_data`'s, how
it is written down is `bench_report`'s. What has been measured is in docs/bench/.
"""

import argparse
import re
from pathlib import Path

from scripts import bench_report
from train.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line says, print a table, write JSON if asked."""
    options = build_parser().parse_args(argv)
    report = bench_report.new_report(options.what, argv)
    kinds = {"train": measure_steps, "start": measure_starts, "data": measure_data}
    report["results"] = kinds[options.what](options)
    if options.json:
        bench_report.write(report, options.json)
        print(f"\n{options.json}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="kindling bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    train = commands.add_parser(
        "train", parents=[common], help="a training step, beside a bare loop in diffusers and peft"
    )
    train.add_argument("--parameters", type=count, default="60M", help="default 60M")
    train.add_argument("--size", type=int, nargs="+", default=[64, 256], metavar="PIXELS")
    train.add_argument("--batch", type=int, default=1, help="pictures a step")
    train.add_argument("--text-tokens", type=int, default=512)
    train.add_argument("--rank", type=int, default=16)
    train.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="frozen weights")
    train.add_argument("--optimizer", choices=["adamw", "adamw8bit"], default="adamw")
    train.add_argument("--gradient-checkpointing", action="store_true")
    train.add_argument("--steps", type=int, default=12, help="timed steps a side; default 12")
    train.add_argument("--warmup", type=int, default=2, help="steps before those; default 2")
    train.add_argument("--no-memory", action="store_true", help="skip the peaks: a process each")
    start = commands.add_parser(
        "start", parents=[common], help="whole processes, from their start to the first step"
    )
    start.add_argument("--config", type=Path, default=bench_report.ROOT / "configs" / "demo.yaml")
    start.add_argument("--runs", type=int, default=3, help="of each kind; default 3")
    start.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the job")
    add_data(commands, common)
    return parser


def add_data(commands: "argparse._SubParsersAction", common: argparse.ArgumentParser) -> None:
    """`kindling bench data` of the command line."""
    data = commands.add_parser(
        "data", parents=[common], help="inspect beside a bare Pillow loop, bucketing, encoding"
    )
    data.add_argument("--pictures", type=int, default=10_000, help="generated; default 10000")
    data.add_argument("--plan", type=int, default=100_000, help="records; default 100000")
    data.add_argument("--encode", type=int, default=200, help="by the toy VAE; default 200")
    data.add_argument("--runs", type=int, default=1, help="turns of inspect and Pillow; default 1")
    data.add_argument("--cores", type=int, default=2, help="default 2")
    data.add_argument("--folder", type=Path, help="where generated pictures are kept (3 GB)")


def count(text: str) -> int:
    """60M -> 60,000,000."""
    match = re.fullmatch(r"([0-9.]+)([KMB]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number such as 60M")
    return round(float(match[1]) * UNITS[match[2]])


def measure_steps(options: argparse.Namespace) -> list[dict]:
    """`kindling bench train`."""
    from scripts import bench_sides, bench_step

    job = bench_sides.Job(
        parameters=options.parameters,
        batch=options.batch,
        text_tokens=options.text_tokens,
        rank=options.rank,
        dtype=options.dtype,
        optimizer=options.optimizer,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    results = []
    for size in options.size:
        result = bench_step.compare(job, size=size, steps=options.steps, warmup=options.warmup)
        if not options.no_memory:
            result["memory"] = bench_step.peaks(job, size=size)
        results.append(result)
    print(bench_report.table(bench_step.HEADER, map(bench_step.row, results)))
    return results


def measure_starts(options: argparse.Namespace) -> dict:
    """`kindling bench start`."""
    from scripts import bench_start

    results = bench_start.measure(options.config, options.overrides, runs=options.runs)
    print(bench_report.table(bench_start.HEADER, bench_start.rows(results)))
    return results


def measure_data(options: argparse.Namespace) -> dict:
    """`kindling bench data`."""
    from scripts import bench_data, bench_pictures

    if min(options.pictures, options.plan, options.runs, options.cores, options.encode - 1) < 1:
        raise UserError("bench data: all counts must be at least 1, and --encode at least 2")
    folder = options.folder or bench_pictures.default_folder()
    results = bench_data.measure(
        folder,
        pictures=options.pictures,
        plans=options.plan,
        encode=min(options.encode, options.pictures // bench_pictures.QUARTERS),
        runs=options.runs,
        cores=options.cores,
    )
    print(bench_report.table(bench_data.HEADER, bench_data.rows(results)))
    return results
