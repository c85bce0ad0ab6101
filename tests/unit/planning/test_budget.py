"""The timeline of a step by hand, what auto chooses, and that a decision only goes one way."""

from itertools import pairwise
from typing import Any

import pytest

from train.config import MemoryConfig, OptimConfig
from train.errors import ConfigError
from train.planning import budget
from train.planning.budget import Block, Choice, Footprint, Pass

OPTIM = OptimConfig(name="adamw")


def block(name: str, weights: int) -> Block:
    """Keeps 10 and works with 5 more; recomputed it keeps 1 and needs the 10 again."""
    kept = (Pass(15, 10), Pass(5, -9))
    recomputed = (Pass(15, 1), Pass(15, 0))
    return Block(name, weights, kept, recomputed)


def stack(double: int = 2, single: int = 4, *, accumulated: bool = False) -> Footprint:
    """Double blocks of 200, single ones of 100, one parameter in each."""
    blocks = [block(f"transformer_blocks.{i}", 200) for i in range(double)]
    blocks += [block(f"single_transformer_blocks.{i}", 100) for i in range(single)]
    return Footprint(
        tuple(blocks),
        others=50,
        parameters=len(blocks),
        head=Pass(3, 2),
        turn=Pass(4, 1),
        accumulated=accumulated,
    )


def need(choice: Choice, **changes: Any) -> budget.Need:
    return budget.measure(stack(**changes), choice, optim=OPTIM)


HELD = 50 + 2 * 200 + 4 * 100 + 6 * (4 + 8)


def test_nothing_recomputed_peaks_after_the_forward() -> None:
    """Head 2, six blocks of 10, the loss 1, and the last block's backward 5 on top of them."""
    found = need(Choice(frozenset(), 6, False))
    assert found.held == HELD
    assert found.gpu == HELD + 2 + 60 + 1 + 5
    assert found.where == "backward of single_transformer_blocks.3"


def test_all_recomputed_needs_one_block_at_a_time() -> None:
    assert need(Choice(frozenset(range(6)), 6, False)).gpu == HELD + 2 + 6 + 1 + 15


def test_the_last_blocks_are_the_ones_to_keep() -> None:
    first, last = (need(Choice(frozenset(n), 6, False)).gpu for n in ({0, 1, 2}, {3, 4, 5}))
    assert (first, last) == (HELD + 2 + 3 + 30 + 1 + 5, HELD + 2 + 30 + 3 + 1 + 15)


def test_accumulated_gradients_are_there_from_the_start() -> None:
    assert need(Choice(frozenset(), 6, False), accumulated=True).held == HELD + 6 * 4


def test_starts_go_to_ram_but_for_two() -> None:
    """The first block's, which is in the head, and what the last one leaves don't either."""
    found = need(Choice(frozenset(range(6)), 6, True))
    assert found.ram == 5
    assert found.gpu == HELD + 2 + 1 + 1 + 15 + 2 + 5  # at the first block, five gradients later
    assert need(Choice(frozenset({0}), 6, True)).ram == 0
    assert need(Choice(frozenset({5}), 6, True)).ram == 1


@pytest.mark.parametrize(
    ("resident", "gpu", "ram"),
    [
        (6, 850, 0),
        (5, 850, 100),  # a slot instead of the block: nothing gained
        (2, 750, 400),  # 4 single blocks away, 3 slots
        (1, 750, 600),
        (0, 750, 800),  # both double blocks in two slots
    ],
)
def test_streamed_blocks_leave_three_slots(resident: int, gpu: int, ram: int) -> None:
    found = need(Choice(frozenset(), resident, False))
    assert (found.held - 6 * 12, found.ram) == (gpu, ram)


def decide(limit: int | None, **settings: Any) -> budget.Decision:
    memory = MemoryConfig.model_validate(settings)
    return budget.decide(stack(single=8), memory, optim=OPTIM, budget=limit)


def test_auto_prefers_kept_activations_then_residents() -> None:
    auto = {"gradient_checkpointing": "auto", "resident_blocks": "auto"}
    rich, poor = decide(10**6, **auto), decide(1160, **auto)
    assert rich.choice == Choice(frozenset(), 10, False)
    assert len(poor.choice.recomputed) == 10
    assert poor.choice.resident < 10


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": "auto"},
        {"gradient_checkpointing": "auto", "resident_blocks": "auto"},
        {"resident_blocks": "auto"},
        {"resident_blocks": "auto", "offload_activations": True},
    ],
)
def test_more_memory_never_means_more_recomputed_or_streamed(settings: dict[str, Any]) -> None:
    found = [decide(limit, **settings) for limit in range(800, 1600, 7)]
    for less, more in pairwise(found):
        assert more.choice.recomputed <= less.choice.recomputed
        assert more.choice.resident >= less.choice.resident
        assert more.fits >= less.fits
    for limit, one in zip(range(800, 1600, 7), found, strict=True):
        assert one.fits == (one.need.gpu <= limit)
    assert {one.fits for one in found} == {True, False}


def test_what_does_not_fit_is_the_least_that_is_allowed() -> None:
    auto = {"gradient_checkpointing": "auto", "resident_blocks": "auto"}
    found = decide(1, **auto)
    assert (found.fits, found.choice) == (False, Choice(frozenset(range(10)), 0, False))


def test_without_a_budget_all_stays_and_all_is_recomputed() -> None:
    auto = {"gradient_checkpointing": "auto", "resident_blocks": "auto"}
    assert decide(None, **auto).choice == Choice(frozenset(range(10)), 10, False)
    assert decide(None, gradient_checkpointing="none").choice.recomputed == frozenset()


def test_settings_in_numbers_are_taken_as_they_are() -> None:
    found = decide(10**6, gradient_checkpointing=3, resident_blocks=4)
    assert found.choice == Choice(frozenset({0, 3, 6}), 4, False)
    with pytest.raises(ConfigError, match="resident_blocks"):
        decide(10**6, resident_blocks=11)


def test_a_budget_leaves_room_for_what_is_not_torchs() -> None:
    allowed = budget.allowed(24 * 10**9)
    assert allowed < 24 * 10**9 - budget.CONTEXT
    assert budget.needed(allowed) == pytest.approx(budget.usable(24 * 10**9), abs=2)
    assert budget.usable(24 * 10**9) == (1 - budget.MARGIN) * 24 * 10**9


def test_a_choice_in_words() -> None:
    assert budget.shown(Choice(frozenset({0, 1}), 6, False), blocks=6) == (
        "2 of 6 blocks recomputed, all resident"
    )
    assert budget.shown(Choice(frozenset({0}), 4, True), blocks=6) == (
        "1 of 6 blocks recomputed, 4 resident, their starts in RAM"
    )
