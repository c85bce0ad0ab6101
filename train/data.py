"""From showings to batches: reads the cache, draws the noise, reads one step ahead.

All that is random is a function of the seed and the showing. Decodes and encodes nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch

from train import flow, randomness
from train.batch import Batch
from train.config import FlowConfig
from train.config.schema import PIXEL_MULTIPLE
from train.encoding import texts
from train.encoding.cache import Cache
from train.order import Mixture, Showing

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True)
class Rules:
    """How the examples of a data set are shown; one for all of them."""

    caption_dropout: float = 0.0
    """Fraction of showings with the empty prompt."""
    weight: float = 1.0
    """What a picture's loss counts for."""
    mask_floor: float = 1.0
    """What masked-out parts count for, against 1 for the rest."""


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
    rules: Rules = Rules()
    repeats: int = 1
    """How often an epoch shows it."""
    mask: tuple[str, str | None] | None = None
    """Entries of the mask and of its mirror image."""

    @property
    def tokens(self) -> int:
        """Packed latent tokens of the target: one for 16 x 16 pixels."""
        width, height = self.geometry[0]
        return width // PIXEL_MULTIPLE * (height // PIXEL_MULTIPLE)


@dataclass(frozen=True)
class Loader:
    """Showings to batches."""

    examples: Sequence[Example]
    empty_text: str | None
    """Entry of the empty prompt, which replaces a dropped caption."""
    cache: Cache
    flow: FlowConfig
    seed: int

    def __call__(self, showings: Sequence[Showing]) -> Batch:
        """Read a batch and draw its noise, on the CPU."""
        rows = [self._row(showing) for showing in showings]
        columns = zip(*(row.pictures for row in rows), strict=True)
        pictures = [torch.stack(column) for column in columns]
        clean = pictures[0]
        keys = [(s.epoch, s.example, s.repeat) for s in showings]
        noise = [
            torch.randn(clean.shape[1:], generator=randomness.generator(self.seed, "noise", *key))
            for key in keys
        ]
        return Batch(
            latents_BDhw=clean,
            noise_BDhw=torch.stack(noise),
            weight_Bhw=torch.stack([row.weight_hw for row in rows]),
            sigma_B=torch.stack([self.sigma(showing) for showing in showings]),
            text_BLJ=torch.stack([row.text_LJ for row in rows]),
            references=tuple(pictures[1:]),
            names=tuple(self.examples[s.example].name for s in showings),
        )

    def sigma(self, showing: Showing) -> torch.Tensor:
        """The noise level of a showing, shape (), fp32. Reads nothing."""
        return flow.sample_sigma(
            self.flow,
            tokens=self.examples[showing.example].tokens,
            generator=randomness.generator(
                self.seed, "sigma", showing.epoch, showing.example, showing.repeat
            ),
        )

    def first_sigmas(self, order: Mixture, *, count: int) -> list[float]:
        """Noise levels of the first showings of an order."""
        showings = (showing for position in range(count) for showing in order[position])
        return [self.sigma(showing).item() for showing in islice(showings, count)]

    def first_batches(self, order: Mixture, *, pictures: int) -> Iterator[Batch]:
        """Batches of an order from its start, until they have so many pictures."""
        position = 0
        while pictures > 0:
            showings = order[position]
            yield self(showings)
            position, pictures = position + 1, pictures - len(showings)

    def _row(self, showing: Showing) -> "Row":
        example = self.examples[showing.example]
        key = (self.seed, showing.epoch, showing.example, showing.repeat)
        flip = example.mirrored is not None and randomness.fraction("flip", *key) < 0.5
        drop = randomness.fraction("caption", *key) < example.rules.caption_dropout
        return read(example, cache=self.cache, flip=flip, text=self.empty_text if drop else None)


@dataclass(frozen=True)
class Row:
    """One picture of a batch, on the CPU."""

    pictures: list[torch.Tensor]
    """The target's latents and those of its references, (D, h, w) each."""
    text_LJ: torch.Tensor
    weight_hw: torch.Tensor
    """What each patch's loss counts for."""


def read(example: Example, *, cache: Cache, flip: bool = False, text: str | None = None) -> Row:
    """An example's entries. text: the prompt's entry in place of the caption's."""
    names = example.mirrored if flip and example.mirrored else example.pictures
    latents = [cache.get(name)["latents"] for name in names]
    weight = _weight(example, latents[0], cache=cache, flip=flip)
    return Row(latents, texts.get(cache, text or example.text), weight)


def _weight(
    example: Example, latents_Dhw: torch.Tensor, *, cache: Cache, flip: bool
) -> torch.Tensor:
    """(h, w): the mask above its floor, of mean 1, times the data set's weight.

    Of mean 1, so that a small subject is learnt as hard as one that fills the picture.
    """
    if example.mask is None:
        return torch.full(latents_Dhw.shape[1:], example.rules.weight)
    name = example.mask[flip]
    assert name is not None
    floor = example.rules.mask_floor
    weight = floor + (1 - floor) * cache.get(name)["mask"]
    return weight * (example.rules.weight / weight.mean())


@dataclass(frozen=True)
class Portion:
    """A batch of one process in one step."""

    batch: Batch
    weight: float
    """What the mean loss of the batch counts for in the step: its share of the step's pictures."""
    position: int
    """In the order: the key to what is random in the model itself."""


def portions(
    order: Mixture,
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
