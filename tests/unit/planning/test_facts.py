"""Facts of bases: released ones without a download, folders, the hub's cache, own files."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from train.config import BaseConfig
from train.errors import ConfigError
from train.planning import facts


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def sizes(model: str) -> dict[str, float]:
    return {part.name: part.size / 1e9 for part in facts.of(BaseConfig(model=model)).parts}


def test_dev_is_gated_and_large() -> None:
    found = facts.of(BaseConfig())
    assert (found.gated, found.licence) == (True, "FLUX.2-dev Non-Commercial License")
    assert (found.text.used, found.klein) == (30, False)
    assert not any(part.present for part in found.parts)
    assert found.fetched / 1e9 == pytest.approx(112.8, abs=0.1)


@pytest.mark.parametrize("name", ["klein-4b", "black-forest-labs/FLUX.2-klein-base-4B"])
def test_klein_is_known_by_both_names(name: str) -> None:
    """Sizes as the hub lists them: 7.75, 8.05 and 0.168 GB."""
    found = sizes(name)
    assert found["transformer"] == pytest.approx(7.75, abs=0.01)
    assert found["text_encoder"] == pytest.approx(8.05, abs=0.01)
    assert found["vae"] == pytest.approx(0.168, abs=0.001)
    assert not facts.of(BaseConfig(model=name)).gated


def test_parts_in_the_hubs_cache_are_here(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub / "models--black-forest-labs--FLUX.2-klein-base-4B" / "snapshots" / "abc"
    for part, size in {"vae": 1000, "text_encoder": 10}.items():
        (snapshot / part).mkdir(parents=True)
        (snapshot / part / "model.safetensors").write_bytes(bytes(size))
    monkeypatch.setitem(facts.VAE_BYTES, "klein-4b", 1)
    monkeypatch.setattr(facts, "VAE_PARAMETERS", 1000)
    found = facts.of(BaseConfig(model="klein-4b"))
    assert [part.name for part in found.parts if part.present] == ["vae"]  # the other is not whole


def test_a_folder_says_its_own_shape(dev_folder: Path, klein_folder: Path) -> None:
    dev, klein = (facts.of(BaseConfig(model=str(f))) for f in (dev_folder, klein_folder))
    assert (dev.klein, klein.klein) == (False, True)
    assert (dev.fetched, dev.local, dev.licence) == (0, True, None)
    assert dev.transformer["num_single_layers"] == 2
    assert klein.text.head_norms
    weights = dev_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    part = next(part for part in dev.parts if part.name == "transformer")
    assert 0 <= part.size - weights.stat().st_size < 2000  # its config.json


def test_a_file_of_ones_own_replaces_the_bases(tmp_path: Path) -> None:
    own = tmp_path / "flux2.safetensors"
    own.write_bytes(bytes(100))
    found = facts.of(BaseConfig(transformer=str(own)))
    assert found.parts[0] == facts.Part(str(own), 100, present=True)
    assert found.fetched / 1e9 == pytest.approx(48.4, abs=0.1)
    with pytest.raises(ConfigError, match=r"base\.transformer: there is no file"):
        facts.of(BaseConfig(transformer=str(tmp_path / "none")))


def test_an_unknown_repository_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"base\.model: .*someone/else.*dev, klein-4b"):
        facts.of(BaseConfig(model="someone/else"))
