"""Adapters in a model: attached, their strength and their start, written and read back."""

import dataclasses
import re
from typing import Any

import peft
import pytest
import torch
from diffusers import Flux2Transformer2DModel

from tests import tiny
from train import lora
from train.config import LoraConfig
from train.errors import CheckpointError, ConfigError


def attached(**settings) -> tuple[Flux2Transformer2DModel, LoraConfig]:
    """A tiny transformer with a fresh adapter."""
    config = LoraConfig(rank=4, **settings)
    transformer = tiny.transformer(guidance=True)
    lora.attach(transformer, config, seed=0)
    return transformer, config


def read(transformer: Any, config: LoraConfig) -> lora.Adapter:
    """The attached LoRA."""
    adapter = lora.read(transformer, config)
    assert isinstance(adapter, lora.Adapter)
    return adapter


def read_start(transformer: Any, config: LoraConfig) -> lora.Adapter:
    """Its start, which must be there."""
    start = lora.read_start(transformer, config)
    assert isinstance(start, lora.Adapter)
    return start


def randomized(adapter: lora.Adapter) -> lora.Adapter:
    """Another adapter of the same modules and rank."""
    down = {name: torch.randn_like(weight) for name, weight in adapter.down.items()}
    up = {name: torch.randn_like(weight) for name, weight in adapter.up.items()}
    return lora.Adapter(down, up, adapter.rank, adapter.alpha)


def test_adapter_weights_are_fp32_on_a_bf16_base_and_the_base_is_frozen():
    transformer = tiny.transformer(guidance=True).bfloat16()
    lora.attach(transformer, LoraConfig(rank=4), seed=0)
    assert {weight.dtype for weight in lora.trainable(transformer)} == {torch.float32}
    frozen = [p for n, p in transformer.named_parameters() if ".lora_" not in n]
    assert {weight.dtype for weight in frozen} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in frozen)


def test_a_fresh_adapter_changes_nothing_and_depends_on_the_seed_alone():

    def fresh(*, history: int, seed: int) -> lora.Adapter:
        transformer, config = tiny.transformer(guidance=True), LoraConfig(rank=4)
        torch.manual_seed(history)
        before = torch.get_rng_state()
        lora.attach(transformer, config, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return read(transformer, config)

    one, same, other = fresh(history=1, seed=0), fresh(history=2, seed=0), fresh(history=1, seed=1)
    assert all(torch.equal(one.down[name], same.down[name]) for name in one.down)
    assert not any(torch.equal(one.down[name], other.down[name]) for name in one.down)
    assert all(weight.any() for weight in one.down.values())
    assert not any(weight.any() for weight in one.up.values())


def test_attaching_touches_no_gpu_that_the_base_is_not_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    transformer = tiny.transformer(guidance=True)
    before = torch.get_rng_state()
    lora.attach(transformer, LoraConfig(rank=4), seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("alpha", [None, 1.0, 4.0, 10.0])
def test_the_update_is_scale_times_up_times_down(alpha):
    """What peft computes in the forward pass is what `delta` says, which is what gets exported."""
    transformer, config = attached(alpha=alpha)
    adapter = randomized(read(transformer, config))
    lora.write(transformer, adapter)
    name = "transformer_blocks.0.attn.to_q"
    module: Any = transformer.get_submodule(name)
    x = torch.randn(5, 32)
    added = module(x) - module.base_layer(x)
    torch.testing.assert_close(added, x @ adapter.delta(name).T, rtol=1e-4, atol=1e-4)
    assert adapter.scale == (1.0 if alpha is None else alpha / 4)


def test_rslora_is_pefts():
    """Ours sets the strength by alpha alone; peft's own switch gives the same output."""
    ours, config = attached(rslora=True, alpha=3.0, compute="fp32")
    adapter = randomized(read(ours, config))
    lora.write(ours, adapter)
    theirs = tiny.transformer(guidance=True)
    targets = lora.block_linears(theirs)
    theirs.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=targets),
        adapter_name=lora.ADAPTER_NAME,
    )
    lora.write(theirs, adapter)
    name, x = "single_transformer_blocks.1.attn.to_out", torch.randn(5, 128)
    modules: list[Any] = [model.get_submodule(name) for model in (ours, theirs)]
    outputs = [module(x) for module in modules]
    assert torch.equal(*outputs)
    assert adapter.scale == 1.5
    base = modules[0].base_layer(x)
    torch.testing.assert_close(outputs[0] - base, x @ adapter.delta(name).T, rtol=1e-4, atol=1e-4)


def pissa(**settings) -> tuple[Any, LoraConfig]:
    """A tiny transformer with a fresh PiSSA adapter of a strength other than 1."""
    return attached(init="pissa", alpha=2.0, **settings)


def test_pissa_starts_as_pefts_does_from_an_untouched_base():
    """peft takes the start off the base; we leave the base and take it off the output."""
    ours, theirs = (tiny.transformer(guidance=True) for _ in range(2))
    targets = lora.block_linears(theirs)
    before = {}
    for name in targets:  # sizes as far apart as a trained base's, or two ways to an SVD part
        left, sizes, right = torch.linalg.svd(ours.get_parameter(f"{name}.weight").data, False)
        before[name] = left @ torch.diag(0.1 ** torch.arange(len(sizes))) @ right
        for model in (ours, theirs):
            model.get_parameter(f"{name}.weight").data = before[name].clone()
    config = LoraConfig(rank=4, alpha=2.0, init="pissa")
    lora.attach(ours, config, seed=0)
    settings: Any = {"r": 4, "lora_alpha": 2, "init_lora_weights": "pissa"}
    theirs.add_adapter(
        peft.LoraConfig(**settings, target_modules=targets), adapter_name=lora.ADAPTER_NAME
    )
    adapter = read(ours, config)
    exact = read(theirs, config)
    for name in targets:
        module: Any = ours.get_submodule(name)
        assert torch.equal(module.base_layer.weight, before[name])
        torch.testing.assert_close(adapter.delta(name), exact.delta(name), rtol=0, atol=1e-5)
        for one, other in ((adapter.down, exact.down), (adapter.up, exact.up)):
            torch.testing.assert_close(one[name].norm(), other[name].norm(), rtol=1e-3, atol=0)
        x = torch.randn(5, module.in_features)
        torch.testing.assert_close(module(x), module.base_layer(x), rtol=1e-5, atol=1e-5)


def test_pissa_trains_the_adapter_and_not_its_start():
    ours, config = pissa()
    names = [name for name, weight in ours.named_parameters() if weight.requires_grad]
    assert names
    assert all(f".{lora.ADAPTER_NAME}." in name for name in names)
    assert {weight.dtype for weight in lora.trainable(ours)} == {torch.float32}
    assert len(lora.trainable(ours)) == 2 * len(read(ours, config).down)
    assert len(lora.trainable_up(ours)) == len(read(ours, config).up)


def test_the_base_alone_is_seen_with_pissa_too_and_training_goes_on():
    """peft would leave the frozen half trained after it."""
    ours, _ = pissa()
    name = "transformer_blocks.0.attn.to_q"
    module: Any = ours.get_submodule(name)
    trained = [n for n, weight in ours.named_parameters() if weight.requires_grad]
    with torch.no_grad():
        module.lora_B[lora.ADAPTER_NAME].weight.add_(1.0)
    x = torch.randn(5, 32)
    with lora.disabled(ours):
        assert torch.equal(module(x), module.base_layer(x))
    assert not torch.allclose(module(x), module.base_layer(x))
    assert [n for n, weight in ours.named_parameters() if weight.requires_grad] == trained


def test_a_start_that_is_given_is_taken():
    ours, config = pissa()
    start = read_start(ours, config)
    given = moved(start, by=0.1)
    transformer = tiny.transformer(guidance=True)
    lora.attach(transformer, config, seed=0, start=given)
    found = read_start(transformer, config)
    torch.testing.assert_close((found.down, found.up), (given.down, given.up), rtol=0, atol=0)
    numbers = sum(weight.numel() for weight in lora.start_parameters(transformer))
    assert numbers == sum(weight.numel() for weight in lora.trainable(transformer))


def moved(adapter: lora.Adapter, *, by: float) -> lora.Adapter:
    """The adapter after some training."""
    down = {n: w + by * w.std() * torch.randn_like(w) for n, w in adapter.down.items()}
    up = {n: w + by * w.std() * torch.randn_like(w) for n, w in adapter.up.items()}
    return lora.Adapter(down, up, adapter.rank, adapter.alpha)


def test_with_its_start_pissa_is_a_plain_adapter_to_the_base():
    ours, config = pissa(rslora=True)
    trained = moved(read(ours, config), by=0.1)
    lora.write(ours, trained)
    start = read_start(ours, config)
    whole = lora.with_start(trained, start)
    assert (whole.rank, whole.scale) == (8, trained.scale)
    for name in lora.block_linears(tiny.transformer(guidance=True)):
        module: Any = ours.get_submodule(name)
        x = torch.randn(5, module.in_features)
        added = module(x) - module.base_layer(x)
        torch.testing.assert_close(added, x @ whole.delta(name).T, rtol=1e-4, atol=1e-4)


def test_a_small_update_of_pissa_survives_bf16():
    """A thousandth of the start: rounded apart, the two products would lose it in their own."""
    ours, config = pissa()
    start, trained = read_start(ours, config), moved(read(ours, config), by=1e-3)
    whole = lora.with_start(trained, start)
    rounded = lora.Adapter(
        {n: w.bfloat16().float() for n, w in whole.down.items()},
        {n: w.bfloat16().float() for n, w in whole.up.items()},
        whole.rank,
        whole.alpha,
    )
    for name in whole.down:
        exact = trained.scale * (
            trained.up[name].double() @ trained.down[name].double()
            + start.up[name].double() @ start.down[name].double()
        )
        assert (rounded.delta(name) - exact).norm() < 0.01 * exact.norm()


def test_pissa_on_weights_that_it_cannot_read_is_refused():
    transformer: Any = tiny.transformer(guidance=True)
    name = "transformer_blocks.0.attn.to_q"
    weight = transformer.get_submodule(name).weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ConfigError) as caught:
        lora.attach(transformer, LoraConfig(rank=4, init="pissa"), seed=0)
    assert str(caught.value) == (
        f"lora.init: pissa starts from the base's weights, but {name} is kept as float8_e4m3fn. "
        "Remove it, or use a base in bf16."
    )
    transformer, config = tiny.transformer(guidance=True), LoraConfig(rank=33, init="pissa")
    with pytest.raises(ConfigError) as caught:
        lora.attach(transformer, config, seed=0)
    assert str(caught.value) == (
        f"lora.rank: 33 is more than the 32 directions that pissa finds in {name}. Lower it, or "
        "remove lora.init."
    )


def test_reading_gives_back_what_was_written():
    transformer, config = attached()
    adapter = randomized(read(transformer, config))
    lora.write(transformer, adapter)
    back = read(transformer, config)
    assert (
        list(back.down) == list(adapter.down) == lora.block_linears(tiny.transformer(guidance=True))
    )
    assert all(torch.equal(back.down[n], adapter.down[n]) for n in adapter.down)
    assert all(torch.equal(back.up[n], adapter.up[n]) for n in adapter.down)
    assert (back.rank, back.alpha) == (adapter.rank, adapter.alpha)


@pytest.mark.parametrize("misfit", ["missing", "extra", "rank"])
def test_an_adapter_that_does_not_fit_is_refused(misfit):
    transformer, config = attached()
    adapter = read(transformer, config)
    name = "transformer_blocks.0.attn.to_q"
    down = dict(adapter.down)
    if misfit == "missing":
        del down[name]
    elif misfit == "extra":
        down["proj_out"] = torch.zeros(4, 32)
    else:
        down[name] = torch.zeros(8, 32)
    with pytest.raises(CheckpointError, match=re.escape("other modules or ranks than this config")):
        lora.write(transformer, dataclasses.replace(adapter, down=down))


def test_norms_of_updates_are_those_of_the_whole_matrices():
    """By kind of block; the update is never made in training."""
    transformer, config = attached(alpha=6.0)
    adapter = randomized(read(transformer, config))
    lora.write(transformer, adapter)
    adapter = read(transformer, config)
    squares = {"double_attn": 0.0, "double_ff": 0.0, "single": 0.0}
    for module in adapter.down:
        kind = "single" if "single" in module else "double_ff" if ".ff" in module else "double_attn"
        squares[kind] += adapter.delta(module).square().sum().item()
    found = lora.update_norms(transformer)
    assert {kind: norm.item() for kind, norm in found.items()} == pytest.approx(
        {kind: square**0.5 for kind, square in squares.items()}, rel=1e-5
    )


def test_norms_of_gradients_add_up_to_the_whole():
    transformer, _ = attached()
    for parameter in lora.trainable(transformer):
        parameter.grad = torch.randn_like(parameter)
    found = lora.gradient_norms(transformer)
    assert set(found) == {"double_attn", "double_ff", "single"}
    whole = torch.nn.utils.clip_grad_norm_(lora.trainable(transformer), 1.0)
    assert sum(norm**2 for norm in found.values()) ** 0.5 == pytest.approx(whole.item(), rel=1e-5)


def test_disabled_is_the_base_and_ends():
    transformer, config = attached()
    lora.write(transformer, randomized(read(transformer, config)))
    module: Any = transformer.get_submodule("transformer_blocks.0.attn.to_q")
    inputs = torch.randn(3, module.in_features)
    adapted = module(inputs)
    with lora.disabled(transformer):
        assert torch.equal(module(inputs), module.base_layer(inputs))
        assert lora.trainable(transformer) == []
    assert torch.equal(module(inputs), adapted)
    assert len(lora.trainable(transformer)) == 2 * len(read(transformer, config).down)
