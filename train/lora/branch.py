"""The low-rank branch of an adapted Linear, computed in the base's type from fp32 weights.

Owns the forward that takes the place of peft's on its LoRA Linears; weights, names and switches
stay peft's. peft computes the branch in fp32, and on a bf16 base that means fp32 copies of a
Linear's input and output: most of what a training step holds.

y = W x + (s B) A x. A and s B are cast on the fly, so the forward has the very numbers that are
exported in bf16. Each product sums in fp32 and rounds its result once; the sum with W x is part of
the second one. So A x (r numbers a token), A and s B are rounded to 2^-9 of themselves, and so was
W x, which is larger. The gradients of A and B are sums over all tokens, made in fp32 (on a GPU:
`speed.sum_exactly`), rounded once to the base's type and added up over batches in fp32.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional

from train.lora.pissa import START_NAME


class BranchLinear(Linear):
    """peft's LoRA Linear; kept for the backward are the input and r numbers a token."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out), in x's type, which is the base's."""
        assert not [*args, *kwargs], "FLUX.2's blocks give their Linears nothing but the input"
        if self.disable_adapters or self.merged:
            return super().forward(x)
        rows = x.flatten(0, -2)  # in two dimensions addmm works in place and on no view
        y = self.base_layer(rows)
        for narrow, up in self._branches(rows):
            y = _add_product(y, narrow, up.to(y.dtype))
        return y.unflatten(0, x.shape[:-1])

    def _branches(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The narrow side of each product, (tokens, rank), and the matrix that widens it, fp32."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if START_NAME in names:
            assert len(names) == 2, names
            yield self._from_start(rows, next(name for name in names if name != START_NAME))
            return
        for name in names:
            dropped = self.lora_dropout[name](rows)
            yield functional.linear(dropped, self._down(name).to(rows.dtype)), self._up(name)

    def _from_start(self, rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """PiSSA's update as one product of twice the rank.

        B A + S A0, S being minus B0, is (B + S) A - S (A - A0), as in `lora.with_start`: the
        differences are taken in fp32, so what is rounded is as small as the update itself.
        """
        down, start = self._down(name), self._down(START_NAME)
        up, minus = self._up(name), self._up(START_NAME)
        dropped = self.lora_dropout[name](rows)
        if dropped is rows:
            both = torch.cat([down, down - start]).to(rows.dtype)
            return functional.linear(rows, both), torch.cat([up + minus, -minus], dim=1)
        sides = [(dropped, down), (rows, start)]
        narrow = [functional.linear(side, weight.to(side.dtype)) for side, weight in sides]
        return torch.cat(narrow, dim=-1), torch.cat([up, minus], dim=1)

    def _down(self, name: str) -> Tensor:
        """A, fp32."""
        return cast(Tensor, self.lora_A[name].weight)

    def _up(self, name: str) -> Tensor:
        """B with its strength, fp32."""
        up, scale = cast(Tensor, self.lora_B[name].weight), self.scaling[name]
        return up if scale == 1 else up * scale


def _add_product(y: Tensor, narrow: Tensor, up: Tensor) -> Tensor:
    """y + narrow up^T, in place."""
    if not torch.compiler.is_compiling():
        return y.addmm_(narrow, up.t())
    if torch.is_grad_enabled():
        return _Added.apply(y, narrow, up)
    add_product(y, narrow, up)
    return y


class _Added(torch.autograd.Function):
    """The same for the compiler, which would make the sum in memory of its own, as wide as y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, narrow: Tensor, up: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(narrow, up)
        add_product(y, narrow, up)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        narrow, up = ctx.saved_tensors
        return grads[0], grads[0] @ up, grads[0].t() @ narrow


@torch.library.custom_op("kindling::add_product", mutates_args=("y",))
def add_product(y: Tensor, narrow: Tensor, up: Tensor) -> None:
    """y += narrow up^T, opaque to the compiler."""
    y.addmm_(narrow, up.t())


@add_product.register_fake
def _(y: Tensor, narrow: Tensor, up: Tensor) -> None:
    pass


def use(model: nn.Module) -> None:
    """Compute the branches of a model's LoRA Linears so from now on.

    peft's variants of them, such as DoRA, aren't of this form and keep peft's forward.
    """
    for module in model.modules():
        if type(module) is Linear and not module.lora_variant:
            module.__class__ = BranchLinear
