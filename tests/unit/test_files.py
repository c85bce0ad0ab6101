"""What can't be written is told with its place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from train.errors import MachineError
from train.files import writing


def test_a_file_where_a_folder_should_be(tmp_path: Path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "x"
    message = rf"^{place}: can't be written \(Not a directory\)\. "
    with pytest.raises(MachineError, match=message), writing(place):
        place.mkdir()


def test_safetensors_own_error(tmp_path: Path):
    message = r"can't be written \(.*No such file"
    with pytest.raises(MachineError, match=message), writing(tmp_path):
        save_file({"x": torch.zeros(2)}, tmp_path / "none" / "x.safetensors")


def test_other_errors_keep_their_traceback(tmp_path: Path):
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError
