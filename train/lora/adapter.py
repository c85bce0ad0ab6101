"""Adapters in memory: one class for each form of update, and what all can say of themselves.

Owns no model and no file: how an adapter gets into a transformer is the package's, files are
`export`'s and `checkpoint`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from train.adapters.updates import Kronecker, LowRank

Parts = dict[str, dict[str, Tensor]]
"""peft's name of a kind of tensor -> module -> tensor, fp32; a module has some of them."""


@dataclass(frozen=True)
class Adapter:
    """One LoRA, by module name of the transformer: the update of a weight is scale * up @ down.

    down: module -> (rank, in), fp32. up: module -> (out, rank), fp32. Same keys, in model order.
    magnitude: module -> (out,), fp32, makes it DoRA: the changed weight's rows get these norms.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    rank: int
    alpha: float
    magnitude: dict[str, Tensor] | None = None

    @property
    def kind(self) -> Literal["lora", "dora"]:
        """As `lora.kind` has it."""
        return "lora" if self.magnitude is None else "dora"

    @property
    def modules(self) -> list[str]:
        """What is adapted, in model order."""
        return list(self.down)

    @property
    def parts(self) -> Parts:
        """All tensors."""
        parts = {"lora_A": self.down, "lora_B": self.up}
        return (
            parts if self.magnitude is None else parts | {"lora_magnitude_vector": self.magnitude}
        )

    @property
    def scale(self) -> float:
        """Strength of the update, alpha / rank."""
        return self.alpha / self.rank

    def update(self, module: str) -> LowRank:
        """What it does to one module's weight."""
        magnitude = None if self.magnitude is None else self.magnitude[module]
        return LowRank(self.up[module], self.down[module], self.scale, magnitude)

    def delta(self, module: str) -> Tensor:
        """The update of one module's weight before magnitudes, (out, in), fp32."""
        return self.scale * (self.up[module] @ self.down[module])


@dataclass(frozen=True)
class LokrAdapter:
    """One LoKr: the update of a weight, (a c, b d), is scale * kron(left, right).

    parts: lokr_w1, left: (a, b); then lokr_w2, right: (c, d), or in its place lokr_w2_a, (c, rank),
    and lokr_w2_b, (rank, d), whose product it is.
    """

    parts: Parts
    rank: int
    alpha: float
    kind: Literal["lokr"] = "lokr"

    @property
    def modules(self) -> list[str]:
        """What is adapted, in model order."""
        return list(self.parts["lokr_w1"])

    @property
    def scale(self) -> float:
        """Strength of the update, alpha / rank, also where the right side is whole."""
        return self.alpha / self.rank

    @property
    def factor(self) -> int:
        """Rows and columns of the left side."""
        return len(next(iter(self.parts["lokr_w1"].values())))

    def update(self, module: str) -> Kronecker:
        """What it does to one module's weight."""
        left, halves = self.parts["lokr_w1"][module], None
        right = self.parts["lokr_w2"].get(module)
        if right is None:
            halves = self.parts["lokr_w2_a"][module], self.parts["lokr_w2_b"][module]
            right = halves[0] @ halves[1]
        return Kronecker(left, right, self.scale, halves)

    def delta(self, module: str) -> Tensor:
        """The update of one module's weight, (out, in), fp32."""
        update = self.update(module)
        return update.scale * torch.kron(update.left, update.right)


AnyAdapter = Adapter | LokrAdapter


def of_parts(parts: Mapping[str, dict[str, Tensor]], *, rank: int, alpha: float) -> AnyAdapter:
    """The adapter that these tensors are."""
    if "lokr_w1" in parts:
        names = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
        return LokrAdapter({name: dict(parts.get(name, {})) for name in names}, rank, alpha)
    magnitude = parts.get("lora_magnitude_vector")
    return Adapter(parts["lora_A"], parts["lora_B"], rank, alpha, magnitude)


def changes_nothing(adapter: AnyAdapter) -> bool:
    """Whether one side of every update is zero, as before the first step; magnitudes aside."""
    ends = ("lora_A", "lora_B", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    zero = {
        module
        for part in ends
        for module, tensor in adapter.parts.get(part, {}).items()
        if not tensor.any()
    }
    return zero.issuperset(adapter.modules)


def with_start(adapter: Adapter, start: Adapter) -> Adapter:
    """The update of both together, as one adapter of twice the rank.

    start is down A0 and up -B0, so that the update is BA - B0 A0 = (B - B0) A + B0 (A - A0). Each
    product has one factor that is as small as the update; so has its rounding in a file, which in
    the difference of the two large products it hadn't.
    """
    down = {n: torch.cat([a, a - start.down[n]]) for n, a in adapter.down.items()}
    up = {n: torch.cat([b + start.up[n], -start.up[n]], dim=1) for n, b in adapter.up.items()}
    return Adapter(down, up, 2 * adapter.rank, 2 * adapter.alpha)
