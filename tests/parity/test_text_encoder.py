"""The cut text encoder and its cache against the whole encoder inside diffusers' pipeline."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny
from train.config import BaseConfig, EncodeConfig
from train.encoding import encode_text, texts
from train.encoding.cache import Cache, FileDigests
from train.encoding.encode import Keys
from train.errors import ConfigError
from train.loading.base import Base, resolve

CPU = torch.device("cpu")
PROMPTS = ["", "a", "a red circle", "blue " * 4, "一只红色的猫", "x " * 12, "y " * 40]
"""From the shortest to one that is cut off."""


def whole_encoder(base: Base) -> Any:
    """As the pipeline would load it."""
    model_class = getattr(transformers, base.family.text_encoder)
    return model_class.from_pretrained(base.folder("text_encoder"), dtype=base.dtype).eval()


@torch.no_grad()
def by_pipeline(base: Base, encoder: Any, prompts: list[str]) -> list[torch.Tensor]:
    """The pipeline's embeddings, prompt by prompt."""
    tokenizer = base.load_tokenizer()
    pipeline: Any = base.pipeline(text_encoder=encoder, tokenizer=tokenizer)
    limit = min(512, tokenizer.model_max_length)
    return [pipeline.encode_prompt(prompt, max_sequence_length=limit)[0][0] for prompt in prompts]


def by_cache(base: Base, root: Path, prompts: list[str], **settings: Any) -> list[torch.Tensor]:
    """Ours, through encoding, disk and reading."""
    cache = Cache(root)
    digests = FileDigests(root / "digests.json")
    keys = Keys.of(base, digests=digests, settings=EncodeConfig(**settings))
    encode_text.encode_prompts(base, prompts, keys=keys, cache=cache, device=CPU)
    return [texts.get(cache, keys.prompt(prompt)) for prompt in prompts]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """To the bit."""
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


@pytest.fixture(params=["dev", "klein"])
def folder(request) -> Path:
    """Both families."""
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture
def changed(dev_folder, tmp_path) -> Callable[[Callable[[Path], None]], Base]:
    """A dev base whose text encoder's folder was changed."""

    def change(edit: Callable[[Path], None]) -> Base:
        folder = tmp_path / "dev"
        shutil.copytree(dev_folder, folder)
        edit(folder / "text_encoder")
        return resolve(BaseConfig(model=str(folder)))

    return change


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_cut_encoder_gives_the_pipelines_bits(folder, dtype):
    base = resolve(BaseConfig(model=str(folder), dtype=dtype))
    cut, whole = base.load_text_encoder(CPU), whole_encoder(base)
    assert_equal(by_pipeline(base, cut, PROMPTS), by_pipeline(base, whole, PROMPTS))
    names = [name for name, _ in cut.named_parameters()]
    last = base.family.text_layers[-1]
    assert len({name.split(".")[1] for name in names if name.startswith("layers.")}) == last
    assert not any(word in name for name in names for word in ("vision", "head", "projector"))
    assert not {name for name in names if name.startswith("norm")}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_cache_gives_the_pipelines_bits(folder, dtype, tmp_path):
    base = resolve(BaseConfig(model=str(folder), dtype=dtype))
    expected = by_pipeline(base, whole_encoder(base), PROMPTS)
    assert_equal(by_cache(base, tmp_path, PROMPTS), expected)


def test_512_positions_in_every_window(dev_folder, tmp_path, monkeypatch):
    """dev's real length; 3 prompts and more of each window, so that each is tried."""
    shutil.copytree(dev_folder, tmp_path / "dev")
    edit_json(tmp_path / "dev" / "tokenizer" / "tokenizer_config.json", model_max_length=4096)
    base = resolve(BaseConfig(model=str(tmp_path / "dev")))
    lengths = [0, 1, 57, 60, 90, 123, 130, 200, 251, 507, 508, 600]
    prompts = ["?" * length for length in lengths]
    ran = []
    run = encode_text.TextEncoder.run
    monkeypatch.setattr(
        encode_text.TextEncoder,
        "run",
        lambda self, prompts, *, window: (
            ran.append((len(prompts), window)),
            run(self, prompts, window=window),
        )[1],
    )
    found = by_cache(base, tmp_path / "cache", prompts)
    # a proof for each window and then its three prompts; the empty one, and those that are too long
    assert Counter(ran) == {(8, 64): 2, (4, 128): 2, (2, 256): 3, (1, 512): 4}
    assert_equal(found, by_pipeline(base, whole_encoder(base), prompts))


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantised_encoder_gives_its_own_bits(dev_folder, quantize, tmp_path):
    """Those of one prompt, whole, and near the true ones; the linears are quantised."""
    base = resolve(BaseConfig(model=str(dev_folder)))
    quantised = base.load_text_encoder(CPU, quantize=quantize)
    kind = {"int8": torch.int8, "nf4": torch.uint8}[quantize]
    assert quantised.get_submodule("layers.3.mlp.up_proj").weight.dtype == kind
    own = by_pipeline(base, quantised, PROMPTS)
    assert_equal(by_cache(base, tmp_path, PROMPTS, text_quantize=quantize), own)
    true = by_pipeline(base, whole_encoder(base), PROMPTS)
    for one, two in zip(own, true, strict=True):
        assert 0 < ((one - two).float().norm() / two.float().norm()) < 0.1


def edit_json(path: Path, **changes: Any) -> None:
    """Change a JSON file's entries."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def rename(folder: Path) -> None:
    """Weights named as newer versions of transformers name them, in two shards."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    renamed = {
        (
            f"model.{name}"
            if not name.startswith("language_model.model.")
            else name.replace("language_model.model.", "model.language_model.")
        ): tensor.clone()
        for name, tensor in tensors.items()
    }
    weights = {}
    for number in (1, 2):
        shard = f"model-0000{number}-of-00002.safetensors"
        names = sorted(renamed)[number - 1 :: 2]
        save_file({n: renamed[n] for n in names}, folder / shard, metadata={"format": "pt"})
        weights |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_other_names_and_shards_are_the_same_encoder(changed, dev_folder):
    base = changed(rename)
    expected = by_pipeline(
        base, whole_encoder(resolve(BaseConfig(model=str(dev_folder)))), PROMPTS[:3]
    )
    assert_equal(by_pipeline(base, base.load_text_encoder(CPU), PROMPTS[:3]), expected)


def keep_layers(folder: Path, count: int) -> None:
    """Leave only the first layers."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = count
    path.write_text(json.dumps(config), encoding="utf-8")


def test_an_encoder_of_30_layers_keeps_its_norm(changed):
    """Its last state is the one after the norm, and so it is for the pipeline."""
    base = changed(lambda folder: keep_layers(folder, 30))
    whole = whole_encoder(base)
    torch.nn.init.uniform_(whole.get_submodule("model.language_model.norm").weight)
    whole.save_pretrained(base.folder("text_encoder"))
    expected = by_pipeline(base, whole, PROMPTS[:3])
    assert_equal(by_pipeline(base, base.load_text_encoder(CPU), PROMPTS[:3]), expected)


def lose_a_weight(folder: Path) -> None:
    """As a broken conversion leaves it."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("language_model.model.layers.7.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda folder: keep_layers(folder, 12), "12 layers, 30 are needed"),
        (lose_a_weight, "no layers.7.mlp.up_proj.weight"),
    ],
)
def test_an_encoder_that_lacks_weights_is_refused(changed, edit, problem):
    """transformers would fill them in at random."""
    base = changed(edit)
    with pytest.raises(ConfigError) as caught:
        base.load_text_encoder(CPU)
    assert str(caught.value) == (
        f"base.model: {base.folder('text_encoder')} isn't dev's text encoder: it has {problem}. "
        "It must be the one of the base's own repository."
    )


def test_the_whole_pipeline_has_our_layers(folder):
    """The states that we name are the ones that the pipeline takes unasked."""
    base = resolve(BaseConfig(model=str(folder)))
    cut = base.load_text_encoder(CPU)
    tokenizer = base.load_tokenizer()
    pipeline: Any = base.pipeline(text_encoder=cut, tokenizer=tokenizer)
    limit = tokenizer.model_max_length
    named, _ = pipeline.encode_prompt(
        "a", max_sequence_length=limit, text_encoder_out_layers=base.family.text_layers
    )
    assert torch.equal(named[0], by_pipeline(base, cut, ["a"])[0])
    assert named.shape[-1] == 3 * tiny.TEXT_WIDTH
