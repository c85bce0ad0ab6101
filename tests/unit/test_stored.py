"""Reading safetensors by offset."""

import pytest
import torch
from safetensors.torch import save_file

from tests import damage
from train import stored
from train.errors import ConfigError

TENSORS = {
    "matrix": torch.randn(6, 4),
    "half": torch.randn(3, 5).bfloat16(),
    "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "number": torch.tensor(2.5),
    "nothing": torch.empty(0),
    "bytes": torch.arange(7, dtype=torch.uint8),
}


def test_tensors_and_rows_come_back(tmp_path):
    save_file(TENSORS, tmp_path / "x", metadata={"a": "b"})
    found, metadata = stored.read_header(tmp_path / "x", where="here")
    assert metadata == {"a": "b"}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        again = found[name].read()
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            again.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    assert torch.equal(found["matrix"].read((2, 5)), TENSORS["matrix"][2:5])


def test_a_read_tensor_is_a_copy(tmp_path):
    save_file(TENSORS, tmp_path / "x")
    tensor = stored.read_header(tmp_path / "x", where="here")[0]["matrix"].read()
    (tmp_path / "x").write_bytes(bytes((tmp_path / "x").stat().st_size))
    assert torch.equal(tensor, TENSORS["matrix"])


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path):
    save_file(TENSORS, tmp_path / "x")
    found, _ = stored.read_header(tmp_path / "x", where="here")
    damage.empty(tmp_path / "x")
    with pytest.raises(ConfigError, match="became shorter"):
        found["matrix"].read()


def test_one_is_made_ahead_and_no_more():
    made = []

    def make():
        for number in range(5):
            made.append(number)
            yield number

    seen = []
    for number in stored.ahead(make()):
        seen.append(number)
        assert len(made) <= number + 2
    assert seen == [0, 1, 2, 3, 4]


def test_an_error_while_reading_ahead_arrives():
    def fail():
        yield 1
        raise ValueError("broken")

    items = stored.ahead(fail())
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)
