"""Runs inside this process, which is seconds faster than launching one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import runs
from train import run

TrainRun = Callable[..., Path]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs of a module, with pictures of two sizes and of one."""
    folder = tmp_path_factory.mktemp("shared")
    runs.make_pictures(folder / "mixed", sizes=[*(runs.SQUARE,) * 3, *(runs.WIDE,) * 2])
    runs.make_pictures(folder / "squares")
    return folder


@pytest.fixture(scope="module")
def train_run(shared: Path, dev_folder: Path) -> TrainRun:
    """Train the run of a name, all with one cache; returns its folder."""

    def train(
        name: str,
        *,
        pictures: str = "mixed",
        resume: bool = False,
        accept: bool = False,
        **sections,
    ) -> Path:
        config = runs.make_config(
            shared / name, model=dev_folder, pictures=shared / pictures, **sections
        )
        run.run(config, resume=resume, accept=accept)
        return runs.run_folder(config)

    return train
