"""The frozen transformer, put together tensor by tensor from wherever its weights are.

Owns the order: an empty model on meta, each weight from its file to the device, quantised there
before the next one comes, then to its place. So the device never holds the model in bf16, nor the
RAM more than two tensors that aren't part of the result. Where several processes have the base in
parts, a block is cut as soon as it is whole, so none of them ever holds more than one that isn't.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from train import lora
from train.encoding.cache import DIGESTS, FileDigests
from train.errors import CheckpointError, ConfigError
from train.loading import frozen, kept
from train.loading.frozen import FrozenLinear
from train.loading.weights import Files, Weight

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel

Place = Callable[[str], torch.device]
"""A parameter's name -> where it stays."""

Cut = Callable[[nn.Module], object]
"""Leaves this process its part of a module's weights. Given each block once it is whole, in the
same order on all processes, and the model after them."""

BLOCK = re.compile(r"(single_)?transformer_blocks\.\d+")


def load(
    files: Files,
    device: torch.device,
    *,
    place: Place | None = None,
    cache: Path | None = None,
    cut: Cut | None = None,
    main: bool = True,
) -> "Flux2Transformer2DModel":
    """The transformer, frozen, in evaluation mode.

    device: where weights are quantised. place: where each parameter stays; none means there too.
    cache: folder to keep a quantised copy in, and to take it from. cut: none leaves the model
    whole. main: of the processes that load together, the one that shows progress and writes the
    copy. They don't wait for each other. Raises ConfigError for weights that aren't this
    transformer's, and CheckpointError for a damaged copy of which parts may be in use already.
    """

    def assembled(tensors: Iterable[tuple[str, Tensor]]) -> "Flux2Transformer2DModel":
        return _assemble(files, tensors, place, cut, shows=main)

    if cache is None or not _is_work(files):
        return assembled(_from_source(files, device))
    folder = kept.place(cache, digest=files.digest(FileDigests(cache / DIGESTS)))
    if folder.is_dir():
        try:
            return assembled(kept.read(folder, device))
        except CheckpointError as error:
            fault = f"{folder}: this quantised copy of the base is {error}"
        kept.remove(folder)
        if cut is not None:  # other processes may be further, or have found nothing
            raise CheckpointError(f"{fault}; it is deleted. Start again: it is made anew.")
        tqdm.write(f"{fault}; it is made anew")
    tensors = _from_source(files, device)
    return assembled(_written(tensors, files, cache, folder) if main else tensors)


def _written(
    tensors: Iterable[tuple[str, Tensor]], files: Files, cache: Path, folder: Path
) -> Iterable[tuple[str, Tensor]]:
    """The same tensors, kept in a copy on their way if there is room for it."""
    kept.sweep(cache)
    size = sum(p.nbytes for p in empty(files).parameters())
    if kept.has_room(folder, size):
        return kept.writing(folder, tensors)
    tqdm.write(
        f"{cache}: no room for a quantised copy of the base ({size / 1e9:.1f} GB); "
        "each start has to quantise it again"
    )
    return tensors


def empty(files: Files) -> "Flux2Transformer2DModel":
    """The model without weights, on meta, its block Linears already of their kind."""
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel.from_config(files.settings)
    assert isinstance(model, Flux2Transformer2DModel)
    model.register_to_config(_name_or_path=str(files.config.parent))
    nn.Module.to(model, files.dtype)  # diffusers' own warns of an empty list
    if files.quantize != "none":
        for name in lora.block_linears(model):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, FrozenLinear.like(linear, files.quantize))
    return model


def _assemble(
    files: Files,
    tensors: Iterable[tuple[str, Tensor]],
    place: Place | None,
    cut: Cut | None,
    *,
    shows: bool,
) -> "Flux2Transformer2DModel":
    """Raises CheckpointError if a tensor isn't of this model, or if one is missing."""
    model = empty(files)
    slots = dict(model.named_parameters())
    lacking = Counter(_block_of(name) for name in slots)
    settings = {"desc": "load base", "unit": "tensor", "total": len(slots), "delay": 2}
    for name, tensor in tqdm(tensors, disable=not shows, **settings):
        slot = slots.pop(name, None)
        if slot is None or (slot.shape, slot.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(f"another model's ({name} doesn't fit)")
        module, _, attribute = name.rpartition(".")
        placed = tensor if place is None else tensor.to(place(name))
        parameter = nn.Parameter(placed, requires_grad=False)
        setattr(model.get_submodule(module), attribute, parameter)
        block = _block_of(name)
        lacking[block] -= 1
        if cut is not None and block and not lacking[block]:
            cut(model.get_submodule(block))
    if slots:
        raise CheckpointError(f"another model's (it has no {min(slots)})")
    model.requires_grad_(False).eval()
    if cut is not None:
        cut(model)
    return model


def _block_of(name: str) -> str:
    """The block that a parameter is in; "" for those outside."""
    found = BLOCK.match(name)
    return found[0] if found else ""


def _from_source(files: Files, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters from the base's files, on the device."""
    source = files.source()
    for name, weight in source.read_all():
        if files.quantize == "none" or not _is_block_linear(name, weight.values.shape):
            yield name, weight.to(device).dense(files.dtype)
            continue
        state = _packed(weight.to(device), files.quantize)
        for part, tensor in state.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ConfigError(f"{source.pieces[name].stored.file}: {name} isn't all numbers")
            yield f"{name.removesuffix('weight')}{part}", tensor


def _is_work(files: Files) -> bool:
    """Whether anything has to be quantised; a scaled fp8 file is in kind fp8 as it is."""
    if files.quantize != "fp8":
        return files.quantize != "none"
    pieces = files.source().pieces.items()
    linears = [piece.stored for name, piece in pieces if _is_block_linear(name, piece.stored.shape)]
    return any(stored.dtype != "F8_E4M3" for stored in linears)


def _is_block_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and lora.BLOCK_LINEAR.match(name) is not None


def _packed(weight: Weight, kind: str) -> dict[str, Tensor]:
    """A weight in a kind's state; what is stored in fp8 with scales stays as it is for kind fp8."""
    values, scale = weight.values, weight.scale
    if kind == "fp8" and values.dtype == frozen.FP8:
        ones = torch.ones(len(values), 1, device=values.device)
        scales = ones if scale is None else ones * scale
        return {"weight": values.view(torch.uint8), "scale": scales.flatten()}
    is_plain = scale is None and values.itemsize > 1
    return frozen.quantize(values if is_plain else weight.dense(torch.float32), kind)
