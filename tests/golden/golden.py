"""The run whose figures are kept in losses.json: twenty fp32 steps on the tiny dev base.

Two sizes of pictures, flips, dropped captions, accumulation, a schedule and dropout take part, so
that a change of any of them shows.
"""

from pathlib import Path

from tests import runs, tiny
from train import run

LOSSES = Path(__file__).with_name("losses.json")
FIGURES = ("loss", "grad_norm")


def figures(folder: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of each step of the run, made in an empty folder."""
    sizes = [*(runs.SQUARE,) * 3, *(runs.WIDE,) * 2]
    config = runs.make_config(
        folder / "run",
        model=tiny.make_dev(folder / "dev"),
        pictures=runs.make_pictures(folder / "pictures", sizes=sizes),
        data={"flip": True, "caption_dropout": 0.3},
        lora={"alpha": 8.0, "dropout": 0.1},
        optim={"lr": 1e-2, "schedule": "cosine", "warmup": 3},
        train={"steps": 20, "accumulate": 2, "checkpoint_every": 100},
    )
    run.run(config, resume=False)
    rows = runs.metrics(runs.run_folder(config))
    return {figure: [row[figure] for row in rows] for figure in FIGURES}
