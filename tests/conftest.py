"""Shared fixtures. Nothing here or in any test may reach a hub."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from tests import tiny

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The marker alone says what needs a GPU; without one such a test makes no fixture either."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def dev_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base of dev's classes."""
    return tiny.make_dev(tmp_path_factory.mktemp("base") / "dev")


@pytest.fixture(scope="session")
def klein_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base of klein's classes."""
    return tiny.make_klein(tmp_path_factory.mktemp("base") / "klein")


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    """For what is compiled: nothing of it is there before, nor after."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    with ExitStack() as stack:
        yield stack
