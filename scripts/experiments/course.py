"""How an arm's figures go while it trains: the loss on trained and on two kinds of held-out
pictures beside what is drawn. For the question whether the loss chooses what a person would.
"""

import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scripts.experiments import job
from scripts.experiments.arms import ARMS, Run
from scripts.experiments.judge import Judge, make_validator
from scripts.toy.character import draw_portrait, portrait_caption
from scripts.toy.dataset import PORTRAITS, save
from train import checkpoint
from train import run as training
from train.adapters import export
from train.config import reading
from train.config.watch import PreviewConfig, ValidationConfig

EVERY = 100
"""Steps between checkpoints."""
COURSES = ("rank-4", "baseline", "rank-64")
OTHER_GROUND = {"pink": "green", "white": "red", "purple": "gray", "red": "blue", "gray": "pink"}
OTHER_GROUND |= {"blue": "purple", "black": "white"}


def at_home(folder: Path) -> Path:
    """The trained portraits' places, sizes and neighbours on other backgrounds; pictured
    backgrounds are left out."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for name, (portrait, size) in PORTRAITS.items():
            if portrait.background.kind == "plain":
                ground = replace(
                    portrait.background, colour=OTHER_GROUND[portrait.background.colour]
                )
                moved = replace(portrait, background=ground)
                save(draw_portrait(moved, *size), portrait_caption(moved), folder / name)
    return folder


def courses(*, seed: int, steps: int, folder: Path, judge: Judge) -> Iterator[dict[str, Any]]:
    """A row for each checkpoint of each arm."""
    base = reading.load(job.CONFIG, [f"cache={folder / 'cache'}"])
    checks = {
        "trained": ValidationConfig(pictures="training", max_pictures=len(PORTRAITS)),
        "at_home": ValidationConfig(
            path=str(at_home(folder / "at-home")), max_pictures=len(PORTRAITS)
        ),
    }
    validators = {
        name: make_validator(
            base.model_copy(update={"validation": check, "preview": PreviewConfig()})
        )
        for name, check in checks.items()
    }
    for name in COURSES:
        arm = ARMS[name]
        kept = (*arm.overrides, f"train.keep_checkpoints={steps // EVERY}")
        config = job.load(
            replace(arm, overrides=kept), Run(name, seed, arm.rates[0]), steps=steps, folder=folder
        )
        train = config.train.model_copy(update={"checkpoint_every": EVERY})
        config = config.model_copy(update={"train": train})
        shutil.rmtree(folder / name, ignore_errors=True)
        with (
            (folder / "log").open("a", encoding="utf-8") as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            training.run(config, resume=False)
        for place in checkpoint.list_checkpoints(folder / name / "checkpoints"):
            saved = checkpoint.load(place)
            file = folder / name / "adapter.safetensors"
            export.write(saved.shown("average"), file, dtype=torch.float32, metadata={})
            losses = {kind: judge.loss(file, one) for kind, one in validators.items()}
            row = {"arm": name, "seed": seed, "step": saved.progress.step}
            yield row | losses | judge.judge(file)
        shutil.rmtree(folder / name)
