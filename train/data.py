"""Which pictures come when, and a position in that order to a batch.

The order is a function of the seed and the position, so a run resumes anywhere without any state,
and every process knows what the others do. Reads the cache; decodes and encodes nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch

from train import flow, randomness, texts
from train.batch import Batch
from train.cache import Cache
from train.config import FlowConfig

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True)
class Example:
    """A record as the trainer sees it: names of cache entries."""

    name: str
    """The picture's file, for messages."""
    pictures: tuple[str, ...]
    """Entries of the target and of each reference."""
    mirrored: tuple[str, ...] | None
    """The same pictures flipped; None where flips are off."""
    text: str
    """Entry of the caption."""
    geometry: tuple[tuple[int, int], ...]
    """Pixels (width, height) of the target and of each reference: a batch has one geometry."""


@dataclass(frozen=True)
class Showing:
    """One appearance of an example: the key to everything random about it."""

    epoch: int
    example: int
    repeat: int


class Order:
    """The endless sequence of batches. Every epoch shows each example `repeats` times.

    An epoch's showings are shuffled, and each joins the open batch of its geometry; batches come in
    the order of their first showing, those that don't fill included. Nothing is dropped or padded.
    So with one geometry, two batches of one hold what one batch of two would.
    """

    def __init__(
        self, examples: Sequence[Example], *, repeats: int, batch_size: int, seed: int
    ) -> None:
        self._examples = examples
        self._repeats = repeats
        self._batch_size = batch_size
        self._seed = seed
        groups = Counter(example.geometry for example in examples)
        self.epoch_length = sum(-(-count * repeats // batch_size) for count in groups.values())
        self._epoch = lru_cache(maxsize=2)(self._shuffled_epoch)

    def __getitem__(self, position: int) -> list[Showing]:
        """The batch at a position, counted from the first epoch's first."""
        epoch, index = divmod(position, self.epoch_length)
        return self._epoch(epoch)[index]

    def _shuffled_epoch(self, epoch: int) -> list[list[Showing]]:
        showings = [
            Showing(epoch, example, repeat)
            for example in range(len(self._examples))
            for repeat in range(self._repeats)
        ]
        batches: list[list[Showing]] = []
        filling: dict[tuple, list[Showing]] = {}
        for showing in randomness.shuffled(showings, self._seed, "order", epoch):
            geometry = self._examples[showing.example].geometry
            batch = filling.get(geometry)
            if batch is None or len(batch) == self._batch_size:
                batch = filling[geometry] = []
                batches.append(batch)
            batch.append(showing)
        return batches


@dataclass(frozen=True)
class Loader:
    """Showings to batches."""

    examples: Sequence[Example]
    empty_text: str | None
    """Entry of the empty prompt, which replaces a dropped caption."""
    cache: Cache
    flow: FlowConfig
    caption_dropout: float
    seed: int

    def __call__(self, showings: Sequence[Showing]) -> Batch:
        """Read a batch and draw its noise, on the CPU."""
        rows = [self._row(showing) for showing in showings]
        pictures = [torch.stack(column) for column in zip(*(row[0] for row in rows), strict=True)]
        clean = pictures[0]
        tokens = clean.shape[2] * clean.shape[3]
        keys = [(s.epoch, s.example, s.repeat) for s in showings]
        noise = [
            torch.randn(clean.shape[1:], generator=randomness.generator(self.seed, "noise", *key))
            for key in keys
        ]
        sigma = [
            flow.sample_sigma(
                self.flow,
                tokens=tokens,
                generator=randomness.generator(self.seed, "sigma", *key),
            )
            for key in keys
        ]
        return Batch(
            latents_BDhw=clean,
            noise_BDhw=torch.stack(noise),
            sigma_B=torch.stack(sigma),
            text_BLJ=torch.stack([row[1] for row in rows]),
            references=tuple(pictures[1:]),
            names=tuple(self.examples[s.example].name for s in showings),
        )

    def _row(self, showing: Showing) -> tuple[list[torch.Tensor], torch.Tensor]:
        example = self.examples[showing.example]
        key = (self.seed, showing.epoch, showing.example, showing.repeat)
        flip = example.mirrored is not None and randomness.fraction("flip", *key) < 0.5
        drop = randomness.fraction("caption", *key) < self.caption_dropout
        names = example.mirrored if flip and example.mirrored else example.pictures
        text = self.empty_text if drop and self.empty_text else example.text
        latents = [self.cache.get(name)["latents"] for name in names]
        return latents, texts.get(self.cache, text)


@dataclass(frozen=True)
class Portion:
    """A batch of one process in one step."""

    batch: Batch
    weight: float
    """What the mean loss of the batch counts for in the step: its share of the step's pictures."""
    position: int
    """In the order: the key to what is random in the model itself."""


def portions(
    order: Order,
    load: Callable[[Sequence[Showing]], Batch],
    *,
    steps: Iterable[int],
    accumulate: int,
    rank: int,
    world: int,
) -> Iterator[list[Portion]]:
    """For each step the batches of this process, the next one read while the last one trains.

    Step s takes the next accumulate * world batches of the order, process r each world-th of them.
    The weights of a step add up to 1 over all processes, so that every picture counts the same,
    in small batches too, and two processes equal one with twice the accumulation.
    """

    def load_step(step: int) -> list[Portion]:
        first = step * accumulate * world
        positions = range(first, first + accumulate * world)
        total = sum(len(order[position]) for position in positions)
        return [
            Portion(load(order[position]), len(order[position]) / total, position)
            for position in positions[rank::world]
        ]

    return ahead(load_step, steps)


def ahead(function: Callable[[A], R], arguments: Iterable[A]) -> Iterator[R]:
    """Like map, but with the next result being made in a thread."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = None
        for argument in arguments:
            current, upcoming = upcoming, thread.submit(function, argument)
            if current is not None:
                yield current.result()
        if upcoming is not None:
            yield upcoming.result()
