"""Which pictures come when: data sets to an endless sequence of batches.

The order is a function of the seed and the position, so a run resumes anywhere without any state,
and every process knows what the others do. Knows sizes and counts, not what a picture holds.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Protocol

from train import randomness


@dataclass(frozen=True)
class Showing:
    """One appearance of an example: the key to everything random about it."""

    epoch: int
    example: int
    """Counted over all data sets."""
    repeat: int


class Shown(Protocol):
    """What the order needs to know of an example."""

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def repeats(self) -> int: ...


class Order:
    """The batches of one data set. Every epoch shows each example `repeats` times.

    An epoch's showings are shuffled, and each joins the open batch of its geometry; batches come in
    the order of their first showing, those that don't fill included. Nothing is dropped or padded.
    So with one geometry, two batches of one hold what one batch of two would.
    """

    def __init__(
        self, examples: Sequence[Shown], *, batch_size: int, seed: int, first: int = 0
    ) -> None:
        """first: number of the first example, where other data sets come before this one."""
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._first = first
        groups = Counter[tuple]()
        for example in examples:
            groups[example.geometry] += example.repeats
        self.pictures = groups.total()
        """Showings in an epoch."""
        self.epoch_length = sum(-(-count // batch_size) for count in groups.values())
        """Batches in an epoch."""
        self._epoch = lru_cache(maxsize=2)(self._shuffled_epoch)

    def __getitem__(self, position: int) -> list[Showing]:
        """The batch at a position, counted from the first epoch's first."""
        epoch, index = divmod(position, self.epoch_length)
        return self._epoch(epoch)[index]

    def _shuffled_epoch(self, epoch: int) -> list[list[Showing]]:
        showings = [
            Showing(epoch, self._first + number, repeat)
            for number, example in enumerate(self._examples)
            for repeat in range(example.repeats)
        ]
        batches: list[list[Showing]] = []
        filling: dict[tuple, list[Showing]] = {}
        for showing in randomness.shuffled(showings, self._seed, "order", self._first, epoch):
            geometry = self._examples[showing.example - self._first].geometry
            batch = filling.get(geometry)
            if batch is None or len(batch) == self._batch_size:
                batch = filling[geometry] = []
                batches.append(batch)
            batch.append(showing)
        return batches


class Mixture:
    """Data sets in turn, so that the pictures shown are in the ratio of `shares` at any position.

    The next batch is always that of the set whose share is due first, each batch counted at its
    middle; so no set is ever further from its share than the batches of the sets.
    """

    def __init__(self, orders: Sequence[Order], *, shares: Sequence[float]) -> None:
        assert len(orders) == len(shares) > 0
        self._orders, self._shares = orders, shares
        self._shown = [0] * len(orders)
        self._turns: list[tuple[int, tuple[int, ...]]] = []  # set, batches of each before it
        self._taken = [0] * len(orders)
        self._planning = Lock()  # batches are read ahead in a thread

    def __getitem__(self, position: int) -> list[Showing]:
        """The batch at a position."""
        self._plan(position)
        number, taken = self._turns[position]
        return self._orders[number][taken[number]]

    def passes(self, position: int) -> list[float]:
        """How often each data set has been shown when the batches before `position` are done."""
        self._plan(position)
        _, taken = self._turns[position]
        pairs = zip(taken, self._orders, strict=True)
        return [batches / order.epoch_length for batches, order in pairs]

    def _plan(self, position: int) -> None:
        with self._planning:
            while len(self._turns) <= position:
                self._next_turn()

    def _next_turn(self) -> None:
        pairs = zip(self._orders, self._taken, strict=True)
        coming = [len(order[taken]) for order, taken in pairs]
        due = [
            (shown + pictures / 2) / share
            for shown, pictures, share in zip(self._shown, coming, self._shares, strict=True)
        ]
        number = due.index(min(due))
        self._turns.append((number, tuple(self._taken)))
        self._shown[number] += coming[number]
        self._taken[number] += 1
