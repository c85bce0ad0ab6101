"""The measure, against a second one that is written out by hand; and that it touches nothing."""

import itertools
import json
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import Flux2Pipeline

from tests import tiny
from train import lora, randomness
from train.config import FlowConfig, LoraConfig
from train.data import Example, Rules
from train.encoding.cache import Cache
from train.flow import quantile_sigmas, token_shift
from train.validation.validate import DRIFT_STEPS, Model, Trial, Validator
from train.validation.verdict import History

SIZES = ((64, 48), (32, 32), (64, 48))
LEVELS = 5
FLOW = FlowConfig(mean=0.2, std=0.9)


class Share:
    """An accelerator that is one of several processes and keeps its part."""

    def __init__(self, rank: int, world: int) -> None:
        self.process_index, self.num_processes = rank, world
        self.device = torch.device("cpu")

    def reduce(self, table: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return table


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Three pictures, one of them masked, a caption each, and two neutral prompts."""
    cache = Cache(tmp_path_factory.mktemp("cache"))
    draw = torch.Generator().manual_seed(0)
    for number, (width, height) in enumerate(SIZES):
        latents = torch.randn(16, height // 16, width // 16, generator=draw)
        cache.put(f"aa{number}", {"latents": latents}, notes={})
    cache.put("mm", {"mask": torch.rand(3, 4, generator=draw)}, notes={})
    for name in ("bb0", "bb1", "bb2", "cc0", "cc1"):
        text = torch.randn(7, 3 * tiny.TEXT_WIDTH, generator=draw)
        cache.put(name, {"text": text}, notes={})
    return cache


def trial(**changes: Any) -> Trial:
    rules = Rules(mask_floor=0.1)
    examples = tuple(
        Example(f"{n}.png", (f"aa{n}",), None, f"bb{n}", (size,), rules=rules)
        for n, size in enumerate(SIZES)
    )
    examples = (*examples[:2], replace(examples[2], mask=("mm", None)))
    return replace(Trial(examples, True, ("cc0", "cc1"), {}, ""), **changes)


def validator(
    cache: Cache, *, accelerator: Any = None, batch_size: int = 2, **changes
) -> Validator:
    return Validator(
        trial(**changes),
        cache=cache,
        flow=FLOW,
        levels=LEVELS,
        batch_size=batch_size,
        accelerator=accelerator or Accelerator(),
    )


def model(*, dropout: float = 0.0, trained: bool = True) -> Model:
    """The tiny transformer with an adapter that does something, in training mode."""
    transformer = tiny.transformer(guidance=True)
    lora.attach(transformer, LoraConfig(rank=4, dropout=dropout), seed=0)
    if trained:
        draw = torch.Generator().manual_seed(1)
        for parameter in lora.trainable(transformer):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)
    transformer.train()
    return Model(transformer, torch.float32, 1.0)


def sigmas_by_hand(tokens: int, count: int) -> list[float]:
    """By the standard library's inverse of the normal distribution."""
    levels = []
    for number in range(count):
        normal = NormalDist(FLOW.mean, FLOW.std).inv_cdf((number + 0.5) / count)
        sigma = 1 / (1 + 2.718281828459045**-normal)
        factor = token_shift(tokens)
        levels.append(factor / (factor + 1 / sigma - 1))
    return levels


def velocity_by_hand(transformer: Any, clean, noise, *, sigma: float, text) -> torch.Tensor:
    """One picture, through the pipeline's own functions."""
    noisy = ((1 - sigma) * clean + sigma * noise)[None]
    prediction = transformer(
        hidden_states=Flux2Pipeline._pack_latents(noisy),
        timestep=torch.tensor([sigma]),
        guidance=torch.tensor([1.0]),
        encoder_hidden_states=text[None],
        txt_ids=Flux2Pipeline._prepare_text_ids(text[None]),
        img_ids=Flux2Pipeline._prepare_latent_ids(noisy),
        return_dict=False,
    )[0]
    ids = Flux2Pipeline._prepare_latent_ids(noisy)
    unpacked: Any = Flux2Pipeline._unpack_latents_with_ids(prediction, ids)
    return unpacked[0]


def noise_by_hand(clean, number: int, level: int) -> torch.Tensor:
    generator = randomness.generator("validation", f"aa{number}", number, level)
    return torch.randn(clean.shape, generator=generator)


@torch.no_grad()
def test_losses_are_those_written_out(cache):
    found = model()
    check = validator(cache).check(10, found)
    found.transformer.eval()
    table = []
    for number, (width, height) in enumerate(SIZES):
        clean, text = cache.get(f"aa{number}")["latents"], cache.get(f"bb{number}")["text"]
        weight = torch.ones(height // 16, width // 16)
        if number == 2:
            weight = 0.1 + 0.9 * cache.get("mm")["mask"]
            weight = weight / weight.mean()
        row = []
        for level, sigma in enumerate(sigmas_by_hand(width * height // 256, LEVELS)):
            noise = noise_by_hand(clean, number, level)
            moved = velocity_by_hand(found.transformer, clean, noise, sigma=sigma, text=text)
            row.append(((moved - (noise - clean)) ** 2 * weight).mean().item())
        table.append(row)
    expected = torch.tensor(table)
    assert check.step == 10
    assert check.losses == pytest.approx(expected.mean(1).tolist(), rel=1e-5)
    assert check.bands == pytest.approx(expected.mean(0).tolist(), rel=1e-5)


@torch.no_grad()
def test_drift_is_that_between_two_models(cache):
    """The base is loaded anew, without adapter, and takes Euler's steps from noise by itself."""
    found, base = model(), tiny.transformer(guidance=True)
    drift = validator(cache).drift(Model(found.transformer.eval(), torch.float32, 1.0))
    moved = still = 0.0
    factor = token_shift(64 * 48 // 256)
    steps = [1 - n / DRIFT_STEPS for n in range(DRIFT_STEPS + 1)]
    sigmas = [factor * s / (1 + (factor - 1) * s) for s in steps]
    for number in range(2):
        text = cache.get(f"cc{number}")["text"]
        place = torch.randn(1, 16, 3, 4, generator=randomness.generator("drift", number))[0]
        for now, later in itertools.pairwise(sigmas):
            zero, noise = torch.zeros_like(place), place / now
            ours, theirs = (
                velocity_by_hand(transformer, zero, noise, sigma=now, text=text)
                for transformer in (found.transformer, base)
            )
            moved += (ours - theirs).square().mean().item()
            still += theirs.square().mean().item()
            place = place + (later - now) * theirs
    assert drift == pytest.approx((moved / still) ** 0.5, rel=1e-4)
    assert drift > 0.01


def test_a_fresh_adapter_is_the_base(cache):
    found = model(trained=False)
    check = validator(cache).check(0, found)
    assert check.drift == 0
    with torch.no_grad(), lora.disabled(found.transformer):
        assert tuple(validator(cache).losses(found).double().mean(1).tolist()) == check.losses


def test_the_base_is_measured_once_and_stays_it(cache):
    """The adapter moves after the first check; the second compares with the base all the same."""
    kept, found = validator(cache), model(trained=False)
    kept.check(0, found)
    trained = model()
    lora.write(found.transformer, lora.read(trained.transformer, LoraConfig(rank=4)))
    assert kept.check(1, found).drift == validator(cache).check(1, trained).drift


def test_every_check_measures_the_same(cache):
    """With dropout in the adapter, and whatever was drawn before."""
    found, kept = model(dropout=0.5), validator(cache)
    first = kept.check(1, found)
    torch.manual_seed(99)
    assert kept.check(1, found) == first
    assert validator(cache).check(1, found) == first


def test_training_goes_on_as_if_nothing_was(cache):
    found = model(dropout=0.5)
    state = torch.get_rng_state()
    before = [p.requires_grad for p in found.transformer.parameters()]
    validator(cache).check(1, found)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.transformer.training
    assert [p.requires_grad for p in found.transformer.parameters()] == before
    assert all(p.grad is None for p in found.transformer.parameters())


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shares_add_up_to_the_whole_to_the_bit(cache, world):
    """Also where there are more processes than pictures; each runs as often as any other."""
    found = model()
    found.transformer.eval()
    whole = validator(cache).losses(found)
    parts, passes = [], []
    for rank in range(world):
        calls: list[int] = []
        hook = found.transformer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        parts.append(validator(cache, accelerator=Share(rank, world)).losses(found))
        hook.remove()
        passes.append(len(calls))
    assert torch.equal(torch.stack(parts).sum(0), whole)
    assert len(set(passes)) == 1


def test_without_neutral_prompts_there_is_no_drift(cache):
    assert validator(cache, neutral=()).check(0, model()).drift is None


@pytest.mark.parametrize(
    "flow",
    [FLOW, FlowConfig(sampling="uniform", shift="none"), FlowConfig(shift=3.0)],
    ids=["logit-normal", "uniform", "shifted"],
)
def test_levels_stand_for_the_trained_density(flow: FlowConfig):
    """A mean over them is the mean over what training draws."""
    from train.flow import sample_sigma

    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack(
        [sample_sigma(flow, tokens=1024, generator=generator) for _ in range(20000)]
    )
    levels = quantile_sigmas(flow, tokens=1024, count=64)
    assert levels.mean().item() == pytest.approx(drawn.mean().item(), abs=0.005)
    edges = torch.quantile(drawn, (torch.arange(64) + 0.5) / 64)
    torch.testing.assert_close(levels, edges, atol=0.02, rtol=0)


def test_other_pictures_prompts_or_levels_are_another_measure():
    whole = trial()
    digests = {
        whole.digest(levels=8),
        whole.digest(levels=4),
        replace(whole, neutral=("cc0",)).digest(levels=8),
        replace(whole, examples=whole.examples[:2]).digest(levels=8),
    }
    assert len(digests) == 4


def test_what_references_are_worth_is_a_difference_of_losses(cache: Cache):
    """Of those that have some, against the same picture at the same noise without any."""
    edits = list(trial().examples)
    for number, other in ((0, 2), (1, 0)):
        pictures = (*edits[number].pictures, f"aa{other}")
        edits[number] = replace(edits[number], pictures=pictures)
    asked = model()
    found = validator(cache, examples=tuple(edits)).check(1, asked)
    alone = validator(cache).check(1, asked)
    assert alone.worth is None
    assert found.worth is not None
    expected = [without - own for own, without in zip(found.losses, alone.losses, strict=True)]
    assert found.worth == pytest.approx(expected[:2])
    assert all(found.worth)
    assert found.losses[2] == alone.losses[2]
    history = History(True, "", (found, alone))
    assert History.of_json(json.loads(json.dumps(history.to_json()))) == history
