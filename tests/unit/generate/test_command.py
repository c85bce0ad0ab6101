"""What `kindling generate` refuses, before anything is loaded; seeds, and a prompt file's way."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests import runs, tiny
from tests.interop import common
from train.adapters import export
from train.commands import generate as command
from train.config import BaseConfig
from train.errors import CheckpointError, ConfigError, DataError
from train.generate import drawing
from train.loading import base
from train.lora import Adapter

SHAPED = {"dev": 6144, "klein-4b": 3072}


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights may be touched."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(drawing.Base, "load_transformer", fail)
    monkeypatch.setattr(drawing.encode_text, "encode_prompts", fail)


def call(tmp_path: Path, *arguments: str) -> int:
    where = ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    return command.main([*where, *arguments])


def one_linear(path: Path, width: int) -> Path:
    module = "transformer_blocks.0.attn.to_q"
    halves = {module: torch.ones(1, width)}, {module: torch.ones(width, 1)}
    export.write(Adapter(*halves, 1, 1.0), path, dtype=torch.float32, metadata={})
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to draw: give --prompt, once or more, or --prompts FILE"),
        (["--prompt", "x", "--size", "1000"], "--size: 1000x1000: both sides must be multiples"),
        (["--prompt", "x", "--lora", "a.safetensors=strong"], "'strong' is no number"),
        (["--prompt", "x", "--base", "toy", "--distilled"], "toy has no step-distilled"),
        (["--prompt", "x", "--base", "/nowhere"], "there is no folder /nowhere"),
    ],
)
def test_refused(arguments: list[str], words: str, tmp_path: Path, unloaded: None) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        call(tmp_path, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_missing_adapter_or_reference_is_named(tmp_path: Path, unloaded: None) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: there is no such file"):
        call(
            tmp_path, "--prompt", "x", "--base", "toy", "--lora", str(tmp_path / "none.safetensors")
        )
    with pytest.raises(DataError, match=r"none\.png: can't be opened"):
        call(tmp_path, "--prompt", "x", "--reference", str(tmp_path / "none.png"))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, unloaded: None) -> None:
    path = one_linear(tmp_path / "a.safetensors", SHAPED["klein-4b"])
    with pytest.raises(CheckpointError) as error:
        call(tmp_path, "--prompt", "x", "--base", "toy", "--lora", f"{path}=0.5")
    assert "a.safetensors: an adapter of klein-4b, but the base is 160 wide" in str(error.value)


def test_guidance_of_a_distilled_base_is_refused(tmp_path: Path, unloaded: None) -> None:
    folder = tiny.make_klein(tmp_path / "klein", distilled=True)
    with pytest.raises(ConfigError, match="is step-distilled and takes no guidance"):
        call(tmp_path, "--prompt", "x", "--base", str(folder), "--guidance", "4")


def test_the_base_is_the_adapters_unless_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def note(config: BaseConfig) -> None:
        asked.append(config.model)
        raise ConfigError("enough")

    monkeypatch.setattr(base, "resolve", note)
    path = one_linear(tmp_path / "a.safetensors", SHAPED["klein-4b"])
    for more in ([], ["--distilled"], ["--base", "toy"]):
        with pytest.raises(ConfigError, match="enough"):
            call(tmp_path, "--prompt", "x", "--lora", str(path), *more)
    with pytest.raises(ConfigError, match="enough"):
        call(tmp_path, "--prompt", "x")
    assert asked == ["klein-4b", "black-forest-labs/FLUX.2-klein-4B", "toy", "dev"]


def test_seeds_count_on_from_each_prompts_own(
    klein_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """And on a quantised base, with an adapter."""
    runs.draw_picture(tmp_path / "a.png", size=(64, 64))
    rows = [{"prompt": "a fox", "seed": 5}, {"prompt": "b", "references": ["a.png"], "size": "96"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    adapter = tmp_path / "mika.safetensors"
    transformer = tiny.transformer(guidance=False)
    export.write(common.random_adapter(transformer), adapter, dtype=torch.bfloat16, metadata={})
    shared = ["--base", str(klein_folder), "--steps", "1", "--quantize", "int8", "--size", "64"]
    asked = ["--prompts", str(prompts), "--seeds", "2", "--lora", f"{adapter}=0.25"]
    assert call(tmp_path, *shared, *asked) == 0
    listing = (tmp_path / "out" / "pictures.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in listing]
    assert [(row["prompt"], row["seed"], row["width"]) for row in found] == [
        *(("a fox", 5, 64), ("a fox", 6, 64), ("b", 0, 96), ("b", 1, 96)),
    ]
    assert found[0]["quantize"] == "int8"
    assert [found[0]["references"], found[2]["references"][0]["file"]] == [[], "a.png"]
    assert found[0]["adapters"][0]["strength"] == 0.25
    assert "sheet-0001-0004.png" in capsys.readouterr().out
