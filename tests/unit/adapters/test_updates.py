"""The algebra of updates, each against the full matrices."""

import pytest
import torch
from torch import Tensor

from train.adapters import updates
from train.adapters.updates import Kronecker, LowRank, Update
from train.errors import CheckpointError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(update: Update | None) -> Tensor:
    if isinstance(update, Kronecker):
        return update.scale * torch.kron(update.left.double(), update.right.double())
    assert update is not None
    return update.scale * update.up.double() @ update.down.double()


LORA = LowRank(draw(12, 4), draw(4, 10, seed=1), -0.7)
LOKR = Kronecker(draw(3, 2), draw(4, 5, seed=1), -1.3)
DORA = LowRank(draw(12, 2), draw(2, 10), 1.0, draw(12))


@pytest.mark.parametrize("update", [LORA, LOKR])
def test_norm_and_size(update: Update) -> None:
    assert updates.norm(update) == pytest.approx(full(update).norm().item())
    assert update.size == tuple(full(update).shape)


def test_inner_products_and_distances() -> None:
    one, two = LORA.factors(), LowRank(draw(12, 3, seed=2), draw(3, 10, seed=3)).factors()
    a, b = one[0] @ one[1], two[0] @ two[1]
    assert updates.inner(one, two) == pytest.approx((a * b).sum().item())
    assert updates.distance(one, two) == pytest.approx((a - b).norm().item())
    assert updates.product_norm(draw(12, 0), draw(0, 10)) == 0.0


@pytest.mark.parametrize("update", [LORA, LOKR])
def test_singular_values_and_vectors(update: Update) -> None:
    values, vectors = updates.svd(update)
    expected = torch.linalg.svdvals(full(update))[: len(values)]
    torch.testing.assert_close(values, expected)
    u, v = vectors(len(values))
    torch.testing.assert_close(u * values @ v, full(update))
    torch.testing.assert_close(u.T @ u, torch.eye(len(values), dtype=torch.float64))


@pytest.mark.parametrize("update", [LORA, LOKR])
@pytest.mark.parametrize("rank", [1, 2, 3, 99])
def test_cut_to_a_rank_is_the_nearest_there_is(update: Update, rank: int) -> None:
    result, kept = updates.truncated(update, rank=rank)
    u, s, v = torch.linalg.svd(full(update), full_matrices=False)
    torch.testing.assert_close(
        full(result), u[:, :rank] * s[:rank] @ v[:rank], atol=1e-5, rtol=1e-5
    )
    assert kept == pytest.approx((s[:rank].square().sum() / s.square().sum()).item())
    lost = (full(result) - full(update)).square().sum() / full(update).square().sum()
    assert 1 - kept == pytest.approx(lost.item(), abs=1e-6)
    assert result.rank == min(rank, len(updates.svd(update)[0]))


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.79, 1), (0.81, 2), (0.99, 3), (1.0, 3)])
def test_cut_to_an_energy_takes_as_few_ranks_as_keep_it(energy: float, rank: int) -> None:
    values = torch.tensor([4.0, 1.9, 0.6])  # energies 0.801, 0.982, 1
    update = LowRank(torch.eye(5)[:, :3] * values, torch.eye(3, 7))
    result, kept = updates.truncated(update, energy=energy)
    assert (result.rank, kept >= energy - 1e-9) == (rank, True)
    assert updates.truncated(update, energy=energy, rank=1)[0].rank == 1


def test_cut_of_nothing_is_nothing() -> None:
    result, kept = updates.truncated(LowRank(torch.zeros(5, 3), torch.ones(3, 4)), energy=0.9)
    assert (result.rank, kept, full(result).abs().max()) == (1, 1.0, 0.0)


def test_cutting_keeps_a_magnitude() -> None:
    result, _ = updates.truncated(DORA, rank=1)
    assert result.magnitude is DORA.magnitude


def test_sums_are_exact() -> None:
    other = LowRank(draw(12, 3, seed=2).float(), draw(3, 10, seed=3).float(), 2.0)
    ours = LowRank(LORA.up.float(), LORA.down.float(), LORA.scale)
    result = updates.summed([ours, other], [0.5, -2.0])
    torch.testing.assert_close(full(result), 0.5 * full(ours) - 2 * full(other), atol=1e-5, rtol=0)
    assert result.rank == 7


def test_rows() -> None:
    for update, start, stop in ((LORA, 3, 7), (LOKR, 4, 8), (DORA, 0, 5)):
        part = updates.rows_of(update, start, stop)
        torch.testing.assert_close(full(part), full(update)[start:stop])
    assert updates.rows_of(LOKR, 3, 8) is None
    part = updates.rows_of(DORA, 2, 5)
    assert isinstance(part, LowRank)
    assert part.magnitude is not None
    assert torch.equal(part.magnitude, DORA.magnitude[2:5])  # pyright: ignore


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0)])
@pytest.mark.parametrize("absent", [None, 0, 1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_stacked_rows(scales: tuple[float, ...], absent: int | None, shared: bool) -> None:
    downs = [draw(2, 10, seed=0 if shared else i).float() for i in range(3)]
    parts = [
        None if i == absent else LowRank(draw(4, 2, seed=9 + i).float(), downs[i], scales[i])
        for i in range(3)
    ]
    result = updates.stacked(parts, 4)
    zero = torch.zeros(4, 10, dtype=torch.float64)
    expected = torch.cat([zero if part is None else full(part) for part in parts])
    torch.testing.assert_close(full(result), expected, atol=1e-6, rtol=1e-6)
    assert result.rank == (2 if shared else 2 * sum(part is not None for part in parts))


def test_swapped_halves() -> None:
    swapped = updates.halves_swapped(DORA)
    torch.testing.assert_close(full(swapped), full(DORA).roll(6, 0))
    assert swapped.magnitude is not None
    assert torch.equal(swapped.magnitude, DORA.magnitude.roll(6))  # pyright: ignore
    with pytest.raises(CheckpointError, match="LoKr on the final layer"):
        updates.halves_swapped(LOKR)
