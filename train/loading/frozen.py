"""Frozen Linears that keep their weight in one byte or half a byte a number.

Owns the three formats, their matrix products and the Linear that holds one. Doesn't own which
weights are kept so (`transformer`) or where they come from (`weights`).

fp8 and int8: W[o, i] = scale[o] * q[o, i]. Every q is exact in bf16, so y = (x q^T) * scale and
grad_x = (grad * scale) q need no rounded copy of W, and the cast to bf16 reads and writes 3 bytes a
weight. nf4: QLoRA's codes in blocks of 64 by bitsandbytes' kernels; a block's maximum is kept in 8
bits of its row's largest. QLoRA's own double quantisation takes as much memory, but measures all
maxima from their mean: rows much smaller than others lose half of their precision.

A product is one opaque operator, for torch.compile too: were the cast visible, the compiler could
merge forward's with backward's and keep the unpacked weight between them.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.errors import MachineError

KINDS = ("fp8", "int8", "nf4")

STATE = {
    "fp8": ("weight", "scale"),
    "int8": ("weight", "scale"),
    "nf4": ("weight", "absmax", "scale"),
}
"""Names of what a kind keeps. fp8 is kept as uint8: peft and `.to(dtype)` convert what they take
for a number."""

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_MAX = 127.0
BLOCK = 64
"""Weights that share a maximum in nf4."""
ABSMAX_MAX = 255.0
FP8_ALIGNMENT = 16
"""fp8 products want both sides of a weight in multiples of this."""


def quantize(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """A weight, (out, in), as the tensors that a kind keeps, on the weight's device."""
    if kind == "nf4":
        return _quantize_nf4(weight)
    limit = FP8_MAX if kind == "fp8" else INT8_MAX
    scale = weight.abs().amax(1).float() / limit
    scale = scale.where(scale != 0, 1.0)  # not "> 0": a NaN must stay visible
    scaled = (weight / scale[:, None]).clamp_(-limit, limit)  # fp32, as scale is
    packed = scaled.to(FP8).view(torch.uint8) if kind == "fp8" else scaled.round_().to(torch.int8)
    return {"weight": packed, "scale": scale}


def dequantize(state: dict[str, Tensor], kind: str, *, shape: torch.Size) -> Tensor:
    """The weight that a state stands for, (out, in), fp32."""
    unpacked = _unpack([state[name] for name in STATE[kind]], kind, shape, torch.float32)
    return unpacked if kind == "nf4" else unpacked * state["scale"][:, None]


def layout(kind: str, out_features: int, in_features: int) -> dict[str, tuple[tuple, torch.dtype]]:
    """Shape and type of each tensor of a state."""
    if kind != "nf4":
        packed = torch.uint8 if kind == "fp8" else torch.int8
        weight = ((out_features, in_features), packed)
        return {"weight": weight, "scale": ((out_features,), torch.float32)}
    count = out_features * in_features
    rows, blocks = _maxima(count, in_features)
    return {
        "weight": ((-(-count // 2), 1), torch.uint8),
        "absmax": ((rows, blocks), torch.uint8),
        "scale": ((rows,), torch.float32),
    }


class FrozenLinear(nn.Linear):
    """A Linear without bias whose weight is packed and never trained.

    A new one is on meta; whoever loads it puts real tensors in place of its parameters. All its
    state is in parameters, so that DDP doesn't send it around at each step as it does buffers.
    """

    def __init__(self, in_features: int, out_features: int, *, kind: str) -> None:
        nn.Module.__init__(self)  # not Linear's, which would make a full weight
        self.in_features, self.out_features = in_features, out_features
        self.kind = kind
        self.fp8_matmul = False
        self.register_parameter("bias", None)
        for name, (shape, dtype) in layout(kind, out_features, in_features).items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @classmethod
    def like(cls, linear: nn.Linear, kind: str) -> Self:
        """In place of a Linear; filled from it unless that is on meta."""
        assert linear.bias is None, "a frozen Linear has no bias, nor have FLUX.2's blocks"
        frozen = cls(linear.in_features, linear.out_features, kind=kind)
        if not linear.weight.is_meta:
            for name, tensor in quantize(linear.weight.detach(), kind).items():
                setattr(frozen, name, nn.Parameter(tensor, requires_grad=False))
        return frozen.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the input's type."""
        state = [self.get_parameter(name) for name in STATE[self.kind]]
        if self.fp8_matmul:
            y = _Fp8Product.apply(input.flatten(0, -2), *state)
            return y if input.ndim == 2 else y.unflatten(0, input.shape[:-1])  # no needless view
        shape = (self.out_features, self.in_features)
        return _Product.apply(input, self.kind, shape, *state)

    def extra_repr(self) -> str:
        """As in `print(transformer)`."""
        return f"{self.in_features}, {self.out_features}, {self.kind}, fp8_matmul={self.fp8_matmul}"


class _Product(torch.autograd.Function):
    """x W^T and grad W, each unpacking W for itself; only the packed state outlives a product."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        # spelt out before *state, they make dynamo (torch 2.13) leave out ctx: where x needs no
        # gradient it counts arguments against parameters to see whether there is one
        x, kind, shape, *state = inputs
        assert state[-1].dtype == torch.float32, "scales were cast by .to()"
        ctx.save_for_backward(*state)
        ctx.kind, ctx.shape = kind, shape
        return matmul(x, state, kind, shape, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        state = ctx.saved_tensors
        grad_x = matmul(grads[0], state, ctx.kind, ctx.shape, True)
        return grad_x, None, None, *(None for _ in state)


class _Fp8Product(torch.autograd.Function):
    """The same for kind fp8 and x of (M, in), the product itself in fp8, x and grad scaled by row.

    x W^T = (qx q^T) * sx * scale; in grad W = (grad * scale) q the scale is on the side that is
    summed over, so it goes into the gradient before that is quantised.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows, row_scale = quantize_rows(x)
        return scaled_matmul(rows, row_scale, weight, scale, x.dtype, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        grad = grads[0]
        rows, row_scale = quantize_rows(grad, scale)
        ones = torch.ones_like(weight[0], dtype=torch.float32)
        return scaled_matmul(rows, row_scale, weight, ones, grad.dtype, True), None, None


def quantize_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(M, K) to fp8 and the scale of each row, (M, 1) fp32: x * columns = scale * rows.

    One fp32 copy of x and no second one: on dev a gradient's is 1 GB.
    """
    exact = x.to(torch.float32, copy=True)
    if columns is not None:
        exact.mul_(columns)
    scale = torch.linalg.vector_norm(exact, torch.inf, 1, keepdim=True) / FP8_MAX
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return exact.div_(scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


@torch.library.custom_op("kindling::frozen_matmul", mutates_args=())
def matmul(x: Tensor, state: list[Tensor], kind: str, shape: list[int], transposed: bool) -> Tensor:
    """x W^T, or x W if transposed, W the unpacked weight of `shape`.

    All of it is in here: a result scaled in place outside would have two names, of which dynamo of
    torch 2.11 gives the wrong one its gradient, without a word.
    """
    return multiply(x, _unpack(state, kind, shape, x.dtype), state, kind, transposed)


def multiply(
    x: Tensor, weight: Tensor, state: Sequence[Tensor], kind: str, transposed: bool
) -> Tensor:
    """The same with the weight unpacked, for fp8 and int8 without its row scales."""
    if kind == "nf4":
        return torch.matmul(x, weight) if transposed else functional.linear(x, weight)
    if transposed:
        x = x.clone().mul_(state[1])  # x * scale would be a whole fp32 tensor
        return torch.matmul(x, weight)
    return functional.linear(x, weight).mul_(state[1])


@matmul.register_fake
def _(x: Tensor, state: list[Tensor], kind: str, shape: list[int], transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[1] if transposed else shape[0])


@torch.library.custom_op("kindling::fp8_matmul", mutates_args=())
def scaled_matmul(
    rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype, back: bool
) -> Tensor:
    """(rows Q^T) * row_scale * scale, or with Q if `back`; fp8 operands, fp32 sums.

    On a CPU, where torch 2.11 knows no scales of rows, in fp32.
    """
    if rows.is_cuda:
        return multiply_on_gpu(rows, row_scale, weight, scale, dtype, back)
    q = weight.view(FP8).float()
    return (rows.float() @ (q if back else q.t())).mul_(row_scale).mul_(scale).to(dtype)


def multiply_on_gpu(
    rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype, back: bool
) -> Tensor:
    """The same by tensor cores, rounded to bf16: torch 2.11 has fp32 on Hopper only.

    The first operand must lie in memory row by row, the second one column by column. Q^T does; Q
    has to be turned, which moves 2 bytes a weight.
    """
    columns = weight.t().contiguous().t() if back else weight.t()
    return torch._scaled_mm(
        rows.contiguous(),
        columns.view(FP8),
        scale_a=row_scale.contiguous(),
        scale_b=scale[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    ).to(dtype)


@scaled_matmul.register_fake
def _(
    rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype, back: bool
) -> Tensor:
    return rows.new_empty(rows.shape[0], scale.shape[0], dtype=dtype)


def use_fp8_matmul(model: nn.Module, device: torch.device) -> None:
    """Multiply in fp8 in all of a model's fp8 Linears. Raises MachineError where a GPU can't."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise MachineError(
            f"speed.fp8_matmul: {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}; products in fp8 need 8.9 or newer (RTX 40, L40, "
            "H100 and later). Remove the setting; base.quantize: fp8 works without it."
        )
    if device.type not in ("cuda", "cpu"):
        raise MachineError(f"speed.fp8_matmul: needs an NVIDIA GPU, not {device.type}; remove it")
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and module.kind == "fp8":
            if module.in_features % FP8_ALIGNMENT or module.out_features % FP8_ALIGNMENT:
                raise MachineError(
                    f"speed.fp8_matmul: {name} is {module.in_features} -> {module.out_features}; "
                    f"fp8 needs multiples of {FP8_ALIGNMENT}. Remove the setting."
                )
            module.fp8_matmul = True


def kind_of(model: nn.Module) -> str:
    """How a transformer's block Linears are kept: a kind, or none."""
    return next((m.kind for m in model.modules() if isinstance(m, FrozenLinear)), "none")


def _unpack(state: Any, kind: str, shape: Any, dtype: torch.dtype) -> Tensor:
    if kind == "nf4":
        return _unpack_nf4(*state, shape=shape, dtype=dtype)
    weight = state[0]
    return (weight.view(FP8) if kind == "fp8" else weight).to(dtype)


def _quantize_nf4(weight: Tensor) -> dict[str, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    codes, found = quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
    )
    rows, blocks = _maxima(weight.numel(), weight.shape[1])
    maxima = functional.pad(found.absmax, (0, rows * blocks - found.absmax.numel()))
    maxima = maxima.view(rows, blocks)
    scale = maxima.amax(1) / ABSMAX_MAX
    scale = scale.where(scale != 0, 1.0)
    absmax = (maxima / scale[:, None]).round_().to(torch.uint8)
    return {"weight": codes, "absmax": absmax, "scale": scale}


def _unpack_nf4(
    codes: Tensor, absmax: Tensor, scale: Tensor, *, shape: Any, dtype: torch.dtype
) -> Tensor:
    import bitsandbytes  # noqa: F401  its operators

    blocks = -(-shape[0] * shape[1] // BLOCK)
    maxima = (absmax * scale[:, None]).view(-1)[:blocks]
    dequantize_4bit = torch.ops.bitsandbytes.dequantize_4bit
    # its CPU kernel (0.50.2) begins a block with each row: rows of broken blocks are given as one
    rows = list(shape) if shape[1] % BLOCK == 0 else [1, shape[0] * shape[1]]
    return dequantize_4bit(codes, maxima, BLOCK, "nf4", rows, dtype).view(*shape)


def _maxima(count: int, columns: int) -> tuple[int, int]:
    """How the maxima of `count` weights lie: as many in a row as a row of weights has blocks.

    Exact for widths that are multiples of 64, as FLUX.2's are; else a little over the end.
    """
    blocks = max(1, columns // BLOCK)
    return -(-count // (BLOCK * blocks)), blocks
