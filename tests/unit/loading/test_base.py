"""Finding a base, and what is said where there is none."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from tests import bfl, tiny
from train.config import BaseConfig
from train.errors import ConfigError, MachineError, UserError
from train.loading import base

REPOSITORY = "someone/FLUX.2-other"
COMMIT = "0123456789abcdef"


def index_only(folder: Path, **index: object) -> Path:
    """A folder with nothing but a model_index.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def complaint(**config) -> str:
    """What `resolve` says."""
    with pytest.raises(UserError) as caught:
        base.resolve(BaseConfig(**config))
    return str(caught.value)


def test_a_local_base_is_what_its_index_says(dev_folder, klein_folder):
    dev = base.resolve(BaseConfig(model=str(dev_folder)))
    assert (dev.family.name, dev.dtype, dev.revision) == ("dev", torch.bfloat16, None)
    assert (dev.family.text_layers, dev.family.padding_side) == ((10, 20, 30), "left")
    klein = base.resolve(BaseConfig(model=str(klein_folder), dtype="fp32"))
    assert (klein.family.name, klein.dtype, klein.distilled) == ("klein", torch.float32, False)
    assert (klein.family.text_layers, klein.family.padding_side) == ((9, 18, 27), "right")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_parts_come_frozen_and_in_the_bases_type(dev_folder, dtype):
    found = base.resolve(BaseConfig(model=str(dev_folder), dtype=dtype))
    cpu = torch.device("cpu")
    for model in (found.load_transformer(cpu), found.load_text_encoder(cpu)):
        assert {weight.dtype for weight in model.parameters()} == {base.DTYPES[dtype]}
        assert not any(weight.requires_grad for weight in model.parameters())
        assert not model.training
    assert found.load_vae(cpu, torch.float32).dtype == torch.float32


def test_prompts_are_as_long_as_the_tokenizer_says_but_512_at_most(dev_folder):
    tokenizer = base.resolve(BaseConfig(model=str(dev_folder))).load_tokenizer()
    assert base.max_text_tokens(tokenizer) == tokenizer.model_max_length == 32
    tokenizer.model_max_length = 131072
    assert base.max_text_tokens(tokenizer) == 512


def test_klein_means_the_base_checkpoints():
    assert base.NAMED_BASES["klein-4b"] == "black-forest-labs/FLUX.2-klein-base-4B"
    assert base.NAMED_BASES["klein-9b"] == "black-forest-labs/FLUX.2-klein-base-9B"


def test_every_named_base_has_a_licence_by_name_and_by_repository():
    for name, repository in base.NAMED_BASES.items():
        assert base.LICENCES[name] == base.LICENCES[repository]


def test_a_folder_without_an_index(tmp_path):
    assert complaint(model=str(tmp_path)) == (
        f"base.model: {tmp_path} has no model_index.json. It must be a diffusers folder; "
        "a single .safetensors file isn't one."
    )


def test_a_base_of_another_class(tmp_path):
    folder = index_only(tmp_path / "flux1", _class_name="FluxPipeline")
    assert complaint(model=str(folder)) == (
        f"base.model: {folder} is a FluxPipeline; "
        "Kindling trains Flux2Pipeline and Flux2KleinPipeline."
    )


@pytest.mark.parametrize("part", ["vae", "transformer", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part(dev_folder, tmp_path, part):
    index = (dev_folder / "model_index.json").read_text(encoding="utf-8")
    folder = index_only(tmp_path / "partial", **json.loads(index))
    found = base.resolve(BaseConfig(model=str(folder)))
    with pytest.raises(ConfigError) as caught:
        found.folder(part)
    assert str(caught.value) == (
        f"base.model: {folder} has no folder '{part}'. "
        "It must be a whole diffusers folder, as save_pretrained writes it."
    )


def test_a_distilled_base_is_refused_unless_the_user_insists(tmp_path):
    folder = index_only(tmp_path / "k", _class_name="Flux2KleinPipeline", is_distilled=True)
    assert complaint(model=str(folder)) == (
        f"base.model: {folder} is step-distilled; an adapter trained on it draws grey, generic "
        "pictures. Train on its base checkpoint (klein-4b, klein-9b): the adapter works on the "
        "distilled one too. base.allow_distilled: true insists."
    )
    assert base.resolve(BaseConfig(model=str(folder), allow_distilled=True)).distilled


def test_a_distilled_base_as_diffusers_saves_it_is_seen(tmp_path):
    folder = tiny.make_klein(tmp_path / "klein", distilled=True)
    assert "is step-distilled" in complaint(model=str(folder))
    shutil.rmtree(folder)


def test_a_local_folder_has_no_revisions(dev_folder):
    assert complaint(model=str(dev_folder), revision="main") == (
        f"base.revision: {dev_folder} is a local folder and has no revisions"
    )


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "flux", "a/b/c"])
def test_what_is_neither_folder_nor_repository(model):
    assert complaint(model=model) == (
        f"base.model: there is no folder {model}, and it isn't a hub repository "
        "(owner/name) or one of dev, klein-4b, klein-9b, toy."
    )


def test_what_can_be_no_repository():
    assert complaint(model="my pictures/flux 2") == (
        "base.model: there is no folder my pictures/flux 2, "
        "and no hub repository can have that name"
    )


def raising(error: Exception):
    """A function that raises it whatever it is given."""

    def call(*args: object, **kwargs: object) -> str:
        raise error

    return call


def test_without_a_network_the_real_client_raises_what_we_expect():
    """HF_HUB_OFFLINE is set for all tests."""
    assert "isn't on this machine and the hub can't be reached" in complaint(model=REPOSITORY)


@pytest.fixture
def hub(monkeypatch, dev_folder, tmp_path) -> list[tuple]:
    """A hub that holds the tiny base; what was asked of it."""
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(dev_folder, snapshot)
    asked: list[tuple] = []

    def hf_hub_download(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(snapshot / file)

    def snapshot_download(repository: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, *allow_patterns, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_parts_are_fetched_when_needed_all_of_the_commit_of_the_index(hub):
    """The branch may move between two parts; the commit can't."""
    found = base.resolve(BaseConfig(model=REPOSITORY, revision="main"))
    assert hub == [(REPOSITORY, "model_index.json", "main")]
    assert found.revision == COMMIT
    assert found.load_scheduler().config.shift == 3.0
    assert hub[1:] == [(REPOSITORY, "scheduler/*", COMMIT)]


def test_a_refusal_between_two_parts_is_explained_too(hub, monkeypatch):
    found = base.resolve(BaseConfig(model=REPOSITORY))
    offline = raising(errors.LocalEntryNotFoundError("not cached"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(MachineError, match="the hub can't be reached"):
        found.folder("vae")


def test_a_single_file_is_checked_when_the_base_is_found(dev_folder, tmp_path):
    """Not hours later, when the prompts have been encoded."""
    path = tmp_path / "x.safetensors"
    config = {"model": str(dev_folder), "transformer": str(path)}
    assert complaint(**config) == f"base.transformer: {path}: there is no file x.safetensors."
    bfl.save({"x.lora_A.weight": torch.zeros(2)}, path)
    assert "this is an adapter, not a base" in complaint(**config)
    made = bfl.tensors(tiny.transformer(guidance=False))
    bfl.save(made, path)
    assert "guidance_in.in_layer.weight isn't there" in complaint(**config)
    bfl.save(bfl.tensors(tiny.transformer(guidance=True)), path)
    found = base.resolve(BaseConfig(**config, quantize="fp8"))  # pyright: ignore
    assert (found.transformer, found.quantize) == (path, "fp8")


def test_of_a_hub_base_with_a_single_file_only_the_config_is_fetched(
    dev_folder, tmp_path, monkeypatch
):
    path = bfl.save(bfl.tensors(tiny.transformer(guidance=True)), tmp_path / "x.safetensors")
    fetched = []

    def download(repository: str, name: str, *, revision: str | None) -> str:
        target = tmp_path / COMMIT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(dev_folder / name, target)
        fetched.append((repository, name, revision))
        return str(target)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = base.resolve(BaseConfig(model=REPOSITORY, transformer=str(path)))
    found.load_transformer(torch.device("cpu"))
    config = (REPOSITORY, "transformer/config.json", COMMIT)
    assert fetched == [(REPOSITORY, "model_index.json", None), config, config]
