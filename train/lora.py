"""LoRA on the transformer's block Linears: which modules, attaching them, reading them back.

Weights of the adapter are fp32 whatever the base's type: peft gives them the base's, and in bf16
most of their entries never move at the usual learning rates. Owns the in-memory adapter; files
are `export`'s and `checkpoint`'s.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from train import branch
from train.branch import START_NAME
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

PISSA_ITERATIONS = 4
"""Of the randomised SVD, as peft's `pissa_niter_4`; a whole SVD would take hours on dev."""


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


def attach(
    transformer: "Flux2Transformer2DModel",
    lora: LoraConfig,
    *,
    seed: int,
    start: Adapter | None = None,
) -> list[str]:
    """Freeze the base, add a fresh adapter in fp32 (its update is zero) and return its modules.

    start: a resumed run's `read_start`, in place of finding it anew. Raises ConfigError where the
    base has no weights that PiSSA can start from.
    """
    targets = select_targets(transformer, lora.targets)
    transformer.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _add(transformer, lora, targets, name=ADAPTER_NAME, dropout=lora.dropout)
        if lora.init == "pissa":
            _add_start(transformer, lora, targets)
            if start is None:
                _start_from_base(transformer, targets, scale=lora.scale)
            else:
                write(transformer, start, adapter=START_NAME)
    found = {name.rsplit(".lora_A.", 1)[0] for name, _ in _lora_weights(transformer, "lora_A")}
    assert found == set(targets), f"peft adapted {found ^ set(targets)} otherwise than asked"
    if lora.compute == "base":
        branch.use(transformer)
    return targets


def _add(
    transformer: "Flux2Transformer2DModel",
    lora: LoraConfig,
    targets: list[str],
    *,
    name: str,
    dropout: float,
) -> None:
    transformer.add_adapter(
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.scale * lora.rank,  # pyright: ignore[reportArgumentType]
            lora_dropout=dropout,
            target_modules=targets,
            bias="none",
        ),
        adapter_name=name,
    )
    for kind in ("lora_A", "lora_B"):
        for _, parameter in _lora_weights(transformer, kind, adapter=name):
            parameter.data = parameter.data.float()


def _add_start(
    transformer: "Flux2Transformer2DModel", lora: LoraConfig, targets: list[str]
) -> None:
    """A second adapter, active beside the first one, and frozen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        _add(transformer, lora, targets, name=START_NAME, dropout=0.0)
    transformer.set_adapters([ADAPTER_NAME, START_NAME])
    for parameter in start_parameters(transformer):
        parameter.requires_grad_(False)


@torch.no_grad()
def _start_from_base(transformer: Any, targets: list[str], *, scale: float) -> None:
    """PiSSA (Meng et al. 2024): W = U S V; down and up are sqrt(S / scale) times V and U, cut to
    the rank. Their product is taken off by the second adapter, which has -up.
    """
    for name in targets:
        module = transformer.get_submodule(name)
        weight = module.base_layer.weight
        down, up = module.lora_A, module.lora_B
        rank = down[ADAPTER_NAME].out_features
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"lora.init: pissa starts from the base's weights, but {name} is kept as "
                f"{str(weight.dtype).removeprefix('torch.')}. Remove it, or use a base in bf16."
            )
        if rank > min(weight.shape):
            raise ConfigError(
                f"lora.rank: {rank} is more than the {min(weight.shape)} directions that pissa "
                f"finds in {name}. Lower it, or remove lora.init."
            )
        left, sizes, right = torch.svd_lowrank(weight.float(), rank, niter=PISSA_ITERATIONS)
        root = (sizes / scale).sqrt()
        for adapter, sign in ((ADAPTER_NAME, 1), (START_NAME, -1)):
            down[adapter].weight.copy_(root[:, None] * right.T)
            up[adapter].weight.copy_(sign * left * root)


def trainable(transformer: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters, in model order."""
    return [p for p in transformer.parameters() if p.requires_grad]


def start_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """Those of the frozen adapter that PiSSA's start is taken off by."""
    kinds = ("lora_A", "lora_B")
    return [p for kind in kinds for _, p in _lora_weights(transformer, kind, adapter=START_NAME)]


def trainable_up(transformer: nn.Module) -> list[nn.Parameter]:
    """Those of them that are up matrices (lora_B)."""
    return [parameter for _, parameter in _lora_weights(transformer, "lora_B")]


def read(transformer: nn.Module, lora: LoraConfig, *, adapter: str = ADAPTER_NAME) -> Adapter:
    """A copy of the attached adapter on the CPU."""

    def weights(kind: str) -> dict[str, Tensor]:
        return {
            name.rsplit(f".{kind}.", 1)[0]: weight.detach().float().cpu().clone()
            for name, weight in _lora_weights(transformer, kind, adapter=adapter)
        }

    return Adapter(weights("lora_A"), weights("lora_B"), lora.rank, lora.scale * lora.rank)


@contextmanager
def disabled(transformer: "Flux2Transformer2DModel") -> Iterator[None]:
    """The base alone, while this lasts. What is trained is so again after it."""
    before = [(parameter, parameter.requires_grad) for parameter in transformer.parameters()]
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
        for parameter, trained in before:  # peft takes every active adapter for trained
            parameter.requires_grad_(trained)


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


def read_start(transformer: nn.Module, lora: LoraConfig) -> Adapter | None:
    """A copy of what is taken off the adapter, on the CPU; None where that is nothing.

    Frozen as it is, it is streamed with the base: to be read before that begins.
    """
    return read(transformer, lora, adapter=START_NAME) if lora.init == "pissa" else None


def with_start(adapter: Adapter, start: Adapter) -> Adapter:
    """The update of both together, as one adapter of twice the rank.

    start is down A0 and up -B0, so that the update is BA - B0 A0 = (B - B0) A + B0 (A - A0). Each
    product has one factor that is as small as the update; so has its rounding in a file, which in
    the difference of the two large products it hadn't.
    """
    down = {n: torch.cat([a, a - start.down[n]]) for n, a in adapter.down.items()}
    up = {n: torch.cat([b + start.up[n], -start.up[n]], dim=1) for n, b in adapter.up.items()}
    return Adapter(down, up, 2 * adapter.rank, 2 * adapter.alpha)


@torch.no_grad()
def write(transformer: nn.Module, source: Adapter, *, adapter: str = ADAPTER_NAME) -> None:
    """Put an adapter's weights into the attached one. Raises CheckpointError if they don't fit."""
    for kind, weights in (("lora_A", source.down), ("lora_B", source.up)):
        found = _lora_weights(transformer, kind, adapter=adapter)
        slots = {n.rsplit(f".{kind}.", 1)[0]: w for n, w in found}
        differing = sorted(slots.keys() ^ weights.keys())
        misfits = [n for n in slots.keys() & weights.keys() if slots[n].shape != weights[n].shape]
        if wrong := differing + misfits:
            raise CheckpointError(
                f"the adapter has other modules or ranks than this config: {wrong[0]} "
                f"and {len(wrong) - 1} more differ. "
                "Resume with the config of the run, or start a run of another name."
            )
        for name, slot in slots.items():
            slot.copy_(weights[name])


def _lora_weights(
    transformer: nn.Module, kind: str, *, adapter: str = ADAPTER_NAME
) -> list[tuple[str, nn.Parameter]]:
    suffix = f".{kind}.{adapter}.weight"
    return [(n, p) for n, p in transformer.named_parameters() if n.endswith(suffix)]
