"""Fixtures of captioning: pictures to caption, and models that look at them."""

from pathlib import Path

import pytest
from PIL import Image

from data_tools.caption.captioners.server import KEY_VARIABLE
from tests import tiny_vision
from tests.unit.caption.shades import SHADES


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's owner has in the variable."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six plain pictures, shade 0 to 5."""
    top = tmp_path / "pictures"
    top.mkdir()
    for number, shade in enumerate(SHADES):
        Image.new("RGB", (64, 48), shade).save(top / f"{number}.png")
    return top


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of each kind: a base of dev's classes, and two as the hub has them."""
    top = tmp_path_factory.mktemp("vision")
    makers = {
        "dev": tiny_vision.make_dev,
        "qwen": tiny_vision.make_qwen,
        "florence": tiny_vision.make_florence,
    }
    return {name: make(top / name) for name, make in makers.items()}
