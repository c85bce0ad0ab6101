"""Where a transformer's weights come from: diffusers' folders, or one file as ComfyUI ships it.

Owns finding, checking and reading them, one tensor at a time. Headers are checked as a whole before
the first tensor is read: every weight is there once, in its shape, and every key has a meaning.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.encoding.cache import FileDigests, key
from train.errors import ConfigError, bullet_list
from train.loading import names
from train.loading.names import Home
from train.loading.stored import Stored, ahead, read_header

CLASS = "Flux2Transformer2DModel"
"""diffusers' name of it."""

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"

FLOATS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""What a weight may be stored in."""

PREFIX = "model.diffusion_model."
"""Before every key of some of ComfyUI's files."""

SCALES = (".weight_scale", ".scale_weight")
"""After a module's name: what its fp8 weight has to be multiplied by."""

UNUSED = (".input_scale", ".scale_input", ".comfy_quant")
"""After a module's name: how ComfyUI multiplies in fp8; no part of the weight."""

MARKER = "scaled_fp8"
"""An empty tensor in ComfyUI's older scaled files."""

FORMATS = ("float8_e4m3fn", "float8_e5m2")
"""Of ComfyUI's quantised formats, those that are read."""

FLUX1_MARKS = {"vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight"}
"""In BFL's names and in diffusers'; FLUX.2 has no pooled text."""

LORA_MARKS = (".lora_", "_lora.", ".lokr_", ".hada_", ".oft_", ".dora_scale", ".alpha")


@dataclass(frozen=True)
class Weight:
    """One of diffusers' weights as it was stored."""

    values: Tensor
    scale: Tensor | None
    """fp32, 1 or as many rows, of as many dimensions as values: what those are multiplied by."""

    def to(self, device: torch.device) -> "Weight":
        """On another device, in the stored type."""
        return Weight(self.values.to(device), None if self.scale is None else self.scale.to(device))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """As plain numbers of a type."""
        if self.scale is None:
            return self.values.to(dtype)
        return (self.values.float() * self.scale).to(dtype)


@dataclass(frozen=True)
class Piece:
    """Where one of diffusers' weights is, and what has to be done to it."""

    stored: Stored
    scale: Stored | None
    home: Home

    def read(self) -> Weight:
        """On the CPU."""
        scale = None
        if self.scale is not None:
            scale = self.scale.read().float().reshape(-1, *(1 for _ in self.stored.shape[1:]))
            if self.home.rows and len(scale) > 1:
                scale = scale[slice(*self.home.rows)]
        values = self.stored.read(self.home.rows)
        if self.home.swapped:
            values = _swapped(values)
            scale = _swapped(scale) if scale is not None and len(scale) > 1 else scale
        return Weight(values, scale)


@dataclass(frozen=True)
class Source:
    """A transformer's weights, checked to be all there."""

    pieces: dict[str, Piece]
    """By diffusers' name of the weight."""

    def read_all(self) -> Iterator[tuple[str, Weight]]:
        """Each weight by its name on the CPU, the next one being read meanwhile."""
        return ahead((name, piece.read()) for name, piece in self.pieces.items())


@dataclass(frozen=True)
class Files:
    """What a transformer is loaded from, and as what."""

    config: Path
    """The config.json of diffusers' folder."""
    folder: Path | None
    """diffusers' folder, if the weights are its."""
    file: Path | None
    """One file instead."""
    dtype: torch.dtype
    """Of all that isn't quantised."""
    quantize: str
    """none, or a kind of `frozen`."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What config.json says. Raises ConfigError if that isn't a transformer of FLUX.2."""
        try:
            settings = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"base.model: {self.config} can't be read ({error})") from None
        found = settings.get("_class_name") if isinstance(settings, dict) else None
        if found != CLASS:
            raise ConfigError(f"base.model: {self.config} is of {found or 'no class'}, not {CLASS}")
        if "quantization_config" in settings:
            raise ConfigError(
                f"base.model: {self.config.parent} is quantised already, in a format that isn't "
                "read. Take the base in bf16; base.quantize makes it smaller."
            )
        return names.DEFAULTS | settings

    def source(self) -> Source:
        """The weights, checked. Raises ConfigError for anything that isn't whole."""
        if self.file is not None:
            return open_file(self.file, self.settings)
        assert self.folder is not None
        return open_folder(self.folder, self.settings)

    def digest(self, digests: FileDigests) -> str:
        """Of all that the loaded weights depend on; reads the files once."""
        if self.file is not None:
            content = key(config=digests.file(self.config), file=digests.file(self.file))
        else:
            assert self.folder is not None
            content = digests.folder(self.folder)
        if self.quantize == "none":
            return content
        return key(content=content, quantize=self.quantize, dtype=str(self.dtype))


def open_folder(folder: Path, config: dict[str, Any]) -> Source:
    """A diffusers folder's weights, in one file or in shards with an index.

    config: what its config.json says. Raises ConfigError for anything that isn't whole.
    """
    where = f"base.model: {folder}"
    files = [folder / SINGLE]
    if (index := folder / INDEX).is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(folder / shard for shard in shards)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{where}: its {INDEX} is damaged ({error}).") from None
    stored: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files:
        more, notes = read_header(file, where=where)
        if twice := sorted(stored.keys() & more.keys()):
            raise ConfigError(f"{where}: {twice[0]} is in two of its files.")
        stored |= more
        metadata |= notes
    return Source(_pieces(where, stored, metadata, config))


def open_file(path: Path, config: dict[str, Any]) -> Source:
    """A single file's weights, in BFL's names or in diffusers'.

    config: what the config.json of the base's own transformer says; the file must be of its shape.
    Raises ConfigError for anything else than such a file.
    """
    where = f"base.transformer: {path}"
    stored, metadata = read_header(path, where=where)
    return Source(_pieces(where, stored, metadata, config))


def _pieces(
    where: str, stored: dict[str, Stored], metadata: dict[str, str], config: dict[str, Any]
) -> dict[str, Piece]:
    """Where each weight of a transformer of this config is; all keys must have a meaning."""
    original = {key.removeprefix(PREFIX): key for key in stored}
    by_key = {key: stored[full] for key, full in original.items()}
    _refuse_others(where, by_key)
    is_bfl = "img_in.weight" in by_key
    if is_bfl:
        by_key = {_bfl_norm(key): tensor for key, tensor in by_key.items()}
    _refuse_formats(where, by_key, metadata)
    shapes = names.shapes(config)
    homes = names.bfl_homes(config) if is_bfl else {name: Home(name) for name in shapes}
    scales, unused = _side_tensors(by_key)
    used = {home.key for home in homes.values()}
    unknown = by_key.keys() - used - set(scales.values()) - unused
    unknown |= {scales[key] for key in scales.keys() - used}
    missing = [f"{key} isn't there" for key in sorted(used - by_key.keys())]
    homeless = [f"{original.get(k, k)} has no place in the model" for k in sorted(unknown)]
    misfits: list[str] = []
    pieces = {}
    for name, shape in shapes.items():
        key = homes[name].key
        if key in by_key:
            scale = by_key[scales[key]] if key in scales else None
            pieces[name] = Piece(by_key[key], scale, homes[name])
            misfits += _misfits(name, shape, key, pieces[name], has_scales=bool(scales))
    turns = zip_longest(missing, homeless, misfits)  # so that the first few show all kinds
    if faults := [fault for turn in turns for fault in turn if fault]:
        title = f"{where}: not the weights of this base's transformer:"
        raise ConfigError(bullet_list(title, faults, limit=8))
    return pieces


def _misfits(
    name: str, shape: tuple[int, ...], key: str, piece: Piece, *, has_scales: bool
) -> list[str]:
    """What is wrong with a weight that is there."""
    stored, scale, rows = piece.stored, piece.scale, piece.home.rows
    found = stored.shape
    if rows:
        whole = 3 * shape[0]  # BFL's only fused weights are q, k and v
        shape = (whole, *shape[1:])
    if found != shape:
        return [f"{key} is {_size(found)}; {name.removesuffix('.weight')} needs {_size(shape)}"]
    if stored.dtype not in FLOATS:
        return [f"{key} is stored as {stored.dtype}, which isn't read"]
    if scale is not None and prod(scale.shape) not in (1, found[0]):
        return [f"{key} is {_size(found)} and its scale {_size(scale.shape)}"]
    if scale is not None and scale.dtype not in FLOATS:
        return [f"the scale of {key} is stored as {scale.dtype}, which isn't read"]
    if scale is None and has_scales and stored.dtype.startswith("F8"):
        return [f"{key} is in fp8 and has no scale, though others have"]
    return []


def _side_tensors(by_key: dict[str, Stored]) -> tuple[dict[str, str], set[str]]:
    """Weight -> its scale's key; and the keys that mean nothing here."""
    scales = {
        f"{key.removesuffix(end)}.weight": key
        for key in by_key
        for end in SCALES
        if key.endswith(end)
    }
    unused = {key for key in by_key if key == MARKER or key.endswith(UNUSED)}
    return scales, unused


def _refuse_others(where: str, by_key: dict[str, Stored]) -> None:
    """Raise ConfigError for what people give by mistake."""
    lora = [key for key in by_key if any(mark in key for mark in LORA_MARKS)]
    if lora:
        raise ConfigError(
            f"{where}: this is an adapter, not a base (it has {lora[0]}). Give the base here; "
            "an adapter is made by training."
        )
    if flux1 := FLUX1_MARKS & by_key.keys():
        raise ConfigError(f"{where}: this is FLUX.1 (it has {min(flux1)}); give FLUX.2's file.")
    if not {"img_in.weight", "x_embedder.weight"} & by_key.keys():
        example = min(by_key, default="nothing")
        raise ConfigError(
            f"{where}: this isn't a transformer of FLUX.2: it has neither img_in.weight (BFL's "
            f"and ComfyUI's naming) nor x_embedder.weight (diffusers'), but {example}."
        )


def _refuse_formats(where: str, by_key: dict[str, Stored], metadata: dict[str, str]) -> None:
    """Raise ConfigError for weights in formats that ComfyUI reads and Kindling doesn't."""
    try:
        notes = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        for key, tensor in by_key.items():
            if key.endswith(".comfy_quant"):
                notes[key] = json.loads(bytes(tensor.read().tolist()))
        formats = {layer: note["format"] for layer, note in notes.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: its notes on quantisation are damaged ({error})") from None
    other = [f"{layer} is in {name}" for layer, name in formats.items() if name not in FORMATS]
    if other:
        raise ConfigError(
            f"{where}: {other[0]}, which isn't read. Take the bf16 or the scaled fp8 file; "
            "base.quantize makes it smaller."
        )


def _bfl_norm(key: str) -> str:
    """Newer files of ComfyUI say .weight where BFL's say .scale."""
    stem = key.removesuffix(".weight")
    return f"{stem}.scale" if stem.endswith(("query_norm", "key_norm")) else key


def _swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
