"""An adapter file of any layout, read into one form: module of diffusers -> its update.

Owns which keys belong together, at which strength they were meant, what base they fit, and what of
a file can't be used. Only the header is read until an update is asked for; then only its tensors.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from train.adapters import intent, layouts
from train.adapters.files import File
from train.adapters.layouts import Key, Target
from train.adapters.updates import (
    Factors,
    Kronecker,
    LowRank,
    Update,
    halves_swapped,
    rows_of,
    tensors_of,
)
from train.errors import CheckpointError
from train.loading.names import SWAPPED, Shape
from train.loading.shapes import HEAD_WIDTH, SHAPES

Group = dict[str, Update]
"""Updates of diffusers' modules whose rows lie below each other in one BFL weight."""

Reduce = Callable[[str, Update], Update]
"""What is done to a unit's update, given its name."""

BASES = {
    name: Shape(HEAD_WIDTH * shape.heads, shape.double, shape.single)
    for name, shape in SHAPES.items()
}
"""The released bases as the mapping needs them."""

NARROW = ("img_mlp.2", "txt_mlp.2", "linear2")
"""Their rows are the width; of the others in the blocks, it is the columns."""


@dataclass(frozen=True)
class Unit:
    """The keys that hold one Linear's update."""

    name: str
    """Prefix and name, as in the file."""
    target: Target
    keys: dict[str, str]
    """A value of layouts.PARTS -> key."""

    @property
    def magnitudes(self) -> list[str]:
        """Keys of DoRA's magnitude: peft's, ComfyUI's, or both, which are then the same."""
        return [self.keys[part] for part in ("magnitude", "dora_scale") if part in self.keys]


class Source:
    """An adapter file. Raises CheckpointError where it is no adapter of FLUX.2 at all."""

    def __init__(self, path: Path) -> None:
        self.file = File(path)
        self.path = path
        self.intent = intent.read(path, self.file.metadata)
        self.keys: list[Key] = []
        self.unknown: list[str] = []
        """Keys that mean nothing here, or an update of a kind that is only named."""
        found: dict[str, list[Key]] = defaultdict(list)
        self.key_of: dict[str, str] = {}
        for text in self.file.tensors:
            key = layouts.parse(text)
            if key is None:
                self.unknown.append(text)
            else:
                self.keys.append(key)
                found[key.prefix + key.name].append(key)
                self.key_of[text] = key.prefix + key.name
        self._found = found
        self.units, self.broken = self._assemble(found)

    def _assemble(self, found: dict[str, list[Key]]) -> tuple[dict[str, Unit], dict[str, str]]:
        """Whole units in the model's order, and what is wrong with the others, by name."""
        units, broken, taken = {}, {}, {}
        for name, keys in found.items():
            parts = {key.part: key.prefix + key.name + key.end for key in keys}
            unit = Unit(name, keys[0].target, parts)
            fault = self._fault(unit, len(keys))
            clash = next((m for m in unit.target.modules if m in taken), None)
            if fault is None and clash is not None:
                fault = f"is the same weight as {taken[clash]}"
            if fault is None:
                units[name] = unit
                taken |= dict.fromkeys(unit.target.modules, name)
            else:
                broken[name] = fault
        ordered = sorted(units.values(), key=lambda unit: layouts.order(unit.target.weight))
        return {unit.name: unit for unit in ordered}, broken

    def _fault(self, unit: Unit, count: int) -> str | None:
        """Why the keys of a name can't be used; None if they can."""
        parts = unit.keys
        if count != len(parts):
            return "holds the same thing twice, under two endings"
        if "down" not in parts and "up" not in parts:
            if not any(part.startswith("lokr") for part in parts):
                return "has no lora_A/lora_down and no lora_B/lora_up"
            return self._lokr_fault(unit)
        for half, names in (("down", "lora_A/lora_down"), ("up", "lora_B/lora_up")):
            if half not in parts:
                return f"has no {names}"
        down, up = (self.file.tensors[parts[half]].shape for half in ("down", "up"))
        if len(down) != 2 or len(up) != 2 or up[1] != down[0] or not down[0]:
            return f"has shapes {down} and {up}, which aren't (rank, in) and (out, rank)"
        if up[0] % len(unit.target.modules):
            return f"has {up[0]} rows for {len(unit.target.modules)} modules"
        sizes = {math.prod(self.file.tensors[key].shape) for key in unit.magnitudes}
        if sizes - {up[0]}:
            return "has a DoRA magnitude that isn't one number a row"
        return None

    def _lokr_fault(self, unit: Unit) -> str | None:
        for side in ("lokr_w1", "lokr_w2"):
            halves = [f"{side}_a" in unit.keys, f"{side}_b" in unit.keys]
            if side not in unit.keys and not all(halves):
                return f"has no whole {side}"
        if any(len(self.file.tensors[key].shape) != 2 for part, key in unit.keys.items()
               if part.startswith("lokr")):  # fmt: skip
            return "has LoKr factors that aren't matrices"
        if unit.magnitudes:
            return "is LoKr with a DoRA magnitude"
        return None

    @property
    def is_dora(self) -> bool:
        """Whether any unit has magnitudes."""
        return any(unit.magnitudes for unit in self.units.values())

    @property
    def for_comfyui(self) -> bool:
        """Whether its magnitudes make up for ComfyUI's other norms: see `intent.DORA_NORMS`."""
        return self.is_dora and intent.DORA_NORMS in self.file.metadata

    @cached_property
    def layout(self) -> str:
        """In a few words."""
        return layouts.describe(self.keys)

    @cached_property
    def groups(self) -> dict[str, list[Unit]]:
        """BFL weight -> the units in it, in the model's order."""
        groups: dict[str, list[Unit]] = {}
        for unit in self.units.values():
            groups.setdefault(unit.target.weight, []).append(unit)
        return groups

    def size(self, unit: Unit) -> tuple[int, int]:
        """(out, in) of the weight that a unit's tensors fit."""
        shape = {part: self.file.tensors[key].shape for part, key in unit.keys.items()}
        if "up" in shape:
            return shape["up"][0], shape["down"][1]
        sides = []
        for side in ("lokr_w1", "lokr_w2"):
            if side in shape:
                sides.append(shape[side])
            else:
                sides.append((shape[f"{side}_a"][0], shape[f"{side}_b"][1]))
        return sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]

    def rank(self, unit: Unit) -> int | None:
        """Of a LoRA unit; for LoKr, of its low-rank side, None if both sides are whole."""
        for part in ("down", "lokr_w2_b", "lokr_w1_b"):
            if part in unit.keys:
                return self.file.tensors[unit.keys[part]].shape[0]
        return None

    def alpha(self, unit: Unit) -> float | None:
        """What the unit's alpha tensor says. Raises CheckpointError unless it is one number."""
        if "alpha" not in unit.keys:
            return None
        tensor = self.file.get(unit.keys["alpha"])
        if tensor.numel() != 1:
            raise CheckpointError(f"{self.path}: {unit.keys['alpha']} isn't one number.")
        value = float(tensor.float())
        if not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {unit.keys['alpha']} is {value}.")
        return value

    def scale(self, unit: Unit) -> float:
        """At which its product was meant: its alpha tensor's, else the metadata's, else 1."""
        alpha, rank = self.alpha(unit), self.rank(unit)
        if rank is None:  # LoKr of two whole matrices: every program takes the product as it is
            return 1.0
        if alpha is not None:
            return alpha / rank
        return self.intent.scale(unit.target.modules[0], rank)

    def whole(self, unit: Unit) -> Update:
        """A unit's update as it is in the file."""
        if "up" in unit.keys:
            up, down = self.file.get(unit.keys["up"]), self.file.get(unit.keys["down"])
            sizes = [self.file.get(key).flatten() for key in unit.magnitudes]
            if len(sizes) > 1 and not torch.equal(*sizes):
                raise CheckpointError(f"{self.path}: {unit.name} has two DoRA magnitudes.")
            return LowRank(up, down, self.scale(unit), sizes[0] if sizes else None)
        (left, _), (right, halves) = self._side(unit, "lokr_w1"), self._side(unit, "lokr_w2")
        return Kronecker(left, right, self.scale(unit), halves)

    def _side(self, unit: Unit, side: str) -> tuple[Tensor, Factors | None]:
        """A LoKr factor, and the two that it is the product of, if it is stored so."""
        if side in unit.keys:
            return self.file.get(unit.keys[side]), None
        up, down = (self.file.get(unit.keys[f"{side}_{half}"]) for half in "ab")
        return up.float() @ down.float(), (up, down)

    def unit(
        self, unit: Unit, shape: Shape | None = None, *, reduce: Reduce | None = None
    ) -> Group:
        """A unit's update by diffusers' module; fused ones share their down.

        shape: needed where a unit covers some of its module's rows only. reduce: done to the whole
        update first. Raises CheckpointError for a Kronecker product that can't be cut into modules.
        """
        update, modules = self.whole(unit), unit.target.modules
        if reduce is not None:
            update = reduce(unit.name, update)
        if modules == (SWAPPED,) and unit.target.bfl:
            update = halves_swapped(update)
        if unit.target.partial:
            update = _padded(update, shape or self.shape)
        if len(modules) == 1:
            return {modules[0]: update}
        height = update.size[0] // len(modules)
        parts = [rows_of(update, i * height, (i + 1) * height) for i in range(len(modules))]
        if any(part is None for part in parts):
            raise CheckpointError(
                f"{self.path}: {unit.name} is LoKr over q, k and v together, and its factors don't "
                "divide at their borders. --rank N makes plain LoRA of it."
            )
        return {m: part for m, part in zip(modules, parts, strict=True) if part is not None}

    def walk(self, *, reduce: Reduce | None = None) -> Iterator[tuple[str, Group]]:
        """BFL's weights and the updates in them, in the model's order, one at a time."""
        for weight in self.groups:
            yield weight, self.group(weight, reduce=reduce)

    def group(self, weight: str, *, reduce: Reduce | None = None) -> Group:
        """The updates in one BFL weight by diffusers' module, in the order of its rows.

        Empty if there is none. Raises CheckpointError for numbers that aren't finite.
        """
        updates: Group = {}
        for unit in self.groups.get(weight, []):
            if not all(torch.isfinite(t.float()).all() for t in tensors_of(self.whole(unit))):
                raise CheckpointError(
                    f"{self.path}: {unit.name} holds numbers that aren't finite. The file can't "
                    "be mended; train or download it again."
                )
            updates |= self.unit(unit, reduce=reduce)
        return {m: updates[m] for m in layouts.group_of(weight) if m in updates}

    @cached_property
    def base(self) -> str | None:
        """The released base that all shapes and block numbers fit; None if there is none."""
        for name, shape in BASES.items():
            if not self.misfits(shape) and self.units:
                return name
        return None

    @cached_property
    def shape(self) -> Shape:
        """The smallest base that everything fits, released or not.

        Raises CheckpointError where the tensors contradict each other or tell no width.
        """
        if self.base is not None:
            return BASES[self.base]
        widths = Counter(
            self.size(unit)[0 if unit.target.weight.endswith(NARROW) else 1]
            for unit in self.units.values()
            if unit.target.weight not in layouts.OUTSIDE_WEIGHTS
        )
        if not widths:
            raise CheckpointError(f"{self.path}: holds no update of a Linear inside the blocks.")
        numbers = [layouts.order(unit.target.weight)[:2] for unit in self.units.values()]
        double = max((index for kind, index in numbers if kind == 0), default=-1) + 1
        single = max((index for kind, index in numbers if kind == 1), default=-1) + 1
        return Shape(widths.most_common(1)[0][0], double, single)

    def misfits(self, shape: Shape) -> dict[str, str]:
        """Names of the units in the blocks that a base doesn't have, and why."""
        places = layouts.sizes(shape)
        wrong = {}
        for unit in self.units.values():
            if unit.target.weight in layouts.OUTSIDE_WEIGHTS:
                continue
            modules = unit.target.modules
            if modules[0] not in places:
                wrong[unit.name] = f"there is no {modules[0]}"
                continue
            rows = sum(places[module][0] for module in modules)
            if unit.target.partial:
                rows = 3 * shape.width
            if self.size(unit) != (rows, places[modules[0]][1]):
                wrong[unit.name] = (
                    f"its shape is {self.size(unit)}, the weight's {(rows, places[modules[0]][1])}"
                )
        return wrong


def _padded(update: Update, shape: Shape) -> LowRank:
    """The first rows of linear1, with no update for the rest."""
    assert isinstance(update, LowRank)
    rows = layouts.sizes(shape)["single_transformer_blocks.0.attn.to_qkv_mlp_proj"][0]
    up = update.up.new_zeros(rows, update.rank)
    up[: update.size[0]] = update.up
    return LowRank(up, update.down, update.scale)
