"""Metrics of a run: metrics.jsonl, validation.jsonl and the console always, trackers when asked.

Each line of metrics.jsonl is one optimizer step, each of validation.jsonl one check. Nothing else
prints while training.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tqdm import tqdm

from train import trackers, usage
from train.config import TrackConfig
from train.files import writing

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
BARS = " ▁▂▃▄▅▆▇█"
SIGMAS = "sigma"
"""Name of the histogram of noise levels."""


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
        self._main, self._folder = main, folder
        self._start, self._steps, self._every = start, steps, every
        self._began = time.monotonic()
        self._bar = self._file = None
        self._sinks: list[trackers.Sink] = []
        if not main:
            return
        _keep_steps(folder / METRICS, upto=start)
        _keep_steps(folder / VALIDATION, upto=start or -1)  # step 0 comes again
        self._sinks = trackers.start(
            track, folder, name=name, settings=settings, done=start, say=self.say
        )
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=start, desc="train", unit="step")
        usage.reset()

    def sigmas(self, values: Sequence[float]) -> None:
        """Record how the noise levels of the first pictures are spread."""
        for sink in self._sinks:
            sink.histogram(SIGMAS, values)

    def step(self, done: int, metrics: dict[str, float]) -> None:
        """Record the step after which `done` steps are done."""
        if self._file is None:
            return
        with writing(Path(self._file.name)):
            self._file.write(json.dumps({"step": done, **metrics}) + "\n")
            self._file.flush()
        for sink in self._sinks:
            sink.scalars(done, metrics)
        summary = f"loss {metrics['loss']:.4f}  grad {metrics['grad_norm']:.3f}"
        shown = done % self._every == 0 or done == self._steps
        if self._bar is not None:
            memory = f", {usage.now()}" if shown else ""
            self._bar.set_postfix_str(summary + memory, refresh=False)
            self._bar.update()
        elif shown:
            pace = (time.monotonic() - self._began) / (done - self._start)
            left = timedelta(seconds=round(pace * (self._steps - done)))
            self.say(
                f"step {done}/{self._steps}  {summary}  {pace:.2f} s/step  {left} left  "
                f"{usage.now()}"
            )

    def check(self, row: dict[str, Any], *, scalars: dict[str, float], text: str) -> None:
        """Record a check: `row` has its step."""
        if not self._main:
            return
        with (self._folder / VALIDATION).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for sink in self._sinks:
            sink.scalars(row["step"], scalars)
        self.say(text)

    def previews(self, done: int, pictures: Sequence[Image], *, prompts: Sequence[str]) -> None:
        """Show previews to who wants pictures."""
        for sink in self._sinks:
            sink.pictures(done, pictures, prompts)

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
        for sink in self._sinks:
            sink.close()


def spread(values: Sequence[float], *, bins: int = 20) -> str:
    """Values in [0, 1] as a row of bars, the highest of them full; an empty bin is a space."""
    counts = Counter(min(int(value * bins), bins - 1) for value in values)
    top = max(counts.values())
    bars = "".join(BARS[-(-counts[bin] * (len(BARS) - 1) // top)] for bin in range(bins))
    return f"0 |{bars}| 1, half of them below {sorted(values)[len(values) // 2]:.2f}"


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
