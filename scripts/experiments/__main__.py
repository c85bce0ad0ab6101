"""`python -m scripts.experiments`: run what is missing of the experiments, and write their page.

Results are kept after each run, so it can be stopped and started again at any time.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import psutil

from scripts import bench_report
from scripts.experiments import page
from scripts.experiments.arms import ARMS, missing

RESULTS = bench_report.ROOT / "docs" / "experiments" / "toy.json"


def main(argv: list[str] | None = None) -> None:
    """From the command line."""
    options = _parse(argv)
    if options.page:
        _write(json.loads(options.results.read_text(encoding="utf-8")), options.results)
        return
    _run(options)


def _run(options: argparse.Namespace) -> None:
    import torch

    from scripts.experiments import course, job, judge

    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    judging = job.make_judge(count=options.count, folder=options.folder)
    facts = {"steps": options.steps, "count": options.count, "portraits": judge.PORTRAITS}
    facts |= {"levels": judge.LEVELS, "drawing": judge.DRAWING, "seeds": options.seeds}
    report = _open(options.results, facts)
    if "base" not in report:
        report["base"] = judging.judge(None)
        _write(report, options.results)
    if options.course and "course" not in report:
        seed, steps = options.seeds[0], options.steps
        rows = course.courses(seed=seed, steps=steps, folder=options.folder, judge=judging)
        report["course"] = list(rows)
        _write(report, options.results)
        return
    arms = {name: ARMS[name] for name in options.arms or ARMS}
    while time.monotonic() < until and (run := missing(arms, options.seeds, report["results"])):
        arm, folder = ARMS[run.arm], options.folder
        row = job.measure(arm, run, steps=options.steps, folder=folder, judge=judging)
        now = bench_report.new_report("", [])["date"]
        report["results"].append(row | {"date": now, "load": psutil.getloadavg()[0]})
        _write(report, options.results)
        shown = ("arm", "seed", "rate", "held_out", "likeness", "character", "obeyed")
        print({key: row[key] for key in (*shown, "train_wall_s")}, flush=True)


def _open(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What was measured before, of the same job."""
    if not path.is_file():
        report = bench_report.new_report("experiments on the toy base", [])
        return report | {"command": _command(facts), "job": facts, "results": []}
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["job"] != json.loads(json.dumps(facts)):
        raise SystemExit(f"{path} is of another job, {report['job']}; give --results another")
    return report


def _command(facts: dict[str, Any]) -> list[str]:
    seeds = [str(seed) for seed in facts["seeds"]]
    settings = ["--steps", str(facts["steps"]), "--count", str(facts["count"])]
    return ["python", "-m", "scripts.experiments", *settings, "--seeds", *seeds]


def _write(report: dict[str, Any], path: Path) -> None:
    """The figures and their page, each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {path: json.dumps(report, indent=1) + "\n"}
    texts[path.with_name("README.md")] = page.page(report)
    for target, text in texts.items():
        scratch = target.with_suffix(".part")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(target)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.experiments", description=__doc__)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--count", type=int, default=64, help="pictures of each kind to score")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so many")
    parser.add_argument("--course", action="store_true", help="instead: figures while training")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.arms if name not in ARMS]:
        parser.error(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    return options


if __name__ == "__main__":
    main()
