"""What a run says where it can't go on."""

import pytest
import torch

from train import run
from train.errors import MachineError


def test_a_gpu_without_room_is_for_the_user_to_mend() -> None:
    torchs = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB. Of the rest, much."
    with pytest.raises(MachineError) as caught, run._room_on_the_gpu():
        raise torch.OutOfMemoryError(torchs)
    said = str(caught.value)
    assert said.startswith("memory: CUDA out of memory. Tried to allocate 2.00 GiB. Set memory.")
    assert "79" not in said
    with pytest.raises(RuntimeError, match="launch failure"), run._room_on_the_gpu():
        raise RuntimeError("CUDA error: unspecified launch failure")
