"""The table of layouts and loaders: what each does with each, executed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop import common
from train.adapters import certify, comfyui, export, files
from train.lora import Adapter
from train.names import Shape, diffusers_places

EXACT = dict.fromkeys(("diffusers", "comfyui"), 1.0)

TABLE = {
    "export": EXACT,
    "peft, alpha only in metadata": {"diffusers": 1.0, "comfyui": 2.0},
    "peft, folded": EXACT,
    "peft, folded, with alpha tensors": {"diffusers": ValueError, "comfyui": 0.5},
    "peft, with alpha tensors": {"diffusers": ValueError, "comfyui": 1.0},
    "bare, folded": {"diffusers": None, "comfyui": 1.0},
    "diffusion_model. before diffusers names": {"diffusers": 1.0, "comfyui": None},
    "base_model.model. before diffusers names": {"diffusers": 1.0, "comfyui": None},
    "lora_transformer_ with alpha": {"diffusers": None, "comfyui": 1.0},
    "BFL, lora_A": EXACT,
    "BFL, lora_down with alpha": {"diffusers": None, "comfyui": 1.0},
    "kohya": EXACT,
}
"""Strength that a loader applies; None: it loads nothing and raises nothing."""


def write_layout(name: str, adapter: Adapter, shape: Shape, path: Path) -> Path:
    """A file as the program that uses this layout writes it."""

    def underscored(module: str) -> str:
        return f"lora_transformer_{module.replace('.', '_')}"

    metadata = None
    if name == "export":
        export.write(adapter, path, dtype=torch.float32, metadata={})
        return path
    if name == "peft, alpha only in metadata":
        state = common.peft_layout(adapter, fold=False)
        metadata = common.peft_metadata(adapter, alpha=adapter.alpha)
    elif name == "peft, folded":
        state = common.peft_layout(adapter)
    elif name in ("peft, folded, with alpha tensors", "peft, with alpha tensors"):
        state = common.peft_layout(adapter, fold="folded" in name)
        state |= common.alphas(adapter, lambda m: f"transformer.{m}")
    elif name == "bare, folded":
        state = common.peft_layout(adapter, prefix="")
    elif name.endswith("before diffusers names"):
        state = common.peft_layout(adapter, prefix=name.split()[0])
    elif name == "lora_transformer_ with alpha":
        state = common.alphas(adapter, underscored)
        state |= {f"{underscored(m)}.lora_down.weight": a for m, a in adapter.down.items()}
        state |= {f"{underscored(m)}.lora_up.weight": b for m, b in adapter.up.items()}
    else:
        halves = ("lora_A", "lora_B") if name == "BFL, lora_A" else ("lora_down", "lora_up")
        state = common.bfl_layout(
            adapter,
            shape,
            kohya=name == "kohya",
            down=halves[0],
            up=halves[1],
            alpha=name != "BFL, lora_A",
        )
    return common.save(state, path, metadata)


def deltas_in_diffusers(path: Path, pipeline: Any, adapter: Adapter) -> dict[str, torch.Tensor]:
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    try:
        factors = {m: certify.loaded_factors(pipeline.transformer, m) for m in adapter.down}
    finally:
        pipeline.unload_lora_weights()
    return {m: up @ down for m, (up, down) in factors.items()}


def assert_strength(
    adapter: Adapter, deltas: dict[str, torch.Tensor], strength: float | None
) -> None:
    for module in adapter.down:
        wanted = (strength or 0.0) * adapter.delta(module).double()
        torch.testing.assert_close(deltas[module], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dev", "klein"])
@pytest.mark.parametrize("layout", TABLE)
def test_diffusers(layout: str, kind: str, tmp_path: Path) -> None:
    pipeline = common.pipeline(kind)
    adapter = common.random_adapter(pipeline.transformer)
    shape = Shape.of(pipeline.transformer)
    path = write_layout(layout, adapter, shape, tmp_path / "a.safetensors")
    expected = TABLE[layout]["diffusers"]
    if expected is ValueError:
        with pytest.raises(ValueError, match="Invalid adapter checkpoint"):
            deltas_in_diffusers(path, pipeline, adapter)
    else:
        assert_strength(adapter, deltas_in_diffusers(path, pipeline, adapter), expected)


@pytest.mark.parametrize("layout", TABLE)
def test_comfyui(layout: str, tmp_path: Path) -> None:
    transformer = common.pipeline("dev").transformer
    adapter, shape = common.random_adapter(transformer), Shape.of(transformer)
    path = write_layout(layout, adapter, shape, tmp_path / "a.safetensors")
    tensors, _ = files.load(path)
    reading = comfyui.read(tensors, shape)
    expected = TABLE[layout]["comfyui"]
    places = diffusers_places(shape)
    factors = {m: reading.factors(places[m]) for m in adapter.down}
    assert_strength(adapter, {m: up @ down for m, (up, down) in factors.items()}, expected)
    if expected is None:
        assert (reading.used, set(reading.ignored)) == ([], set(tensors))
    else:
        assert (set(reading.used), reading.ignored) == (set(tensors), [])
