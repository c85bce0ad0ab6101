"""Our nf4 and int8 Linears beside bitsandbytes' own, and all kinds beside autograd's own."""

import bitsandbytes
import peft
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.loading import frozen
from train.loading.frozen import FrozenLinear


def product(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


def drawn(dtype: torch.dtype) -> tuple[nn.Linear, Tensor, Tensor]:
    """A Linear, an input and a gradient; two of the input's channels are outliers."""
    torch.manual_seed(0)
    plain = nn.Linear(320, 96, bias=False, dtype=dtype)
    x = torch.randn(3, 7, 320)
    x[..., [5, 200]] *= 20
    return plain, x.to(dtype), torch.randn(3, 7, 96).to(dtype)


def linear4bit(plain: nn.Linear, *, double: bool) -> nn.Module:
    """bitsandbytes' nf4 Linear of a weight; double: with its double quantisation."""
    columns, rows = plain.in_features, plain.out_features
    theirs = bitsandbytes.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=plain.weight.dtype, quant_type="nf4"
    )
    theirs.weight = bitsandbytes.nn.Params4bit(
        plain.weight.data.clone(),
        requires_grad=False,
        quant_type="nf4",  # pyright: ignore
        compress_statistics=double,  # pyright: ignore
    )
    return theirs.to("cpu")  # quantises


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_linear4bit_but_for_its_8_bit_maxima(dtype):
    """The same codes; with maxima that 8 bits hold exactly, the same results to the bit."""
    plain, x, grad = drawn(dtype)
    with torch.no_grad():
        plain.weight.mul_(0.05)
        plain.weight[:, ::64] = (torch.tensor([255, 17, 101, 254, 1]) / 256).to(dtype)
    ours, theirs = FrozenLinear.like(plain, "nf4"), linear4bit(plain, double=False)
    assert torch.equal(ours.weight, theirs.weight)  # pyright: ignore
    for one, other in zip(product(ours, x, grad), product(theirs, x, grad), strict=True):
        assert torch.equal(one, other)


def test_nf4_maxima_are_as_good_as_fp32_ones_and_better_than_doubly_quantised_ones():
    """Rows of different size: 0.2 % of the row's largest against half of the smallest."""
    plain, x, _ = drawn(torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        plain.weight.mul_(torch.randn(96, 1).exp())
    truth = x @ plain.weight.T
    layers = {
        "ours": FrozenLinear.like(plain, "nf4"),
        "fp32": linear4bit(plain, double=False),
        "double": linear4bit(plain, double=True),
    }
    outputs = {name: layer(x) for name, layer in layers.items()}
    errors = {
        name: ((y - truth).flatten(0, 1).norm(dim=0) / truth.flatten(0, 1).norm(dim=0)).max().item()
        for name, y in outputs.items()
    }
    assert errors["ours"] < 1.02 * errors["fp32"]
    assert errors["double"] > 2 * errors["ours"]


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_is_closer_to_the_truth_than_linear8bitlt(threshold):
    """bitsandbytes rounds the input to 8 bits too; threshold 6 keeps its outliers out of that."""
    plain, x, grad = drawn(torch.bfloat16)
    theirs = bitsandbytes.nn.Linear8bitLt(
        320, 96, bias=False, has_fp16_weights=False, threshold=threshold
    )
    theirs.weight = bitsandbytes.nn.Int8Params(
        plain.weight.data.clone(),
        requires_grad=False,
        has_fp16_weights=False,  # pyright: ignore
    )
    theirs.to("cpu")
    ours = FrozenLinear.like(plain, "int8")
    weight = plain.weight.detach().double()
    truths = x.double() @ weight.T, grad.double() @ weight
    found = [product(layer, x, grad) for layer in (ours, theirs)]
    error = [
        [((y - t).norm() / t.norm()).item() for y, t in zip(f, truths, strict=True)] for f in found
    ]
    assert error[0][0] < error[1][0]
    assert error[0][1] < 1.05 * error[1][1]


def test_int8_codes_are_those_of_int8_vectorwise_quant():
    """But for numbers on the border of two codes: ours are divided by maximum / 127, theirs
    multiplied by 127 / maximum."""
    plain = drawn(torch.float16)[0]
    codes, maxima, _ = int8_vectorwise_quant(plain.weight.detach())
    state = frozen.quantize(plain.weight.detach(), "int8")
    torch.testing.assert_close(state["scale"] * frozen.INT8_MAX, maxima.flatten())
    difference = (state["weight"].int() - codes.int()).abs()
    assert difference.max() <= 1
    assert difference.sum() <= 0.001 * difference.numel()


@pytest.mark.parametrize("how", ["plain", "checkpointed", "compiled"])
@pytest.mark.parametrize("kind", frozen.KINDS)
def test_gradients_under_an_adapter_are_autograds_own(kind, how):
    """Of input and LoRA, beside an ordinary Linear of the unpacked weight, all in fp32.

    Both differ by the order of multiplying with the row scales alone: 2^-24 a product, summed over
    320 columns in random signs, is 1e-6 of the norm at most.
    """
    plain, x, grad = drawn(torch.float32)
    packed = FrozenLinear.like(plain, kind)
    state = dict(packed.named_parameters())
    with torch.no_grad():
        plain.weight.copy_(frozen.dequantize(state, kind, shape=plain.weight.shape))  # pyright: ignore
    plain.requires_grad_(False)
    results = []
    for linear in (packed, plain):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        layer: nn.Module = peft.inject_adapter_in_model(config, nn.Sequential(linear))
        call = layer
        if linear is packed and how == "checkpointed":
            call = lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False)  # noqa: E731
        if linear is packed and how == "compiled":
            call = torch.compile(layer, backend="aot_eager", fullgraph=True)
        y, grad_x = product(call, x, grad)  # pyright: ignore[reportArgumentType]
        lora = [p.grad for p in layer.parameters() if p.requires_grad]
        assert len(lora) == 2
        results.append((y, grad_x, *lora))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
