"""Which showings come when, in one data set and in several."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pytest

from tests.examples import SQUARE, TALL, WIDE, example, mixed, repeated
from train.order import Mixture, Order, Showing


def epoch_of(order: Order, number: int) -> list[list[Showing]]:
    """The batches of an epoch."""
    length = order.epoch_length
    return [order[number * length + i] for i in range(length)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("repeats", [1, 3])
def test_every_epoch_shows_every_example_repeats_times(batch_size, repeats):
    order = Order(repeated(mixed(), repeats), batch_size=batch_size, seed=5)
    for epoch in (0, 1, 7):
        showings = [showing for batch in epoch_of(order, epoch) for showing in batch]
        expected = {Showing(epoch, i, r) for i in range(12) for r in range(repeats)}
        assert Counter(showings) == Counter(expected)


def test_a_batch_has_one_geometry_and_only_the_last_of_each_is_smaller():
    order = Order(mixed(), batch_size=3, seed=5)
    sizes = Counter()
    for batch in epoch_of(order, 0):
        (geometry,) = {mixed()[showing.example].geometry for showing in batch}
        sizes[geometry, len(batch)] += 1
    assert sizes == {(SQUARE, 3): 2, (SQUARE, 1): 1, (WIDE, 3): 1, (WIDE, 1): 1, (TALL, 1): 1}


def test_the_order_depends_on_seed_and_position_alone():
    def positions(order: Order, wanted: list[int]) -> dict[int, list[Showing]]:
        return {position: order[position] for position in wanted}

    def order(seed: int) -> Order:
        return Order(repeated(mixed(), 2), batch_size=2, seed=seed)

    forward, backward = list(range(60)), list(range(59, -1, -1))
    assert positions(order(1), forward) == positions(order(1), backward)
    assert positions(order(1), forward) != positions(order(2), forward)


def test_epochs_differ():
    order = Order([example(f"{i}") for i in range(12)], batch_size=1, seed=1)
    sequences = {tuple(batch[0].example for batch in epoch_of(order, e)) for e in range(5)}
    assert len(sequences) == 5


def test_with_one_geometry_two_batches_of_one_hold_what_one_of_two_does():
    """So that accumulation can stand in for batch size."""
    examples = [example(f"{i}") for i in range(6)]
    ones = Order(examples, batch_size=1, seed=1)
    twos = Order(examples, batch_size=2, seed=1)
    for position in range(9):
        assert twos[position] == ones[2 * position] + ones[2 * position + 1]


def three_sets(batch_size: int) -> list[Order]:
    """Of 12, 5 and 40 examples, the first with two sizes and repeats."""
    sizes = [repeated(mixed(), 2), [example(f"b{i}") for i in range(5)]]
    sizes.append([example(f"c{i}") for i in range(40)])
    firsts = [0, *accumulate(map(len, sizes))]
    return [
        Order(examples, batch_size=batch_size, seed=5, first=first)
        for examples, first in zip(sizes, firsts, strict=False)
    ]


def set_of(showing: Showing) -> int:
    """Which of `three_sets` a showing is of."""
    return (showing.example >= 12) + (showing.example >= 17)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("shares", [(1, 1, 1), (3, 1, 0.2), (0.5, 0.3, 0.2), (1, 7, 30)])
def test_shares_hold_after_any_number_of_batches(batch_size, shares):
    mixture = Mixture(three_sets(batch_size), shares=shares)
    shown = Counter()
    for position in range(300):
        shown.update(set_of(showing) for showing in mixture[position])
        for number, share in enumerate(shares):
            expected = shown.total() * share / sum(shares)
            assert abs(shown[number] - expected) <= 1.5 * batch_size, position


def test_each_set_of_a_mixture_keeps_its_own_epochs():
    orders = three_sets(3)
    mixture = Mixture(orders, shares=(1, 2, 3))
    batches = [mixture[position] for position in range(200)]
    for number, order in enumerate(orders):
        own = [batch for batch in batches if set_of(batch[0]) == number]
        assert own == [order[position] for position in range(len(own))]


def test_a_mixture_depends_on_the_position_alone_whoever_asks_first():
    wanted = list(range(400))
    forward = [Mixture(three_sets(2), shares=(1, 2, 3))[position] for position in (399, 7)]
    mixture = Mixture(three_sets(2), shares=(1, 2, 3))
    shuffled = random.Random(0).sample(wanted, len(wanted))
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(shuffled, pool.map(mixture.__getitem__, shuffled), strict=True))
    assert [found[399], found[7]] == forward
    ordered = Mixture(three_sets(2), shares=(1, 2, 3))
    assert [found[position] for position in wanted] == [ordered[p] for p in wanted]


def test_sets_do_not_shuffle_alike():
    """Else picture i of one set would meet the same picture of the other in every epoch."""
    examples = [example(f"{i}") for i in range(12)]
    one = Order(examples, batch_size=1, seed=5)
    other = Order(examples, batch_size=1, seed=5, first=12)
    places = [
        [batch[0].example - order._first for batch in epoch_of(order, 0)] for order in (one, other)
    ]
    assert places[0] != places[1]


def test_passes_count_the_batches_before_a_position():
    orders = three_sets(3)
    mixture = Mixture(orders, shares=(1, 2, 3))
    assert mixture.passes(0) == [0, 0, 0]
    taken = Counter(set_of(mixture[position][0]) for position in range(90))
    expected = [taken[number] / order.epoch_length for number, order in enumerate(orders)]
    assert mixture.passes(90) == expected


def test_with_one_set_a_mixture_is_its_order():
    order = Order(mixed(), batch_size=3, seed=5)
    mixture = Mixture([order], shares=[7])
    assert [mixture[p] for p in range(40)] == [order[p] for p in range(40)]
    assert mixture.passes(order.epoch_length) == [1]
