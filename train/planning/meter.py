"""How much memory code takes, counted as it runs: live tensors, each storage once.

Owns counting and the stand-ins for kernels that a GPU has and the meta device lacks. On the meta
device nothing is computed and nothing allocated, so a step of 32B parameters is metered in seconds
anywhere. Doesn't know what is run under it. What a kernel takes inside of itself isn't seen, and
neither is what the allocator keeps beyond what is asked of it.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512
"""Bytes: CUDA's allocator gives whole multiples of it (c10/cuda/CUDACachingAllocator)."""


@dataclass(frozen=True)
class Span:
    """What happened between two marks; bytes."""

    name: str
    start: int
    """Live when it began."""
    peak: int
    """Live at most, over `start`."""
    change: int
    """Live when it ended, over `start`."""


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered and are still alive.

    Tensors from before count once they are given to `add`.
    """

    def __init__(self, *, block: int = BLOCK) -> None:
        super().__init__()
        self._block = block
        self._known: dict[int, weakref.ref] = {}
        self.live = 0
        self.peak = 0
        self.spans: list[Span] = []
        self._name, self._start, self._highest = "start", 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        return made

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these too, from now to their end."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            name = id(storage)
            if name in self._known:
                continue
            size = math.ceil(storage.nbytes() / self._block) * self._block

            def forget(_: weakref.ref, name: int = name, size: int = size) -> None:
                del self._known[name]
                self.live -= size

            self._known[name] = weakref.ref(storage, forget)
            self.live += size
        self.peak = max(self.peak, self.live)
        self._highest = max(self._highest, self.live)

    def mark(self, name: str) -> None:
        """End the span and begin one of this name."""
        start = self._start
        self.spans.append(Span(self._name, start, self._highest - start, self.live - start))
        self._name, self._start, self._highest = name, self.live, self.live


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Lets attention and RMS norm take the memory that they take on a GPU.

    Elsewhere torch builds them of many small operations, which would count whole attention
    matrices and fp32 copies. The results are of the right shape and type; their numbers aren't.
    """
    before = functional.scaled_dot_product_attention, functional.rms_norm
    functional.scaled_dot_product_attention, functional.rms_norm = _attention, _rms_norm
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.rms_norm = before


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    assert attn_mask is None, "a flash kernel takes no mask"
    return _FlashAttention.apply(query, key, value)  # pyright: ignore[reportReturnType]


def _rms_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    return _FusedNorm.apply(input, weight)  # pyright: ignore[reportReturnType]


class _FusedNorm(torch.autograd.Function):
    """Keeps the input and a number a row, as CUDA's fused kernel does. The weight is frozen."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is None or not weight.requires_grad
        ctx.save_for_backward(input, input.new_empty(input.shape[:-1], dtype=torch.float32))
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(gradients[0]), None


class _FlashAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and a number a row; backward needs an fp32 sum for q's gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, sums = ctx.saved_tensors
        scratch = (torch.empty_like(query, dtype=torch.float32), torch.empty_like(sums))
        made = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del scratch
        return made
