"""Proof that an exported file does what the trained adapter does, in diffusers and in ComfyUI.

diffusers is asked itself: its real loader loads the file into a real pipeline, the loaded weights
and the transformer's output are compared with the trained adapter's. ComfyUI is read by `comfyui`.
Owns the comparison, its bounds and the certificate; makes no file of its own but that.

On each module's update and magnitudes the bounds are `bounds`', and proven. The output isn't linear
in the updates; its bound is argued, not proven: 8 u of the adapter's effect (two rounded factors;
fourfold for updates that partly cancel in the output), three times the measured noise of computing
the adapter in the transformer's type, one roundoff of that type and 16 of fp32.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.linalg import vector_norm

from train import lora, parallel
from train.adapters import comfyui, files
from train.adapters.bounds import FP32, Roundoff, compare, compare_magnitudes, wide
from train.adapters.intent import PREFIX
from train.adapters.source import Source
from train.adapters.updates import Kronecker, LowRank, Update
from train.config import LoraConfig
from train.loading import frozen
from train.loading.names import Shape, diffusers_places
from train.lora import Adapter, AnyAdapter, LokrAdapter
from train.lora.adapter import changes_nothing
from train.lora.base import weights as base_weights

LOADED = "certified"
LOADERS = ("diffusers", "comfyui")
TITLES = {"diffusers": "diffusers", "comfyui": "ComfyUI"}
PACKAGES = ("kindling", "diffusers", "peft", "torch", "safetensors")


@dataclass(frozen=True)
class Case:
    """A file, what it holds, and what it should hold."""

    path: Path
    source: Source
    tensors: dict[str, Tensor]
    roundoff: Roundoff
    adapter: AnyAdapter


def certify(
    path: Path, *, adapter: AnyAdapter, pipeline: Any, loaders: tuple[str, ...] = LOADERS
) -> dict[str, Any]:
    """A JSON-able certificate of one exported file.

    adapter: as trained. loaders: those that the file is for; what the others make of it is said,
    too, but isn't asked to be right. pipeline: a Flux2Pipeline or Flux2KleinPipeline around the
    frozen base transformer, without adapters; its other parts may be None. Everything runs on the
    transformer's device and in its type; the transformer is handed back as it was. `passed` is
    false, with plain reasons, if a loader ignores a key, applies another strength or gives another
    output. Raises CheckpointError if the file can't be read at all.
    """
    transformer = pipeline.transformer
    assert not _layers(transformer), "the transformer already has an adapter"
    tensors, _ = files.load(path)
    shape = Shape.of(transformer)
    floats = [t.dtype for t in tensors.values() if t.is_floating_point()] or [torch.float32]
    file_type = max(floats, key=lambda dtype: torch.finfo(dtype).eps)
    reasons = ["the adapter changes nothing"] if changes_nothing(adapter) else []
    case = Case(path, Source(path), tensors, Roundoff.of(file_type) + FP32, adapter)
    verdicts = {
        "diffusers": _ask_diffusers(case, pipeline),
        "comfyui": _ask_comfyui(case, shape, transformer),
    }
    for loader in loaders:
        reasons += [f"{TITLES[loader]}: {reason}" for reason in verdicts[loader]["reasons"]]
    return {
        "passed": not reasons,
        "reasons": reasons,
        "for": list(loaders),
        "file": {
            "name": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
            "tensors": len(tensors),
            "dtype": str(file_type),
        },
        "adapter": {
            "kind": adapter.kind,
            "modules": len(adapter.modules),
            "rank": adapter.rank,
            "alpha": adapter.alpha,
        },
        "transformer": dataclasses.asdict(shape)
        | {"dtype": str(transformer.dtype), "quantize": frozen.kind_of(transformer)},
        "device": transformer.device.type,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        **verdicts,
    }


def write_certificate(certificate: dict[str, Any], path: Path) -> Path:
    """Put a certificate beside its adapter file, whole or not at all, and return its path."""
    target = path.with_name(f"{path.stem}.certificate.json")
    with files.replacing(target) as partial:
        text = json.dumps(certificate, indent=2, ensure_ascii=False, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
    return target


def loaded_update(transformer: nn.Module, module: str) -> Update:
    """What the adapters now in a transformer do to one module's weight at strength 1, fp64.

    LoRA's ranks add up, 0 where there is none; of LoKr and DoRA there is one at most.
    """
    layer: Any = transformer.get_submodule(module)
    if isinstance(layer, LoKrLayer):
        sides = {
            end: wide(getattr(layer, f"lokr_{end}")[LOADED])
            for end in ("w1", "w2", "w2_a", "w2_b")
            if LOADED in getattr(layer, f"lokr_{end}")
        }
        right = sides["w2"] if "w2" in sides else sides["w2_a"] @ sides["w2_b"]
        return Kronecker(sides["w1"], right, layer.scaling[LOADED])
    linear: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    ups = [torch.zeros(linear.out_features, 0, dtype=torch.float64)]
    downs = [torch.zeros(0, linear.in_features, dtype=torch.float64)]
    magnitude = None
    for name in layer.lora_A if isinstance(layer, LoraLayer) else ():
        up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
        if not (up.is_meta or down.is_meta):
            ups.append(layer.scaling[name] * wide(up))
            downs.append(wide(down))
        if name in layer.lora_magnitude_vector:
            size = layer.lora_magnitude_vector[name].weight
            magnitude = None if size.is_meta else wide(size)
    return LowRank(torch.cat(ups, dim=1), torch.cat(downs), 1.0, magnitude)


def _ask_comfyui(case: Case, shape: Shape, transformer: nn.Module) -> dict[str, Any]:
    reading = comfyui.read(case.tensors, shape)
    places = diffusers_places(shape)
    changed = [m for m, place in places.items() if any(at.overlap(place) for at in reading.patches)]

    def found(module: str) -> Update:
        place = places[module]
        patch = reading.patches.get(place)
        if isinstance(patch, Kronecker):
            return patch
        return LowRank(*reading.factors(place), 1.0, reading.magnitude(place))

    compared = compare(case.adapter, found, case.roundoff)
    if case.adapter.kind == "dora":
        wanted = {
            module: comfyui.dora_scale(update, weight)
            for module, weight in base_weights(transformer, case.adapter.modules)
            if isinstance(update := case.adapter.update(module), LowRank)
        }
        compared |= compare_magnitudes(wanted, found, FP32 + FP32)
    ignored = reading.ignored + reading.failed + reading.not_computed
    return _verdict(case.adapter, reading.used, ignored, changed, compared)


def _ask_diffusers(case: Case, pipeline: Any) -> dict[str, Any]:
    transformer = pipeline.transformer
    batch = _batch(transformer)
    with _borrowed(transformer) as is_unchanged, torch.no_grad():
        base = _output(transformer, batch)
        trained, noise = _trained_output(transformer, case.adapter, batch)
        verdict = _load(case, pipeline)
        if verdict["loads"]:
            output = _output(transformer, batch)
            own = Roundoff.of(transformer.dtype)
            verdict["output"] = _compare_output(base, trained, output, noise, case.roundoff, own)
        transformer.unload_lora()
        verdict["restored"] = is_unchanged() and torch.equal(base, _output(transformer, batch))
    if "output" in verdict and not verdict["output"]["within_bound"]:
        verdict["reasons"].append("the output is further off than rounding explains")
    if not verdict["restored"]:
        verdict["reasons"].append("the transformer isn't the same after unloading")
    return verdict


def _trained_output(
    transformer: Any, adapter: AnyAdapter, batch: dict[str, Tensor]
) -> tuple[Tensor, float]:
    """The output with the adapter as trained, and how far it moves in the transformer's type."""
    modules = tuple(map(re.escape, adapter.modules))
    config = LoraConfig(kind=adapter.kind, targets=modules, rank=adapter.rank, alpha=adapter.alpha)
    if isinstance(adapter, LokrAdapter):
        config = config.model_copy(update={"factor": adapter.factor})
    lora.attach(transformer, config, seed=0)
    lora.write(transformer, adapter)
    trained = _output(transformer, batch)
    for parameter in lora.trainable(transformer):
        parameter.data = parameter.data.to(transformer.dtype)
    noise = vector_norm(_output(transformer, batch) - trained).item()
    transformer.unload_lora()
    return trained, noise


def _load(case: Case, pipeline: Any) -> dict[str, Any]:
    """diffusers' verdict on keys and weights; the file stays loaded."""
    transformer, path, tensors = pipeline.transformer, case.path, case.tensors
    verdict: dict[str, Any] = {"pipeline": type(pipeline).__name__}
    try:
        pipeline.load_lora_weights(
            str(path.parent), weight_name=path.name, adapter_name=LOADED, use_safetensors=True
        )
    except Exception as error:  # a foreign loader may fail in any way; each is a verdict
        reason = f"its loader refuses the file: {type(error).__name__}: {error}"
        verdict |= {"loads": False, "keys_used": 0, "keys_ignored": list(tensors)}
        return verdict | {"strength": None, "reasons": [reason]}
    layers = _layers(transformer)
    lacking = {
        f"{PREFIX}{module}.{name.replace(f'.{LOADED}', '')}": module
        for module, layer in layers.items()
        for name, parameter in layer.named_parameters()
        if f".{LOADED}" in name and parameter.is_meta
    }
    filled = layers.keys() - set(lacking.values())
    used = [key for key in tensors if (at := _modules(case.source, key)) and filled.issuperset(at)]
    ignored = [key for key in tensors if key not in used]
    roundoff = case.roundoff + Roundoff.of(transformer.dtype)
    compared = compare(case.adapter, lambda m: loaded_update(transformer, m), roundoff)
    if isinstance(case.adapter, Adapter) and case.adapter.magnitude is not None:
        own = FP32 + Roundoff.of(transformer.dtype)
        found = partial(loaded_update, transformer)
        compared |= compare_magnitudes(case.adapter.magnitude, found, own)
    verdict |= _verdict(case.adapter, used, ignored, list(layers), compared)
    if lacking:
        verdict["loads"] = False
        verdict["reasons"].append(f"{min(lacking)} isn't in the file and gets random weights")
    return verdict


def _verdict(
    adapter: AnyAdapter, used: list[str], ignored: list[str], changed: list[str], weights: dict
) -> dict[str, Any]:
    reasons = []
    if not used:
        reasons.append("it loads nothing from the file: it knows none of the names")
    elif ignored:
        reasons.append(f"it ignores {len(ignored)} keys, such as {ignored[0]}")
    if strangers := sorted(set(changed) - set(adapter.modules)):
        reasons.append(f"the file changes {strangers[0]}, which the adapter doesn't")
    if absent := sorted(set(adapter.modules) - set(changed)):
        reasons.append(f"{len(absent)} of the adapter's modules are left out, such as {absent[0]}")
    if used and not weights["within_bound"]:
        worst = weights["worst"]
        reasons.append(
            f"the update of {worst['module']} is off by {worst['error']:.2g} of its size "
            f"(rounding explains {worst['bound']:.2g}); "
            f"the adapter as a whole is applied at strength {weights['strength']}"
        )
    magnitudes = weights.get("magnitudes")
    if used and magnitudes and not magnitudes["within_bound"]:
        reasons.append(f"DoRA's magnitudes of {magnitudes['module']} {magnitudes['fault']}")
    keys = {"loads": bool(used), "keys_used": len(used), "keys_ignored": ignored}
    return keys | weights | {"reasons": reasons}


def _compare_output(
    base: Tensor, trained: Tensor, loaded: Tensor, noise: float, file: Roundoff, own: Roundoff
) -> dict[str, Any]:
    """Norms relative to the base's output; conclusive if half the strength would be seen."""
    size = vector_norm(base).item()
    effect = vector_norm(trained - base).item() / size
    error = vector_norm(loaded - trained).item() / size
    bound = 8 * file.unit * effect + 3 * noise / size + own.unit + 16 * FP32.unit
    numbers = {"effect": effect, "error": error, "bound": bound}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return finite | {"within_bound": error <= bound, "conclusive": effect > 2 * bound}


def _batch(transformer: Any) -> dict[str, Tensor]:
    """Random, valid input at sigma 0.5: 4x4 image tokens and 8 text tokens."""
    config, draw = transformer.config, torch.Generator().manual_seed(0)
    zero, side, text = torch.arange(1), torch.arange(4), torch.arange(8)
    batch = {
        "hidden_states": torch.randn(1, 16, config["in_channels"], generator=draw),
        "encoder_hidden_states": torch.randn(1, 8, config["joint_attention_dim"], generator=draw),
        "timestep": torch.tensor([0.5]),
    }
    if config["guidance_embeds"]:
        batch["guidance"] = torch.tensor([1.0])
    ids = {
        "img_ids": torch.cartesian_prod(zero, side, side, zero)[None],
        "txt_ids": torch.cartesian_prod(zero, zero, zero, text)[None],
    }
    placed = {k: v.to(transformer.device, transformer.dtype) for k, v in batch.items()}
    return placed | {k: v.to(transformer.device) for k, v in ids.items()}


def _output(transformer: Any, batch: dict[str, Tensor]) -> Tensor:
    return transformer(**batch, return_dict=False)[0].double().cpu()


@contextmanager
def _borrowed(transformer: Any) -> Iterator[Callable[[], bool]]:
    """The transformer in evaluation mode, handed back as it was: adapters, flags and mode."""
    training = transformer.training
    flags = {name: p.requires_grad for name, p in transformer.named_parameters()}
    before = _fingerprints(transformer)
    transformer.eval()
    try:
        yield lambda: _fingerprints(transformer) == before
    finally:
        if _layers(transformer):
            transformer.unload_lora()
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(flags[name])
        transformer.train(training)


def _fingerprints(transformer: nn.Module) -> dict[str, tuple[torch.dtype, int]]:
    """Of every weight's bits: a change of any one bit changes them. Of a base in parts, its own."""
    return {
        name: (tensor.dtype, int(torch.hash_tensor(parallel.own_part(tensor).detach()).item()))
        for name, tensor in transformer.state_dict(keep_vars=True).items()
    }


def _layers(transformer: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}


def _modules(source: Source, key: str) -> tuple[str, ...]:
    """diffusers' modules that a key of a file is for."""
    unit = source.units.get(source.key_of.get(key, ""))
    return unit.target.modules if unit else ()
