"""What is known of a base before any of its weights are there: shapes, files, gate, licence.

Owns the look at what is on this machine: a local folder's files, or the hub's cache. Goes to no
network and reads no weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import BaseConfig
from train.errors import ConfigError
from train.loading.base import LICENCES, NAMED_BASES
from train.loading.shapes import SHAPES, TEXT_ENCODERS, VAE_BYTES, VAE_PARAMETERS, TextEncoder

GATED = ("dev", "klein-9b")
"""Bases whose licence has to be accepted on the hub first."""

SMALL = 20_000_000
"""Bytes, assumed: tokenizer and configs."""

USED_LAYERS = {"mistral": 30, "qwen3": 27}
"""The deepest hidden state that a prompt's embedding takes, by the decoder's kind."""


@dataclass(frozen=True)
class Part:
    """A folder of the base, or its transformer's single file."""

    name: str
    size: int
    """Bytes of its files, all of them."""
    present: bool
    """On this machine already."""


@dataclass(frozen=True)
class Facts:
    """A base as far as a plan needs it."""

    name: str
    source: str
    local: bool
    gated: bool
    licence: str | None
    transformer: Mapping[str, Any]
    """Arguments of Flux2Transformer2DModel."""
    vae: Mapping[str, Any]
    """Arguments of AutoencoderKLFlux2; empty means the released one."""
    text: TextEncoder
    klein: bool
    """Of klein's family: true guidance runs the model twice, and pads are each caption's own."""
    parts: tuple[Part, ...]

    @property
    def fetched(self) -> int:
        """Bytes still to be downloaded."""
        return sum(part.size for part in self.parts if not part.present)


def of(config: BaseConfig) -> Facts:
    """The facts of a config's base.

    Raises ConfigError for a base that is neither released, nor a folder, nor in the hub's cache.
    """
    source = NAMED_BASES.get(config.model, config.model)
    names = {repository: name for name, repository in NAMED_BASES.items()}
    if Path(source).is_dir():
        return _local(config, Path(source), source=source)
    name = names.get(source)
    if name in SHAPES:
        return _released(config, name, source=source)
    snapshot = _snapshot(source)
    if snapshot is not None and (snapshot / "transformer" / "config.json").is_file():
        return _local(config, snapshot, source=source)
    known = ", ".join(NAMED_BASES)
    raise ConfigError(
        f"base.model: there is no folder {source}, and of repositories that aren't on this machine "
        f"a plan knows those of {known}. Plan with one of these, or with a "
        "folder."
    )


def _released(config: BaseConfig, name: str, *, source: str) -> Facts:
    snapshot, text = _snapshot(source), TEXT_ENCODERS[name]
    shape = SHAPES[name]
    sizes = {
        "transformer": 2 * shape.parameters,
        "text_encoder": 2 * text.stored,
        "vae": VAE_BYTES[name] * VAE_PARAMETERS,
        "tokenizer and configs": SMALL,
    }
    parts = [Part(part, size, present=_there(snapshot, part, size)) for part, size in sizes.items()]
    return Facts(
        name=config.model,
        source=source,
        local=False,
        gated=name in GATED,
        licence=LICENCES.get(config.model),
        transformer=shape.config(),
        vae={},
        text=text,
        klein=name != "dev",
        parts=tuple(_own_file(config, parts)),
    )


def _local(config: BaseConfig, folder: Path, *, source: str) -> Facts:
    names = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")
    parts = [Part(name, _size(folder / name), present=True) for name in names]
    text = _read(folder / "text_encoder")
    text = text.get("text_config", text)
    return Facts(
        name=config.model,
        source=source,
        local=True,
        gated=False,
        licence=LICENCES.get(config.model),
        transformer=_arguments(folder / "transformer"),
        vae=_arguments(folder / "vae"),
        text=_text_encoder(text),
        klein="Klein" in _read(folder, name="model_index.json").get("_class_name", ""),
        parts=tuple(_own_file(config, parts)),
    )


def _text_encoder(config: Mapping[str, Any]) -> TextEncoder:
    kind, heads = config["model_type"], config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    return TextEncoder(
        layers=layers,
        used=min(layers, USED_LAYERS.get(kind, layers)),
        width=config["hidden_size"],
        inner=config["intermediate_size"],
        heads=heads,
        groups=config["num_key_value_heads"],
        head_width=config["head_dim"],
        vocabulary=config["vocab_size"],
        head_norms=kind == "qwen3",
    )


def _own_file(config: BaseConfig, parts: list[Part]) -> list[Part]:
    """With base.transformer the base's own transformer isn't fetched."""
    if config.transformer is None:
        return parts
    path = Path(config.transformer)
    if not path.is_file():
        raise ConfigError(f"base.transformer: there is no file {path}")
    own = Part(str(path), path.stat().st_size, present=True)
    return [own if part.name == "transformer" else part for part in parts]


def _snapshot(repository: str) -> Path | None:
    """The newest snapshot of a repository in the hub's cache, whole or not."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    found = sorted(folder.glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _there(snapshot: Path | None, part: str, size: int) -> bool:
    """Whether a part's weights are in the cache; up to 2 % may be headers that we don't count."""
    if snapshot is None:
        return False
    if part == "tokenizer and configs":
        return (snapshot / "tokenizer").is_dir()
    return _size(snapshot / part) > 0.98 * size


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _arguments(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in _read(folder).items() if not key.startswith("_")}


def _read(folder: Path, *, name: str = "config.json") -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"base.model: there is no {path}; it must be a whole diffusers folder")
    return json.loads(path.read_text(encoding="utf-8"))
