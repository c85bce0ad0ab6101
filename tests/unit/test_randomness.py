"""Randomness is a function of its key."""

import torch

from train import randomness


def test_a_seed_is_the_same_on_every_machine_and_in_every_run():
    """Fixed by hand: another hash would silently change every resumed run."""
    assert randomness.derived_seed(7, "noise", 0) == 8241906094854770664


def test_every_part_of_a_key_counts_its_type_and_place_too():
    keys = [(1, "a"), ("1", "a"), ("a", 1), (1, "a", 0), ("1a",), (2, "a")]
    assert len({randomness.derived_seed(*key) for key in keys}) == len(keys)


def test_draws_depend_on_the_key_and_not_on_what_was_drawn_before():
    first = torch.randn(4, generator=randomness.generator("x", 1))
    torch.randn(100)
    torch.randn(4, generator=randomness.generator("x", 2))
    assert torch.equal(first, torch.randn(4, generator=randomness.generator("x", 1)))


def test_drawing_leaves_the_global_generators_alone():
    state = torch.get_rng_state()
    randomness.generator(1)
    randomness.fraction(1)
    randomness.shuffled([1, 2, 3], 1)
    assert torch.equal(state, torch.get_rng_state())


def test_fractions_are_uniform():
    draws = torch.tensor([randomness.fraction("uniform", i) for i in range(4000)])
    assert 0 <= draws.min() < draws.max() < 1
    # the standard deviation of a mean of 4000 is 0.0046, and of a fraction below 1/4, 0.0068
    assert abs(draws.mean() - 0.5) < 0.02
    assert abs((draws < 0.25).double().mean() - 0.25) < 0.03


def test_shuffling_permutes_a_copy():
    items = list(range(20))
    shuffled = randomness.shuffled(items, "order", 0)
    assert items == list(range(20))
    assert sorted(shuffled) == items
    assert shuffled != items
    assert shuffled != randomness.shuffled(items, "order", 1)
