"""bitsandbytes' Linears in a text encoder: how they are asked for, and their product on a CPU.

Quantised transformers are `frozen`'s.
"""

import logging
from functools import partial
from typing import Any

import torch


def settings(name: str, *, dtype: torch.dtype) -> Any:
    """bitsandbytes' settings; None for "none"."""
    from transformers import BitsAndBytesConfig

    if name == "none":
        return None
    if name == "int8":
        # it would say for every matrix of every prompt that it computes in fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    assert name == "nf4"
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def compute_as_on_a_gpu(model: Any) -> None:
    """Give bitsandbytes' 4-bit Linears on a CPU the product that a GPU computes.

    Its kernels for CPUs with AVX512 round inputs to bf16, refuse widths that aren't multiples of 32
    and unpack those wrongly that aren't multiples of 64 (0.50), so a prompt's embedding would
    depend on the CPU.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.forward = partial(_product_4bit, module)


def _product_4bit(linear: Any, x: torch.Tensor) -> torch.Tensor:
    state, unpack = linear.weight.quant_state, torch.ops.bitsandbytes.dequantize_4bit
    rows, columns = state.shape
    flat = [1, rows * columns]  # rows that begin no block of their own
    weight = unpack(linear.weight, state.absmax, state.blocksize, "nf4", flat, x.dtype)
    return torch.nn.functional.linear(x, weight.view(rows, columns), linear.bias)
