"""Base models: what distinguishes them, where they are, and loading their parts one by one.

A base is a folder in diffusers' layout, local or on the hub. Owns loading, not encoding or
training. Each part is fetched and loaded when it is needed and not before.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.config import BaseConfig
from train.errors import ConfigError
from train.loading import hub, packed

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKLFlux2,
        DiffusionPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from train.loading.transformer import Cut, Place
    from train.loading.weights import Files

TOY_FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "toy" / "base"

NAMED_BASES = {
    "dev": "black-forest-labs/FLUX.2-dev",
    "klein-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "klein-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "toy": str(TOY_FOLDER),
}
"""klein means the base checkpoints: an adapter trained on a distilled one draws grey pictures."""

DISTILLED = {
    "klein-4b": "black-forest-labs/FLUX.2-klein-4B",
    "klein-9b": "black-forest-labs/FLUX.2-klein-9B",
}
"""The step-distilled checkpoints of the same shapes, which adapters are used on and not trained."""

LICENCES = {
    "dev": "FLUX.2-dev Non-Commercial License",
    "klein-4b": "Apache-2.0",
    "klein-9b": "FLUX Non-Commercial License",
    "toy": "Apache-2.0",
}
LICENCES |= {NAMED_BASES[name]: licence for name, licence in LICENCES.items()}
"""Of the base's weights, by name and by repository; an adapter is bound by them."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

MAX_TEXT_TOKENS = 512
"""Prompts are padded and cut to this, or to the tokenizer's own limit where that is smaller."""


@dataclass(frozen=True)
class Family:
    """What dev and klein do differently."""

    name: str
    pipeline: str
    text_encoder: str
    text_layers: tuple[int, int, int]
    padding_side: str
    true_cfg: bool


@dataclass(frozen=True)
class Inference:
    """How pictures are made unless the user says otherwise."""

    steps: int
    guidance: float
    """Embedded in dev, true guidance on klein; 1 is none."""


FULL, FEW = Inference(50, 4.0), Inference(4, 1.0)

FAMILIES = {
    "Flux2Pipeline": Family(
        "dev", "Flux2Pipeline", "Mistral3ForConditionalGeneration", (10, 20, 30), "left", False
    ),
    "Flux2KleinPipeline": Family(
        "klein", "Flux2KleinPipeline", "Qwen3ForCausalLM", (9, 18, 27), "right", True
    ),
}


@dataclass(frozen=True)
class Base:
    """A base that exists: `name` as the user gave it, `source` a folder or a hub repository."""

    name: str
    source: str
    revision: str | None
    family: Family
    distilled: bool
    dtype: torch.dtype
    quantize: str = "none"
    transformer: Path | None = None
    """The file that has the transformer's weights instead of the base's own."""

    @property
    def inference(self) -> Inference:
        """The authors' defaults."""
        return FEW if self.distilled else FULL

    def folder(self, part: str) -> Path:
        """The local folder of one part, fetched first if the base is on the hub."""
        if Path(self.source).is_dir():
            folder = Path(self.source) / part
            if not folder.is_dir():
                raise ConfigError(
                    f"base.model: {self.source} has no folder '{part}'. "
                    "It must be a whole diffusers folder, as save_pretrained writes it."
                )
            return folder
        from huggingface_hub import snapshot_download

        def download() -> str:
            return snapshot_download(
                self.source, revision=self.revision, allow_patterns=[f"{part}/*"]
            )

        return Path(hub.fetch(self.source, download)) / part

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> "AutoencoderKLFlux2":
        """The VAE, frozen."""
        from diffusers import AutoencoderKLFlux2

        vae = AutoencoderKLFlux2.from_pretrained(self.folder("vae"), dtype=dtype)
        return _frozen(vae, device)

    def transformer_files(self) -> "Files":
        """Where the transformer's weights are; of a base whose file is given, only the config."""
        from train.loading.weights import Files

        if self.transformer is None:
            folder = self.folder("transformer")
            return Files(folder / "config.json", folder, None, self.dtype, self.quantize)
        if Path(self.source).is_dir():
            config = self.folder("transformer") / "config.json"
        else:
            config = Path(hub.fetch_file(self.source, "transformer/config.json", self.revision))
        return Files(config, None, self.transformer, self.dtype, self.quantize)

    def load_transformer(
        self,
        device: torch.device,
        *,
        place: "Place | None" = None,
        cache: Path | None = None,
        cut: "Cut | None" = None,
        main: bool = True,
    ) -> "Flux2Transformer2DModel":
        """The transformer, frozen, in the base's type or quantised on the device.

        place: says of each parameter where it stays; none means on the device. cache: folder that
        keeps a quantised copy for the next time. cut, main: see `transformer.load`.
        Raises ConfigError for weights that don't fit.
        """
        from train.loading import transformer

        files = self.transformer_files()
        return transformer.load(files, device, place=place, cache=cache, cut=cut, main=main)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer with its chat template; for dev without its image processor."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder("tokenizer"))

    def load_text_encoder(
        self, device: torch.device, *, quantize: str = "none"
    ) -> "PreTrainedModel":
        """What a prompt passes through of the text encoder, frozen, in the base's type.

        That is the embedding and the decoder layers up to the last state that is used (dev: 30 of
        40; no vision tower, no output head). Other weights are never read. Each goes from the file
        straight to the device, and with `quantize` (int8, nf4) it is quantised there before the
        next one comes, so the device never holds the whole model in bf16.
        Raises ConfigError for a folder that lacks any of these weights.
        """
        from transformers import AutoConfig, AutoModel

        folder, last = self.folder("text_encoder"), self.family.text_layers[-1]
        config = AutoConfig.from_pretrained(folder).get_text_config()
        layers = config.num_hidden_layers
        config.num_hidden_layers = min(layers, last)
        if config.to_dict().get("layer_types"):
            config.layer_types = config.layer_types[:last]
        with _quiet():
            model, found = AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=self.dtype,
                key_mapping={r"^(model\.)?language_model\.(model\.)?": ""},
                quantization_config=packed.settings(quantize, dtype=self.dtype),
                device_map={"": device},
                output_loading_info=True,
            )
        lacking = sorted(found["missing_keys"])
        if layers < last or lacking:
            problem = f"{layers} layers, {last} are needed" if layers < last else f"no {lacking[0]}"
            raise ConfigError(
                f"base.model: {folder} isn't {self.family.name}'s text encoder: it has {problem}. "
                "It must be the one of the base's own repository."
            )
        if layers > last:
            model.norm = torch.nn.Identity()  # it belongs after the whole model's last layer
        if quantize == "nf4" and device.type == "cpu":
            packed.compute_as_on_a_gpu(model)
        return model.requires_grad_(False).eval()

    def load_scheduler(self) -> Any:
        """The sampler's noise schedule, a FlowMatchEulerDiscreteScheduler."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder("scheduler"))

    def pipeline(
        self,
        *,
        scheduler: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        transformer: Any = None,
    ) -> "DiffusionPipeline":
        """diffusers' own pipeline of this family around the parts at hand; others stay None."""
        import diffusers

        parts = {
            "scheduler": scheduler,
            "vae": vae,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "transformer": transformer,
        }
        if self.family.true_cfg:
            parts["is_distilled"] = self.distilled
        return getattr(diffusers, self.family.pipeline)(**parts)


def _frozen(model: Any, device: torch.device) -> Any:
    return model.requires_grad_(False).eval().to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of the weights that were left out on purpose."""
    from transformers.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(before)


def max_text_tokens(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Length that prompts are padded and cut to."""
    return min(MAX_TEXT_TOKENS, tokenizer.model_max_length)


def resolve(config: BaseConfig) -> Base:
    """Find the base, read what it is, and refuse what can't be trained.

    Raises ConfigError for a folder or repository that isn't a FLUX.2 base and MachineError where
    the hub needs a login, a licence or a connection.
    """
    source = NAMED_BASES.get(config.model, config.model)
    index, revision = _read_index(source, config.revision)
    family = FAMILIES.get(index.get("_class_name", ""))
    if family is None:
        raise ConfigError(
            f"base.model: {source} is a {index.get('_class_name', 'model without a class name')}; "
            f"Kindling trains {' and '.join(FAMILIES)}."
        )
    distilled = bool(index.get("is_distilled", False))
    if distilled and not config.allow_distilled:
        raise ConfigError(
            f"base.model: {source} is step-distilled; an adapter trained on it draws grey, generic "
            "pictures. Train on its base checkpoint (klein-4b, klein-9b): the adapter works on the "
            "distilled one too. base.allow_distilled: true insists."
        )
    found = Base(
        config.model,
        source,
        revision,
        family,
        distilled,
        DTYPES[config.dtype],
        config.quantize,
        None if config.transformer is None else Path(config.transformer),
    )
    if found.transformer is not None or (Path(source) / "transformer").is_dir():
        found.transformer_files().source()  # hours before it is loaded, if prompts come first
    return found


def _read_index(source: str, revision: str | None) -> tuple[dict[str, Any], str | None]:
    """The pipeline's model_index.json and, for the hub, the commit that it is of."""
    if Path(source).is_dir():
        path, commit = Path(source) / "model_index.json", None
        if revision is not None:
            raise ConfigError(f"base.revision: {source} is a local folder and has no revisions")
        if not path.is_file():
            raise ConfigError(
                f"base.model: {source} has no model_index.json. It must be a diffusers folder; "
                "a single .safetensors file isn't one."
            )
    elif source.startswith((".", "/")) or source.count("/") != 1:
        known = ", ".join(NAMED_BASES)
        raise ConfigError(
            f"base.model: there is no folder {source}, and it isn't a hub repository "
            f"(owner/name) or one of {known}."
        )
    else:
        path = Path(hub.fetch_file(source, "model_index.json", revision))
        commit = path.parent.name
    return json.loads(path.read_text(encoding="utf-8")), commit
