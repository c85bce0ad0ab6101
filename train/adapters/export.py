"""The adapter file that users load: one safetensors file that diffusers and ComfyUI both apply at
strength 1.

Owns its names, its numbers, its metadata and writing it whole or not at all. Doesn't own other
layouts, proof that it loads (`certify`) or checkpoints. A file is never changed in place.

ComfyUI doesn't read safetensors metadata, diffusers refuses `.alpha` tensors: so neither can be
told a strength, and alpha / rank is folded into lora_B.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from train.adapters import comfyui, files, layouts
from train.adapters.intent import DORA_NORMS, PEFT_METADATA, PREFIX
from train.adapters.source import Group
from train.adapters.updates import LowRank
from train.adapters.write import save
from train.config import Config
from train.errors import CheckpointError
from train.lora import BLOCK_LINEAR, Adapter, AnyAdapter
from train.lora.base import weights

KEY = re.compile(r"transformer\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
KINDS = {
    (6144, 8, 48): ("Flux.2-dev", "flux_2_dev"),
    (3072, 5, 20): ("Flux.2-klein-4b", "flux_2_klein_4b"),
    (4096, 8, 24): ("Flux.2-klein-9b", "flux_2_klein_9b"),
}
"""Width, double and single blocks -> names as SwarmUI and musubi-tuner have them: ModelSpec's
architecture (they add "/lora") and ss_base_model_version."""


@dataclass(frozen=True)
class Facts:
    """What a run knows of itself; None is left out of the file."""

    name: str
    """The run's name."""
    created: datetime
    version: str
    """Of Kindling."""
    base: str
    """Hub repository or folder of the base."""
    base_revision: str | None
    shape: tuple[int, int, int]
    """Of the base: width, double blocks, single blocks."""
    resolution: int
    """The data's target side in pixels."""
    steps: int
    config_hash: str
    data_hash: str
    guidance: float | None
    """Told to the model in training; None on a base without guidance embedding."""
    sigma_sampling: str
    training_shift: str
    inference_shift: str
    checkpoint: str | None = None
    """Which rule chose the checkpoint, and why that one."""
    held_out_loss: float | None = None
    weights: str = "last"
    """Which of the run's: the last ones, or an average."""
    trigger: str | None = None
    title: str | None = None
    author: str | None = None
    description: str | None = None
    licence: str | None = None


def describe(facts: Facts, adapter: AnyAdapter) -> dict[str, str]:
    """Metadata for `write`: ModelSpec 1.0.0, the ss_* fields that are true here, and our own.

    ss_network_alpha is the file's, where the scale is folded in; kindling.alpha is the run's, such
    that alpha / rank is the strength.
    """
    architecture, version = KINDS.get(facts.shape, (None, None))
    if architecture is None:
        architecture = "Flux.2-custom-" + "-".join(map(str, facts.shape))
    fields = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": facts.title or facts.name,
        "modelspec.author": facts.author,
        "modelspec.description": facts.description,
        "modelspec.date": facts.created.isoformat(timespec="seconds"),
        "modelspec.resolution": f"{facts.resolution}x{facts.resolution}",
        "modelspec.trigger_phrase": facts.trigger,
        "modelspec.usage_hint": f"Trigger word: {facts.trigger}" if facts.trigger else None,
        "modelspec.license": facts.licence,
        "ss_base_model_version": version,
        "ss_network_dim": adapter.rank,
        "ss_network_alpha": adapter.rank,
        "ss_output_name": facts.name,
        "ss_sd_model_name": facts.base,
        "ss_resolution": f"({facts.resolution}, {facts.resolution})",
        "ss_steps": facts.steps,
        "ss_training_finished_at": facts.created.timestamp(),
        "ss_training_comment": facts.description,
        "kindling.version": facts.version,
        "kindling.base": facts.base,
        "kindling.base_revision": facts.base_revision,
        "kindling.config_hash": facts.config_hash,
        "kindling.data_hash": facts.data_hash,
        "kindling.steps": facts.steps,
        "kindling.kind": None if adapter.kind == "lora" else adapter.kind,
        "kindling.rank": adapter.rank,
        "kindling.alpha": adapter.alpha,
        "kindling.weights": facts.weights,
        "kindling.guidance": facts.guidance,
        "kindling.sigma_sampling": facts.sigma_sampling,
        "kindling.training_shift": facts.training_shift,
        "kindling.inference_shift": facts.inference_shift,
        "kindling.checkpoint": facts.checkpoint,
        "kindling.held_out_loss": facts.held_out_loss,
    }
    return {key: str(value) for key, value in fields.items() if value is not None}


def settings(config: Config) -> dict[str, str]:
    """The ss_* fields that are settings, and mean to kohya's readers what they mean here.

    ss_network_module is left out: no module of kohya's was used.
    """
    train, optim = config.train, config.optim
    fields = {
        "ss_seed": config.seed,
        "ss_max_train_steps": train.steps,
        "ss_batch_size_per_device": train.batch_size,
        "ss_gradient_accumulation_steps": train.accumulate,
        "ss_optimizer": optim.name,
        "ss_learning_rate": optim.lr,
        "ss_lr_scheduler": optim.schedule,
        "ss_lr_warmup_steps": optim.warmup,
        "ss_max_grad_norm": optim.max_grad_norm,
        "ss_network_dropout": config.lora.dropout,
        "ss_caption_dropout_rate": config.data.caption_dropout,
    }
    return {key: str(value) for key, value in fields.items()}


def write(
    adapter: AnyAdapter,
    path: Path,
    *,
    dtype: torch.dtype,
    metadata: dict[str, str],
    layout: str = "diffusers",
    transformer: nn.Module | None = None,
) -> None:
    """Write an adapter, with its hash and peft's settings added; by default the one file for both.

    DoRA has no file for both: the layout diffusers is for diffusers, the others are for ComfyUI and
    need the base's `transformer`, by whose row norms ComfyUI divides. An old file of that name
    stays until the new one is complete and checked. Raises CheckpointError on weights that aren't
    finite or that the layout can't hold, ConfigError where dtype can't hold them, and MachineError
    where the disk refuses.
    """
    base = None
    if adapter.kind == "dora" and layout != "diffusers":
        assert transformer is not None, "DoRA for ComfyUI needs the base's weights"
        base = transformer
        metadata = metadata | {DORA_NORMS: "base"}
    save(groups(adapter, base=base), path, layout=layout, dtype=dtype, metadata=metadata)


def groups(adapter: AnyAdapter, *, base: nn.Module | None = None) -> Iterator[tuple[str, Group]]:
    """A trained adapter's updates as `write.save` takes them, in the model's order.

    base: given, magnitudes are turned into what ComfyUI makes the same weights of.
    """
    found: dict[str, list[str]] = {}
    for module in adapter.modules:
        assert BLOCK_LINEAR.match(module), f"{module} has no place in ComfyUI's layout"
        target = layouts.find(module)
        assert target is not None
        found.setdefault(target.weight, []).append(module)
    for weight in sorted(found, key=layouts.order):
        modules = [module for module in layouts.group_of(weight) if module in found[weight]]
        group: Group = {module: adapter.update(module) for module in modules}
        for module, tensor in weights(base, modules) if base is not None else ():
            update = group[module]
            assert isinstance(update, LowRank)
            group[module] = replace(update, magnitude=comfyui.dora_scale(update, tensor))
        yield weight, group


def read(path: Path) -> Adapter:
    """The adapter in a file of `write`'s layout, fp32. Nothing is ever unpickled.

    Raises CheckpointError if the file is missing, damaged, a pickle, or of another layout.
    """
    tensors, metadata = files.load(path)
    halves: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{path}: '{key}' is no key of Kindling's layout, "
                "transformer.<module>.lora_A.weight. Convert the file first."
            )
        halves[match["half"]][match["module"]] = tensor.float()
    down, up = halves["A"], halves["B"]
    rank = _common_rank(path, down, up)
    alpha, order = _settings(path, metadata, rank)
    order = order if set(order) == set(down) else list(down)
    return Adapter({m: down[m] for m in order}, {m: up[m] for m in order}, rank, alpha)


def _common_rank(path: Path, down: dict[str, Tensor], up: dict[str, Tensor]) -> int:
    if not down and not up:
        raise CheckpointError(f"{path}: holds no adapter weights.")
    if half := sorted(down.keys() ^ up.keys()):
        missing = "lora_B" if half[0] in down else "lora_A"
        raise CheckpointError(
            f"{path}: {half[0]} has no {missing} ({len(half)} such modules). The file was cut by "
            "another program; export it again."
        )
    rank = next(iter(down.values())).shape[0]
    for module in down:
        a, b = down[module], up[module]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise CheckpointError(
                f"{path}: {module} has shapes {tuple(a.shape)} and {tuple(b.shape)}, which aren't "
                f"(rank, in) and (out, rank) at the file's rank {rank}."
            )
    return rank


def _settings(path: Path, metadata: dict[str, str], rank: int) -> tuple[float, list[str]]:
    """Alpha and module order; alpha is the rank where the file says nothing, as in diffusers."""
    try:
        settings = json.loads(metadata.get(PEFT_METADATA, "{}"))
        alpha = float(settings.get(f"{PREFIX}lora_alpha", rank))
        order = list(settings.get(f"{PREFIX}target_modules") or [])
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {PEFT_METADATA} is damaged ({error}).") from None
    foreign = ["rank_pattern", "alpha_pattern", "use_rslora", "use_dora"]
    if found := [key for key in foreign if settings.get(f"{PREFIX}{key}")]:
        raise CheckpointError(
            f"{path}: uses peft's {', '.join(found)}, which Kindling's adapters don't have."
        )
    return alpha, order
