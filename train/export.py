"""The adapter file that users load: one safetensors file that diffusers and ComfyUI both apply at
strength 1.

Owns its names, its numbers, its metadata and writing it whole or not at all. Doesn't own other
layouts, proof that it loads (`certify`) or checkpoints. A file is never changed in place.

ComfyUI doesn't read safetensors metadata, diffusers refuses `.alpha` tensors: so neither can be
told a strength, and alpha / rank is folded into lora_B.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.errors import CheckpointError, ConfigError, MachineError
from train.lora import BLOCK_LINEAR, Adapter

PREFIX = "transformer."
KEY = re.compile(r"transformer\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
PEFT_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings, as JSON with the component's name before each key."""

KINDS = {
    (6144, 8, 48): ("Flux.2-dev", "flux_2_dev"),
    (3072, 5, 20): ("Flux.2-klein-4b", "flux_2_klein_4b"),
    (4096, 8, 24): ("Flux.2-klein-9b", "flux_2_klein_9b"),
}
"""Width, double and single blocks -> names as SwarmUI and musubi-tuner have them: ModelSpec's
architecture (they add "/lora") and ss_base_model_version."""

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

MAX_ROUNDING_LOSS = 0.01
"""Of a tensor's norm. bf16 loses at most 0.4 %; fp16 loses more only where weights are too small
for it."""


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


def describe(facts: Facts, adapter: Adapter) -> dict[str, str]:
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


def write(adapter: Adapter, path: Path, *, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write the one file that serves both loaders, with its hash and peft's settings added.

    An old file of that name stays until the new one is complete and checked. Raises
    CheckpointError on weights that aren't finite, ConfigError where dtype can't hold them, and
    MachineError where the disk refuses.
    """
    tensors = _tensors(adapter, dtype)
    digest = _digest(tensors)
    header = metadata | {
        "format": "pt",
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        PEFT_METADATA: _peft_settings(adapter),
    }
    with replacing(path) as partial:
        _save(tensors, partial, header)
        if body_hash(partial) != digest:
            raise MachineError(f"{path}: the disk gave back other bytes than it was given.")


def read(path: Path) -> Adapter:
    """The adapter in a file of `write`'s layout, fp32. Nothing is ever unpickled.

    Raises CheckpointError if the file is missing, damaged, a pickle, or of another layout.
    """
    tensors, metadata = load(path)
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


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and metadata of any safetensors file. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        with path.open("rb") as file:
            start = file.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise CheckpointError(
                f"{path}: this is a pickle under a safetensors name. It isn't opened, since "
                "unpickling runs whatever code it holds. Get it as safetensors."
            ) from None
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}). It is cut off or damaged; "
            "copy, download or export it again."
        ) from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise CheckpointError(
                f"{path}: '{key}' holds values that aren't finite. Export an earlier checkpoint."
            )
    return tensors, metadata


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends well, and vanishes otherwise."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except (SafetensorError, OSError) as error:
        raise MachineError(
            f"{path}: can't be written ({error}). Check the folder's rights and the free disk "
            "space; a file of that name, if there was one, is unharmed."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def body_hash(path: Path) -> str:
    """SHA-256 of all tensor bytes of a safetensors file, its header left out."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _tensors(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    assert adapter.down.keys() == adapter.up.keys()
    tensors = {}
    for module, down in adapter.down.items():
        assert BLOCK_LINEAR.match(module), f"{module} has no place in ComfyUI's layout"
        folded = adapter.up[module].float() * adapter.scale
        tensors[f"{PREFIX}{module}.lora_A.weight"] = _rounded(down.float(), dtype, module)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = _rounded(folded, dtype, module)
    return tensors


def _rounded(weight: Tensor, dtype: torch.dtype, module: str) -> Tensor:
    if not torch.isfinite(weight).all():
        raise CheckpointError(
            f"The adapter's weights of {module} aren't finite: the training diverged before this "
            "point. Export an earlier checkpoint, and train on with a lower optim.lr."
        )
    result = weight.to("cpu", dtype).contiguous()
    loss = torch.linalg.vector_norm(result.float() - weight.cpu())
    if not loss <= MAX_ROUNDING_LOSS * torch.linalg.vector_norm(weight.cpu()):
        raise ConfigError(
            f"export.dtype: the weights of {module} are too large or too small for "
            f"{str(dtype).removeprefix('torch.')}. Export as bf16 or fp32."
        )
    return result


def _digest(tensors: dict[str, Tensor]) -> str:
    """`body_hash` of the file to be."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """The safetensors format, in order of names: its own writer shuffles the metadata, so that
    the same adapter would give another file each time."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in sorted(tensors):
        tensor, start = tensors[name], end
        end += tensor.nbytes
        kind = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = kind | {"data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(_bytes(tensors[name]))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _peft_settings(adapter: Adapter) -> str:
    """peft's LoraConfig as diffusers reads it; without the keys that older peft wouldn't know."""
    settings: dict[str, Any] = {
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(adapter.down),
    }
    return json.dumps({f"{PREFIX}{k}": v for k, v in settings.items()}, indent=2, sort_keys=True)


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


def _sync(path: Path) -> None:
    """Force a file or a folder's names to the disk; folders can't be opened on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
