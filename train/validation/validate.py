"""The loss on fixed pictures at fixed noise, and the drift at neutral prompts.

Owns the measure: pictures, noise and noise levels are the same in every check and don't depend on
the run's seed, so that checks and runs compare. Several processes share the work; each picture is
computed alone, so they get what one process gets. Nothing here touches training: no gradients, no
dropout, no generator but its own. What the figures mean is `verdict`'s.

Shape suffixes as in `batch`, and P pictures, S noise levels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from train import data, flow, lora, objective, randomness
from train.batch import Batch
from train.config import FlowConfig, ValidationConfig
from train.data import Example
from train.encoding import texts
from train.encoding.cache import Cache, key
from train.validation.verdict import Check

DRIFT_STEPS = 5
"""Steps of a way from noise to a picture, for each neutral prompt."""


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

    @property
    def edits(self) -> tuple[int, ...]:
        """Numbers of the examples with references."""
        return tuple(n for n, example in enumerate(self.examples) if len(example.pictures) > 1)

    def describe(self, validation: ValidationConfig, *, every: int) -> list[str]:
        """What a check is of and what it costs, for the console."""
        pictures = len(self.examples) + len(self.edits)
        passes = pictures * validation.sigmas + len(self.neutral) * DRIFT_STEPS
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
    """Makes checks. Keeps the base's ways at the neutral prompts: 37 MB of RAM each on dev at
    1024x1024, with the prompt's embedding."""

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
        self._ways: dict[int, list[tuple[Batch, Tensor]]] = {}

    @property
    def digest(self) -> str:
        """Of what the checks are made of."""
        return self.trial.digest(levels=self._levels)

    @property
    def sigmas(self) -> list[float]:
        """Of each noise level, the mean over pictures: sizes have shifts of their own."""
        levels = [self._sigmas(example) for example in self.trial.examples]
        return torch.stack(levels).mean(0).tolist()

    @torch.no_grad()
    def check(self, step: int, model: Model) -> Check:
        """Measure the adapter as it is. The first time, the base at the neutral prompts too."""
        training = model.transformer.training
        model.transformer.eval()
        losses_PS = self.losses(model)
        worth = self._worth(losses_PS, model)
        drift = self.drift(model) if self.trial.neutral else None
        model.transformer.train(training)
        by_picture, by_level = losses_PS.double().mean(1), losses_PS.double().mean(0)
        return Check(step, tuple(by_picture.tolist()), tuple(by_level.tolist()), drift, worth)

    def losses(self, model: Model) -> Tensor:
        """The loss of each picture at each noise level, (P, S), fp32, on the CPU."""
        return self._losses(model, range(len(self.trial.examples)))

    def _losses(self, model: Model, numbers: Sequence[int], *, alone: bool = False) -> Tensor:
        """Those of some pictures. alone: without their references."""

        def measure(row: int) -> Tensor:
            rows = [
                objective.losses(
                    model.transformer, batch, dtype=model.dtype, guidance=model.guidance
                )
                for batch in self._batches(numbers[row], alone=alone)
            ]
            return torch.cat(rows)

        return self._table(measure, rows=len(numbers), width=self._levels)

    def _worth(self, losses_PS: Tensor, model: Model) -> tuple[float, ...] | None:
        """How much the loss of each edit is higher at the same noise without its references."""
        edits = self.trial.edits
        if not edits:
            return None
        alone_ES = self._losses(model, edits, alone=True)
        return tuple((alone_ES.double() - losses_PS[list(edits)].double()).mean(1).tolist())

    def drift(self, model: Model) -> float:
        """RMS difference of the adapter's velocities to the base's, over the RMS of the latter.

        Along the ways that the base itself takes from noise to a picture at the neutral prompts,
        since that is where a sampler would ask. Noised pictures of the subject won't do: a good
        adapter knows those without a prompt.
        """
        count = len(self.trial.neutral)
        if not self._ways:
            with lora.disabled(model.transformer):
                for number, _ in self._turns(count):
                    self._ways[number] = self._way(model, number)

        def measure(number: int) -> Tensor:
            squares = torch.zeros(2, device=self._accelerator.device)
            for batch, velocity in self._ways[number]:
                base = velocity.to(self._accelerator.device)
                moved = self._predict(model, batch) - base
                squares += torch.stack([moved.square().mean(), base.square().mean()])
            return squares

        moved, base = self._table(measure, rows=count, width=2).double().sum(0).tolist()
        return (moved / base) ** 0.5

    def _way(self, model: Model, number: int) -> list[tuple[Batch, Tensor]]:
        """Of Euler's steps from noise at a neutral prompt: where, and the velocity there; on the
        CPU.
        """
        example = self.trial.examples[0]
        shape = data.read(example, cache=self._cache).pictures[0].shape
        text_LJ = texts.get(self._cache, self.trial.neutral[number])
        place = torch.randn((1, *shape), generator=randomness.generator("drift", number))
        factor = flow.shift_factor(self._flow, tokens=example.tokens)
        sigmas = flow.shifted(torch.linspace(1, 0, DRIFT_STEPS + 1), factor=factor)
        way = []
        for now, later in pairwise(sigmas):
            batch = Batch(
                latents_BDhw=torch.zeros(()).expand(place.shape),
                noise_BDhw=place / now,  # so that the model sees `place` itself
                weight_Bhw=torch.ones(1, *shape[1:]),
                sigma_B=now[None],
                text_BLJ=text_LJ[None],
                references=(),
                names=("neutral prompt",),
            )
            velocity = self._predict(model, batch).cpu()
            way.append((batch, velocity))
            place = place + (later - now) * velocity
        return way

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

    def _predict(self, model: Model, batch: Batch) -> Tensor:
        return objective.predict(
            model.transformer,
            batch.to(self._accelerator.device),
            dtype=model.dtype,
            guidance=model.guidance,
        )

    def _sigmas(self, example: Example) -> Tensor:
        return flow.quantile_sigmas(self._flow, tokens=example.tokens, count=self._levels)

    def _batches(self, number: int, *, alone: bool) -> Iterator[Batch]:
        """A picture at all noise levels, each with noise of its own, on the device.

        alone: without its references.
        """
        example = self.trial.examples[number]
        row = data.read(example, cache=self._cache)
        clean = row.pictures[0]
        sigmas = self._sigmas(example)
        noise = [
            torch.randn(
                clean.shape,
                generator=randomness.generator("validation", example.pictures[0], number, level),
            )
            for level in range(self._levels)
        ]
        for first in range(0, self._levels, self._batch_size):
            part = slice(first, first + self._batch_size)
            size = len(sigmas[part])

            def repeated(tensor: Tensor, size: int = size) -> Tensor:
                return tensor.expand(size, *tensor.shape)

            batch = Batch(
                latents_BDhw=repeated(clean),
                noise_BDhw=torch.stack(noise[part]),
                weight_Bhw=repeated(row.weight_hw),
                sigma_B=sigmas[part],
                text_BLJ=repeated(row.text_LJ),
                references=() if alone else tuple(map(repeated, row.pictures[1:])),
                names=(example.name,) * size,
            )
            yield batch.to(self._accelerator.device)
