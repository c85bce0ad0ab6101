"""How the embedding of a prompt lies in the cache: without the pad rows that all prompts share.

Owns the layout of a text entry, not how embeddings are made. An entry has the rows of one prompt
(`text`, or `codes` and `scales` in 8 bits) and may name a block of pad rows that stand before
them. A block is named by its own bits, so an entry can only ever be read with the very rows that
its own were compared with.

Shape suffixes: L tokens with pads, n rows of the entry's own, P rows of pads, J width.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from train.encoding.cache import REMEDY, Cache, key
from train.errors import CheckpointError

SCALED = 128
"""Neighbouring numbers of a row that share a scale in 8 bits; fewer where J isn't a multiple."""


@dataclass(frozen=True)
class Pads:
    """A block of pad rows in the cache."""

    name: str
    rows_PJ: Tensor


def put_pads(cache: Cache, rows_PJ: Tensor) -> Pads:
    """Store pad rows, unless these very bits are there already."""
    digest = hashlib.sha256(_bits(rows_PJ).numpy().data).hexdigest()
    pads = Pads(key(kind="pads", shape=tuple(rows_PJ.shape), bits=digest), rows_PJ)
    if pads.name not in cache:
        cache.put(pads.name, {"pads": rows_PJ}, notes={})
    return pads


def begins_with(text_LJ: Tensor, pads: Pads, *, count: int, at: int = 0) -> bool:
    """Whether its first `count` rows are, to the bit, those of the block from row `at` on."""
    return torch.equal(_bits(text_LJ[:count]), _bits(pads.rows_PJ[at : at + count]))


def put(
    cache: Cache,
    name: str,
    rows_nJ: Tensor,
    *,
    length: int,
    pads: Pads | None,
    eight_bits: bool,
    notes: dict[str, str],
) -> None:
    """Store the rows of an embedding of `length`; those that lack are the first of `pads`."""
    notes = {**notes, "length": str(length)}
    if pads is not None:
        notes["pads"] = pads.name
    if eight_bits:
        notes["dtype"] = str(rows_nJ.dtype).removeprefix("torch.")
        codes, scales = quantized(rows_nJ)
        cache.put(name, {"codes": codes, "scales": scales}, notes=notes)
    else:
        cache.put(name, {"text": rows_nJ.contiguous()}, notes=notes)


def get(cache: Cache, name: str) -> Tensor:
    """The whole embedding (L, J), pads included, on the CPU.

    Raises CheckpointError if the entry or its block is missing or damaged.
    """
    tensors, notes = cache.get(name), cache.notes(name)
    if "text" in tensors:
        rows = tensors["text"]
    else:
        rows = restored(tensors["codes"], tensors["scales"]).to(_dtype(notes["dtype"]))
    if "pads" not in notes:
        return rows
    block, length = _block(cache, notes["pads"]), int(notes["length"])
    if not 0 <= length - len(rows) <= len(block):
        raise CheckpointError(
            f"{cache.path(name)}: {len(rows)} rows and its pads don't make {length}. {REMEDY}"
        )
    return torch.cat([block[: length - len(rows)], rows])


def holds(cache: Cache, name: str) -> bool:
    """Whether the entry is there, and the pads that it names too."""
    if name not in cache:
        return False
    pads = cache.notes(name).get("pads")
    return pads is None or pads in cache


def quantized(rows_nJ: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (n, J) and the fp32 scale of each group of SCALED numbers, by its largest."""
    size = math.gcd(rows_nJ.shape[1], SCALED)
    groups = rows_nJ.float().unflatten(1, (-1, size))
    scales = (groups.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (groups / scales[..., None]).round().to(torch.int8)
    return codes.flatten(1), scales


def restored(codes_nJ: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `quantized`, in fp32 (n, J)."""
    groups = codes_nJ.unflatten(1, (scales.shape[1], -1))
    return (groups * scales[..., None]).flatten(1)


@lru_cache(maxsize=2)
def _block(cache: Cache, name: str) -> Tensor:
    """Read once in a process: every caption needs it."""
    return cache.get(name)["pads"]


def _bits(rows: Tensor) -> Tensor:
    """Bytes: -0.0 isn't 0.0, and a NaN equals itself."""
    return rows.contiguous().view(torch.uint8)


def _dtype(name: str) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
