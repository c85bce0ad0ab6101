"""The loss on fixed pictures at fixed noise, and the drift at neutral prompts.

Owns the measure: pictures, noise and noise levels are the same in every check and don't depend on
the run's seed, so that checks and runs compare. Several processes share the work; each picture is
computed alone, so they get what one process gets. Nothing here touches training: no gradients, no
dropout, no generator but its own. What the figures mean is `verdict`'s.

Shape suffixes as in `batch`, and P pictures, S noise levels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from train import data, flow, lora, objective, randomness, texts
from train.batch import Batch
from train.cache import Cache, key
from train.config import FlowConfig, ValidationConfig
from train.data import Example
from train.verdict import Check

DRIFT_LEVELS = 4
"""Noise levels of each neutral prompt."""


@dataclass(frozen=True)
class Trial:
    """What checks are made of; entries of the cache."""

    examples: tuple[Example, ...]
    held_out: bool
    """Whether they are never trained."""
    neutral: tuple[str, ...]
    """Of prompts that the adapter should leave alone."""
    sources: Mapping[str, str]
    """Text of captions and neutral prompts -> where it is from, for messages."""
    origin: str
    """Where the pictures are from, for the console."""

    def describe(self, validation: ValidationConfig, *, every: int) -> list[str]:
        """What a check is of and what it costs, for the console."""
        passes = len(self.examples) * validation.sigmas + len(self.neutral) * DRIFT_LEVELS
        kind = "held out, never trained:" if self.held_out else "none held out; training loss of"
        what = f"{kind} {self.origin}"
        return [f"validation: {what}", f"  {passes} passes forward every {every} steps"]

    def digest(self, *, levels: int) -> str:
        """Of all that a check's figures depend on, apart from weights and noise density."""
        names = tuple((*one.pictures, one.text, *(one.mask or ())) for one in self.examples)
        return key(kind="validation", pictures=names, neutral=self.neutral, levels=levels)


@dataclass(frozen=True)
class Model:
    """The transformer with its adapter, as it is asked."""

    transformer: Any
    dtype: torch.dtype
    guidance: float | None


class Validator:
    """Makes checks. Keeps the base's velocities at the neutral prompts, 2 MB each at 1024x1024."""

    def __init__(
        self,
        trial: Trial,
        *,
        cache: Cache,
        flow: FlowConfig,
        levels: int,
        batch_size: int,
        accelerator: Accelerator,
    ) -> None:
        """batch_size: noise levels in one pass; no more memory than training's batches need."""
        self.trial = trial
        self._cache, self._flow, self._levels = cache, flow, levels
        self._batch_size = batch_size
        self._accelerator = accelerator
        self._base: dict[int, Tensor] = {}

    @property
    def digest(self) -> str:
        """Of what the checks are made of."""
        return self.trial.digest(levels=self._levels)

    @property
    def sigmas(self) -> list[float]:
        """Of each noise level, the mean over pictures: sizes have shifts of their own."""
        levels = [self._sigmas(example, count=self._levels) for example in self.trial.examples]
        return torch.stack(levels).mean(0).tolist()

    @torch.no_grad()
    def check(self, step: int, model: Model) -> Check:
        """Measure the adapter as it is. The first time, the base at the neutral prompts too."""
        training = model.transformer.training
        model.transformer.eval()
        losses_PS = self.losses(model)
        drift = self.drift(model) if self.trial.neutral else None
        model.transformer.train(training)
        by_picture, by_level = losses_PS.double().mean(1), losses_PS.double().mean(0)
        return Check(step, tuple(by_picture.tolist()), tuple(by_level.tolist()), drift)

    def losses(self, model: Model) -> Tensor:
        """The loss of each picture at each noise level, (P, S), fp32, on the CPU."""

        def measure(number: int) -> Tensor:
            example = self.trial.examples[number]
            batches = self._batches(example, "validation", number, count=self._levels)
            return torch.cat([self._loss(model, batch) for batch in batches])

        return self._table(measure, rows=len(self.trial.examples), width=self._levels)

    def drift(self, model: Model) -> float:
        """RMS difference of the adapter's velocities to the base's, over the RMS of the latter.

        Each neutral prompt is put to one of the pictures, noised.
        """
        count = len(self.trial.neutral)
        if not self._base:
            with lora.disabled(model.transformer):
                for number, _ in self._turns(count):
                    self._base[number] = self._velocities(model, number).cpu()

        def measure(number: int) -> Tensor:
            base = self._base[number].to(self._accelerator.device)
            moved = self._velocities(model, number) - base
            return torch.stack([moved.square().mean(), base.square().mean()])

        moved, base = self._table(measure, rows=count, width=2).double().sum(0).tolist()
        return (moved / base) ** 0.5

    def _table(self, measure: Any, *, rows: int, width: int) -> Tensor:
        """Rows from all processes. To add zeros changes no bit."""
        table = torch.zeros(rows, width, device=self._accelerator.device)
        for number, counts in self._turns(rows):
            row = measure(number)
            if counts:
                table[number] = row
        total = self._accelerator.reduce(table, "sum")
        assert isinstance(total, Tensor)
        return total.cpu()

    def _turns(self, count: int) -> Iterator[tuple[int, bool]]:
        """This process's numbers, and whether they count: all processes take as many turns.

        One without a number left repeats the last, since a sharded model runs on all or none.
        """
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        for first in range(0, count, world):
            yield min(first + rank, count - 1), first + rank < count

    def _loss(self, model: Model, batch: Batch) -> Tensor:
        return objective.losses(
            model.transformer, batch, dtype=model.dtype, guidance=model.guidance
        )

    def _velocities(self, model: Model, number: int) -> Tensor:
        """At a neutral prompt, (DRIFT_LEVELS, D, h, w)."""
        example = self.trial.examples[number % len(self.trial.examples)]
        text = texts.get(self._cache, self.trial.neutral[number])
        batches = self._batches(example, "drift", number, count=DRIFT_LEVELS, text_LJ=text)
        return torch.cat(
            [
                objective.predict(
                    model.transformer, batch, dtype=model.dtype, guidance=model.guidance
                )
                for batch in batches
            ]
        )

    def _sigmas(self, example: Example, *, count: int) -> Tensor:
        return flow.quantile_sigmas(self._flow, tokens=example.tokens, count=count)

    def _batches(
        self, example: Example, use: str, number: int, *, count: int, text_LJ: Tensor | None = None
    ) -> Iterator[Batch]:
        """A picture at `count` noise levels, each with noise of its own.

        text_LJ: in place of the caption's.
        """
        row = data.read(example, cache=self._cache)
        clean = row.pictures[0]
        text = row.text_LJ if text_LJ is None else text_LJ
        sigmas = self._sigmas(example, count=count)
        noise = [
            torch.randn(
                clean.shape,
                generator=randomness.generator(use, example.pictures[0], number, level),
            )
            for level in range(count)
        ]
        for first in range(0, count, self._batch_size):
            part = slice(first, first + self._batch_size)
            size = len(sigmas[part])

            def repeated(tensor: Tensor, size: int = size) -> Tensor:
                return tensor.expand(size, *tensor.shape)

            batch = Batch(
                latents_BDhw=repeated(clean),
                noise_BDhw=torch.stack(noise[part]),
                weight_Bhw=repeated(row.weight_hw),
                sigma_B=sigmas[part],
                text_BLJ=repeated(text),
                references=tuple(map(repeated, row.pictures[1:])),
                names=(example.name,) * size,
            )
            yield batch.to(self._accelerator.device)
