"""One training step, and saving, restoring and previewing what it trains.

Owns the model, the optimizer and their accelerate wrappers. When each method runs is `loop`'s.
"""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from train import checkpoint, lora, objective, optim, parallel, randomness, sample
from train.average import Average, Ema, ScheduleFree
from train.batch import Batch
from train.checkpoint import Checkpoint, Origin, Progress
from train.config import Config
from train.data import Loader, Portion, portions
from train.errors import TrainingError
from train.interrupt import Wish
from train.loading.base import Base
from train.lora import AnyAdapter
from train.order import Mixture, Showing
from train.track import Tracker
from train.validation.validate import Model
from train.watch import Watch


@dataclass(frozen=True)
class Previews:
    """What to draw, and the empty prompt's embedding for bases that need it."""

    requests: Sequence[sample.Request]
    empty_text: torch.Tensor | None
    folder: Path


@dataclass(frozen=True)
class Pending:
    """A step whose figures are on their way from the device."""

    done: int
    names: list[str]
    figures: torch.Tensor
    """Loss, processes that wish to stop, gradient norm, then those of `details`: on the CPU once
    `arrived` is over."""
    details: list[str]
    arrived: torch.cuda.Event | None
    facts: dict[str, float]


class Trainer:
    """Trains the adapter that is attached to a transformer."""

    def __init__(
        self,
        config: Config,
        *,
        accelerator: Accelerator,
        base: Base,
        transformer: Any,
        order: Mixture,
        loader: Loader,
        previews: Previews,
        tracker: Tracker,
        folder: Path,
        origin: Origin,
        watch: Watch | None = None,
        start: AnyAdapter | None = None,
    ) -> None:
        self._config = config
        self._accelerator = accelerator
        self._base = base
        self._order, self._loader = order, loader
        self._previews, self._tracker, self._watch = previews, tracker, watch
        self._folder = folder
        self._origin = origin
        self._transformer, self._start = transformer.train(), start
        self._parameters = lora.trainable(transformer)
        self._optimizer = optim.build_optimizer(
            config.optim, self._parameters, up=lora.trainable_up(transformer)
        )
        self._average = self._new_average()
        embedded = transformer.config.guidance_embeds
        self._guidance = config.flow.guidance if embedded else None
        self._pending: Pending | None = None
        self.wish = Wish()
        self._stopping = False
        self._clock = time.monotonic()

    def batches(self, start: int, steps: int) -> Iterable[list[Portion]]:
        """This process's portions of each step, read one step ahead."""

        def load(showings: Sequence[Showing]) -> Batch:
            batch = self._loader(showings)
            return batch.pinned() if self._accelerator.device.type == "cuda" else batch

        return portions(
            self._order,
            load,
            steps=range(start, steps),
            accumulate=self._config.train.accumulate,
            rank=self._accelerator.process_index,
            world=self._accelerator.num_processes,
        )

    def step(self, done: int, batch: list[Portion]) -> None:
        """Add up the gradients of the portions, clip them and step the optimizer."""
        accelerator, config = self._accelerator, self._config
        self._optimizer.zero_grad(set_to_none=True)
        lr = config.optim.lr * optim.rate(config.optim, step=done - 1, steps=config.train.steps)
        optim.set_rate(self._optimizer, lr, lora_plus=config.optim.lora_plus)
        total = torch.zeros((), device=accelerator.device)
        for portion in batch:
            total += self._backward(portion)
        if self._world > 1:
            parallel.add_gradients(self._parameters)
        shown = done % config.train.log_every == 0 or done == config.train.steps
        details = _named("grad_norm", lora.gradient_norms(self._transformer)) if shown else {}
        norm = nn.utils.clip_grad_norm_(self._parameters, config.optim.max_grad_norm)
        self._optimizer.step()
        if self._average is not None:
            self._average.update(done)
        if shown and self._start is None:  # PiSSA's is the norm of a difference, kept on the CPU
            details |= _named("lora_norm", lora.update_norms(self._transformer))
        self._settle()
        wish = total.new_full((), self.wish.signal is not None)
        sums = accelerator.reduce(torch.stack([total, wish]), "sum")
        assert isinstance(sums, torch.Tensor)
        figures = torch.cat([sums, torch.stack([norm, *details.values()])])
        figures = figures.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event() if total.is_cuda else None
        if arrived is not None:
            arrived.record()
        names = [name for portion in batch for name in portion.batch.names]
        now = time.monotonic()
        lr = optim.used_rate(config.optim, self._optimizer)
        facts = {"lr": lr, "epoch": self._epoch(done), "seconds": now - self._clock}
        self._clock = now
        self._pending = Pending(done, names, figures, list(details), arrived, facts)

    def save(self, done: int) -> None:
        """Write a checkpoint, if the weights are numbers."""
        self._settle()
        self._check_weights(done)
        checks, best = self._watch.saved(done) if self._watch else (None, None)
        if self._accelerator.is_main_process:
            settings = self._config.model_dump(mode="json")
            progress = Progress(done, settings, self._origin, self._world, checks)
            average = None
            if self._average is not None:
                with self._average.shown():
                    average = lora.read(self._transformer, self._config.lora)
            content = Checkpoint(
                progress,
                lora.read(self._transformer, self._config.lora),
                self._optimizer.state_dict(),
                average=average,
                start=self._start,
            )
            keep = self._config.train.keep_checkpoints
            checkpoint.save(self._folder / "checkpoints", content, keep=keep, best=best)
        self._accelerator.wait_for_everyone()
        self._clock = time.monotonic()

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint of the same config and data."""
        if self._average is not None:
            average = saved.average or saved.adapter  # train.ema may be new
            lora.write(self._transformer, average)
            self._average.restart()
        lora.write(self._transformer, saved.adapter)
        optim.restore(self._optimizer, saved.optimizer)
        if self._watch:
            self._watch.restore(saved.progress.checks, step=saved.progress.step)

    def preview(self, done: int) -> None:
        """Draw the preview prompts: on the main process, or together where the base is sharded."""
        self._settle()
        main = self._accelerator.is_main_process
        if self._previews.requests and (main or parallel.is_sharded()):
            with self._shown():
                pictures = sample.draw(
                    self._base,
                    self._transformer,
                    self._previews.requests,
                    empty_text=self._previews.empty_text,
                    steps=self._config.preview.steps,
                    guidance=self._config.preview.guidance,
                )
            if main:
                averaged = self._average is not None and self._config.export.weights == "average"
                label = "-average" if averaged else ""
                sample.save_all(pictures, self._previews.folder, step=done, label=label)
                self._tracker.previews(done, pictures, prompts=self._config.preview.texts)
        self._accelerator.wait_for_everyone()
        self._clock = time.monotonic()

    def validate(self, done: int) -> None:
        """Measure the loss on fixed pictures; every process has its part in it."""
        self._settle()
        if self._watch:
            self._check_weights(done)
            with self._shown():
                self._watch.check(done, Model(self._transformer, self._base.dtype, self._guidance))
        self._clock = time.monotonic()

    def finish(self) -> None:
        """Report the last step."""
        self._settle()
        self._tracker.close()

    def _new_average(self) -> Average | None:
        if self._config.optim.name == "schedulefree":
            return ScheduleFree(self._parameters, optimizer=self._optimizer)
        decay = self._config.train.ema
        return None if decay is None else Ema(self._parameters, decay=decay)

    def _shown(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that are exported (export.weights)."""
        if self._average is None or self._config.export.weights == "last":
            return nullcontext()
        return self._average.shown()

    @property
    def stopping(self) -> bool:
        """Whether a process was told to stop, which all of them see after the same step."""
        return self._stopping

    @property
    def _world(self) -> int:
        return self._accelerator.num_processes

    def _check_weights(self, done: int) -> None:
        """Raises TrainingError if they aren't numbers."""
        if not all(bool(weight.isfinite().all()) for weight in self._parameters):
            raise TrainingError(
                f"step {done}: the adapter's weights aren't numbers any more; stopped, the last "
                "checkpoint is from before. Lower optim.lr, then continue with --resume."
            )

    def _epoch(self, done: int) -> float:
        """Passes over the first data set."""
        taken = done * self._config.train.accumulate * self._world
        return self._order.passes(taken)[0]

    def _backward(self, portion: Portion) -> torch.Tensor:
        """Gradients of a portion's share of the step's mean loss; returns that share."""
        if self._config.lora.dropout:
            torch.manual_seed(
                randomness.derived_seed(self._config.seed, "dropout", portion.position)
            )
        losses = objective.losses(
            self._transformer,
            portion.batch.to(self._accelerator.device),
            dtype=self._base.dtype,
            guidance=self._guidance,
        )
        loss = losses.mean() * portion.weight
        loss.backward()
        return loss.detach()

    def _settle(self) -> None:
        """Report the step before: the device is already at the next one and never waits."""
        step, self._pending = self._pending, None
        if step is None:
            return
        if step.arrived is not None:
            step.arrived.synchronize()
        loss, wishes, norm, *details = step.figures.tolist()
        self._stopping = wishes > 0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            names = sorted(set(gather_object(step.names)))
            raise TrainingError(
                f"step {step.done}: the loss is {loss} and the gradient norm {norm}; stopped, "
                f"the last checkpoint is from before. Pictures of this step: {', '.join(names)}. "
                "Look at them, lower optim.lr, then continue with --resume."
            )
        if self._watch:
            self._watch.trained(loss)
        named = dict(zip(step.details, details, strict=True))
        self._tracker.step(step.done, {"loss": loss, "grad_norm": norm, **step.facts, **named})


def _named(prefix: str, norms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{kind}": norm for kind, norm in norms.items()}
