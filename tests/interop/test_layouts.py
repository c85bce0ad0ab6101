"""The table of layouts and loaders: what each does with each, executed; and that certifying says
so, and converting mends it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop import common, layouts
from train.adapters import LAYOUTS, certify, comfyui, examine, export, files
from train.adapters.convert import convert
from train.adapters.source import Source
from train.adapters.updates import LowRank
from train.errors import CheckpointError
from train.loading.names import Shape, diffusers_places
from train.lora import Adapter

PARTLY = "partly"
EXACT = (1.0, 1.0)

TABLE: dict[str, tuple[Any, Any]] = {
    "export": EXACT,
    "export, comfyui": EXACT,
    "export, kohya": EXACT,
    "peft, folded": EXACT,
    "peft, alpha only in metadata": (1.0, 2.0),
    "peft, rsLoRA in metadata": (1.0, 2.0),
    "peft, alpha_pattern in metadata": (1.0, 2.0),
    "peft, two ranks": EXACT,
    "peft, folded, with alpha tensors": (ValueError, 0.5),
    "peft, with alpha tensors": (ValueError, 1.0),
    "peft, .default.weight": (None, 1.0),
    "transformer., lora_down with alpha": (None, 1.0),
    "transformer., lora.down, folded": EXACT,
    "transformer., lora_linear_layer, folded": (IndexError, 1.0),
    "bare, folded": (None, 1.0),
    "unet. before diffusers names": (None, None),
    "diffusion_model. before diffusers names": (1.0, None),
    "diffusion_model.sformer_blocks": (1.0, None),
    "base_model.model. before diffusers names": (1.0, None),
    "base_model.model. before BFL names": (1.0, None),
    "base_model.model.transformer.": (ValueError, None),
    "lora_transformer_ with alpha": (None, 1.0),
    "lycoris_ with alpha": (None, 1.0),
    "lora_unet_ before diffusers names": (None, None),
    "BFL, lora_A": EXACT,
    "BFL, lora_A, one down": EXACT,
    "BFL, lora_A with alpha": (ValueError, 1.0),
    "BFL, lora_down with alpha": (None, 1.0),
    "BFL, attn_qkv for attn.qkv": (ValueError, PARTLY),
    "BFL, bare": (None, None),
    "BFL, bare, with alpha": (ValueError, None),
    "BFL, model.diffusion_model.": (None, None),
    "kohya": EXACT,
    "kohya, one down": EXACT,
    "kohya without alpha": EXACT,
    "kohya with lora_A": (None, 1.0),
    "peft beside a text encoder's": EXACT,
    "kohya beside a text encoder's": EXACT,
    "BFL beside a text encoder's": (ValueError, 1.0),
}
"""Strength that diffusers and ComfyUI apply, of what alpha / rank * up @ down is; None: it loads
nothing and raises nothing."""

MEANT = dict.fromkeys(TABLE, 1.0) | {"peft, folded, with alpha tensors": 0.5}
"""What a file says of itself, as Kindling reads it."""

BESIDE = [name for name in TABLE if "beside" in name]


@pytest.fixture(scope="module")
def dev() -> Any:
    return common.pipeline("dev")


@pytest.fixture(scope="module")
def base(dev: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    dev.transformer.save_config(folder / "transformer")
    return str(folder)


def write(layout: str, transformer: Any, folder: Path) -> tuple[Adapter, Path]:
    """A random adapter, as it was trained and as a file."""
    path = folder / "a.safetensors"
    if not layout.startswith("export"):
        adapter = layouts.adapter_for(layout, transformer)
        return adapter, layouts.write(layout, adapter, Shape.of(transformer), path)
    adapter = common.random_adapter(transformer)
    kind = layout.rpartition(", ")[2].replace("export", "diffusers")
    export.write(adapter, path, dtype=torch.float32, metadata={}, layout=kind)
    return adapter, path


def in_diffusers(path: Path, pipeline: Any, adapter: Adapter) -> dict[str, torch.Tensor]:
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    try:
        factors = {
            m: certify.loaded_update(pipeline.transformer, m).factors()  # pyright: ignore
            for m in adapter.down
        }
    finally:
        pipeline.unload_lora_weights()
    return {m: up @ down for m, (up, down) in factors.items()}


def in_comfyui(path: Path, shape: Shape) -> dict[str, torch.Tensor]:
    reading = comfyui.read(files.load(path)[0], shape)
    places = diffusers_places(shape)
    factors = {module: reading.factors(place) for module, place in places.items()}
    return {module: up @ down for module, (up, down) in factors.items()}


def as_meant(path: Path) -> dict[str, torch.Tensor]:
    items = [item for _, group in Source(path).walk() for item in group.items()]
    factors = {module: update.factors() for module, update in items if isinstance(update, LowRank)}
    return {module: up @ down for module, (up, down) in factors.items()}


def assert_strength(adapter: Adapter, deltas: dict[str, torch.Tensor], strength: Any) -> None:
    for module in adapter.down:
        share = strength or 0.0
        if strength == PARTLY:
            share = 0.0 if ".attn." in module and "single" not in module else 1.0
        wanted = share * adapter.delta(module).double()
        torch.testing.assert_close(deltas[module], wanted, rtol=1e-5, atol=1e-6)


def test_the_table_is_whole() -> None:
    assert set(TABLE) == {"export", "export, comfyui", "export, kohya", *layouts.LAYOUTS}
    assert len(TABLE) >= 25


@pytest.mark.parametrize("kind", ["dev", "klein"])
@pytest.mark.parametrize("layout", TABLE)
def test_diffusers(layout: str, kind: str, tmp_path: Path) -> None:
    pipeline = common.pipeline(kind)
    adapter, path = write(layout, pipeline.transformer, tmp_path)
    expected = TABLE[layout][0]
    if isinstance(expected, type):
        with pytest.raises(expected):
            in_diffusers(path, pipeline, adapter)
    else:
        assert_strength(adapter, in_diffusers(path, pipeline, adapter), expected)


@pytest.mark.parametrize("layout", TABLE)
def test_comfyui(layout: str, dev: Any, tmp_path: Path) -> None:
    adapter, path = write(layout, dev.transformer, tmp_path)
    assert_strength(adapter, in_comfyui(path, Shape.of(dev.transformer)), TABLE[layout][1])


@pytest.mark.parametrize("layout", TABLE)
def test_the_meaning_is_read(layout: str, dev: Any, tmp_path: Path) -> None:
    adapter, path = write(layout, dev.transformer, tmp_path)
    assert_strength(adapter, as_meant(path), MEANT[layout])


@pytest.mark.parametrize("layout", TABLE)
def test_certifying_says_what_the_table_says(
    layout: str, dev: Any, base: str, tmp_path: Path
) -> None:
    _, path = write(layout, dev.transformer, tmp_path)
    report = examine.examine(path, base=base)
    json.dumps(report, allow_nan=False)
    for loader, expected in zip(("diffusers", "comfyui"), TABLE[layout], strict=True):
        verdict = report[loader]
        nothing = expected is None or isinstance(expected, type)
        assert verdict["loads"] is not nothing
        if isinstance(expected, type):
            assert verdict["reasons"][0].startswith(
                f"its loader refuses the file: {expected.__name__}"
            )
        if isinstance(expected, float):
            assert verdict["strength"] == pytest.approx(expected / MEANT[layout], abs=1e-3)
        exact = expected == MEANT[layout] and layout not in BESIDE
        assert (verdict["exact"], bool(verdict["reasons"])) == (exact, not exact)
        assert set(verdict["keys"]) == set(files.File(path).tensors)
    assert report["passed"] is (report["diffusers"]["exact"] and report["comfyui"]["exact"])


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("layout", sorted(set(TABLE) - set(BESIDE)))
def test_converting_gives_a_file_that_both_load(
    layout: str, to: str, dev: Any, tmp_path: Path
) -> None:
    adapter, path = write(layout, dev.transformer, tmp_path)
    output = tmp_path / "converted.safetensors"
    outcome, _ = convert(path, output, to=to)
    assert outcome.error < 1e-6
    assert_strength(adapter, in_diffusers(output, dev, adapter), MEANT[layout])
    assert_strength(adapter, in_comfyui(output, Shape.of(dev.transformer)), MEANT[layout])


@pytest.mark.parametrize("layout", BESIDE)
def test_converting_loses_no_key_silently(layout: str, dev: Any, tmp_path: Path) -> None:
    _, path = write(layout, dev.transformer, tmp_path)
    with pytest.raises(CheckpointError, match="is no key of a known layout"):
        convert(path, tmp_path / "converted.safetensors", to="diffusers")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("layout", layouts.NEEDS_ONE_DOWN)
@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_fusing_what_was_fused_keeps_its_rank(
    layout: str, to: str, dev: Any, tmp_path: Path
) -> None:
    adapter, path = write(layout, dev.transformer, tmp_path)
    split, fused = tmp_path / "split.safetensors", tmp_path / "fused.safetensors"
    convert(path, split, to="diffusers")
    convert(split, fused, to=to)
    shapes = [s.shape for key, s in files.File(fused).tensors.items() if "qkv" in key]
    assert {min(shape) for shape in shapes if len(shape) == 2} == {adapter.rank}
