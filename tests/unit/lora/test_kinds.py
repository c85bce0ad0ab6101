"""DoRA and LoKr on the model: peft's numbers, the base's first picture, and EVA's start."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests import lanes, tiny
from train import lora, optim
from train.adapters.updates import changed_squares, row_squares
from train.config import LoraConfig, OptimConfig
from train.errors import ConfigError
from train.loading.frozen import FrozenLinear
from train.lora import eva, layers
from train.lora.base import weights
from train.memory import offload, recompute

CPU = torch.device("cpu")

KINDS: dict[str, LoraConfig] = {
    "dora": LoraConfig(kind="dora", rank=3, alpha=2.0),
    "lokr": LoraConfig(kind="lokr", rank=2, alpha=3.0, factor=4),
    # whole right sides of the square Linears, not of the others
    "lokr, whole": LoraConfig(kind="lokr", rank=8, alpha=3.0, factor=4),
}
PEFT: dict[str, Any] = {
    "dora": lambda t: peft.LoraConfig(r=3, lora_alpha=2, use_dora=True, target_modules=t),
    "lokr": lambda t: peft.LoKrConfig(r=2, alpha=3, decompose_factor=4, target_modules=t),
    "lokr, whole": lambda t: peft.LoKrConfig(r=8, alpha=3, decompose_factor=4, target_modules=t),
}
DTYPES = (torch.float32, torch.bfloat16)


def base(dtype: torch.dtype = torch.float32) -> Any:
    """Without an adapter."""
    transformer = tiny.transformer(guidance=False, double=1, single=3)
    nn.Module.to(transformer, dtype)
    return transformer


def attached(kind: str, dtype: torch.dtype = torch.float32, *, moved: bool = True) -> Any:
    """With an adapter that has an effect."""
    transformer = base(dtype)
    lora.attach(transformer, KINDS[kind], seed=0)
    torch.manual_seed(1)
    for parameter in lora.trainable(transformer) if moved else ():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return transformer.train()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_one_is_the_base_to_the_bit_in_fp32(kind: str, dtype: torch.dtype) -> None:
    before = lanes.loss(base(dtype), seed=1)
    transformer = attached(kind, dtype, moved=False)
    assert torch.equal(lanes.loss(transformer, seed=1), before)
    assert {parameter.dtype for parameter in lora.trainable(transformer)} == {torch.float32}
    found = {module for part in layers.parts(transformer).values() for module in part}
    assert found == set(lora.block_linears(base()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_pefts(kind: str, dtype: torch.dtype) -> None:
    """Loss, gradients and the weights after a step of AdamW; ours makes no whole weight."""
    ours, theirs = attached(kind, dtype), base(dtype)
    config = PEFT[kind](lora.block_linears(theirs))
    theirs.add_adapter(config, adapter_name=lora.ADAPTER_NAME)
    for parameter in lora.trainable(theirs):
        parameter.data = parameter.data.float()
    lora.write(theirs, lora.read(ours, KINDS[kind]))
    steps = []
    for model in (ours, theirs.train()):
        parameters = lora.trainable(model)
        optimizer = optim.build_optimizer(OptimConfig(lr=0.01, weight_decay=0.0), parameters)
        loss = lanes.loss(model, seed=1)
        loss.backward()
        gradients = lanes.gradients(model)
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
        optimizer.step()
        steps.append((loss, gradients, lanes.loss(model, seed=1)))
    # in bf16 peft and we round the sum of base and adapter at other places
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(steps[0][0], steps[1][0], rtol=tolerance, atol=0)
    torch.testing.assert_close(steps[0][2], steps[1][2], rtol=tolerance, atol=0)
    for one, two in zip(steps[0][1], steps[1][1], strict=True):
        assert (one - two).norm() <= tolerance * two.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_and_recomputed_is_the_same_to_the_bit(kind: str) -> None:
    plain = lanes.course(attached(kind))
    transformer = attached(kind)
    lane = lanes.LateLane()
    offload.attach(transformer, resident=1, device=CPU, slots=2, lane=lane)
    recompute.enable(transformer, range(4), offload_activations=False, device=CPU)
    assert lanes.same(lanes.course(transformer), plain)
    assert lane.copies


def test_norms_are_of_the_true_weights_where_slots_hold_other_blocks() -> None:
    """The certificate puts DoRA on a base that is streamed."""
    before = base()
    modules = lora.block_linears(before)
    wanted = {name: before.get_parameter(f"{name}.weight").clone() for name in modules}
    transformer = base()
    offload.attach(transformer, resident=1, device=CPU, slots=2)
    lanes.loss(transformer, seed=1)
    for name, weight in weights(transformer, modules):
        assert torch.equal(weight, wanted[name])
    lora.attach(transformer, KINDS["dora"], seed=0)
    for name, magnitude in layers.parts(transformer)["lora_magnitude_vector"].items():
        assert torch.equal(magnitude, row_squares(wanted[name]).sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_written_and_the_updates_are_the_models(kind: str) -> None:
    transformer = attached(kind)
    adapter = lora.read(transformer, KINDS[kind])
    fresh = attached(kind, moved=False)
    lora.write(fresh, adapter)
    torch.testing.assert_close(lora.read(fresh, KINDS[kind]).parts, adapter.parts, rtol=0, atol=0)
    assert adapter.modules == lora.block_linears(base())
    squares: dict[str, float] = {}
    for module in adapter.modules:
        delta, layer = adapter.delta(module), transformer.get_submodule(module)
        group = lora.block_kind(module)
        squares[group] = squares.get(group, 0.0) + delta.square().sum().item()
        weight = layer.base_layer.weight
        changed = weight + delta
        if kind == "dora":
            size = layer.lora_magnitude_vector[lora.ADAPTER_NAME].weight
            changed = size[:, None] * changed / changed.norm(dim=1, keepdim=True)
        x = torch.randn(5, weight.shape[1])
        torch.testing.assert_close(layer(x), x @ changed.T, rtol=1e-4, atol=1e-4)
    found = {group: norm.item() ** 2 for group, norm in lora.update_norms(transformer).items()}
    assert found == pytest.approx(squares, rel=1e-4)


def test_norms_of_changed_rows_without_the_changed_weight() -> None:
    torch.manual_seed(0)
    weight, up, down = torch.randn(2100, 40).bfloat16(), torch.randn(2100, 3), torch.randn(3, 40)
    squares = row_squares(weight)
    found = changed_squares(weight, up, down, squares=squares)
    torch.testing.assert_close(found, (weight.float() + up @ down).square().sum(1))
    assert torch.equal(changed_squares(weight, 0 * up, down, squares=squares), squares)


def test_lokr_on_packed_weights() -> None:
    """It multiplies by none of the base's weights, and is fp32 beside bytes, too."""
    plain, packed = base(), base()
    for name in lora.block_linears(packed):
        frozen = FrozenLinear.like(packed.get_submodule(name), "int8")
        packed.set_submodule(name, frozen)
    for model in (plain, packed):
        lora.attach(model, KINDS["lokr"], seed=0)
    adapter = lora.read(plain, KINDS["lokr"])
    torch.testing.assert_close(lora.read(packed, KINDS["lokr"]).parts, adapter.parts)
    lanes.loss(packed.train(), seed=1).backward()
    assert {parameter.dtype for parameter in lora.trainable(packed)} == {torch.float32}


def test_a_weight_without_room_is_refused() -> None:
    transformer = base()
    with pytest.raises(ConfigError) as caught:
        lora.attach(transformer, LoraConfig(kind="lokr", factor=5), seed=0)
    assert str(caught.value) == (
        "lora.factor: 5 doesn't divide transformer_blocks.0.attn.to_q, which is 32 -> 32. Powers "
        "of 2 divide all Linears of FLUX.2; 8 is usual."
    )
    name = "single_transformer_blocks.1.attn.to_out"
    transformer = base()
    transformer.get_parameter(f"{name}.weight").data[3] = 0
    with pytest.raises(ConfigError, match=f"{name} has a row of zeros"):
        lora.attach(transformer, KINDS["dora"], seed=0)
    transformer = base()
    transformer.set_submodule(name, FrozenLinear.like(transformer.get_submodule(name), "int8"))
    with pytest.raises(ConfigError, match=f"{name} is kept as int8"):
        lora.attach(transformer, KINDS["dora"], seed=0)


def test_magnitudes_are_not_drawn_to_zero() -> None:
    """Decay would shrink the base's weights; the matrices have it, and the last group LoRA+'s."""
    transformer = attached("dora")
    settings = OptimConfig(weight_decay=0.1, lora_plus=4.0, lr=1e-3)
    up = lora.trainable_up(transformer)
    groups = optim.build_optimizer(settings, lora.trainable(transformer), up=up).param_groups
    found = [(len(g["params"]), g["params"][0].ndim, g["weight_decay"], g["lr"]) for g in groups]
    modules = len(lora.block_linears(base()))
    assert found == [(modules, 2, 0.1, 1e-3), (modules, 1, 0.0, 1e-3), (modules, 2, 0.1, 4e-3)]


# ---- EVA


def heard(*, rank: int, seeds: tuple[int, ...]) -> tuple[Any, dict[str, list[Tensor]]]:
    """A model that EVA has started on, and what its Linears were given."""
    transformer = base()
    config = LoraConfig(rank=rank, init="eva")
    targets = lora.attach(transformer, config, seed=0)
    given: dict[str, list[Tensor]] = {name: [] for name in targets}
    for name in targets:

        def note(module: Any, inputs: Any, name: str = name) -> None:
            given[name].append(inputs[0].flatten(0, -2))

        transformer.get_submodule(name).register_forward_pre_hook(note)
    with eva.listening(transformer, targets, rank=rank):
        for seed in seeds:
            lanes.loss(transformer, seed=seed, tokens=24)
    return transformer, given


def test_eva_starts_from_the_main_directions_of_the_inputs() -> None:
    """Of one batch they are its principal components; nothing of them shows in the output."""
    transformer, given = heard(rank=3, seeds=(1,))
    for name, (vectors,) in given.items():
        layer = transformer.get_submodule(name)
        down = layer.lora_A[lora.ADAPTER_NAME].weight
        torch.testing.assert_close(down @ down.T, torch.eye(3), atol=1e-5, rtol=0)
        centred = vectors - vectors.mean(0)
        shares = (centred @ down.T).square().sum(0)
        best = torch.linalg.svdvals(centred)[:3].square()
        assert shares.sum() > 0.97 * best.sum()  # a randomised SVD of flat spectra
        assert not layer.lora_B[lora.ADAPTER_NAME].weight.any()
    assert torch.equal(lanes.loss(transformer, seed=5), lanes.loss(base(), seed=5))
    hooks = [len(module._forward_pre_hooks) for module in transformer.modules()]
    assert sum(hooks) == len(given)  # this test's own


def test_eva_takes_all_batches_and_is_the_same_again() -> None:
    one, given = heard(rank=2, seeds=(1, 2, 3))
    torch.manual_seed(99)
    again, _ = heard(rank=2, seeds=(1, 2, 3))
    other, _ = heard(rank=2, seeds=(1,))
    for name in given:
        downs = [
            m.get_submodule(name).lora_A[lora.ADAPTER_NAME].weight for m in (one, again, other)
        ]
        assert torch.equal(downs[0], downs[1])
        assert not torch.equal(downs[0], downs[2])
        vectors = torch.cat(given[name])
        centred = vectors - vectors.mean(0)
        share = (centred @ downs[0].T).square().sum()
        assert share > 0.85 * torch.linalg.svdvals(centred)[:2].square().sum()


def test_eva_needs_as_many_vectors_as_ranks() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank: 13 is more than the 12 directions"):
        heard(rank=13, seeds=(1,))
