"""The layout of a text entry: what is read is what was put, or an error says why not."""

from pathlib import Path

import pytest
import torch

from tests import damage
from train.encoding import cache as caches
from train.encoding import texts
from train.encoding.cache import Cache
from train.errors import CheckpointError

LENGTH, WIDTH = 12, 256


def rows(count: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of an embedding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator).to(dtype)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty cache."""
    return Cache(tmp_path)


def store(cache: Cache, own: torch.Tensor, *, pads: texts.Pads | None, eight_bits=False) -> str:
    """Put an entry; its name."""
    name = caches.key(kind="prompt", rows=len(own), pads=pads.name if pads else None)
    texts.put(cache, name, own, length=LENGTH, pads=pads, eight_bits=eight_bits, notes={"t": "5"})
    return name


@pytest.mark.parametrize("own", [1, 5, 12])
def test_an_entry_is_read_with_its_pads_before_it(cache, own):
    pads = texts.put_pads(cache, rows(11, seed=1))
    name = store(cache, rows(own), pads=pads)
    expected = torch.cat([pads.rows_PJ[: LENGTH - own], rows(own)])
    assert torch.equal(texts.get(cache, name), expected)
    assert cache.notes(name)["t"] == "5"
    assert cache.path(name).stat().st_size < own * WIDTH * 2 + 600, "its own rows and a header"


def test_an_entry_without_pads_is_read_as_it_is(cache):
    assert torch.equal(texts.get(cache, store(cache, rows(12), pads=None)), rows(12))


def test_equal_pads_are_stored_once_and_others_beside_them(cache):
    first, again, other = (texts.put_pads(cache, rows(11, seed=seed)) for seed in (1, 1, 2))
    assert first.name == again.name != other.name
    names = [store(cache, rows(5), pads=pads) for pads in (first, other)]
    found = [texts.get(cache, name) for name in names]
    assert torch.equal(found[0][:7], rows(11, seed=1)[:7])
    assert torch.equal(found[1][:7], rows(11, seed=2)[:7])


def test_pads_are_compared_to_the_bit(cache):
    pads = texts.put_pads(cache, rows(11, seed=1).index_fill(0, torch.tensor([3]), 0.0))
    text = torch.cat([pads.rows_PJ[:7], rows(5)])
    assert texts.begins_with(text, pads, count=7)
    assert texts.begins_with(text[2:], pads, count=5, at=2)
    assert not texts.begins_with(text[2:], pads, count=5, at=1)
    assert not texts.begins_with(text, pads, count=8)
    assert not texts.begins_with(text, texts.put_pads(cache, pads.rows_PJ[:6]), count=7)
    text[3, 0] = -0.0
    assert torch.equal(text[:7], pads.rows_PJ[:7]), "equal as numbers"
    assert not texts.begins_with(text, pads, count=7)


@pytest.mark.parametrize("harm", [damage.truncate, Path.unlink])
def test_without_its_pads_an_entry_is_not_there(cache, harm):
    pads = texts.put_pads(cache, rows(11, seed=1))
    name = store(cache, rows(5), pads=pads)
    assert texts.holds(cache, name)
    harm(cache.path(pads.name))
    assert not texts.holds(cache, name)
    with pytest.raises(CheckpointError) as caught:
        texts.get(Cache(cache.root), name)
    assert str(cache.path(pads.name)) in str(caught.value)
    assert "start again" in str(caught.value)


def test_rows_that_do_not_add_up_are_an_error(cache):
    pads = texts.put_pads(cache, rows(6, seed=1))
    name = store(cache, rows(5), pads=pads)
    with pytest.raises(CheckpointError, match=r"5 rows and its pads don't make 12\. Delete"):
        texts.get(cache, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_eight_bits_come_back_close_and_in_the_same_type(cache, dtype):
    pads = texts.put_pads(cache, rows(11, seed=1, dtype=dtype))
    own = rows(5, dtype=dtype)
    name = store(cache, own, pads=pads, eight_bits=True)
    found = texts.get(cache, name)
    assert found.dtype == dtype
    assert torch.equal(found[:7], pads.rows_PJ[:7]), "shared pads keep all their bits"
    assert 0.001 < error(found[7:], own) < 0.008
    assert cache.path(name).stat().st_size < 5 * WIDTH * (1 + 4 / texts.SCALED) + 700


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Relative, by root mean squares."""
    return ((found.float() - true.float()).norm() / true.float().norm()).item()


def test_one_large_number_costs_its_neighbours_only():
    """Text encoders have a few channels a hundred times larger than the rest."""
    true = rows(4, dtype=torch.float32)
    true[:, 3] = 300.0
    found = texts.restored(*texts.quantized(true))
    far = slice(texts.SCALED, None)
    assert error(found[:, far], true[:, far]) < 0.008


@pytest.mark.parametrize("value", [0.0, 1e-38, -1e30, 65504.0])
def test_eight_bits_of_extreme_rows_stay_finite(value):
    true = torch.full((2, WIDTH), value)
    found = texts.restored(*texts.quantized(true))
    assert found.isfinite().all()
    torch.testing.assert_close(found, true, rtol=1e-5, atol=2e-38)


def test_a_width_that_no_group_divides_has_smaller_groups():
    true = torch.randn(3, 144)
    codes, scales = texts.quantized(true)
    assert (codes.shape, scales.shape) == ((3, 144), (3, 9))
    assert error(texts.restored(codes, scales), true) < 0.008


def test_a_bare_entry_of_rows_is_read_whole(cache):
    """As the benchmark and other tools may put it."""
    cache.put("ab12", {"text": rows(12)}, notes={})
    assert torch.equal(texts.get(cache, "ab12"), rows(12))
