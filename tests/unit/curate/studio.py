"""A studio's library of pictures, and recipes and versions of it, for the tests of curation."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from data_tools.curate import command as curate
from data_tools.curate.recipe import Recipe


def rules(tmp_path: Path, **changes: object) -> Recipe:
    base = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    return Recipe.model_validate_json(json.dumps(base | changes))  # lists count as tuples there


def scene(path: Path, *, seed: int, width: int = 96, height: int = 64, blur: float = 0) -> Path:
    """Large shapes on a ground: like themselves after saving and blurring, unlike other seeds."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.filter(ImageFilter.GaussianBlur(blur)).save(path)
    path.with_suffix(".txt").write_text(f"scene {seed}")
    return path


def studio(root: Path) -> Path:
    for seed in range(8):
        scene(root / f"hero/{seed}.png", seed=seed, width=96 + seed)
    scene(root / "hero/0-again.jpg", seed=0, width=120, height=80)
    scene(root / "draft/9.png", seed=9)
    scene(root / "world/10.png", seed=10).with_suffix(".txt").write_text("Watermark: x")
    scene(root / "world/11.png", seed=11, width=60, height=40)
    scene(root / "world/12.png", seed=12)
    return root


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def rows(home: Path) -> dict[str, dict]:
    lines = (home / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row for row in map(json.loads, lines)}


def made(recipe: Recipe, **options: bool) -> Path:
    version, plan = curate.run(recipe, **options)
    assert plan is not None
    return version


def entries(version: Path) -> dict[str, dict]:
    listed = json.loads((version / "manifest.json").read_text(encoding="utf-8"))["pictures"]
    return {entry["name"]: entry for entry in listed}
