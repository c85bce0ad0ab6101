"""What an adapter does to one weight, as numbers: W + scale * up @ down, and its relatives.

Pure functions. Owns the forms and their algebra: norms, sums, splitting and fusing rows, fewer
ranks. The product itself is never formed (on dev it would be a full-size weight) except for rows
that are asked for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.linalg import matrix_norm

from train.errors import CheckpointError

Factors = tuple[Tensor, Tensor]
"""An update as up @ down: (out, k) and (k, in)."""

ROWS = 1024
"""Of a weight that are made fp32 at a time: 100 MB on dev at most."""


@dataclass(frozen=True)
class LowRank:
    """LoRA: scale * up @ down. up: (out, rank), down: (rank, in).

    With a magnitude, (out,), it is DoRA: the changed weight's rows are scaled to these norms.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Of the weight: (out, in)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Columns of up."""
        return self.down.shape[0]

    def factors(self, dtype: torch.dtype = torch.float64) -> Factors:
        """The update without magnitude."""
        up = self.up.to(dtype)
        return up if self.scale == 1.0 else self.scale * up, self.down.to(dtype)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: scale * kron(left, right). left: (a, b), right: (c, d); the weight is (a c, b d)."""

    left: Tensor
    right: Tensor
    scale: float = 1.0
    halves: Factors | None = None
    """Whose product `right` is, where it is kept as two."""

    @property
    def size(self) -> tuple[int, int]:
        """Of the weight: (out, in)."""
        rows = self.left.shape[0] * self.right.shape[0]
        return rows, self.left.shape[1] * self.right.shape[1]


Update = LowRank | Kronecker


def tensors_of(update: Update) -> list[Tensor]:
    """All its numbers."""
    if isinstance(update, Kronecker):
        return [update.left, update.right]
    tensors = [update.up, update.down]
    return tensors if update.magnitude is None else [*tensors, update.magnitude]


def row_squares(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Squared norms of a weight's rows, (out,). weight: (out, in) of any float type."""
    return torch.cat([part.detach().to(dtype).square().sum(1) for part in weight.split(ROWS)])


def changed_squares(weight: Tensor, up: Tensor, down: Tensor, *, squares: Tensor) -> Tensor:
    """Squared norms of the rows of weight + up @ down, (out,), in up's type.

    squares: `row_squares` of the weight. |w + b A|^2 = |w|^2 + 2 (w A^T) b + b (A A^T) b for a row:
    neither the product nor the whole weight in up's type is ever made. Exactly `squares` where up
    is zero.
    """
    cross = torch.cat([part.to(down.dtype) @ down.T for part in weight.split(ROWS)])
    return squares + torch.sum((2 * cross + up @ (down @ down.T)) * up, dim=1)


def inner(one: Factors, two: Factors) -> float:
    """Sum over all entries of one update times the other: tr(down_1 down_2' up_2' up_1)."""
    return torch.sum((one[0].T @ two[0]) * (one[1] @ two[1].T)).item()


def product_norm(up: Tensor, down: Tensor) -> float:
    """|up @ down|_F without the product. QR, since a Gram matrix would square the rounding."""
    if not up.shape[1]:
        return 0.0
    triangles = torch.linalg.qr(up, mode="r").R, torch.linalg.qr(down.T, mode="r").R
    return matrix_norm(triangles[0] @ triangles[1].T).item()


def distance(one: Factors, two: Factors) -> float:
    """|up_1 @ down_1 - up_2 @ down_2|_F."""
    return product_norm(torch.cat([one[0], -two[0]], 1), torch.cat([one[1], two[1]]))


def norm(update: Update) -> float:
    """Frobenius norm of the update, without magnitude."""
    if isinstance(update, Kronecker):
        sides = (matrix_norm(side.double()).item() for side in (update.left, update.right))
        return abs(update.scale) * math.prod(sides)
    return product_norm(*update.factors())


def svd(update: Update) -> tuple[Tensor, Callable[[int], Factors]]:
    """Singular values in falling order, and what gives the first k vectors: (out, k), (k, in).

    fp64. Of a low-rank product through the QR of its factors; of a Kronecker product through the
    SVDs of its sides, whose singular values multiply.
    """
    if isinstance(update, Kronecker):
        return _kronecker_svd(update)
    up, down = update.factors()
    (left, r_left), (right, r_right) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return s, lambda k: (left @ u[:, :k], v[:k] @ right.T)


def kronecker_distance(one: Kronecker, two: Kronecker) -> float:
    """|one - two|_F of sides of the same shapes, without cancellation.

    kron(l, r) - kron(l', r') = kron(l - l', r) + kron(l', r - r').
    """
    left, right = one.scale * one.left.double(), one.right.double()
    other = two.scale * two.left.double(), two.right.double()
    off_left, off_right = left - other[0], right - other[1]
    squares = off_left.square().sum() * right.square().sum()
    squares += 2 * torch.sum(off_left * other[0]) * torch.sum(right * off_right)
    squares += other[0].square().sum() * off_right.square().sum()
    return squares.clamp(min=0).sqrt().item()


def truncated(
    update: Update, *, rank: int | None = None, energy: float | None = None
) -> tuple[LowRank, float]:
    """The nearest update of fewer ranks, fp32, and the share of the squared norm that it keeps.

    rank: at most so many. energy: as few as keep this share, 0 to 1. Both: the stricter. At least
    one rank is kept. The singular values are halved between the factors, so that neither is small.
    A magnitude stays as it is.
    """
    s, vectors = svd(update)
    shares = s.square().cumsum(0)
    total = shares[-1].item()
    keep = min(rank or len(s), len(s))
    if energy is not None:
        enough = energy * total * (1 - 1e-12)
        keep = min(keep, int(torch.searchsorted(shares, enough).item()) + 1 if total else 1)
    (u, v), root = vectors(keep), s[:keep].sqrt()
    up, down = u * root, root[:, None] * v
    magnitude = update.magnitude if isinstance(update, LowRank) else None
    kept = shares[keep - 1].item() / total if total else 1.0
    return LowRank(up.float(), down.float(), 1.0, magnitude), kept


def summed(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Weighted sum, exact: the ranks add up."""
    assert all(update.magnitude is None for update in updates)
    ups = [w * u.scale * u.up.float() for w, u in zip(weights, updates, strict=True)]
    return LowRank(torch.cat(ups, 1), torch.cat([u.down.float() for u in updates]))


def rows_of(update: Update, start: int, stop: int) -> Update | None:
    """The update of some rows of the weight; None where a Kronecker product can't be cut there."""
    if isinstance(update, LowRank):
        magnitude = update.magnitude
        part = None if magnitude is None else magnitude[start:stop]
        return replace(update, up=update.up[start:stop], magnitude=part)
    height = update.right.shape[0]
    if start % height or stop % height:
        return None
    return replace(update, left=update.left[start // height : stop // height])


def halves_swapped(update: Update) -> LowRank:
    """The update of a weight whose two halves of rows change places; not of LoKr."""
    if isinstance(update, Kronecker):
        raise CheckpointError(
            "LoKr on the final layer's modulation can't be converted: BFL and diffusers have its "
            "halves in different order."
        )
    half = update.up.shape[0] // 2
    magnitude = update.magnitude
    if magnitude is not None:
        magnitude = torch.cat([magnitude[half:], magnitude[:half]])
    up = torch.cat([update.up[half:], update.up[:half]])
    return LowRank(up, update.down, update.scale, magnitude)


def stacked(parts: Sequence[Update | None], height: int) -> LowRank:
    """Updates of weights that lie below each other, `height` rows each, as one; exact.

    Parts that share one down keep its rank; otherwise the ranks add up and up is block-diagonal.
    None is no update. Scales that differ are folded into up, in fp32.
    """
    parts = [part if isinstance(part, LowRank) else None for part in parts]
    present = [part for part in parts if part is not None]
    scale, same = present[0].scale, present[0].down
    if any(part.scale != scale for part in present):
        parts = [p and replace(p, up=p.scale * p.up.float(), scale=1.0) for p in parts]
        present, scale = [part for part in parts if part is not None], 1.0
    shared = all(p.down is same or torch.equal(p.down, same) for p in present)
    down = same if shared else torch.cat([part.down for part in present])
    up = torch.zeros(height * len(parts), len(down), dtype=present[0].up.dtype)
    column = 0
    for i, part in enumerate(parts):
        if part is not None:
            up[i * height : (i + 1) * height, column : column + part.rank] = part.up
            column += 0 if shared else part.rank
    magnitudes = [p.magnitude for p in present if p.magnitude is not None]
    assert len(magnitudes) in (0, len(parts)), "DoRA on some of the rows only"
    return LowRank(up, down, scale, torch.cat(magnitudes) if magnitudes else None)


def _kronecker_svd(update: Kronecker) -> tuple[Tensor, Callable[[int], Factors]]:
    u1, s1, v1 = torch.linalg.svd(update.left.double(), full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(update.right.double(), full_matrices=False)
    values, order = torch.outer(s1, s2).flatten().sort(descending=True)

    def vectors(k: int) -> Factors:
        i, j = order[:k] // len(s2), order[:k] % len(s2)
        u = torch.einsum("ak,ck->ack", u1[:, i], u2[:, j]).reshape(-1, len(i))
        v = torch.einsum("kb,kd->kbd", v1[i], v2[j]).reshape(len(i), -1)
        return math.copysign(1.0, update.scale) * u, v

    return abs(update.scale) * values, vectors
