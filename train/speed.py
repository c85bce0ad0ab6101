"""The fast path: attention kernels and compiled blocks, put on a transformer and taken off again.

Owns what `speed` in a config means, but for fp8 products, which are the frozen weights' own. Only
the blocks' forwards are compiled, so hooks on the modules, such as those that stream weights, stay
outside, and all blocks of a class share their code.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from train.config import SpeedConfig
from train.errors import ConfigError, MachineError

BACKENDS = {
    "native": "native",
    "cudnn": "_native_cudnn",
    "flash": "_native_flash",
    "flash3": "_native_flash",  # torch's own flash call, which FA3 then serves
}
"""diffusers' names. Its `_flash_3` isn't one of them: that has no backward pass."""

GRAPHS = 32
"""Graphs that a block class may have. Measured: the class that comes first, so the double block,
needs 2 a family of shapes (the first block's input has no gradient) and the single block 1; there
are 2 families (the first shape, all others), times 2 for batches of one; and 2 for previews."""

FA3 = "flash_attn_interface"
"""Its module."""

HEAD_WIDTH, SAMPLE_TOKENS = 128, 256
"""Of the tensors that kernels are asked about."""

HOPPER, AMPERE = (9, 0), (8, 0)


def require(speed: SpeedConfig, *, device: torch.device, dtype: torch.dtype) -> None:
    """Raises MachineError for what `apply` couldn't do here, before hours went elsewhere."""
    choose(speed.attention, device=device, dtype=dtype)
    if speed.compile and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise MachineError(
            "speed.compile: torch compiles for GPUs with Triton, which isn't installed. Install "
            "triton (on Windows triton-windows), or set speed.compile: false."
        )


def apply(
    transformer: nn.Module, speed: SpeedConfig, *, device: torch.device, dtype: torch.dtype
) -> ExitStack:
    """Make the transformer fast as asked; closing the result undoes all of it.

    dtype: what the blocks compute in. Raises MachineError for kernels that this machine lacks.
    """
    undo = ExitStack()
    sum_exactly(undo=undo)
    set_attention(transformer, choose(speed.attention, device=device, dtype=dtype), undo=undo)
    if speed.compile:
        compile_blocks(transformer, undo=undo)
    return undo


def sum_exactly(*, undo: ExitStack) -> None:
    """Let products in bf16 whose sum is split over a GPU add up the parts in fp32.

    The adapter's gradients are such: sums over all tokens into few numbers. torch's default adds
    the parts in bf16, which rounds once a part. The wide products aren't split, so they don't care.
    """
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction
    undo.callback(setattr, products, "allow_bf16_reduced_precision_reduction", before)
    products.allow_bf16_reduced_precision_reduction = False


# ---- attention


def choose(asked: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """The kernels to use: one of BACKENDS. auto: a function of the machine, nothing is timed.

    auto takes FA3 where it is installed on Hopper, otherwise cuDNN there and on what came later,
    otherwise SDPA's own choice. Raises MachineError for what was asked by name and isn't there.
    """
    if asked == "auto":
        if lacking("flash3", device=device, dtype=dtype) is None:
            return "flash3"
        newer = device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER
        if newer and lacking("cudnn", device=device, dtype=dtype) is None:
            return "native" if _takes_cudnn_itself(device, dtype) else "cudnn"
        return "native"
    reason = lacking(asked, device=device, dtype=dtype)
    if reason is not None:
        raise MachineError(
            f"speed.attention: {asked} needs {reason}. Set auto, which takes the fastest that this "
            "machine has."
        )
    return asked


def lacking(kernels: str, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """What these kernels need and the machine or the run hasn't; None if they will work."""
    if kernels == "native":
        return None
    if device.type != "cuda":
        return "an NVIDIA GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return "base.dtype: bf16"
    capability = torch.cuda.get_device_capability(device)
    if kernels == "flash3":
        if capability[0] != HOPPER[0]:
            return "a Hopper GPU (H100, H200)"
        if importlib.util.find_spec(FA3) is None:
            return "the package flash_attn_3 (flash-attention's hopper folder)"
        try:
            importlib.import_module(FA3)
        except (ImportError, OSError) as error:  # such as built for another torch
            return f"a flash_attn_3 that works with torch {torch.__version__} ({error})"
        known = torch.nn.attention.list_flash_attention_impls()
        return None if "FA3" in known else "a newer torch, which knows FA3"
    parameters = _sample(device, dtype)
    if kernels == "flash":
        fits = torch.backends.cuda.can_use_flash_attention(parameters)
        return None if capability >= AMPERE and fits else "an Ampere GPU or newer"
    fits = torch.backends.cuda.can_use_cudnn_attention(parameters)
    return None if fits else "cuDNN 9 and an Ampere GPU or newer"


def set_attention(transformer: nn.Module, kernels: str, *, undo: ExitStack) -> None:
    """Let all attention of the transformer use these kernels, whatever diffusers' default is.

    Module by module: the model's own method would also change the default of the whole process.
    """
    if kernels == "flash3":
        torch.nn.attention.activate_flash_attention_impl("FA3")
        undo.callback(torch.nn.attention.restore_flash_attention_impl)
    for module in attention_modules(transformer):
        module.set_attention_backend(BACKENDS[kernels])
        undo.callback(module.set_attention_backend, BACKENDS["native"])


def attention_modules(transformer: nn.Module) -> Iterator[AttentionModuleMixin]:
    """All of the transformer's attention."""
    return (m for m in transformer.modules() if isinstance(m, AttentionModuleMixin))


def _sample(device: torch.device, dtype: torch.dtype) -> torch.backends.cuda.SDPAParams:
    q = torch.empty(1, 1, SAMPLE_TOKENS, HEAD_WIDTH, device=device, dtype=dtype, requires_grad=True)
    return torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)


def _takes_cudnn_itself(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether SDPA's own choice is cuDNN: it then saves diffusers' copies of q, k and v."""
    q = torch.empty(1, 1, SAMPLE_TOKENS, HEAD_WIDTH, device=device, dtype=dtype, requires_grad=True)
    cudnn = torch.nn.attention.SDPBackend.CUDNN_ATTENTION
    return torch._fused_sdp_choice(q, q, q) == int(cudnn)  # pyright: ignore


# ---- compile


def blocks(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's blocks, in the order of the forward pass."""
    model: Any = transformer
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def compile_blocks(transformer: nn.Module, *, undo: ExitStack, backend: str = "inductor") -> None:
    """Compile the forward of each block, once for each class.

    Shapes: the first one is compiled as it is, which makes the fastest kernels, and the second one
    for all that follow (dynamic=None). Whole blocks or an error: a block that falls apart into
    graphs would be slow without a word.
    """
    before = torch._dynamo.config.recompile_limit
    undo.callback(torch.compiler.reset)
    undo.callback(setattr, torch._dynamo.config, "recompile_limit", before)
    torch._dynamo.config.recompile_limit = GRAPHS
    for block in blocks(transformer):
        assert "forward" not in vars(block), "this block's forward is replaced already"
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=None, backend=backend)
        block.forward = _explained(compiled)
        undo.callback(delattr, block, "forward")


def _explained(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but that running out of graphs says what to do."""

    @wraps(compiled)
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            raise ConfigError(
                f"speed.compile: the blocks needed more than {GRAPHS} graphs, because the shapes "
                "of the batches differ in too many ways. Set data.equal_tokens: true, or "
                "speed.compile: false."
            ) from error

    return forward
