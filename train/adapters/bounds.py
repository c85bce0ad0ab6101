"""How far updates may be from the trained ones for all the rounding, and how far they are.

Bounds. A file stores fl(A) and fl(scale * B), with |fl(x) - x| <= u |x| + eta: u is the unit
roundoff of its type and eta half its smallest number. Then, whatever the n values of a matrix are,
  |E_X|_F <= u |X|_F + eta sqrt(n)
  |dW_file - dW|_F <= |E_B|_F |A|_2 + |B|_2 |E_A|_F + |E_B|_F |E_A|_F,
which is the bound on each module's update. u and eta are summed over the types that the numbers
pass through: the file's, fp32 for the folding, and the transformer's, to which diffusers converts.

LoKr: the same sum for |kron(dL, R) + kron(L + dL, dR)|, a Kronecker product's norm being the
product of its sides'. DoRA: the bound on the update before magnitudes, and one for each magnitude,
which files hold in fp32.

Owns these bounds and the comparison, module by module; products are never formed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import matrix_norm

from train.adapters.updates import (
    Kronecker,
    LowRank,
    Update,
    distance,
    inner,
    kronecker_distance,
    product_norm,
)
from train.lora.adapter import AnyAdapter


@dataclass(frozen=True)
class Roundoff:
    """|fl(x) - x| <= unit * |x| + tiny."""

    unit: float
    tiny: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Roundoff":
        """Of one rounding to a type; several in turn add up."""
        info = torch.finfo(dtype)
        return cls(info.eps / 2, info.smallest_normal * info.eps / 2)

    def __add__(self, other: "Roundoff") -> "Roundoff":
        return Roundoff(self.unit + other.unit, self.tiny + other.tiny)

    def error(self, weight: Tensor) -> float:
        """Bound on the Frobenius norm of a rounded matrix's error."""
        norm = matrix_norm(weight).item()
        return self.unit * norm + self.tiny * math.sqrt(weight.numel())


FP32 = Roundoff.of(torch.float32)


def compare(
    adapter: AnyAdapter, found: Callable[[str], Update], roundoff: Roundoff
) -> dict[str, Any]:
    """Updates of all modules against the trained ones: strength by least squares, worst error.

    Products are never formed: on dev they would be full-size weights.
    """
    product = norm = 0.0
    worst = {"module": "", "error": 0.0, "bound": 0.0}
    worst_ratio = -1.0
    for module in adapter.modules:
        gap = _gap(adapter.update(module), found(module), roundoff)
        product += gap.product
        norm += gap.size**2
        if gap.error > worst_ratio * gap.bound:
            worst_ratio, size = gap.error / gap.bound, gap.size or 1.0
            worst = {"module": module, "error": gap.error / size, "bound": gap.bound / size}
    strength = round(product / norm, 3) if norm else None
    return {"strength": strength, "within_bound": worst_ratio <= 1.0, "worst": worst}


@dataclass(frozen=True)
class Gap:
    """Between the update that is meant and the one that was found; norms are Frobenius'."""

    product: float
    """Sum over all entries of one times the other."""
    size: float
    """Of the meant one."""
    error: float
    bound: float


def _gap(meant: Update, found: Update, roundoff: Roundoff) -> Gap:
    """Without magnitudes."""
    if isinstance(meant, Kronecker):
        return _kronecker_gap(meant, found, roundoff)
    up, down = meant.scale * wide(meant.up), wide(meant.down)
    size, bound = product_norm(up, down), _product_bound(up, down, roundoff)
    if isinstance(found, Kronecker):
        return Gap(0.0, size, size, bound)
    factors = found.factors()
    return Gap(inner((up, down), factors), size, distance(factors, (up, down)), bound)


def _kronecker_gap(meant: Kronecker, found: Update, roundoff: Roundoff) -> Gap:
    left, right = meant.scale * wide(meant.left), wide(meant.right)
    size, error_left = (matrix_norm(left) * matrix_norm(right)).item(), roundoff.error(left)
    if meant.halves is None:
        error_right = roundoff.error(right)
    else:  # the product of the two is in fp32, on either side
        error_right = _product_bound(wide(meant.halves[0]), wide(meant.halves[1]), roundoff)
        error_right += 2 * len(meant.halves[1]) * FP32.unit * matrix_norm(right).item()
    bound = error_left * matrix_norm(right).item()
    bound += (matrix_norm(left).item() + error_left) * error_right
    if not isinstance(found, Kronecker) or found.left.shape != meant.left.shape:
        return Gap(0.0, size, size, bound)
    ours = found.scale * wide(found.left), wide(found.right)
    product = (torch.sum(left * ours[0]) * torch.sum(right * ours[1])).item()
    error = kronecker_distance(Kronecker(left, right), Kronecker(*ours))
    return Gap(product, size, error, bound)


def _product_bound(up: Tensor, down: Tensor, roundoff: Roundoff) -> float:
    """On |up' down' - up down|_F with both rounded."""
    error_a, error_b = roundoff.error(down), roundoff.error(up)
    return (error_b * matrix_norm(down, 2) + (matrix_norm(up, 2) + error_b) * error_a).item()


def compare_magnitudes(
    wanted: dict[str, Tensor], found: Callable[[str], Update], roundoff: Roundoff
) -> dict[str, Any]:
    """The greatest relative error of a row's magnitude."""
    worst = {"module": "", "error": 0.0, "fault": "are right"}
    for module, meant in wanted.items():
        update = found(module)
        if not isinstance(update, LowRank) or update.magnitude is None:
            worst = {"module": module, "error": 1.0, "fault": "are dropped: it loads a plain LoRA"}
            break
        error = ((wide(update.magnitude) - wide(meant)).abs() / wide(meant).abs()).max().item()
        if not error <= worst["error"]:
            fault = f"are off by {error:.2g} (rounding explains {roundoff.unit:.2g})"
            worst = {"module": module, "error": error, "fault": fault}
    return {"magnitudes": worst | {"within_bound": worst["error"] <= roundoff.unit}}


def wide(weight: Any) -> Tensor:
    """On the CPU, fp64."""
    return weight.detach().cpu().double()
