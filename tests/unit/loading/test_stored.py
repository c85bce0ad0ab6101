"""Reading safetensors by offset, and what is said of files that aren't whole."""

import json
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import damage
from train.errors import ConfigError
from train.loading import stored


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One tensor of each type that is known, a scalar and an empty one."""
    torch.manual_seed(0)
    tensors = {name: (50 * torch.randn(6, 5)).to(dtype) for name, dtype in stored.DTYPES.items()}
    tensors |= {"one": torch.tensor(0.25), "none": torch.zeros(0, 3)}
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path, metadata={"made": "here"})
    return path


def complaint(path: Path) -> str:
    """What is said of a file."""
    with pytest.raises(ConfigError) as caught:
        stored.read_header(path, where="base.model: /base")
    return str(caught.value)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """And the same type and shape; NaN is like NaN."""
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(*bits)


def test_tensors_and_rows_are_what_the_library_reads(file):
    found, metadata = stored.read_header(file, where="here")
    wanted = load_file(file)
    assert metadata == {"made": "here"}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert same_bits(tensor.read(), wanted[name])
        assert tensor.bytes == wanted[name].nbytes
        if tensor.shape == (6, 5):
            assert same_bits(tensor.read((2, 5)), wanted[name][2:5])


def test_a_tensor_is_a_copy(file):
    """Nothing that happens to the file changes it."""
    tensor = stored.read_header(file, where="here")[0]["F32"]
    before = tensor.read()
    kept = before.clone()
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(before, kept)


def test_a_file_that_was_cut_off(file):
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-7])
    assert complaint(file) == (
        f"base.model: /base: weights.safetensors has {size - 7} bytes and should have {size}. "
        "It is cut off or damaged; download or copy it again."
    )


def test_a_file_that_is_cut_while_it_is_read(file):
    tensors = stored.read_header(file, where="here")[0]
    last = max(tensors.values(), key=lambda tensor: tensor.start)
    damage.truncate(file)
    with pytest.raises(ConfigError, match="it became shorter while it was read; start again"):
        last.read()


WRONG = {
    "zip pickle": (
        b"PK\x03\x04" + bytes(60),
        "is a pickle, whatever its name says. It isn't opened",
    ),
    "old pickle": (pickle.dumps({"weight": [1.0] * 9}), "is a pickle"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(60), "is a GGUF file, which isn't read. Take a bf16 or"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "`git lfs pull`"),
    "page": (
        b"<!DOCTYPE html><html>not found</html>",
        "isn't a safetensors file, or its beginning",
    ),
    "empty": (b"", "isn't a safetensors file"),
    "list": (b"\x02" + bytes(7) + b"[]", "isn't a safetensors file"),
    "no json": (b"\x03" + bytes(7) + b"\xff\xfe\xfd", "isn't a safetensors file"),
}


@pytest.mark.parametrize(("content", "said"), WRONG.values(), ids=WRONG)
def test_what_isnt_safetensors(tmp_path, content, said):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    assert complaint(path).startswith("base.model: /base: weights.safetensors is")
    assert said in complaint(path)


def test_what_isnt_there(tmp_path):
    assert complaint(tmp_path / "x.safetensors") == (
        "base.model: /base: there is no file x.safetensors."
    )


def test_a_header_that_contradicts_itself(tmp_path):
    """More bytes than its shape has: nothing of it is believed."""
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    assert "its beginning is damaged" in complaint(path)


def test_a_huge_file_of_something_else_isnt_read_whole(tmp_path):
    """Its first bytes may be any length; more than safetensors' own limit is none."""
    path = tmp_path / "weights.safetensors"
    length = 10**9
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(2 * length)  # takes no room on the disk
    begin = time.perf_counter()
    assert "isn't a safetensors file" in complaint(path)
    assert time.perf_counter() - begin < 0.05


def test_one_item_is_made_ahead_in_a_thread():
    made, threads = [], set()

    def items():
        for number in range(4):
            threads.add(threading.get_ident())
            made.append(number)
            yield number

    seen = []
    for item in stored.ahead(items()):
        deadline = time.monotonic() + 5
        while len(made) < min(item + 2, 4) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert made == list(range(min(item + 2, 4)))
        seen.append(item)
    assert seen == [0, 1, 2, 3]
    assert threading.get_ident() not in threads


def test_an_error_ahead_comes_in_its_turn():
    def items():
        yield 1
        raise ConfigError("the second")

    source = stored.ahead(items())
    assert next(source) == 1
    with pytest.raises(ConfigError, match="the second"):
        next(source)
