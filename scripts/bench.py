"""`kindling bench`: speed and memory of this machine, as a table and JSON. Never passes or fails.

Owns the command line, `bench_options` that of `train`. What is measured is `bench_step`'s,
`bench_shape`'s, `bench_start`'s and `bench_data`'s, how it is written down is `bench_report`'s.
What has been measured is in docs/bench/.
"""

import argparse
from pathlib import Path

from scripts import bench_options, bench_report
from train.errors import UserError


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
        "train", parents=[common], help="a training step: beside a bare loop, or on a real shape"
    )
    bench_options.add(train)
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


def measure_steps(options: argparse.Namespace) -> list[dict]:
    """`kindling bench train`."""
    if options.shape or options.config:
        return measure_shapes(options)
    from scripts import bench_sides, bench_step

    results = []
    for batch in options.batch or [1]:
        job = bench_sides.Job(
            parameters=options.parameters,
            batch=batch,
            text_tokens=options.text_tokens,
            rank=options.rank or 16,
            dtype=options.dtype or "fp32",
            optimizer=options.optimizer or "adamw",
            gradient_checkpointing=options.gradient_checkpointing,
        )
        for size in options.size or [64, 256]:
            result = bench_step.compare(job, size=size, steps=options.steps, warmup=options.warmup)
            if not options.no_memory:
                result["memory"] = bench_step.peaks(job, size=size)
            results.append(result)
    print(bench_report.table(bench_step.HEADER, map(bench_step.row, results)))
    return results


def measure_shapes(options: argparse.Namespace) -> list[dict]:
    """`kindling bench train` on real shapes."""
    from scripts import bench_case, bench_shape

    results = bench_shape.measure_all(bench_case.of_options(options))
    print(bench_report.table(bench_shape.HEADER, map(bench_shape.row, results)))
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
