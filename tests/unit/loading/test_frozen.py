"""Frozen Linears: their numbers, their gradients, and what moving and training does to them."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests import tiny
from train import lora
from train.config import LoraConfig
from train.errors import MachineError
from train.loading import frozen
from train.loading.frozen import FrozenLinear

CPU = torch.device("cpu")

ERRORS = {"fp8": 0.027, "int8": 0.009, "nf4": 0.095}
"""Largest error of a Gaussian weight of 256 columns, of its norm."""


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet():
    """Else the graphs of one test count for the next."""
    torch.compiler.reset()


@pytest.fixture(params=frozen.KINDS)
def kind(request) -> str:
    """Each format."""
    return request.param


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Small numbers, as real weights are; rows of very different size; one row of zeros."""
    torch.manual_seed(0)
    plain = nn.Linear(256, 96, bias=False, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(0.02 * torch.randn(96, 256) * torch.logspace(-2, 1, 96)[:, None])
        plain.weight[7] = 0
    return plain


def unpacked(layer: FrozenLinear) -> torch.Tensor:
    """The weight that a layer stands for."""
    shape = torch.Size((layer.out_features, layer.in_features))
    return frozen.dequantize(dict(layer.named_parameters()), layer.kind, shape=shape)


def product(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and gradient of the input."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """An input and a gradient."""
    torch.manual_seed(1)
    return torch.randn(2, 5, 256).to(dtype), torch.randn(2, 5, 96).to(dtype)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to what is wanted."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_rows_that_break_blocks_come_back_too():
    """160 is the toy base's width. bitsandbytes' kernel for CPUs begins a block with each row."""
    torch.manual_seed(0)
    plain = nn.Linear(160, 96, bias=False)
    plain.weight.data.normal_()
    assert distance(unpacked(FrozenLinear.like(plain, "nf4")), plain.weight) < ERRORS["nf4"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_comes_back_within_its_formats_error(kind, dtype):
    plain = linear(dtype)
    again = unpacked(FrozenLinear.like(plain, kind))
    rows = [distance(again[i], plain.weight[i]) for i in range(96) if i != 7]
    assert max(rows) < 1.25 * ERRORS[kind]
    assert distance(again, plain.weight) < ERRORS[kind]
    assert not again[7].any()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_products_are_those_of_the_unpacked_weight(kind, dtype, bound):
    """bf16: two roundings of 2^-9 in the output; nf4's weight is rounded instead."""
    layer = FrozenLinear.like(linear(dtype), kind)
    x, grad = batch(dtype)
    weight = unpacked(layer).double()
    y, grad_x = product(layer, x, grad)
    assert (y.dtype, grad_x.dtype) == (dtype, dtype)
    assert distance(y, x.double() @ weight.T) < bound
    assert distance(grad_x, grad.double() @ weight) < bound


def test_no_unpacked_weight_is_saved_for_the_backward(kind):
    layer, (x, _) = FrozenLinear.like(linear(), kind), batch()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    own = {p.data_ptr() for p in layer.parameters()}
    assert {t.data_ptr() for t in saved} <= own


def test_the_backward_takes_the_state_of_its_time(kind):
    """Streaming puts other storage under the same parameters between the passes."""
    layer, (x, grad) = FrozenLinear.like(linear(), kind), batch()
    wanted = product(layer, x, grad)[1]
    y = layer(x := x.clone().requires_grad_())
    for parameter in layer.parameters():
        copy = parameter.data.clone()
        parameter.data.zero_()
        parameter.data = copy
    y.backward(grad)
    assert torch.equal(x.grad, wanted)  # pyright: ignore


@pytest.mark.parametrize("fp8_matmul", [False, True])
def test_checkpointing_and_compiling_change_no_bit(kind, fp8_matmul):
    layer, (x, grad) = FrozenLinear.like(linear(), kind), batch()
    layer.fp8_matmul = fp8_matmul and kind == "fp8"
    wanted = product(layer, x, grad)
    again = lambda x: checkpoint(layer, x, use_reentrant=False)  # noqa: E731
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for other in (again, compiled):
        assert all(map(torch.equal, product(other, x, grad), wanted))  # pyright: ignore


@pytest.mark.parametrize("fp8_matmul", [False, True])
def test_a_compiled_layer_takes_an_input_without_gradient(kind, fp8_matmul):
    """As the first block's is: dynamo then traces the function in another way."""
    layer, (x, _) = FrozenLinear.like(linear(), kind), batch()
    layer.fp8_matmul = fp8_matmul and kind == "fp8"
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.detach()), layer(x.detach()))


def test_compiling_keeps_no_unpacked_weight(kind):
    """What a compiled forward saves is no larger than the packed state and the input."""
    layer, (x, _) = FrozenLinear.like(linear(torch.bfloat16), kind), batch(torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x.requires_grad_())
    kept = [t for t in y.grad_fn.saved_tensors if t.ndim == 2 and t.dtype == torch.bfloat16]
    assert not any(t.numel() == layer.out_features * layer.in_features for t in kept)


def test_fp8_products_are_within_the_error_of_both_operands():
    """2.7 % for the weight and as much for the input: 3.8 % together."""
    plain, (x, grad) = linear(), batch()
    layer = FrozenLinear.like(plain, "fp8")
    frozen.use_fp8_matmul(layer, CPU)
    assert layer.fp8_matmul
    y, grad_x = product(layer, x, grad)
    assert 0.01 < distance(y, x @ plain.weight.T) < 0.04
    assert 0.01 < distance(grad_x, grad @ plain.weight) < 0.04


def test_fp8_products_are_the_emulated_ones():
    """The operands' own roundings and nothing else; in the backward the turned weight."""
    layer, (x, grad) = FrozenLinear.like(linear(), "fp8"), batch()
    q = layer.weight.view(frozen.FP8).double()
    rows, scale = frozen.quantize_rows(x.flatten(0, 1))
    wanted_y = rows.double() @ q.T * scale.double() * layer.get_parameter("scale").double()
    rows, scale = frozen.quantize_rows(grad.flatten(0, 1), layer.get_parameter("scale"))
    wanted_x = rows.double() @ q * scale.double()
    layer.fp8_matmul = True
    y, grad_x = product(layer, x, grad)
    assert distance(y.flatten(0, 1), wanted_y) < 1e-6
    assert distance(grad_x.flatten(0, 1), wanted_x) < 1e-6


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_fp8_products_ask_for_what_a_gpu_takes(monkeypatch, back, turned):
    """The rules of torch 2.11's CUDA code for scales of rows; what it then computes, on a CPU."""

    def scaled_mm(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert (a.dtype, b.dtype, out_dtype) == (frozen.FP8, frozen.FP8, torch.bfloat16)
        assert not use_fast_accum
        assert a.stride() == (a.shape[1], 1)
        assert b.stride() == (1, b.shape[0])
        assert not any(size % 16 for size in b.shape)
        assert (scale_a.shape, scale_b.shape) == ((len(a), 1), (1, b.shape[1]))
        assert scale_a.is_contiguous()
        assert scale_b.t().is_contiguous()
        assert {scale_a.dtype, scale_b.dtype} == {torch.float32}
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    layer, parts = FrozenLinear.like(linear(), "fp8"), batch()
    x = parts[1 if back else 0].flatten(0, 1)
    rows, row_scale = frozen.quantize_rows(x)
    rows = rows.t().contiguous().t() if turned else rows
    state = layer.get_parameter("weight"), torch.rand(256 if back else 96)
    wanted = frozen.scaled_matmul(rows, row_scale, *state, torch.float32, back)
    on_gpu = partial(frozen.multiply_on_gpu, rows, row_scale, *state)
    assert distance(on_gpu(torch.bfloat16, back), wanted) < 4e-3
    assert on_gpu(torch.float32, back).dtype == torch.float32


def test_rows_are_quantised_over_one_copy_of_them():
    """A GPU would hold each further one, 1 GB on dev, beside all that a step keeps."""
    copies = set()

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if made.dtype == torch.float32 and made.numel() == x.numel():
                copies.add(made.untyped_storage()._cdata)
                kept.append(made)
            return made

    kept, x = [], torch.randn(64, 32).bfloat16()
    with Copies():
        frozen.quantize_rows(x, torch.ones(32))
    assert len(copies) == 1


def test_rows_of_zeros_stay_zeros():
    rows, scale = frozen.quantize_rows(torch.zeros(2, 32))
    assert not rows.float().any()
    assert scale.isfinite().all()


def test_fp8_products_need_a_gpu_that_has_them(monkeypatch):
    layer = FrozenLinear.like(linear(), "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    with pytest.raises(MachineError, match=r"RTX 3090 has compute capability 8\.6; .* need 8\.9"):
        frozen.use_fp8_matmul(layer, torch.device("cuda"))
    assert not layer.fp8_matmul
    odd = nn.Sequential(FrozenLinear.like(nn.Linear(40, 32, bias=False), "fp8"))
    with pytest.raises(MachineError, match="0 is 40 -> 32; fp8 needs multiples of 16"):
        frozen.use_fp8_matmul(odd, CPU)


def test_layout_is_what_quantising_makes(kind):
    for plain in (linear(), nn.Linear(40, 12, bias=False)):
        state = frozen.quantize(plain.weight.detach(), kind)
        found = {name: (tuple(part.shape), part.dtype) for name, part in state.items()}
        assert found == frozen.layout(kind, plain.out_features, plain.in_features)
        assert tuple(state) == frozen.STATE[kind]


def test_bytes_a_weight(kind):
    parts = frozen.layout(kind, 6144, 6144).values()
    size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in parts)
    wanted = {"fp8": 1.0, "int8": 1.0, "nf4": 0.516}
    assert size / 6144**2 == pytest.approx(wanted[kind], abs=1e-3)


def test_a_type_cast_doesnt_reach_the_packed_weight(kind):
    layer, (x, _) = FrozenLinear.like(linear(), kind), batch()
    before = layer.weight.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight, before)
    with pytest.raises(AssertionError, match="cast"):
        layer(x)


def test_a_bias_is_refused(kind):
    with pytest.raises(AssertionError, match="no bias"):
        FrozenLinear.like(nn.Linear(32, 32), kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_over_it_is_fp32_and_comes_off_again(kind, dtype):
    transformer = tiny.transformer(guidance=True).to(dtype)
    for name in lora.block_linears(transformer):
        plain = transformer.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        transformer.set_submodule(name, FrozenLinear.like(plain, kind))
    before = {name: part.clone() for name, part in transformer.state_dict().items()}
    lora.attach(transformer, LoraConfig(rank=4), seed=0)
    assert {p.dtype for p in lora.trainable(transformer)} == {torch.float32}
    assert transformer.dtype == dtype
    transformer.unload_lora()
    after = transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fp8_matmul", [False, True])
def test_a_gpu_computes_what_the_cpu_does(kind, fp8_matmul):
    """Within the rounding of bf16; fp8 tensor cores add up in another order."""
    layer, (x, grad) = FrozenLinear.like(linear(torch.bfloat16), kind), batch(torch.bfloat16)
    layer.fp8_matmul = fp8_matmul and kind == "fp8"
    wanted = product(layer, x, grad)
    found = product(layer.cuda(), x.cuda(), grad.cuda())
    for ours, theirs in zip(found, wanted, strict=True):
        assert distance(ours.cpu(), theirs) < 8e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_packs_as_the_cpu_does(kind):
    weight = linear(torch.bfloat16).weight.detach()
    ours, theirs = frozen.quantize(weight.cuda(), kind), frozen.quantize(weight, kind)
    shape = weight.shape
    found = frozen.dequantize(ours, kind, shape=shape).cpu()
    assert distance(found, frozen.dequantize(theirs, kind, shape=shape)) < 1e-3
