"""DoRA and LoKr as a run exports them: each file does in its loaders what was trained.

ComfyUI's arithmetic on weights is written out here once more, from its behaviour, and compared with
the definitions.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop import common
from train import lora
from train.adapters import certify, comfyui, export, files
from train.adapters.convert import convert
from train.adapters.source import Source
from train.adapters.updates import LowRank
from train.config import LoraConfig
from train.errors import CheckpointError
from train.loading.names import Shape, diffusers_places
from train.lora import Adapter, AnyAdapter

CONFIGS = {
    "dora": LoraConfig(kind="dora", rank=4, alpha=3.0),
    "lokr": LoraConfig(kind="lokr", rank=2, alpha=3.0, factor=4),
    "partial dora": LoraConfig(kind="dora", rank=4, targets=(r".*\.to_[qk]", r"single_.*")),
}
LAYOUTS = {
    "dora": {"diffusers": ("diffusers",), "comfyui": ("comfyui",), "kohya": ("comfyui",)},
    "lokr": {"diffusers": certify.LOADERS, "kohya": certify.LOADERS},
    "partial dora": {"diffusers": ("diffusers",), "comfyui": ("comfyui",)},
}
EACH = [(kind, layout) for kind, some in LAYOUTS.items() for layout in some]


def trained(kind: str, transformer: Any) -> AnyAdapter:
    """An adapter with updates large enough to see; the transformer is the base again."""
    lora.attach(transformer, CONFIGS[kind], seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora.trainable(transformer):
            parameter.add_(0.2 * torch.randn_like(parameter))
    adapter = lora.read(transformer, CONFIGS[kind])
    transformer.unload_lora()
    return adapter


def made(
    kind: str, layout: str, path: Path, *, base: torch.dtype, dtype: torch.dtype
) -> tuple[Any, AnyAdapter]:
    """A pipeline around the base, the adapter, and its file at `path`."""
    pipeline: Any = common.pipeline("dev")
    torch.nn.Module.to(pipeline.transformer, base)
    adapter = trained(kind, pipeline.transformer)
    export.write(
        adapter, path, dtype=dtype, metadata={}, layout=layout, transformer=pipeline.transformer
    )
    return pipeline, adapter


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "layout"), EACH)
def test_every_file_passes_for_its_loaders(
    kind: str, layout: str, dtype: torch.dtype, base: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    pipeline, adapter = made(kind, layout, path, base=base, dtype=dtype)
    loaders = LAYOUTS[kind][layout]
    found = certify.certify(path, adapter=adapter, pipeline=pipeline, loaders=loaders)
    assert (found["reasons"], found["passed"], found["for"]) == ([], True, list(loaders))
    for loader in loaders:
        assert found[loader]["keys_used"] == found["file"]["tensors"]
        assert found[loader]["strength"] == 1.0
    for loader in set(certify.LOADERS) - set(loaders):
        assert any("it loads a plain LoRA" in reason for reason in found[loader]["reasons"])
    every = certify.certify(path, adapter=adapter, pipeline=pipeline)
    assert every["passed"] is (len(loaders) == 2)


def comfys_weight(weight: Tensor, update: LowRank) -> Tensor:
    """The changed rows times dora_scale, over the norms of the rows before the change."""
    assert update.magnitude is not None
    changed = weight + update.scale * update.up.float() @ update.down.float()
    norms = weight.norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps
    return changed * (update.magnitude[:, None] / norms)


@pytest.mark.parametrize(("kind", "layout"), [each for each in EACH if each[1] != "diffusers"])
def test_comfyui_makes_the_weights_that_were_trained(
    kind: str, layout: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    pipeline, adapter = made(kind, layout, path, base=torch.float32, dtype=torch.float32)
    shape = Shape.of(pipeline.transformer)
    reading, places = comfyui.read(files.load(path)[0], shape), diffusers_places(shape)
    assert (reading.ignored, reading.failed, reading.not_computed) == ([], [], [])
    fused = {name: torch.zeros(rows, columns) for name, (rows, columns) in shape.weights().items()}
    for module, place in places.items():
        weight = pipeline.transformer.get_parameter(f"{module}.weight").detach()
        fused[place.weight][place.start : place.stop] = weight
    for place, patch in reading.patches.items():
        rows = fused[place.weight][place.start : place.stop]
        if isinstance(patch, LowRank):
            rows.copy_(comfys_weight(rows.clone(), patch))
        else:
            rows.add_(patch.scale * torch.kron(patch.left, patch.right))
    for module, place in places.items():
        wanted = pipeline.transformer.get_parameter(f"{module}.weight").detach()
        if module in adapter.modules:
            wanted = wanted + adapter.delta(module)
            if isinstance(adapter, Adapter) and adapter.magnitude is not None:
                size = adapter.magnitude[module][:, None]
                wanted = size * wanted / wanted.norm(dim=1, keepdim=True)
        found = fused[place.weight][place.start : place.stop]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fault", ["half", "swapped", "gone"])
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_wrong_magnitudes_are_seen(layout: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pipeline, adapter = made("dora", layout, path, base=torch.float32, dtype=torch.float32)
    state, metadata = files.load(path)
    key = next(k for k in state if k.endswith(("magnitude_vector", "dora_scale")))
    if fault == "half":
        state[key] = state[key] * 1.001
    elif fault == "swapped":
        state[key] = state[key].flip(0)
    else:
        del state[key]
    common.save(state, path, metadata)
    loaders = LAYOUTS["dora"][layout]
    found = certify.certify(path, adapter=adapter, pipeline=pipeline, loaders=loaders)
    assert any("magnitudes" in reason or "random" in reason for reason in found["reasons"])


@pytest.mark.parametrize("part", ["lokr_w1", "lokr_w2_b"])
def test_a_wrong_side_of_lokr_is_seen(part: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pipeline, adapter = made("lokr", "diffusers", path, base=torch.float32, dtype=torch.float32)
    state, metadata = files.load(path)
    key = next(key for key in state if key.endswith(part))
    state[key] = state[key] * 1.01
    common.save(state, path, metadata)
    found = certify.certify(path, adapter=adapter, pipeline=pipeline)
    assert [reason.partition(":")[0] for reason in found["reasons"]][:1] == ["diffusers"]
    assert any(reason.startswith("ComfyUI: the update of") for reason in found["reasons"])


def test_magnitudes_are_never_rounded(tmp_path: Path) -> None:
    """bf16 would change whole rows of weights by up to 0.4 %, as much as an adapter does."""
    path = tmp_path / "a.safetensors"
    _, adapter = made("dora", "diffusers", path, base=torch.float32, dtype=torch.bfloat16)
    assert isinstance(adapter, Adapter)
    assert adapter.magnitude is not None
    for key, tensor in files.load(path)[0].items():
        if key.endswith(".lora_magnitude_vector"):
            module = key.removeprefix("transformer.").removesuffix(".lora_magnitude_vector")
            assert torch.equal(tensor, adapter.magnitude[module])
        else:
            assert tensor.dtype == torch.bfloat16


def test_what_makes_up_for_comfyuis_norms_is_no_magnitude(tmp_path: Path) -> None:
    path, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    made("dora", "comfyui", path, base=torch.float32, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="DoRA for ComfyUI"):
        convert(path, output, to="diffusers")
    convert(path, output, to="kohya")
    assert Source(output).for_comfyui


def test_lokr_keeps_its_low_rank_side_as_two(tmp_path: Path) -> None:
    """Multiplied out, files would be many times larger; bf16 costs what is said."""
    path, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    _, adapter = made("lokr", "diffusers", path, base=torch.float32, dtype=torch.float32)
    outcome, _ = convert(path, output, to="diffusers", dtype="bf16")
    assert {key.rpartition(".")[2] for key in files.File(output).tensors} == {
        *("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        *({"lokr_w2"} if any(adapter.parts["lokr_w2"].values()) else ()),
    }
    assert 1e-3 < outcome.error < 1e-2
    outcome, kept = convert(path, output, to="comfyui", rank=8)  # 4 x 2 ranks: all of them
    assert min(kept.values()) > 1 - 1e-6
    found = {m: u for _, group in Source(output).walk() for m, u in group.items()}
    for module, update in found.items():
        assert isinstance(update, LowRank)
        up, down = update.factors(torch.float32)
        torch.testing.assert_close(up @ down, adapter.delta(module), rtol=1e-4, atol=1e-4)


def test_an_untrained_one_fails(tmp_path: Path) -> None:
    pipeline: Any = common.pipeline("dev")
    lora.attach(pipeline.transformer, CONFIGS["lokr"], seed=0)
    adapter = lora.read(pipeline.transformer, CONFIGS["lokr"])
    pipeline.transformer.unload_lora()
    path = tmp_path / "a.safetensors"
    export.write(adapter, path, dtype=torch.float32, metadata={})
    found = certify.certify(path, adapter=adapter, pipeline=pipeline)
    assert "the adapter changes nothing" in found["reasons"]
    assert dataclasses.replace(adapter, rank=1).scale == 3.0  # pyright: ignore
