"""What each loader does with every key of an adapter file.

diffusers is asked itself: its real loader loads the file into a skeleton of the base, and what lies
in the layers afterwards is compared with what the file means. ComfyUI is read by `comfyui`. What a
file means: up @ down at its alpha tensors, else at the strength that its metadata state, else at 1.
Owns these verdicts; what else there is to say of a file is `examine`'s.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import logging
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from train.adapters import comfyui, layouts, updates
from train.adapters.source import Source, Unit
from train.adapters.updates import (
    Factors,
    Kronecker,
    LowRank,
    Update,
    inner,
    kronecker_distance,
)
from train.loading.names import SWAPPED, Place, Shape, diffusers_places

NAME = "examined"

TYPE = torch.float32
"""Of the sums behind a verdict: they lose 1e-6, which no verdict turns on."""

EXACT = 0.01
"""Relative difference up to which an update counts as the one that was meant: a rounding of both
halves to bf16 makes 0.5 % at most."""

USED, IGNORED, WRONG = "used", "ignored", "used at another strength"
SPARE = "not needed here"
DIFFERS, FAILS, UNKNOWN = "used, but gives another update", "fails", "used, not compared"


Meant = dict[str, dict[str, Update] | Kronecker]
"""Name of a unit -> its updates by diffusers' module; or the whole Kronecker product where it is
over several modules."""


@dataclass(frozen=True)
class Found:
    """What a loader made of one unit."""

    status: str
    strength: float | None = None
    product: float = 0.0
    """Of the meant and the found update: with `norm`, for the strength of the whole file."""
    norm: float = 0.0
    """Squared, of the meant update."""


def meant_by(source: Source, shape: Shape) -> Meant:
    """What a file means, by the name of each unit."""
    return {unit.name: _meant(source, unit, shape) for unit in source.units.values()}


def _meant(source: Source, unit: Unit, shape: Shape) -> dict[str, Update] | Kronecker:
    """By diffusers' module; the whole Kronecker product where it is over several of them."""
    update = source.whole(unit)
    if isinstance(update, Kronecker) and len(unit.target.modules) > 1:
        return update
    return source.unit(unit, shape)


def fuses_lokr(source: Source) -> bool:
    """Whether diffusers will fuse q, k and v for this file, which copies their weights: it needs a
    skeleton on meta."""
    return any(len(u.target.modules) > 1 and "up" not in u.keys for u in source.units.values())


def ask_diffusers(source: Source, meant: Meant, pipeline: Any) -> dict[str, Any]:
    """diffusers' verdict; the file stays loaded in the pipeline."""
    path = source.path
    if _never_ends(source):
        reason = "its loader never ends on an alpha below zero"
        return _verdict(source, {}, dict.fromkeys(source.file.tensors, FAILS), [reason])
    try:
        with _quiet():
            pipeline.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=NAME, use_safetensors=True
            )
    except Exception as error:  # a foreign loader may fail in any way; each is a verdict
        text = " ".join(str(error).split())
        short = text if len(text) < 300 else text[:300] + " …"
        reason = f"its loader refuses the file: {type(error).__name__}: {short}"
        return _verdict(source, {}, dict.fromkeys(source.file.tensors, FAILS), [reason])
    layers = {
        name: module
        for name, module in pipeline.transformer.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    found, keys = {}, dict.fromkeys(source.unknown, IGNORED)
    for unit in source.units.values():
        found[unit.name] = _loaded(unit, meant[unit.name], layers)
    keys |= _spare(source, "dora_scale", "magnitude")
    reasons = []
    lora = [layer for layer in layers.values() if isinstance(layer, LoraLayer)]
    if source.is_dora and not any(layer.use_dora.get(NAME) for layer in lora):
        reasons.append("DoRA's magnitudes are dropped: it loads a plain LoRA, another adapter")
    strangers = sorted(set(layers) - {m for u in source.units.values() for m in _places(u)})
    if strangers:
        reasons.append(f"{strangers[0]} gets random weights: half of its update is missing")
    return _verdict(source, found, keys, reasons)


def _never_ends(source: Source) -> bool:
    """diffusers doubles alpha / rank until it is no longer small, in files with lora_down."""
    down = any(key.end == ".lora_down.weight" for key in source.keys)
    alphas = map(source.alpha, source.units.values()) if down else ()
    return any(alpha is not None and alpha < 0 for alpha in alphas)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' and peft's own words on what the verdict says: peft lists every module."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _spare(source: Source, part: str, other: str) -> dict[str, str]:
    """Keys of one of DoRA's magnitudes that a loader doesn't read, having the other."""
    units = [unit for unit in source.units.values() if part in unit.keys]
    return {unit.keys[part]: SPARE if other in unit.keys else IGNORED for unit in units}


def _places(unit: Unit) -> tuple[str, ...]:
    """The modules of diffusers that a unit ends up in."""
    fused = layouts.fused_name(unit.target)
    return (*unit.target.modules, *([fused] if fused else []))


def _loaded(
    unit: Unit, meant: dict[str, Update] | Kronecker, layers: dict[str, BaseTunerLayer]
) -> Found:
    if isinstance(meant, Kronecker):
        return Found(UNKNOWN if layouts.fused_name(unit.target) in layers else IGNORED)
    assert isinstance(meant, dict)
    pairs = []
    for module, update in meant.items():
        layer = layers.get(module)
        if layer is None:
            return Found(IGNORED)
        if isinstance(update, Kronecker):
            return _lokr_loaded(update, layer)
        if not isinstance(layer, LoraLayer) or NAME not in layer.lora_A:
            return Found(IGNORED)
        halves: list[Any] = [layer.lora_B[NAME].weight, layer.lora_A[NAME].weight]
        if any(half.is_meta for half in halves):
            return Found(FAILS)
        loaded = LowRank(halves[0].detach(), halves[1].detach(), layer.scaling[NAME])
        pairs.append((update.factors(TYPE), loaded.factors(TYPE)))
    return _compared(pairs)


def _lokr_loaded(meant: Kronecker, layer: BaseTunerLayer) -> Found:
    if not isinstance(layer, LoKrLayer):
        return Found(IGNORED)
    parts = {
        end: getattr(layer, f"lokr_{end}")[NAME].detach()
        for end in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
        if NAME in getattr(layer, f"lokr_{end}")
    }
    if any(part.is_meta for part in parts.values()):
        return Found(FAILS)
    left, right = (
        parts[side] if side in parts else parts[f"{side}_a"] @ parts[f"{side}_b"]
        for side in ("w1", "w2")
    )
    return _kronecker_compared(meant, Kronecker(left, right, layer.scaling[NAME]))


def _kronecker_compared(meant: Kronecker, found: Kronecker) -> Found:
    """As `_compared`, by the sides."""
    if meant.left.shape != found.left.shape:
        return Found(DIFFERS)
    size = updates.norm(meant) ** 2
    products = (
        torch.sum(one.double() * two.double()).item()
        for one, two in ((meant.left, found.left), (meant.right, found.right))
    )
    product = meant.scale * found.scale * math.prod(products)
    if not math.isfinite(size + product):
        return Found(UNKNOWN)
    if not size:
        return Found(USED if not updates.norm(found) else DIFFERS)
    strength = product / size
    rest = kronecker_distance(replace(meant, scale=strength * meant.scale), found)
    if rest > EXACT * max(abs(strength), 1.0) * size**0.5:
        return Found(DIFFERS, strength, product, size)
    return _strength(strength, size)


def ask_comfyui(source: Source, meant: Meant, shape: Shape) -> dict[str, Any]:
    """ComfyUI's verdict, as `comfyui` reads it."""
    tensors = {key: source.file.get(key) for key in source.file.tensors}
    reading = comfyui.read(tensors, shape)
    places = diffusers_places(shape)
    lost = {*reading.ignored, *reading.failed}
    found: dict[str, Found] = {}
    for unit in source.units.values():
        update = meant[unit.name]
        halves = [key for part, key in unit.keys.items() if part in layouts.FACTORS]
        if lost.intersection(halves):
            failed = set(reading.failed).intersection(halves)
            found[unit.name] = Found(FAILS if failed else IGNORED)
        elif isinstance(update, Kronecker) or any(
            isinstance(part, Kronecker) for part in update.values()
        ):
            found[unit.name] = _kronecker_found(source.whole(unit), unit, reading, places)
        else:
            pairs = [
                (part.factors(TYPE), _patched(module, unit, reading, places))
                for module, part in update.items()
                if isinstance(part, LowRank)
            ]
            found[unit.name] = _compared(pairs)
    keys = dict.fromkeys(reading.ignored, IGNORED) | dict.fromkeys(reading.failed, FAILS)
    keys |= dict.fromkeys(reading.not_computed, UNKNOWN)
    keys |= _spare(source, "magnitude", "dora_scale")
    reasons = []
    scales = [key for key in reading.used if key.endswith(".dora_scale")]
    if scales and not source.for_comfyui:
        keys |= dict.fromkeys(scales, UNKNOWN)
        reasons.append(
            "it divides DoRA's magnitudes by the norms of the base's rows, not of the changed "
            "weight's: near to what is meant, not equal"
        )
    if reading.refusal:
        reasons.append(f"its loader stops: {reading.refusal}")
        found = {name: Found(FAILS) for name in found}
    if any(keys.get(unit.keys.get("magnitude", "")) == IGNORED for unit in source.units.values()):
        reasons.append("DoRA's magnitudes are ignored: it loads a plain LoRA, another adapter")
    return _verdict(source, found, keys, reasons)


def _patched(
    module: str, unit: Unit, reading: comfyui.Reading, places: dict[str, Place]
) -> Factors:
    """What ComfyUI adds to a module's weight, in diffusers' order of rows."""
    if module in places:
        return reading.factors(places[module], TYPE)
    (place,) = [at for at in reading.patches if at.weight == f"{unit.target.weight}.weight"]
    up, down = reading.factors(place, TYPE)
    if module == SWAPPED:
        up = torch.cat([up[len(up) // 2 :], up[: len(up) // 2]])
    return up, down


def _kronecker_found(
    meant: Update, unit: Unit, reading: comfyui.Reading, places: dict[str, Place]
) -> Found:
    spans = [places[module] for module in unit.target.modules if module in places]
    patch = next(
        (p for at, p in reading.patches.items() if any(at.overlap(s) for s in spans)), None
    )
    if not isinstance(patch, Kronecker) or not isinstance(meant, Kronecker):
        return Found(IGNORED)
    return _kronecker_compared(meant, patch)


def _compared(pairs: list[tuple[Factors, Factors]]) -> Found:
    """Meant against found: strength by least squares, and whether that explains everything."""
    norm = product = square = 0.0
    for meant, found in pairs:
        norm += inner(meant, meant)
        product += inner(meant, found)
        square += inner(found, found)
    if not math.isfinite(norm + product + square):
        return Found(UNKNOWN)
    if not norm:
        return Found(USED if not square else DIFFERS)
    strength = product / norm
    rest = max(square - 2 * strength * product + strength**2 * norm, 0.0) ** 0.5
    if not square:
        return Found(IGNORED, 0.0, 0.0, norm)
    if rest > EXACT * max(abs(strength), 1.0) * norm**0.5:
        return Found(DIFFERS, strength, product, norm)
    return _strength(strength, norm)


def _strength(strength: float, norm: float) -> Found:
    status = USED if abs(strength - 1.0) <= EXACT else WRONG
    return Found(status, strength, strength * norm, norm)


def _verdict(
    source: Source, found: dict[str, Found], keys: dict[str, str], reasons: list[str]
) -> dict[str, Any]:
    """One loader's: whether it loads, at which strength, and what becomes of every key.

    keys: what is known of single keys; the others go as their unit does.
    """
    for key in source.file.tensors:
        name = source.key_of.get(key)
        unit = found.get(name) if name else None
        keys.setdefault(key, unit.status if unit else FAILS if name in source.broken else IGNORED)
    counts = Counter(keys.values())
    product = sum(f.product for f in found.values())
    norm = sum(f.norm for f in found.values())
    strength = round(product / norm, 3) if norm else None
    loads = any(f.status in (USED, WRONG, DIFFERS, UNKNOWN) for f in found.values())
    for status in (IGNORED, FAILS, WRONG, DIFFERS):
        wrong = [key for key, value in keys.items() if value == status]
        if wrong and not (reasons and status == FAILS):
            reasons.append(f"{status}: {len(wrong)} keys, such as {wrong[0]}")
    every = {f.strength for f in found.values() if f.status == WRONG and f.strength}
    exact = loads and not reasons
    return {
        "loads": loads,
        "exact": exact,
        "strength": strength if loads else None,
        "advice": _advice(loads, strength, every, counts),
        "reasons": reasons,
        "counts": dict(counts),
        "keys": keys,
    }


def _advice(
    loads: bool, strength: float | None, every: set[float], counts: Counter[str]
) -> str | None:
    """What to set in the loader, where that mends it."""
    if loads and strength and every and not counts[DIFFERS] and not counts[USED]:
        if max(every) - min(every) <= EXACT * max(map(abs, every)):
            return f"set its strength to {1 / strength:.4g} to get the strength it was trained at"
        return "its modules come at different strengths; convert it with `kindling convert`"
    return None
