"""What a training step takes of memory, block by block: the real training code on the meta device.

Owns building the model without weights, running one step of `objective` under the meter, and
cutting it into blocks. Whether it fits is `budget`'s to say. Attention counts as flash attention,
RMS norm as the fused kernel; what `frozen` unpacks inside its operators counts, too. A compiled
block counts as an eager one, which it doesn't exceed as far as we know (not measured yet).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.buckets import Geometry
from train import lora, objective, speed
from train.batch import Batch
from train.config import LoraConfig
from train.loading import frozen
from train.loading.base import MAX_TEXT_TOKENS
from train.loading.frozen import FrozenLinear
from train.memory import offload, recompute
from train.planning.budget import Block, Footprint, Pass
from train.planning.meter import Meter, Span, gpu_kernels

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
    fp8_matmul: bool = False
    attention: str = "native"
    """Of speed.BACKENDS; other kernels than SDPA's choice may copy their inputs."""
    text_tokens: int = MAX_TEXT_TOKENS


def meter_step(config: Mapping[str, Any], adapter: LoraConfig, step: Step) -> Footprint:
    """A step's footprint. config: the arguments of Flux2Transformer2DModel.

    Takes about two seconds for dev. Raises ConfigError for targets that match nothing.
    """
    doubles, singles = config["num_layers"], config["num_single_layers"]
    sampled = adapter.targets in SAMPLED
    stack = (min(doubles, STACK), min(singles, STACK)) if sampled else (doubles, singles)
    small = {**config, "num_layers": stack[0], "num_single_layers": stack[1]}
    kept, recomputed = (_run(small, adapter, step, again=flag) for flag in (False, True))
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
    with torch.no_grad(), gpu_kernels(), visible_products(), Meter() as meter:
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


def _run(config: Mapping[str, Any], adapter: LoraConfig, step: Step, *, again: bool) -> _Metered:
    """One forward and backward of a model on the meta device."""
    model = _build(config, adapter, step)
    blocks = named_blocks(model)
    if again:
        meta = torch.device("meta")
        recompute.enable(model, range(len(blocks)), offload_activations=False, device=meta)
    model.train()
    with (
        gpu_kernels(),
        visible_products(),
        Meter() as meter,
        _marked(model, blocks, meter) as forward,
    ):
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
        weights={name: offload.packed_bytes(block) for name, block in blocks.items()},
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


def _build(config: Mapping[str, Any], adapter: LoraConfig, step: Step) -> Any:
    """The transformer with its adapter, without numbers."""
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel(**config)
        nn.Module.to(model, step.dtype)
        if step.quantize != "none":
            for name in lora.block_linears(model):
                linear = model.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                model.set_submodule(name, FrozenLinear.like(linear, step.quantize))
        lora.attach(model, adapter, seed=0)
    if step.fp8_matmul:
        frozen.use_fp8_matmul(model, torch.device("cpu"))
    speed.set_attention(model, step.attention, undo=contextlib.ExitStack())
    return model


@contextlib.contextmanager
def visible_products() -> Iterator[None]:
    """Lets products of quantised weights show what they hold inside their operator."""
    before = frozen.matmul, frozen.scaled_matmul
    frozen.matmul, frozen.scaled_matmul = _matmul, _scaled_matmul
    try:
        yield
    finally:
        frozen.matmul, frozen.scaled_matmul = before


def _matmul(
    x: Tensor, state: Sequence[Tensor], kind: str, shape: Sequence[int], transposed: bool
) -> Tensor:
    """As `frozen.matmul`: a whole matrix in x's type, and nf4's maxima in fp32 to make it."""
    maxima = torch.empty_like(state[1], dtype=torch.float32) if kind == "nf4" else None
    weight = x.new_empty(tuple(shape))
    del maxima
    return frozen.multiply(x, weight, state, kind, transposed)


def _scaled_matmul(
    rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype, back: bool
) -> Tensor:
    """As `frozen.scaled_matmul`: the matrix turned, backward only."""
    turned = weight.t().contiguous() if back else weight
    made = rows.new_empty(rows.shape[0], scale.shape[0], dtype=dtype)
    del turned
    return made


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
