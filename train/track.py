"""Metrics of a run: metrics.jsonl and the console always, Weights & Biases when asked.

Each line of metrics.jsonl is one optimizer step. Nothing else prints while training.
"""

import json
import os
import secrets
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from train.config import TrackConfig
from train.errors import MachineError
from train.files import writing

METRICS = "metrics.jsonl"
WANDB_ID = "wandb-id.txt"


class Tracker:
    """Records steps of one run; silent on every process but the main one."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        track: TrackConfig,
        settings: dict[str, Any],
        start: int,
        steps: int,
        every: int,
        main: bool,
    ) -> None:
        self._main = main
        self._start, self._steps, self._every = start, steps, every
        self._began = time.monotonic()
        self._wandb = self._bar = self._file = None
        if not main:
            return
        _keep_steps(folder / METRICS, upto=start)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=start, desc="train", unit="step")
        if track.wandb != "off":
            self._wandb = _start_wandb(folder, track.wandb, name, track.project, settings)

    def step(self, done: int, metrics: dict[str, float]) -> None:
        """Record the step after which `done` steps are done."""
        if self._file is None:
            return
        with writing(Path(self._file.name)):
            self._file.write(json.dumps({"step": done, **metrics}) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=done)
        summary = f"loss {metrics['loss']:.4f}  grad {metrics['grad_norm']:.3f}"
        if self._bar is not None:
            self._bar.set_postfix_str(summary, refresh=False)
            self._bar.update()
        elif done % self._every == 0 or done == self._steps:
            pace = (time.monotonic() - self._began) / (done - self._start)
            left = timedelta(seconds=round(pace * (self._steps - done)))
            self.say(f"step {done}/{self._steps}  {summary}  {pace:.2f} s/step  {left} left")

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self._main:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush everything."""
        if self._file is not None:
            self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()


def _keep_steps(path: Path, *, upto: int) -> None:
    """Drop the lines of steps that a resumed run does again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= upto]
    temporary = path.with_suffix(".part")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _wandb_id(path: Path) -> str:
    """The run's id in Weights & Biases, so that a resumed run goes on with its own curves."""
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _start_wandb(
    folder: Path,
    mode: Literal["online", "offline"],
    name: str,
    project: str,
    settings: dict[str, Any],
) -> Any:
    try:
        import wandb
    except ImportError:
        raise MachineError(
            f"track.wandb is {mode!r} but wandb isn't installed: "
            "pip install wandb, or set track.wandb: off"
        ) from None
    try:
        return wandb.init(
            project=project,
            name=name,
            id=_wandb_id(folder / WANDB_ID),
            resume="allow",
            dir=folder,
            mode=mode,
            config=settings,
        )
    except wandb.Error as error:
        raise MachineError(
            f"track.wandb: {error}. `wandb login` sets the key; track.wandb: offline needs none."
        ) from None
