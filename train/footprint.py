"""What a training step takes of memory, block by block: the real training code on the meta device.

Owns building the model without weights, running one step of `objective` under the meter, and
cutting it into blocks. Whether it fits is `budget`'s to say. Kinds of kernels: attention counts as
flash attention, RMS norm as the fused one; a compiled block counts as an eager one, which it
doesn't exceed as far as we know (not measured yet).
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_tools.buckets import Geometry
from train import lora, objective
from train.base import MAX_TEXT_TOKENS
from train.batch import Batch
from train.budget import Block, Footprint, Pass
from train.config import LoraConfig
from train.meter import Meter, Span, gpu_kernels

STACK = 3
"""Blocks of each kind that are metered: a first, a middle and a last one. The others are as the
middle one, which a test holds against whole models."""

SAMPLED = ("blocks", "attention", "diffusers")
"""Targets that treat all blocks alike. Others are metered whole."""


@dataclass(frozen=True)
class Step:
    """What a training step's memory depends on, beside the model."""

    target: Geometry
    references: tuple[Geometry, ...] = ()
    batch_size: int = 1
    accumulated: bool = False
    dtype: torch.dtype = torch.bfloat16
    quantize: str = "none"
    text_tokens: int = MAX_TEXT_TOKENS


def meter_step(config: Mapping[str, Any], adapter: LoraConfig, step: Step) -> Footprint:
    """A step's footprint. config: the arguments of Flux2Transformer2DModel.

    Takes about two seconds for dev. Raises ConfigError for targets that match nothing.
    """
    doubles, singles = config["num_layers"], config["num_single_layers"]
    sampled = adapter.targets in SAMPLED
    stack = (min(doubles, STACK), min(singles, STACK)) if sampled else (doubles, singles)
    small = {**config, "num_layers": stack[0], "num_single_layers": stack[1]}
    kept, recomputed = (_run(small, adapter, step, recompute=flag) for flag in (False, True))
    blocks = [
        Block(name, kept.weights[name], kept.passes[name], recomputed.passes[name])
        for name in kept.weights
    ]
    whole = [
        *_stretched(blocks[: stack[0]], doubles),
        *_stretched(blocks[stack[0] :], singles),
    ]
    numbers = [kept.parameters[block.name] for block in blocks]
    parameters = sum(_stretched(numbers[: stack[0]], doubles))
    parameters += sum(_stretched(numbers[stack[0] :], singles))
    return Footprint(
        blocks=tuple(_renamed(whole, doubles=doubles)),
        others=kept.others,
        parameters=parameters,
        head=recomputed.head,
        turn=recomputed.turn,
        accumulated=step.accumulated,
    )


def meter_forward(config: Mapping[str, Any], adapter: LoraConfig, step: Step) -> int:
    """Bytes that a forward pass without gradients takes at most, above what is held before it."""
    small = {**config, "num_layers": min(1, config["num_layers"])}
    small["num_single_layers"] = min(2, config["num_single_layers"])
    model = _build(small, replace_targets(adapter), step)
    with torch.no_grad(), gpu_kernels(), Meter() as meter:
        meter.add([*model.parameters(), *model.buffers()])
        held = meter.live
        batch = _batch(config, step)
        objective.predict(model, batch, dtype=step.dtype, guidance=_guidance(config))
    return meter.peak - held


def replace_targets(adapter: LoraConfig) -> LoraConfig:
    """The same adapter on all block Linears, an upper bound: a pattern may miss the sample."""
    return adapter.model_copy(update={"targets": "blocks"})


@dataclass(frozen=True)
class _Metered:
    """One run of a model."""

    passes: dict[str, tuple[Pass, Pass]]
    weights: dict[str, int]
    parameters: dict[str, int]
    others: int
    head: Pass
    turn: Pass


def _run(
    config: Mapping[str, Any], adapter: LoraConfig, step: Step, *, recompute: bool
) -> _Metered:
    """One forward and backward of a model on the meta device."""
    model = _build(config, adapter, step)
    if recompute:
        model.enable_gradient_checkpointing(gradient_checkpointing_func=_checkpointed)
    model.train()
    blocks = named_blocks(model)
    with gpu_kernels(), Meter() as meter, _marked(model, blocks, meter) as forward:
        meter.add([*model.parameters(), *model.buffers()])
        if step.accumulated:
            for parameter in lora.trainable(model):
                parameter.grad = torch.empty_like(parameter)
        meter.mark("head")
        batch = _batch(config, step)
        losses = objective.losses(model, batch, dtype=step.dtype, guidance=_guidance(config))
        loss = losses.mean() * 1.0
        forward.over = True
        torch.autograd.backward(loss)
        meter.mark("end")
    spans = {span.name: span for span in meter.spans}
    return _Metered(
        passes={name: (_pass(spans, name), _pass(spans, f"grad {name}")) for name in blocks},
        weights={name: _frozen(block) for name, block in blocks.items()},
        parameters={
            name: sum(p.numel() for p in block.parameters() if p.requires_grad)
            for name, block in blocks.items()
        },
        others=_frozen(model) - sum(_frozen(block) for block in blocks.values()),
        head=_pass(spans, "head"),
        turn=_pass(spans, "turn"),
    )


def _pass(spans: Mapping[str, Span], name: str) -> Pass:
    """Nothing for a block without gradients: its backward never comes."""
    span = spans.get(name)
    return Pass(span.peak, span.change) if span else Pass(0, 0)


class _Forward:
    """Whether the forward pass is over; recomputation calls the blocks' hooks again."""

    over = False


@contextlib.contextmanager
def _marked(model: Any, blocks: Mapping[str, nn.Module], meter: Meter) -> Iterator[_Forward]:
    """Marks at each block's start, at its backward's start, and behind the last block."""
    state, seen = _Forward(), set()

    def begin(name: str) -> Any:
        return lambda *_: None if state.over else meter.mark(name)

    def backward(name: str) -> Any:
        def mark(_: Tensor) -> None:
            if name not in seen:  # a double block's two outputs: the first to come
                seen.add(name)
                meter.mark(f"grad {name}")

        def hook(_: nn.Module, __: Any, outputs: Tensor | tuple[Tensor, ...]) -> None:
            for output in (outputs,) if isinstance(outputs, Tensor) else outputs:
                if output.requires_grad and not state.over:
                    output.register_hook(mark)

        return hook

    handles = [block.register_forward_pre_hook(begin(name)) for name, block in blocks.items()]
    handles += [block.register_forward_hook(backward(name)) for name, block in blocks.items()]
    handles.append(model.norm_out.register_forward_pre_hook(begin("turn")))
    yield state
    for handle in handles:
        handle.remove()


def named_blocks(model: Any) -> dict[str, nn.Module]:
    """The transformer's blocks by name, in the order of execution."""
    return {
        f"{kind}.{index}": block
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for index, block in enumerate(model.get_submodule(kind))
    }


def _checkpointed(block: nn.Module, *args: Any) -> Any:
    return checkpoint(block.__call__, *args, use_reentrant=False)


def _build(config: Mapping[str, Any], adapter: LoraConfig, step: Step) -> Any:
    """The transformer with its adapter, without numbers."""
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel(**config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(step.dtype)
        if step.quantize != "none":
            for name in lora.block_linears(model):
                parent, _, child = name.rpartition(".")
                linear = model.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                model.get_submodule(parent).add_module(
                    child, _Quantized(linear, kind=step.quantize, dtype=step.dtype)
                )
        lora.attach(model, adapter, seed=0)
    return model


def quantized_bytes(kind: str, *, rows: int, columns: int, size: int) -> tuple[int, int]:
    """A quantised matrix: bytes of its codes and of its scales. size: bytes a weight without."""
    match kind:
        case "none":
            return rows * columns * size, 0
        case "nf4":
            return math.ceil(rows * columns / 2), 4 * math.ceil(rows * columns / 64)
        case _:
            assert kind in ("fp8", "int8"), kind
            return rows * columns, 4 * rows


class _Quantized(nn.Linear):
    """Stands for a frozen Linear in 8 or 4 bits: its size, and a whole matrix when it is used."""

    def __init__(self, linear: nn.Linear, *, kind: str, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        rows, columns = linear.weight.shape
        codes, scales = quantized_bytes(kind, rows=rows, columns=columns, size=0)
        self.weight = nn.Parameter(torch.empty(codes, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self._dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        return _Restored.apply(input, shape, self._dtype)  # pyright: ignore[reportReturnType]


class _Restored(torch.autograd.Function):
    """A matrix product whose matrix is there for as long as it takes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = shape, dtype
        return nn.functional.linear(input, input.new_empty(shape, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        matrix = gradients[0].new_empty(ctx.shape, dtype=ctx.dtype)
        return gradients[0] @ matrix, None, None


def _frozen(module: nn.Module) -> int:
    """Bytes of the weights and buffers that aren't trained."""
    weights = [p for p in module.parameters() if not p.requires_grad]
    return sum(t.numel() * t.element_size() for t in [*weights, *module.buffers()])


def _guidance(config: Mapping[str, Any]) -> float | None:
    return 1.0 if config["guidance_embeds"] else None


def _batch(config: Mapping[str, Any], step: Step) -> Batch:
    """A batch without numbers."""
    count, channels = step.batch_size, config["in_channels"]

    def picture(size: Geometry) -> Tensor:
        return torch.empty(count, channels, size.height // 16, size.width // 16, device="meta")

    width = config["joint_attention_dim"]
    latents = picture(step.target)
    return Batch(
        latents_BDhw=latents,
        noise_BDhw=picture(step.target),
        weight_Bhw=torch.empty(count, *latents.shape[2:], device="meta"),
        sigma_B=torch.empty(count, device="meta"),
        text_BLJ=torch.empty(count, step.text_tokens, width, dtype=step.dtype, device="meta"),
        references=tuple(picture(size) for size in step.references),
        names=(),
    )


def _stretched(sample: Sequence[Any], count: int) -> list[Any]:
    """First, middle and last of a sample as `count`, the middle one many times."""
    if len(sample) == count:
        return list(sample)
    assert len(sample) == STACK < count
    return [sample[0], *[sample[1]] * (count - 2), sample[2]]


def _renamed(blocks: Sequence[Block], *, doubles: int) -> Iterator[Block]:
    for index, block in enumerate(blocks):
        kind, number = ("transformer_blocks", index)
        if index >= doubles:
            kind, number = ("single_transformer_blocks", index - doubles)
        yield replace(block, name=f"{kind}.{number}")
