"""Random adapters through every layout and back: ranks, alphas, targets and types drawn by seed.

What holds for all: the change of each weight is the same before and after, both loaders apply it
at strength 1, no key is lost, and the certificate says so.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop import common, layouts
from train.adapters import LAYOUTS, examine, export, files
from train.adapters.convert import convert
from train.loading.names import Shape
from train.lora import Adapter

from .test_layouts import as_meant, in_comfyui, in_diffusers

SEEDS = range(24)

TYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""Relative error of a product of two factors rounded to a type, and some."""


def draw_adapter(seed: int, transformer: Any) -> Adapter:
    """Some of the block Linears, at any rank, alpha and size of numbers."""
    chance = random.Random(seed)
    whole = common.random_adapter(transformer, rank=chance.choice((1, 2, 3, 5, 8)))
    modules = [m for m in whole.down if chance.random() < chance.choice((0.1, 0.5, 1.0))]
    modules = modules or [next(iter(whole.down))]
    size = 10 ** chance.uniform(-2, 1)
    return Adapter(
        {m: whole.down[m] for m in modules},
        {m: size * whole.up[m] for m in modules},
        whole.rank,
        chance.choice((whole.rank, 1.0, 0.5, 2.0 * whole.rank, 17.3)),
    )


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {kind: common.pipeline(kind) for kind in ("dev", "klein")}


@pytest.fixture(scope="module")
def bases(pipelines: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    for kind, pipeline in pipelines.items():
        pipeline.transformer.save_config(folder / kind / "transformer")
    return {kind: str(folder / kind) for kind in pipelines}


@pytest.mark.parametrize("seed", SEEDS)
def test_any_way_round(
    seed: int, pipelines: dict[str, Any], bases: dict[str, str], tmp_path: Path
) -> None:
    chance = random.Random(1000 + seed)
    kind, dtype = chance.choice(("dev", "klein")), chance.choice(TYPES)
    pipeline = pipelines[kind]
    adapter, shape = draw_adapter(seed, pipeline.transformer), Shape.of(pipeline.transformer)
    path = tmp_path / "0.safetensors"
    way = [chance.choice(LAYOUTS) for _ in range(3)]
    export.write(adapter, path, dtype=dtype, metadata={}, layout=way[0])
    for i, layout in enumerate(way[1:], start=1):
        outcome, _ = convert(path, tmp_path / f"{i}.safetensors", to=layout)
        assert outcome.error == 0.0, "a scale of 1 needs no rounding"
        path = tmp_path / f"{i}.safetensors"
    loaded = (as_meant(path), in_diffusers(path, pipeline, adapter), in_comfyui(path, shape))
    bound = ROUNDING[dtype]
    for deltas in loaded:
        for module in adapter.down:
            wanted = adapter.delta(module).double()
            assert (deltas[module] - wanted).norm() <= bound * wanted.norm(), (module, way)
    others = [module for module in loaded[2] if module not in adapter.down]
    assert all(not loaded[2][module].any() for module in others)
    report = examine.examine(path, base=bases[kind])
    assert report["passed"], report["diffusers"]["reasons"] + report["comfyui"]["reasons"]
    assert set(report["comfyui"]["counts"]) == {"used"}


@pytest.mark.parametrize("seed", SEEDS)
def test_foreign_layouts_of_any_targets(
    seed: int, pipelines: dict[str, Any], tmp_path: Path
) -> None:
    chance = random.Random(2000 + seed)
    pipeline = pipelines[chance.choice(("dev", "klein"))]
    adapter = draw_adapter(seed, pipeline.transformer)
    names = [
        n for n in layouts.LAYOUTS if n.startswith(("peft", "bare", "lora", "lycoris", "base"))
    ]
    name = chance.choice(
        [n for n in names if "beside" not in n and "BFL" not in n and "two" not in n]
    )
    path = layouts.write(name, adapter, Shape.of(pipeline.transformer), tmp_path / "a.safetensors")
    output, to = tmp_path / "b.safetensors", chance.choice(LAYOUTS)
    convert(path, output, to=to)
    before, after = as_meant(path), in_comfyui(output, Shape.of(pipeline.transformer))
    real = in_diffusers(output, pipeline, adapter)
    for module, delta in before.items():
        for found in (after[module], real[module]):
            assert (found - delta).norm() <= 1e-6 * delta.norm(), (name, to, module)
    if name != "peft, folded, with alpha tensors":
        for module in adapter.down:
            wanted = adapter.delta(module).double()
            assert (before[module] - wanted).norm() <= 1e-6 * wanted.norm(), (name, module)


def test_the_same_input_gives_the_same_bytes(pipelines: dict[str, Any], tmp_path: Path) -> None:
    adapter = draw_adapter(0, pipelines["dev"].transformer)
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        export.write(adapter, path, dtype=torch.bfloat16, metadata={"a": "b"}, layout="kohya")
    assert files.file_hash(paths[0]) == files.file_hash(paths[1])
