"""LoRA on the transformer's block Linears: which modules, attaching them, reading them back.

Weights of the adapter are fp32 whatever the base's type: peft gives them the base's, and in bf16
most of their entries never move at the usual learning rates. Owns the in-memory adapter; files
are `export`'s and `checkpoint`'s.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from train.config import LoraConfig
from train.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel

BLOCK_LINEAR = re.compile(r"(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context)\.")
"""Linears outside the blocks have no home in every adapter format, so they are never targets."""

TARGET_SETS = {
    "blocks": r".*",
    "attention": r".*\.attn\..*",
    "diffusers": r"transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)|single_transformer_blocks\..*",
}

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class Adapter:
    """One LoRA, by module name of the transformer: the update of a weight is scale * up @ down.

    down: module -> (rank, in), fp32. up: module -> (out, rank), fp32. Same keys, in model order.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """Strength of the update, alpha / rank."""
        return self.alpha / self.rank

    def delta(self, module: str) -> Tensor:
        """The update of one module's weight, (out, in), fp32."""
        return self.scale * (self.up[module] @ self.down[module])


def block_linears(transformer: nn.Module) -> list[str]:
    """Names of all Linears inside the transformer's blocks, in model order."""
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and BLOCK_LINEAR.match(name)
    ]


def select_targets(transformer: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """Names of the Linears that `lora.targets` means.

    Raises ConfigError if a pattern matches no block Linear.
    """
    names = block_linears(transformer)
    patterns = (TARGET_SETS[targets],) if isinstance(targets, str) else targets
    unmatched = [p for p in patterns if not any(re.fullmatch(p, name) for name in names)]
    if unmatched:
        raise ConfigError(
            f"lora.targets: {', '.join(map(repr, unmatched))} matches no Linear in a block. "
            f"A pattern must match a whole name, such as {names[0]!r} or {names[-1]!r}."
        )
    return [name for name in names if any(re.fullmatch(p, name) for p in patterns)]


def attach(transformer: "Flux2Transformer2DModel", lora: LoraConfig, *, seed: int) -> list[str]:
    """Freeze the base, add a fresh adapter in fp32 (its update is zero) and return its modules."""
    targets = select_targets(transformer, lora.targets)
    transformer.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.scale * lora.rank,  # pyright: ignore[reportArgumentType]
                lora_dropout=lora.dropout,
                target_modules=targets,
                bias="none",
            ),
            adapter_name=ADAPTER_NAME,
        )
    for parameter in trainable(transformer):
        parameter.data = parameter.data.float()
    found = {name.rsplit(".lora_A.", 1)[0] for name, _ in _lora_weights(transformer, "lora_A")}
    assert found == set(targets), f"peft adapted {found ^ set(targets)} otherwise than asked"
    return targets


def trainable(transformer: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters, in model order."""
    return [p for p in transformer.parameters() if p.requires_grad]


def read(transformer: nn.Module, lora: LoraConfig) -> Adapter:
    """A copy of the attached adapter on the CPU."""

    def weights(kind: str) -> dict[str, Tensor]:
        return {
            name.rsplit(f".{kind}.", 1)[0]: weight.detach().float().cpu().clone()
            for name, weight in _lora_weights(transformer, kind)
        }

    return Adapter(weights("lora_A"), weights("lora_B"), lora.rank, lora.scale * lora.rank)


@contextmanager
def disabled(transformer: "Flux2Transformer2DModel") -> Iterator[None]:
    """The base alone, while this lasts. What is trained is so again after it."""
    before = [p.requires_grad for p in transformer.parameters()]
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
    assert [p.requires_grad for p in transformer.parameters()] == before


def block_kind(name: str) -> str:
    """Of a module or parameter in a block: double_attn, double_ff or single.

    A single block's attention and feed-forward are one matrix.
    """
    if name.startswith("single_"):
        return "single"
    return "double_attn" if ".attn." in name else "double_ff"


@torch.no_grad()
def update_norms(transformer: nn.Module) -> dict[str, Tensor]:
    """Frobenius norm of the whole update by kind of block, on the device; no host waits for it.

    |s B A|^2 = s^2 sum((B^T B) * (A A^T)): r x r numbers a module, never out x in.
    """
    squares: dict[str, list[Tensor]] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            pair = (module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight)
            down, up = cast(tuple[Tensor, Tensor], pair)
            inner = (up.T @ up) * (down @ down.T)
            square = module.scaling[ADAPTER_NAME] ** 2 * inner.sum()
            squares.setdefault(block_kind(name), []).append(square)
    return {
        kind: torch.stack(some).sum().clamp(min=0).sqrt() for kind, some in sorted(squares.items())
    }


@torch.no_grad()
def gradient_norms(transformer: nn.Module) -> dict[str, Tensor]:
    """Norm of the gradient by kind of block, on the device."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in transformer.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(block_kind(name), []).append(parameter.grad)
    return {kind: nn.utils.get_total_norm(some) for kind, some in sorted(groups.items())}


@torch.no_grad()
def write(transformer: nn.Module, adapter: Adapter) -> None:
    """Put an adapter's weights into the attached one. Raises CheckpointError if they don't fit."""
    for kind, source in (("lora_A", adapter.down), ("lora_B", adapter.up)):
        slots = {n.rsplit(f".{kind}.", 1)[0]: w for n, w in _lora_weights(transformer, kind)}
        differing = sorted(slots.keys() ^ source.keys())
        misfits = [n for n in slots.keys() & source.keys() if slots[n].shape != source[n].shape]
        if wrong := differing + misfits:
            raise CheckpointError(
                f"the adapter has other modules or ranks than this config: {wrong[0]} "
                f"and {len(wrong) - 1} more differ. "
                "Resume with the config of the run, or start a run of another name."
            )
        for name, slot in slots.items():
            slot.copy_(source[name])


def _lora_weights(transformer: nn.Module, kind: str) -> list[tuple[str, nn.Parameter]]:
    suffix = f".{kind}.{ADAPTER_NAME}.weight"
    return [(n, p) for n, p in transformer.named_parameters() if n.endswith(suffix)]
