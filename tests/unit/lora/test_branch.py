"""The low-rank branch in the base's type: peft's results, the exported numbers, little memory."""

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.autograd.graph import saved_tensors_hooks

from tests import tiny
from train import lora
from train.config import LoraConfig
from train.loading import frozen
from train.loading.frozen import FrozenLinear
from train.lora import branch
from train.lora.branch import BranchLinear

NAME = "single_transformer_blocks.1.attn.to_out"
WIDE, NARROW, TOKENS, RANK = 256, 128, 96, 8


class Host(nn.Module):
    """One Linear, and peft around it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.linear = base


def layer(
    compute: str = "base",
    *,
    dtype: torch.dtype = torch.float32,
    kind: str | None = None,
    scale: float = 0.75,
    dropout: float = 0.0,
    **settings: Any,
) -> Any:
    """An adapted Linear of 128 -> 256, its update about a tenth of it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    base = nn.Linear(NARROW, WIDE, bias=False)
    base.weight.data = (draw(WIDE, NARROW) * NARROW**-0.5).bfloat16().to(dtype)
    host = Host(base if kind is None else FrozenLinear.like(base, kind)).requires_grad_(False)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=scale * RANK,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=["linear"],
        **settings,
    )
    peft.inject_adapter_in_model(config, host)
    adapted: Any = host.linear
    for part, size in ((adapted.lora_A, (RANK, NARROW)), (adapted.lora_B, (WIDE, RANK))):
        part.default.weight.data = draw(*size) * size[1] ** -0.5 * 0.3
    if compute == "base":
        branch.use(host)
    return adapted


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output, numbers exact in bf16."""
    torch.manual_seed(1)
    x, gradient = torch.randn(2, TOKENS, NARROW), torch.randn(2, TOKENS, WIDE)
    return (x.bfloat16().to(dtype).requires_grad_(), gradient.bfloat16().to(dtype))


def results(adapted: Any, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of x, A and B."""
    x, gradient = inputs(dtype)
    y = adapted(x)
    parts = [x, adapted.lora_A.default.weight, adapted.lora_B.default.weight]
    return [y.detach(), *torch.autograd.grad(y, parts, gradient)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1.0, 0.75])
def test_in_fp32_it_is_pefts(scale: float, dropout: float) -> None:
    """Sums in another order: 2e-6 is some twenty ulp, of sums of up to 256 terms."""
    torch.manual_seed(5)
    ours = results(layer(scale=scale, dropout=dropout), torch.float32)
    torch.manual_seed(5)
    theirs = results(layer("fp32", scale=scale, dropout=dropout), torch.float32)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 2e-6 * other.norm()


def test_on_a_bf16_base_it_is_about_as_exact_as_fp32() -> None:
    """Against fp64: y and x's gradient are rounded to bf16 either way, so there it adds little;
    gradients of A and B have the rounding of two operands and their own, 2^-9 at most each."""
    exact = results(layer(dtype=torch.float64), torch.float64)
    ours = results(layer(dtype=torch.bfloat16), torch.bfloat16)
    theirs = results(layer("fp32", dtype=torch.bfloat16), torch.bfloat16)
    assert [part.dtype for part in ours] == [part.dtype for part in theirs]
    assert ours[2].dtype == ours[3].dtype == torch.float32

    def error(found: Tensor, truth: Tensor) -> float:
        return ((found.double() - truth).norm() / truth.norm()).item()

    for one, other, truth in zip(ours[:2], theirs[:2], exact[:2], strict=True):
        assert error(one, truth) < 1.2 * error(other, truth)
    for one, truth in zip(ours[2:], exact[2:], strict=True):
        assert 0 < error(one, truth) < 3 * 2**-9


def test_the_forward_has_the_exported_numbers() -> None:
    """B with its strength folded in and A, as `export.dtype: bf16` writes them."""
    adapted, x = layer(dtype=torch.bfloat16), inputs(torch.bfloat16)[0]
    down = adapted.lora_A.default.weight.bfloat16()
    up = (0.75 * adapted.lora_B.default.weight).bfloat16()
    rows = x.flatten(0, 1)
    expected = torch.addmm(adapted.base_layer(rows), rows @ down.T, up.T)
    assert torch.equal(adapted(x).flatten(0, 1), expected)


@pytest.mark.parametrize("kind", [None, *frozen.KINDS])
def test_kept_for_the_backward_are_the_input_and_little_else(kind: str | None) -> None:
    adapted, x = layer(dtype=torch.bfloat16, kind=kind), inputs(torch.bfloat16)[0]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted(x)
    for known in (x, *adapted.base_layer.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    narrow = 2 * TOKENS * RANK * 2
    factors = 2 * RANK * (NARROW + WIDE)
    assert sum(kept.values()) <= narrow + factors


@pytest.mark.parametrize(("kind", "fp8_matmul"), [("fp8", False), ("fp8", True), ("nf4", False)])
@pytest.mark.parametrize("trains_below", [True, False])
def test_on_packed_bases(kind: str, fp8_matmul: bool, trains_below: bool) -> None:
    """Their outputs are added to in place; whether autograd allows that is what's asked here."""
    ours, theirs = (layer(compute, dtype=torch.bfloat16, kind=kind) for compute in ("base", "fp32"))
    found = []
    for adapted in (ours, theirs):
        adapted.base_layer.fp8_matmul = fp8_matmul
        x, gradient = inputs(torch.bfloat16)
        x.requires_grad_(trains_below)
        y = adapted(x)
        weights = [adapted.lora_A.default.weight, adapted.lora_B.default.weight]
        found.append([y, *torch.autograd.grad(y, [x, *weights][not trains_below :], gradient)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()


@pytest.mark.gpu
def test_a_gpu_holds_no_wide_copies_and_is_as_exact() -> None:
    """Beside the output: a narrow side, the factors in bf16, and no fp32 of input or output."""
    exact = results(layer(dtype=torch.float64), torch.float64)
    adapted = layer(dtype=torch.bfloat16).to("cuda")
    x, gradient = (part.detach().cuda() for part in inputs(torch.bfloat16))
    x.requires_grad_()
    y = adapted(x)
    weights = [adapted.lora_A.default.weight, adapted.lora_B.default.weight]
    found = [y.detach(), *torch.autograd.grad(y, [x, *weights], gradient)]
    for one, truth in zip(found, exact, strict=True):
        assert (one.cpu().double() - truth).norm() < 3 * 2**-9 * truth.norm()
    many = x.detach().repeat(1, 64, 1)
    adapted(many)  # libraries' own memory is there from now on
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = adapted(many)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.1 * y.nbytes + many.shape[1] * 2 * RANK * 2 + 2**16


def test_disabled_and_merged_are_pefts() -> None:
    adapted, x = layer(), inputs(torch.float32)[0]
    before = adapted(x)
    adapted.enable_adapters(False)
    assert torch.equal(adapted(x), adapted.base_layer(x))
    adapted.enable_adapters(True)
    adapted.merge()
    assert torch.equal(adapted(x), adapted.base_layer(x))
    adapted.unmerge()
    torch.testing.assert_close(adapted(x), before, rtol=1e-4, atol=1e-5)


def test_copies_are_their_own() -> None:
    adapted, x = layer(), inputs(torch.float32)[0]
    other = copy.deepcopy(adapted)
    other.lora_B.default.weight.data.zero_()
    assert torch.equal(other(x), other.base_layer(x))
    assert not torch.equal(adapted(x), other(x))


def test_variants_keep_pefts_forward() -> None:
    assert type(layer(use_dora=True)) is Linear
    assert type(layer()) is BranchLinear


@pytest.mark.parametrize(("compute", "kind"), [("base", BranchLinear), ("fp32", Linear)])
def test_the_setting_decides(compute: Any, kind: type) -> None:
    transformer = tiny.transformer(guidance=True)
    lora.attach(transformer, LoraConfig(rank=4, compute=compute), seed=0)
    assert type(transformer.get_submodule(NAME)) is kind


# ---- PiSSA's two adapters


def pissa(compute: str, **settings: Any) -> tuple[Any, Any]:
    """A bf16 transformer that has just been given its adapter, and one Linear of it."""
    transformer = tiny.transformer(guidance=True)
    nn.Module.to(transformer, torch.bfloat16)
    config = LoraConfig.model_validate(
        {"rank": 8, "init": "pissa", "alpha": 4.0, "compute": compute, **settings}
    )
    lora.attach(transformer, config, seed=0)
    return transformer, transformer.get_submodule(NAME)


def test_pissa_starts_as_the_base_to_the_bit() -> None:
    _, adapted = pissa("base")
    x = torch.randn(2, 5, adapted.in_features).bfloat16()
    assert torch.equal(adapted(x), adapted.base_layer(x))


def test_a_small_update_of_pissa_isnt_lost_in_its_start() -> None:
    """A thousandth of the start: as two bf16 products it would drown in their rounding."""
    _, adapted = pissa("base")
    down, up = adapted.lora_A.default.weight, adapted.lora_B.default.weight
    before = up.detach().double() @ down.detach().double()
    for weight in (down, up):
        weight.data += 1e-3 * weight.std() * torch.randn_like(weight)
    x = torch.randn(64, adapted.in_features).bfloat16()
    exact = 0.5 * x.double() @ (up.double() @ down.double() - before).T
    narrow, wide = next(adapted._branches(x))
    found = narrow.double() @ wide.bfloat16().double().T
    assert (found - exact).norm() < 0.01 * exact.norm()


def test_pissa_with_dropout_is_pefts() -> None:
    found = []
    for compute in ("base", "fp32"):
        transformer, adapted = pissa(compute, dropout=0.3)
        transformer.float().train()
        torch.manual_seed(6)
        x = torch.randn(40, adapted.in_features)
        y = adapted(x)
        weights = [adapted.lora_A.default.weight, adapted.lora_B.default.weight]
        found.append([y, *torch.autograd.grad(y.square().mean(), weights)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("kind", [None, "fp8"])
def test_a_compiled_sum_needs_no_memory_of_its_own(kind: str | None) -> None:
    """torch's addmm would write y + narrow up^T beside y: 0.5 GB at dev's widest Linear."""
    torch.compiler.reset()
    record = AotEagerAndRecordGraphs()
    adapted, x = layer(kind=kind), torch.randn(TOKENS, NARROW, requires_grad=True)
    torch.compile(adapted, fullgraph=True, backend=record)(x)
    (graph,) = record.fw_graphs
    called = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.addmm.default not in [node.target for node in called]
    added = [n for n in called if torch.ops.kindling.add_product.default in (n.target, *n.args)]
    assert len(added) == 1
