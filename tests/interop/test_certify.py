"""The certificate passes for a good file and fails, with a plain reason, for every kind of bad."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop import common
from tests.interop.common import State
from train.adapters import certify, export
from train.adapters.write import LAYOUTS
from train.errors import CheckpointError
from train.lora import Adapter


@pytest.fixture(scope="module")
def dev() -> Any:
    return common.pipeline("dev")


@pytest.fixture(scope="module")
def adapter(dev: Any) -> Adapter:
    return common.random_adapter(dev.transformer)


@pytest.mark.parametrize(
    ("base", "dtype", "rank", "alpha"),
    [
        (torch.float32, torch.float32, 4, 4.0),
        (torch.float32, torch.bfloat16, 16, 1.0),
        (torch.float32, torch.float16, 4, 3.0),
        (torch.bfloat16, torch.float32, 4, 3.0),
        (torch.bfloat16, torch.bfloat16, 4, 3.0),
    ],
)
def test_a_good_file_passes(
    base: torch.dtype, dtype: torch.dtype, rank: int, alpha: float, tmp_path: Path
) -> None:
    pipeline = common.pipeline("dev")
    pipeline.transformer.to(base)
    adapter = common.random_adapter(pipeline.transformer, rank=rank, alpha=alpha)
    path = tmp_path / "good.safetensors"
    export.write(adapter, path, dtype=dtype, metadata={})
    certificate = certify.certify(path, adapter=adapter, pipeline=pipeline)
    assert certificate["reasons"] == []
    assert certificate["passed"] is True
    for loader in ("diffusers", "comfyui"):
        verdict = certificate[loader]
        assert (verdict["loads"], verdict["strength"]) == (True, 1.0)
        assert (verdict["keys_used"], verdict["keys_ignored"]) == (56, [])
    assert certificate["diffusers"]["restored"]
    json.dumps(certificate, allow_nan=False)


def test_klein_passes(tmp_path: Path) -> None:
    pipeline = common.pipeline("klein")
    adapter = common.random_adapter(pipeline.transformer)
    path = tmp_path / "klein.safetensors"
    export.write(adapter, path, dtype=torch.bfloat16, metadata={})
    certificate = certify.certify(path, adapter=adapter, pipeline=pipeline)
    assert certificate["passed"]
    assert certificate["diffusers"]["pipeline"] == "Flux2KleinPipeline"


def drop_module(state: State) -> State:
    gone = "transformer.transformer_blocks.0.attn.to_q.lora_"
    return {key: value for key, value in state.items() if not key.startswith(gone)}


def drop_half(state: State, half: str) -> State:
    gone = f"transformer.transformer_blocks.0.attn.to_q.lora_{half}.weight"
    return {key: value for key, value in state.items() if key != gone}


def double_one(state: State) -> State:
    key = "transformer.transformer_blocks.1.ff.linear_in.lora_B.weight"
    return state | {key: 2 * state[key]}


def scale_all(state: State, factor: float) -> State:
    return {key: value * (factor if "lora_B" in key else 1) for key, value in state.items()}


def add_stranger(state: State) -> State:
    halves = {"A": torch.ones(4, 32), "B": torch.ones(16, 4)}
    return state | {f"transformer.proj_out.lora_{h}.weight": w for h, w in halves.items()}


def swap(state: State) -> State:
    q, k = (f"transformer.transformer_blocks.0.attn.to_{x}.lora_B.weight" for x in "qk")
    return state | {q: state[k], k: state[q]}


BAD: dict[str, tuple[Callable[[State], State], str]] = {
    "a module is missing": (drop_module, "left out, such as transformer_blocks.0.attn.to_q"),
    "a lora_A is missing": (lambda s: drop_half(s, "A"), "to_q.lora_A.weight isn't in the file"),
    "a lora_B is missing": (lambda s: drop_half(s, "B"), "to_q.lora_B.weight isn't in the file"),
    "one module is doubled": (double_one, "transformer_blocks.1.ff.linear_in is off by 1 of"),
    "all is doubled": (lambda s: scale_all(s, 2.0), "at strength 2.0"),
    "all is 2 % too strong": (lambda s: scale_all(s, 1.02), "at strength 1.02"),
    "another component is in it": (
        lambda s: s | {f"text_encoder.q.lora_{h}.weight": torch.ones(4, 4) for h in "AB"},
        "diffusers: it ignores 2 keys, such as text_encoder.q.lora_A.weight",
    ),
    "another module is in it": (add_stranger, "the file changes proj_out"),
    "two modules are swapped": (swap, "transformer_blocks.0.attn.to_"),
    "alpha tensors are in it": (
        lambda s: s | {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(4.0)},
        "its loader refuses the file: ValueError",
    ),
    "the names are bare": (
        lambda s: {key.removeprefix("transformer."): value for key, value in s.items()},
        "diffusers: it loads nothing",
    ),
    "the names are unknown": (
        lambda s: {f"unet.{key}": value for key, value in s.items()},
        "ComfyUI: it loads nothing",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_fails(fault: str, dev: Any, adapter: Adapter, tmp_path: Path) -> None:
    spoil, reason = BAD[fault]
    path = common.save(spoil(common.peft_layout(adapter)), tmp_path / "bad.safetensors")
    before = {name: weight.clone() for name, weight in dev.transformer.state_dict().items()}
    certificate = certify.certify(path, adapter=adapter, pipeline=dev)
    assert certificate["passed"] is False
    assert reason in "\n".join(certificate["reasons"])
    after = dev.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    json.dumps(certificate, allow_nan=False)


def blamed(certificate: dict[str, Any]) -> set[str]:
    """Whom the reasons are about."""
    return {reason.partition(": ")[0] for reason in certificate["reasons"]}


def test_a_wrong_alpha_in_the_metadata_fails_in_diffusers_alone(
    dev: Any, adapter: Adapter, tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    metadata = common.peft_metadata(adapter, alpha=3 * adapter.rank)
    common.save(common.peft_layout(adapter), path, metadata)
    certificate = certify.certify(path, adapter=adapter, pipeline=dev)
    assert not certificate["passed"]
    assert (certificate["diffusers"]["strength"], certificate["comfyui"]["strength"]) == (3.0, 1.0)
    assert not certificate["diffusers"]["output"]["within_bound"]
    assert blamed(certificate) == {"diffusers"}


def test_alpha_only_in_the_metadata_fails_in_comfyui_alone(
    dev: Any, adapter: Adapter, tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    metadata = common.peft_metadata(adapter, alpha=adapter.alpha)
    common.save(common.peft_layout(adapter, fold=False), path, metadata)
    certificate = certify.certify(path, adapter=adapter, pipeline=dev)
    assert (certificate["diffusers"]["strength"], certificate["comfyui"]["strength"]) == (1.0, 2.0)
    assert certificate["passed"] is False
    assert blamed(certificate) == {"ComfyUI"}


def test_rounding_excuses_no_more_than_rounding(dev: Any, adapter: Adapter, tmp_path: Path) -> None:
    stronger = Adapter(adapter.down, adapter.up, adapter.rank, 1.02 * adapter.alpha)
    path = tmp_path / "bad.safetensors"
    export.write(stronger, path, dtype=torch.bfloat16, metadata={})
    certificate = certify.certify(path, adapter=adapter, pipeline=dev)
    for loader in ("diffusers", "comfyui"):
        assert certificate[loader]["strength"] == pytest.approx(1.02, abs=0.001)
        assert "rounding explains 0.00" in certificate[loader]["reasons"][0]


def test_an_adapter_that_changes_nothing_fails(dev: Any, adapter: Adapter, tmp_path: Path) -> None:
    zero = {module: torch.zeros_like(up) for module, up in adapter.up.items()}
    nothing = Adapter(adapter.down, zero, adapter.rank, adapter.alpha)
    path = tmp_path / "zero.safetensors"
    export.write(nothing, path, dtype=torch.bfloat16, metadata={})
    certificate = certify.certify(path, adapter=nothing, pipeline=dev)
    assert certificate["reasons"] == ["the adapter changes nothing"]


@pytest.mark.parametrize("visible", [True, False])
def test_a_transformer_that_is_not_restored_fails(
    visible: bool, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = common.pipeline("dev")
    path = tmp_path / "good.safetensors"
    export.write(adapter, path, dtype=torch.float32, metadata={})
    unload = pipeline.transformer.unload_lora

    def careless() -> None:
        unload()
        weight = pipeline.transformer.x_embedder.weight.data
        weight.view(torch.int32)[0, 0] += 1

    monkeypatch.setattr(pipeline.transformer, "unload_lora", careless)
    if not visible:
        monkeypatch.setattr(certify, "_output", lambda transformer, batch: torch.ones(1))
    certificate = certify.certify(path, adapter=adapter, pipeline=pipeline)
    assert certificate["reasons"][-1] == "diffusers: the transformer isn't the same after unloading"


def test_flags_and_mode_are_handed_back(adapter: Adapter, tmp_path: Path) -> None:
    pipeline: Any = common.pipeline("dev")
    pipeline.transformer.train()
    pipeline.transformer.proj_out.weight.requires_grad_(False)
    path = tmp_path / "good.safetensors"
    export.write(adapter, path, dtype=torch.float32, metadata={})
    certify.certify(path, adapter=adapter, pipeline=pipeline)
    frozen = [n for n, p in pipeline.transformer.named_parameters() if not p.requires_grad]
    assert (frozen, pipeline.transformer.training) == (["proj_out.weight"], True)


def test_a_damaged_file_gets_no_certificate(dev: Any, adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    export.write(adapter, path, dtype=torch.bfloat16, metadata={})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        certify.certify(path, adapter=adapter, pipeline=dev)


def test_the_certificate_lies_beside_its_file(dev: Any, adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "mika.safetensors"
    export.write(adapter, path, dtype=torch.bfloat16, metadata={})
    certificate = certify.certify(path, adapter=adapter, pipeline=dev)
    target = certify.write_certificate(certificate, path)
    assert target == tmp_path / "mika.certificate.json"
    assert json.loads(target.read_text(encoding="utf-8")) == certificate
    assert sorted(p.name for p in tmp_path.iterdir()) == [target.name, path.name]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_exported_layout_passes(
    layout: str, dtype: torch.dtype, dev: Any, adapter: Adapter, tmp_path: Path
) -> None:
    path = tmp_path / "good.safetensors"
    export.write(adapter, path, dtype=dtype, metadata={}, layout=layout)
    certificate = certify.certify(path, adapter=adapter, pipeline=dev)
    assert (certificate["reasons"], certificate["passed"]) == ([], True)
    tensors = certificate["file"]["tensors"]
    assert [certificate[loader]["keys_used"] for loader in ("diffusers", "comfyui")] == [
        tensors
    ] * 2
