"""Which models can caption, and why the others can't."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.caption.captioners import Answer, models
from data_tools.caption.captioners.local import Local, Settings
from tests import tiny_vision
from tests.tiny_vision import script
from tests.unit.caption.loading import SETTINGS, hub, load, questions
from train.errors import CheckpointError, ConfigError, MachineError, UserError


def test_the_head_that_is_used_is_the_checkpoints(folders: dict[str, Path]) -> None:
    """Mistral3Config ties head and embedding by default; dev's weights have both, and differ."""
    captioner = load(folders, "dev")
    saved = load_file(folders["dev"] / "text_encoder" / "model.safetensors")
    (name,) = (name for name in saved if name.endswith("lm_head.weight"))
    assert torch.equal(captioner._model.lm_head.weight, saved[name])
    embedding = captioner._model.get_input_embeddings().weight
    assert not torch.equal(captioner._model.lm_head.weight, embedding)


def changed_dev(folder: Path, *, drop: str, config: dict[str, Any]) -> Path:
    """A fresh base whose text encoder lacks weights with `drop` in their names."""
    tiny_vision.make_dev(folder)
    path = folder / "text_encoder" / "model.safetensors"
    weights = {name: weight for name, weight in load_file(path).items() if drop not in name}
    save_file(weights, path, metadata={"format": "pt"})
    path = path.with_name("config.json")
    facts = json.loads(path.read_text())
    facts["text_config"].pop("tie_word_embeddings", None)
    facts.pop("tie_word_embeddings", None)
    path.write_text(json.dumps(facts | config))
    return folder


def test_a_head_that_is_missing_is_no_noise(tmp_path: Path) -> None:
    base = changed_dev(tmp_path / "dev", drop="lm_head", config={})
    with pytest.raises(CheckpointError, match="has no lm_head, so it reads but can't write"):
        models.of_base(str(base), settings=SETTINGS)


def test_a_silent_config_with_a_head_is_fine(tmp_path: Path) -> None:
    base = changed_dev(tmp_path / "dev", drop="nothing", config={})
    captioner: Any = models.of_base(str(base), settings=SETTINGS)
    embedding = captioner._model.get_input_embeddings().weight
    assert not torch.equal(captioner._model.lm_head.weight, embedding)


def test_a_tied_head_is_a_head(tmp_path: Path) -> None:
    base = tiny_vision.make_dev(tmp_path / "dev", tied=True)
    assert isinstance(models.of_base(str(base), settings=SETTINGS), Local)


def test_eyes_that_are_missing_are_no_noise(tmp_path: Path) -> None:
    base = changed_dev(tmp_path / "dev", drop="vision_tower", config={})
    with pytest.raises(CheckpointError, match=r"the weights lack .*vision_tower.* and \d+ more"):
        models.of_base(str(base), settings=SETTINGS)


def test_klein_is_blind(klein_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no vision tower.* hf:MODEL or http:URL"):
        models.of_base(str(klein_folder), settings=SETTINGS)


def test_the_toy_is_random() -> None:
    with pytest.raises(ConfigError, match="random weights"):
        models.of_base("toy", settings=SETTINGS)


# ---- of the hub


def test_a_hub_model_of_mistrals_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    """A repository has in one folder what a base has in two."""
    for part in ("text_encoder", "tokenizer"):
        for path in (folders["dev"] / part).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    captioner = hub(tmp_path)
    script(captioner, ["a fox"])
    assert [answer for _, answer in captioner.answers(questions()[:1])] == [Answer("a fox")]


@pytest.mark.parametrize(("purpose", "language"), [("edit", "en"), ("style", "zh")])
def test_florence_cant_be_told(folders: dict[str, Path], purpose: str, language: str) -> None:
    with pytest.raises(ConfigError, match="Florence-2 takes no instructions"):
        hub(folders["florence"], purpose=purpose, language=language)


def test_florence_says_what_it_will_do(
    folders: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    captioner: Any = hub(folders["florence"])
    assert "it describes everything, the style included" in capsys.readouterr().err
    tokens = captioner._dialect.inputs(questions()[:1])["input_ids"][0]
    text = captioner._dialect.tokenizer.decode(tokens)
    assert "Describe with a paragraph what is shown in the image." in text


def test_a_model_without_words(klein_folder: Path) -> None:
    with pytest.raises(ConfigError, match="a model of type qwen3 doesn't take pictures"):
        hub(klein_folder / "text_encoder")


@pytest.mark.parametrize("source", ["nobody/nothing", "./no/such/folder"])
def test_no_such_model(source: str) -> None:
    with pytest.raises(MachineError, match="can't be loaded"):
        hub(source)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantising_needs_a_gpu_and_says_so_first(quantize: str) -> None:
    settings = Settings(quantize=quantize)
    for opened in (
        lambda: models.of_base("dev", settings=settings),
        lambda: models.of_hub("a/b", settings=settings, purpose="style", language="en"),
    ):
        with pytest.raises(UserError, match=f"--quantize {quantize} needs an NVIDIA GPU"):
            opened()
