"""A folder of pictures that there is something to say about."""

from pathlib import Path

import pytest

from tests.unit import hostile


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four pictures, two of them the same, one wide; each caption has the trigger `ohwx`."""
    top = tmp_path / "pictures"
    for seed, name in enumerate(["a.png", "b.png"]):
        hostile.picture(top / name, width=80, height=80, seed=seed)
    (top / "c.png").write_bytes((top / "b.png").read_bytes())
    hostile.picture(top / "d.png", width=300, height=80, seed=3)
    for name, text in {"a": "ohwx runs", "b": "ohwx", "c": "ohwx", "d": "小火 ohwx"}.items():
        (top / f"{name}.txt").write_text(text, encoding="utf-8")
    return top
