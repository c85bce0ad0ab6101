"""What a showing draws and weighs, and the shares of processes."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.examples import TALL, mixed, one_set, with_rules
from train import data
from train.config import FlowConfig
from train.data import Example, Loader, Rules
from train.encoding.cache import Cache
from train.order import Mixture, Showing


def steps_of(order: Mixture, *, accumulate: int, world: int, rank: int) -> list[list[data.Portion]]:
    """Six steps of a process; batches are lists of showings."""
    load = lambda showings: showings  # noqa: E731
    found = data.portions(
        order,
        load,  # pyright: ignore[reportArgumentType]
        steps=range(6),
        accumulate=accumulate,
        rank=rank,
        world=world,
    )
    return list(found)


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_every_picture_of_a_step_weighs_the_same(accumulate, world):
    order = one_set(mixed(), batch_size=3, seed=5)
    ranks = [steps_of(order, accumulate=accumulate, world=world, rank=r) for r in range(world)]
    for step in zip(*ranks, strict=True):
        portions = [portion for rank in step for portion in rank]
        assert sum(p.weight for p in portions) == pytest.approx(1, abs=1e-12)
        shares = {round(p.weight / len(p.batch), 12) for p in portions}  # pyright: ignore
        assert len(shares) == 1


def test_two_processes_train_what_one_does_with_twice_the_accumulation():
    order = one_set(mixed(), batch_size=3, seed=5)
    one = steps_of(order, accumulate=4, world=1, rank=0)
    two = [steps_of(order, accumulate=2, world=2, rank=rank) for rank in range(2)]
    for alone, first, second in zip(one, *two, strict=True):
        together = sorted([*first, *second], key=lambda portion: portion.position)
        assert together == alone


def test_steps_start_anywhere():
    order = one_set(mixed(), batch_size=3, seed=5)
    load = lambda showings: showings  # noqa: E731
    settings = {"accumulate": 2, "rank": 1, "world": 2}
    whole = list(data.portions(order, load, steps=range(6), **settings))  # pyright: ignore
    rest = list(data.portions(order, load, steps=range(4, 6), **settings))  # pyright: ignore
    assert rest == whole[4:]


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Cache:
    """Entries of `mixed()` and the empty prompt: latents and texts that differ."""
    made = Cache(tmp_path_factory.mktemp("cache"))
    number = 0
    for item in mixed():
        assert item.mirrored is not None
        for name, size in zip(item.pictures, item.geometry, strict=True):
            latents = torch.full((16, size[1] // 16, size[0] // 16), float(number := number + 1))
            made.put(name, {"latents": latents}, notes={})
            made.put(f"{name}-flipped", {"latents": -latents}, notes={})
        made.put(item.text, {"text": torch.full((5, 8), float(number))}, notes={})
    made.put("empty", {"text": torch.zeros(5, 8)}, notes={})
    return made


def loader(cache: Cache, *, dropout: float = 0.0, seed: int = 1, flip: bool = True) -> Loader:
    """Over `mixed()`."""
    examples = mixed()
    if not flip:
        examples = [Example(e.name, e.pictures, None, e.text, e.geometry) for e in examples]
    examples = with_rules(examples, Rules(caption_dropout=dropout))
    return Loader(examples, "empty", cache, FlowConfig(), seed=seed)


def test_a_batch_holds_pictures_references_and_names(filled):
    tall = [i for i, item in enumerate(mixed()) if item.geometry == TALL]
    batch = loader(filled, flip=False)([Showing(0, tall[0], 0)])
    assert batch.names == ("4.png",)
    assert batch.latents_BDhw.shape == batch.noise_BDhw.shape == (1, 16, 6, 3)
    assert [reference.shape for reference in batch.references] == [(1, 16, 4, 4)]
    assert batch.text_BLJ.shape == (1, 5, 8)
    assert torch.equal(batch.latents_BDhw[0], filled.get("4.png-0")["latents"])
    assert torch.equal(batch.references[0][0], filled.get("4.png-1")["latents"])


def test_noise_and_sigma_depend_on_the_showing_alone(filled):
    """Not on its neighbours, the batch size or what was read before."""
    together = loader(filled)([Showing(2, 0, 1), Showing(2, 3, 0)])
    alone = loader(filled)([Showing(2, 3, 0)])
    assert torch.equal(together.noise_BDhw[1], alone.noise_BDhw[0])
    assert torch.equal(together.sigma_B[1], alone.sigma_B[0])
    assert torch.equal(together.latents_BDhw[1], alone.latents_BDhw[0])


@pytest.mark.parametrize(
    "other",
    [Showing(3, 3, 0), Showing(2, 2, 0), Showing(2, 3, 1)],
    ids=["epoch", "example", "repeat"],
)
def test_every_showing_draws_anew(filled, other):
    one, two = loader(filled)([Showing(2, 3, 0)]), loader(filled)([other])
    assert not torch.equal(one.noise_BDhw, two.noise_BDhw)
    assert not torch.equal(one.sigma_B, two.sigma_B)


def test_another_seed_draws_anew(filled):
    one, two = (loader(filled, seed=seed)([Showing(2, 3, 0)]) for seed in (1, 2))
    assert not torch.equal(one.noise_BDhw, two.noise_BDhw)
    assert not torch.equal(one.sigma_B, two.sigma_B)


def test_captions_and_flips_fall_as_often_as_they_should(filled):
    """Of 1000: standard deviations 14 and 16."""
    batch = loader(filled, dropout=0.3)([Showing(epoch, 0, 0) for epoch in range(1000)])
    dropped = (batch.text_BLJ == 0).all(dim=(1, 2))
    flipped = (batch.latents_BDhw < 0).all(dim=(1, 2, 3))
    assert abs(int(dropped.sum()) - 300) < 60
    assert abs(int(flipped.sum()) - 500) < 70
    both = int((dropped & flipped).sum())
    assert abs(both - 150) < 50, "drops and flips must not go together"


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_no_dropout_drops_none_and_full_dropout_all(filled, dropout):
    batch = loader(filled, dropout=dropout)([Showing(epoch, 0, 0) for epoch in range(50)])
    assert bool((batch.text_BLJ == 0).all()) == (dropout == 1)


def test_without_flips_nothing_is_mirrored(filled):
    batch = loader(filled, flip=False)([Showing(epoch, 0, 0) for epoch in range(50)])
    assert (batch.latents_BDhw > 0).all()


def test_a_picture_is_mirrored_together_with_its_references(filled):
    batch = loader(filled)([Showing(epoch, 4, 0) for epoch in range(20)])
    signs = [part.sign().mean(dim=(1, 2, 3)) for part in (batch.latents_BDhw, *batch.references)]
    assert torch.equal(signs[0], signs[1])
    assert signs[0].unique().tolist() == [-1, 1]


def masked(cache: Cache, *, rules: Rules) -> Loader:
    """Over one example whose mask has one of four patches, in the top right corner."""
    corner = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    cache.put("mask", {"mask": corner}, notes={})
    cache.put("mask-flipped", {"mask": corner.flip(1)}, notes={})
    cache.put("masked", {"latents": torch.ones(16, 2, 2)}, notes={})
    cache.put("masked-flipped", {"latents": -torch.ones(16, 2, 2)}, notes={})
    pictures, mirrored = ("masked",), ("masked-flipped",)
    example = Example("m.png", pictures, mirrored, "empty", ((32, 32),), rules)
    masked = replace(example, mask=("mask", "mask-flipped"))
    return Loader([masked], "empty", cache, FlowConfig(), seed=1)


@pytest.mark.parametrize(("floor", "weight"), [(0.0, 1.0), (0.1, 1.0), (0.5, 0.25), (1.0, 2.0)])
def test_a_mask_moves_weight_into_it_and_keeps_the_sum(filled, floor, weight):
    load = masked(filled, rules=Rules(weight=weight, mask_floor=floor))
    for epoch in range(6):
        batch = load([Showing(epoch, 0, 0)])
        found, flipped = batch.weight_Bhw[0], bool(batch.latents_BDhw[0, 0, 0, 0] < 0)
        corner = found[0, 0 if flipped else 1]
        assert found.mean() == pytest.approx(weight)
        assert found.min() == pytest.approx(floor * corner.item())
        assert corner == found.max()


def test_without_a_mask_the_weight_is_the_data_sets(filled):
    load = Loader(with_rules(mixed(), Rules(weight=0.5)), "empty", filled, FlowConfig(), seed=1)
    assert load([Showing(0, 0, 0)]).weight_Bhw.unique().tolist() == [0.5]


def test_the_next_result_is_made_while_this_one_is_used():
    made = [threading.Event() for _ in range(3)]

    def make(number: int) -> int:
        made[number].set()
        return number

    results = data.ahead(make, range(3))
    assert next(results) == 0
    assert made[1].wait(timeout=5)
    time.sleep(0.05)
    assert not made[2].is_set(), "one ahead, not more"
    assert list(results) == [1, 2]


def test_an_error_while_reading_ahead_reaches_the_step_that_needed_it():
    results = data.ahead(lambda number: 1 // (2 - number), range(4))
    assert next(results) == 0
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_damaged_entry_stops_the_step_that_needs_it(filled: Cache, tmp_path: Path):
    from train.errors import CheckpointError

    with pytest.raises(CheckpointError, match="Delete that cache file"):
        loader(Cache(tmp_path))([Showing(0, 0, 0)])
