"""A course of training on a small transformer, and lanes whose timing is as bad as allowed."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from tests import tiny
from train import lora
from train.config import LoraConfig
from train.memory import offload, recompute
from train.memory.transfer import Lane

DOUBLE, SINGLE = 3, 7
BLOCKS = DOUBLE + SINGLE

VARIANTS = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "dropout": {"dropout": 0.3},
    "int8": {"int8": True, "dtype": torch.bfloat16},
}

Job = tuple[Tensor, Tensor]


class LateLane:
    """A target is destroyed as soon as its copy may start, and right only once it is waited for.

    Reading too early or overwriting too early shows as numbers that aren't, or are others.
    """

    def __init__(self) -> None:
        self.copies = 0
        self.late: list[Job] = []

    def copy(self, target: Tensor, source: Tensor) -> Job:
        target.fill_(255 if target.dtype == torch.uint8 else float("nan"))
        self.copies += 1
        self.late.append((target, source))
        return self.late[-1]

    def wait(self, arrived: Job) -> None:
        while any(job is arrived for job in self.late):
            target, source = self.late.pop(0)
            target.copy_(source)


class _Dequantized(torch.autograd.Function):
    """A Linear that saves its packed weight, as bitsandbytes' do, not the matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale, shift)
        return x @ (weight.to(x.dtype) * (scale * shift.float()).to(x.dtype)).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, scale, shift = ctx.saved_tensors
        (gradient,) = gradients
        matrix = weight.to(gradient.dtype) * (scale * shift.float()).to(gradient.dtype)
        return gradient @ matrix, None, None, None


class Int8Linear(nn.Linear):
    """With a weight in int8, its scale as a buffer in fp32, and a buffer in fp8 besides."""

    scale: Tensor
    shift: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        scale = linear.weight.detach().abs().amax() / 127
        packed = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale.float())
        self.register_buffer("shift", torch.ones(1).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        return _Dequantized.apply(x, self.weight, self.scale, self.shift)


def model(
    *, dtype: torch.dtype = torch.float32, dropout: float = 0.0, int8: bool = False
) -> Flux2Transformer2DModel:
    """With an adapter that has an effect, in training mode."""
    transformer = tiny.transformer(guidance=False, double=DOUBLE, single=SINGLE)
    nn.Module.to(transformer, dtype)
    for name in lora.block_linears(transformer) if int8 else []:
        parent, _, child = name.rpartition(".")
        linear = transformer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        transformer.get_submodule(parent).register_module(child, Int8Linear(linear))
    lora.attach(transformer, LoraConfig(rank=4, dropout=dropout), seed=0)
    torch.manual_seed(1)
    for parameter in lora.trainable(transformer):
        nn.init.normal_(parameter, std=0.1)
    return transformer.train()


def streaming(
    variant: str,
    *,
    resident: int,
    slots: int = 3,
    lane: Lane | None = None,
    recomputed: Literal["all", "none"] | int = "none",
) -> tuple[Flux2Transformer2DModel, offload.Streaming]:
    """A model whose blocks are streamed, and what `attach` said."""
    transformer, cpu = model(**VARIANTS[variant]), torch.device("cpu")
    done = offload.attach(transformer, resident=resident, device=cpu, slots=slots, lane=lane)
    numbers = recompute.chosen(BLOCKS, recomputed)
    recompute.enable(transformer, numbers, offload_activations=False, device=cpu)
    return transformer, done


def loss(transformer: nn.Module, *, seed: int, tokens: int = 12, device: str = "cpu") -> Tensor:
    """Of random inputs; dropout draws from the global generator."""
    draw = torch.Generator().manual_seed(seed)
    dtype = next(transformer.parameters()).dtype
    inputs = {
        "hidden_states": torch.randn(2, tokens, 4 * tiny.LATENT_CHANNELS, generator=draw),
        "encoder_hidden_states": torch.randn(2, 6, 3 * tiny.TEXT_WIDTH, generator=draw),
        "timestep": torch.rand(2, generator=draw),
    }
    placed = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    output = transformer(
        **placed,
        img_ids=torch.randint(8, (tokens, 4), generator=draw).to(device),
        txt_ids=torch.randint(8, (6, 4), generator=draw).to(device),
        return_dict=False,
    )[0]
    return output.float().square().mean()


def course(
    transformer: Flux2Transformer2DModel,
    *,
    steps: int = 2,
    accumulate: int = 2,
    device: str = "cpu",
    compute: Callable[..., Tensor] = loss,
) -> list[Tensor]:
    """Losses, gradients and previews of some steps: all that may not change by a bit."""
    parameters = lora.trainable(transformer)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    torch.manual_seed(2)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        for number in range(accumulate):
            value = compute(transformer, seed=10 * step + number, device=device)
            value.backward()
            seen.append(value.detach())
        seen += gradients(transformer)
        optimizer.step()
        transformer.eval()
        with torch.no_grad():
            seen += [compute(transformer, seed=99, device=device) for _ in range(2)]
        transformer.train()
    assert len(seen) == steps * (accumulate + 2 + len(parameters))
    assert all(bool(tensor.isfinite().all()) for tensor in seen)
    return [tensor.cpu() for tensor in seen]


def gradients(transformer: nn.Module) -> list[Tensor]:
    """Copies of the adapter's, all of which must be there."""
    found = [parameter.grad for parameter in lora.trainable(transformer)]
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """To the bit."""
    return all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
