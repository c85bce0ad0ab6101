"""Examples for tests of the order and of batches; their entries are named after them."""

from dataclasses import replace

from train.data import Example, Rules
from train.order import Mixture, Order

SQUARE, WIDE, TALL = ((64, 64),), ((96, 48),), ((48, 96), (64, 64))


def example(name: str, geometry: tuple[tuple[int, int], ...] = SQUARE) -> Example:
    """An example whose entries are named after it."""
    pictures = tuple(f"{name}-{i}" for i in range(len(geometry)))
    return Example(
        name, pictures, tuple(f"{p}-flipped" for p in pictures), f"{name}-text", geometry
    )


def mixed() -> list[Example]:
    """7 square, 4 wide, 1 tall with a reference, in no order."""
    geometries = [
        SQUARE,
        WIDE,
        SQUARE,
        SQUARE,
        TALL,
        SQUARE,
        WIDE,
        WIDE,
        SQUARE,
        SQUARE,
        SQUARE,
        WIDE,
    ]
    return [example(f"{i}.png", geometry) for i, geometry in enumerate(geometries)]


def with_rules(examples: list[Example], rules: Rules) -> list[Example]:
    """The same, shown by these rules."""
    return [replace(example, rules=rules) for example in examples]


def repeated(examples: list[Example], repeats: int) -> list[Example]:
    """The same, each shown so often an epoch."""
    return [replace(example, repeats=repeats) for example in examples]


def one_set(examples: list[Example], *, batch_size: int, seed: int) -> Mixture:
    """The order of a single data set."""
    return Mixture([Order(examples, batch_size=batch_size, seed=seed)], shares=[1])
