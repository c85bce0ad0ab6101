"""The exported file: its numbers, its metadata, writing it whole or not at all, hostile files."""

import json
import os
import pickle
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from train.adapters import export, files
from train.adapters.intent import PEFT_METADATA
from train.config import Config
from train.errors import CheckpointError, ConfigError, MachineError
from train.lora import Adapter

QUERY = "transformer_blocks.0.attn.to_q"
LINEAR2 = "single_transformer_blocks.1.attn.to_out"

FACTS = export.Facts(
    name="mika-v3",
    created=datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC),
    version="0.1.0",
    base="black-forest-labs/FLUX.2-dev",
    base_revision="abc123",
    shape=(6144, 8, 48),
    resolution=1024,
    steps=1500,
    config_hash="c0ffee",
    data_hash="da7a",
    guidance=1.0,
    sigma_sampling="logit-normal(0.0, 1.0)",
    training_shift="tokens",
    inference_shift="empirical mu",
    trigger="mikachan 角色",
    title="Mika",
    licence="FLUX Non-Commercial License",
)


def adapter(*, rank: int = 2, alpha: float = 3.0) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    shapes = {LINEAR2: (8, 32), QUERY: (8, 8)}
    down = {m: torch.randn(rank, i, generator=draw) for m, (_, i) in shapes.items()}
    up = {m: torch.randn(o, rank, generator=draw) for m, (o, _) in shapes.items()}
    return Adapter(down, up, rank, alpha)


def written(path: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    export.write(adapter(), path, dtype=dtype, metadata=export.describe(FACTS, adapter()))
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_the_scale_is_folded_before_rounding(tmp_path: Path) -> None:
    tensors = load_file(written(tmp_path / "a.safetensors", dtype=torch.bfloat16))
    up, down = adapter().up[QUERY], adapter().down[QUERY]
    assert torch.equal(tensors[f"transformer.{QUERY}.lora_B.weight"], (1.5 * up).bfloat16())
    assert torch.equal(tensors[f"transformer.{QUERY}.lora_A.weight"], down.bfloat16())
    twice_rounded = 1.5 * up.bfloat16()
    assert not torch.equal(tensors[f"transformer.{QUERY}.lora_B.weight"], twice_rounded)


def test_names(tmp_path: Path) -> None:
    tensors = load_file(written(tmp_path / "a.safetensors"))
    modules = (QUERY, LINEAR2)
    assert set(tensors) == {f"transformer.{m}.lora_{h}.weight" for m in modules for h in "AB"}


def test_reading_back_gives_the_same_updates_in_the_same_order(tmp_path: Path) -> None:
    found = export.read(written(tmp_path / "a.safetensors"))
    assert (found.rank, found.scale, list(found.down)) == (2, 1.0, [QUERY, LINEAR2])
    for module in (QUERY, LINEAR2):
        torch.testing.assert_close(found.delta(module), adapter().delta(module))


def test_reading_takes_alpha_from_the_file_as_diffusers_does(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors")
    settings = json.loads(metadata_of(path)[PEFT_METADATA])
    settings["transformer.lora_alpha"] = 5.0
    save_file(load_file(path), path, metadata={PEFT_METADATA: json.dumps(settings)})
    assert export.read(path).alpha == 5.0


def test_metadata(tmp_path: Path) -> None:
    found = metadata_of(written(tmp_path / "a.safetensors"))
    settings = json.loads(found.pop(PEFT_METADATA))
    digest = found.pop("sshs_model_hash")
    assert settings == {
        "transformer.bias": "none",
        "transformer.lora_alpha": 2,
        "transformer.lora_dropout": 0.0,
        "transformer.r": 2,
        "transformer.target_modules": [QUERY, LINEAR2],
    }
    assert digest == files.body_hash(tmp_path / "a.safetensors")
    assert found == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "Flux.2-dev/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "Mika",
        "modelspec.date": "2026-03-04T05:06:07+00:00",
        "modelspec.resolution": "1024x1024",
        "modelspec.trigger_phrase": "mikachan 角色",
        "modelspec.usage_hint": "Trigger word: mikachan 角色",
        "modelspec.license": "FLUX Non-Commercial License",
        "modelspec.hash_sha256": f"0x{digest}",
        "ss_base_model_version": "flux_2_dev",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_output_name": "mika-v3",
        "ss_sd_model_name": "black-forest-labs/FLUX.2-dev",
        "ss_resolution": "(1024, 1024)",
        "ss_steps": "1500",
        "ss_training_finished_at": "1772600767.0",
        "kindling.version": "0.1.0",
        "kindling.base": "black-forest-labs/FLUX.2-dev",
        "kindling.base_revision": "abc123",
        "kindling.config_hash": "c0ffee",
        "kindling.data_hash": "da7a",
        "kindling.steps": "1500",
        "kindling.rank": "2",
        "kindling.alpha": "3.0",
        "kindling.weights": "last",
        "kindling.guidance": "1.0",
        "kindling.sigma_sampling": "logit-normal(0.0, 1.0)",
        "kindling.training_shift": "tokens",
        "kindling.inference_shift": "empirical mu",
    }


def test_settings_in_kohyas_words() -> None:
    tree = {"name": "a", "data": {"path": "p"}, "train": {"steps": 9}, "optim": {"lr": 2e-4}}
    found = export.settings(Config.model_validate(tree))
    assert (found["ss_max_train_steps"], found["ss_learning_rate"]) == ("9", "0.0002")
    assert not found.keys() & export.describe(FACTS, adapter()).keys()
    assert "ss_network_module" not in found


def test_what_is_unknown_is_left_out_and_a_title_is_always_there() -> None:
    facts = replace(FACTS, shape=(64, 2, 2), title=None, trigger=None, guidance=None)
    found = export.describe(facts, adapter())
    assert found["modelspec.title"] == "mika-v3"
    assert found["modelspec.architecture"] == "Flux.2-custom-64-2-2/lora"
    absent = {"ss_base_model_version", "modelspec.trigger_phrase", "kindling.guidance"}
    assert not absent & found.keys()
    klein = export.describe(replace(FACTS, shape=(3072, 5, 20)), adapter())
    assert klein["modelspec.architecture"] == "Flux.2-klein-4b/lora"


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (written(tmp_path / n).read_bytes() for n in ("a.safetensors", "b.safetensors"))
    assert first == second


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    broken = adapter()
    broken.up[QUERY][0, 0] = value
    with pytest.raises(CheckpointError, match=rf"{QUERY} aren't finite.*Export an earlier"):
        export.write(broken, tmp_path / "a.safetensors", dtype=torch.bfloat16, metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1e6, 1e-9])
def test_what_fp16_cannot_hold_is_refused(factor: float, tmp_path: Path) -> None:
    extreme = adapter()
    extreme.up[QUERY].mul_(factor)
    with pytest.raises(ConfigError, match=rf"{QUERY} are too large or too small for float16"):
        export.write(extreme, tmp_path / "a.safetensors", dtype=torch.float16, metadata={})
    export.write(extreme, tmp_path / "a.safetensors", dtype=torch.bfloat16, metadata={})


@pytest.mark.parametrize("moment", ["writing", "renaming", "checking"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full_disk(header: object, body: object, target: Path) -> None:
        target.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    def no_rename(source: object, target: object) -> None:
        raise OSError(5, "Input/output error")

    if moment == "writing":
        monkeypatch.setattr(files, "_assemble", full_disk)
    elif moment == "renaming":
        monkeypatch.setattr(os, "replace", no_rename)
    else:
        monkeypatch.setattr(files, "body_hash", lambda path: "other bytes")
    with pytest.raises(MachineError, match=str(path)):
        export.write(adapter(), path, dtype=torch.bfloat16, metadata={})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def interrupted(header: object, body: object, target: Path) -> None:
        target.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_assemble", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(path, dtype=torch.bfloat16)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (before, [path])


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(MachineError, match="can't be written"):
        written(tmp_path / "runs" / "a.safetensors")


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_is_never_opened(writer: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "a.safetensors", tmp_path / "exploded"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save({"weight": Bomb(mark)}, path)
    with pytest.raises(CheckpointError, match="pickle under a safetensors name"):
        export.read(path)
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_that_is_cut_off(keep: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        export.read(path)


def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate((1 << 30) + 16)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        export.read(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            export.read(path)


A, B = f"transformer.{QUERY}.lora_A.weight", f"transformer.{QUERY}.lora_B.weight"
PAIR = {A: torch.ones(2, 8), B: torch.ones(8, 2)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no adapter weights"),
        ({A: PAIR[A]}, f"{QUERY} has no lora_B"),
        ({B: PAIR[B]}, f"{QUERY} has no lora_A"),
        (PAIR | {B: torch.ones(8, 3)}, r"shapes \(2, 8\) and \(8, 3\)"),
        (PAIR | {A: torch.ones(2)}, r"shapes \(2,\)"),
        (PAIR | {f"transformer.{QUERY}.alpha": torch.ones(())}, "is no key of Kindling's layout"),
        ({key.removeprefix("transformer."): w for key, w in PAIR.items()}, "is no key"),
        (PAIR | {B: torch.full((8, 2), torch.nan)}, "aren't finite"),
    ],
)
def test_contents_that_do_not_fit(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        export.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"transformer.lora_alpha": "x"}', "is damaged"),
        ('{"transformer.use_rslora": true}', "uses peft's use_rslora"),
        ('{"transformer.alpha_pattern": {"a": 1}}', "uses peft's alpha_pattern"),
    ],
)
def test_settings_that_do_not_fit(settings: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(PAIR, path, metadata={PEFT_METADATA: settings})
    with pytest.raises(CheckpointError, match=message):
        export.read(path)
