"""One run of an experiment: the demo's job, trained in this process and judged by its file."""

import shutil
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from scripts.bench_report import ROOT
from scripts.experiments import judge
from scripts.experiments.arms import Arm, Run
from scripts.experiments.judge import Judge
from train import run as training
from train.config import Config, reading
from train.config.watch import PreviewConfig, ValidationConfig

CONFIG = ROOT / "configs" / "demo.yaml"


def load(arm: Arm, run: Run, *, steps: int, folder: Path) -> Config:
    """The config of a run. It checks nothing itself: the judge does, alike for all arms."""
    overrides = [
        *(f"name={run.arm}", f"output={folder}", f"cache={folder / 'cache'}"),
        *(f"seed={run.seed}", f"optim.lr={run.rate}", "export.dtype=fp32"),
        *(f"train.steps={steps}", f"train.checkpoint_every={steps}", *arm.overrides),
    ]
    quiet = {"validation": ValidationConfig(pictures="off"), "preview": PreviewConfig()}
    return reading.load(CONFIG, overrides).model_copy(update=quiet)


def make_judge(*, count: int, folder: Path) -> Judge:
    """For all runs in a folder, which keeps the portraits and the cache."""
    checks = ValidationConfig(
        path=str(judge.portraits(folder / "portraits")),
        max_pictures=judge.PORTRAITS,
        neutral_prompts=judge.NEUTRAL,
    )
    config = reading.load(CONFIG, [f"cache={folder / 'cache'}"])
    update = {"validation": checks, "preview": PreviewConfig()}
    return Judge(config.model_copy(update=update), count=count)


def measure(arm: Arm, run: Run, *, steps: int, folder: Path, judge: Judge) -> dict[str, Any]:
    """Train and judge; a row of the results. The run's folder is removed, its log stays."""
    config = load(arm, run, steps=steps, folder=folder)
    place = folder / config.name
    shutil.rmtree(place, ignore_errors=True)
    wall, cpu = time.monotonic(), time.process_time()
    with (
        (folder / "log").open("a", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        training.run(config, resume=False)
    took = {
        "train_wall_s": round(time.monotonic() - wall, 1),
        "train_cpu_s": round(time.process_time() - cpu, 1),
    }
    adapter = place / f"{config.name}.safetensors"
    row = {"arm": run.arm, "seed": run.seed, "rate": run.rate, **judge.judge(adapter), **took}
    shutil.rmtree(place)
    return row
