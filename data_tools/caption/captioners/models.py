"""Which local model: the base's own text encoder, or one of the hub.

Owns finding out what a model is and whether it can caption at all, before its weights are loaded.
"""

import json
import sys
from pathlib import Path
from typing import Any

from data_tools.caption.captioners.dialects import Chat, Dialect, Florence, Pixtral
from data_tools.caption.captioners.local import Local, Settings, check_machine, load
from train.errors import CheckpointError, ConfigError, MachineError

OTHERS = "use another captioner: hf:MODEL or http:URL (see `kindling caption --help`)"


def of_base(name: str, *, settings: Settings) -> Local:
    """The text encoder of a base, with its vision tower and its head: dev's Mistral Small 3.2.

    Raises ConfigError for a base whose text encoder is blind (klein) or means nothing (toy), and
    CheckpointError if its weights have no head to speak with.
    """
    from transformers import AutoImageProcessor, Mistral3ForConditionalGeneration

    from train.config import BaseConfig
    from train.loading import base as bases

    check_machine(settings)
    # whether it is distilled doesn't matter here: it's the text encoder that looks
    base = bases.resolve(BaseConfig(model=name, allow_distilled=True))
    if base.source == bases.NAMED_BASES["toy"]:
        raise ConfigError(f"the toy base's text encoder has random weights; {OTHERS}")
    if base.family.text_encoder != "Mistral3ForConditionalGeneration":
        raise ConfigError(
            f"base {name}: its text encoder ({base.family.text_encoder}) has no vision tower, so "
            f"it can't look at pictures; {OTHERS}"
        )
    folder = base.folder("text_encoder")
    _check_head(folder, name=name)
    tokenizer = base.load_tokenizer()
    image_processor = AutoImageProcessor.from_pretrained(base.folder("tokenizer"))
    model = load(Mistral3ForConditionalGeneration, folder, settings=settings, name=name)
    dialect = Pixtral(
        tokenizer, image_processor=image_processor, config=model.config, name=f"base {name}"
    )
    identity = f"base {base.source} {base.revision or ''}"
    return Local(model, dialect=dialect, identity=identity, settings=settings)


def of_hub(source: str, *, settings: Settings, purpose: str, language: str) -> Local:
    """Any image-text-to-text model of transformers, by its repository or folder.

    Code in a repository is never run. Raises ConfigError or MachineError if the model can't be had,
    or can't do the purpose in the language.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    check_machine(settings)
    name = f"hf:{source}"
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unavailable(name, error) from None
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ConfigError(
            f"{name}: a model of type {config.model_type} doesn't take pictures and words to "
            "words; name an image-text-to-text model, such as hf:Qwen/Qwen3-VL-8B-Instruct"
        )
    if config.model_type == "florence2":
        _check_florence(name, purpose=purpose, language=language)
    try:
        dialect = _dialect(source, config, name=name)
        model = load(AutoModelForImageTextToText, source, settings=settings, name=name)
    except (OSError, ImportError) as error:
        raise _unavailable(name, error) from None
    return Local(model, dialect=dialect, identity=name, settings=settings)


def load_processor(source: str, config: Any) -> Any:
    """The processor of a model, for pictures and words.

    Many want torchvision for videos alone. Without it, theirs is built without a video part.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except ImportError:
        if type(config) not in PROCESSOR_MAPPING:
            raise
    processor_class: Any = PROCESSOR_MAPPING[type(config)]
    if "video_processor" not in processor_class.get_attributes():
        raise MachineError(
            f"hf:{source}: its processor needs torchvision (pip install torchvision)"
        )

    class Blindfolded(processor_class):
        """Without eyes for videos."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(source),
        "tokenizer": AutoTokenizer.from_pretrained(source),
        "video_processor": None,
    }
    settings, _ = processor_class.get_processor_dict(source)
    return Blindfolded.from_args_and_dict(
        [parts[name] for name in processor_class.get_attributes()], settings
    )


def _dialect(source: str, config: Any, *, name: str) -> Dialect:
    if config.model_type == "mistral3":
        from transformers import AutoImageProcessor, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source)
        image_processor = AutoImageProcessor.from_pretrained(source)
        return Pixtral(tokenizer, image_processor=image_processor, config=config, name=name)
    processor = load_processor(source, config)
    if config.model_type == "florence2":
        return Florence(processor)
    return Chat(processor, name=name)


def _check_florence(name: str, *, purpose: str, language: str) -> None:
    """Florence-2 describes one picture in English, and can't be told what to leave out."""
    if purpose == "edit" or language != "en":
        what = "compare pictures" if purpose == "edit" else "write Chinese"
        raise ConfigError(f"{name}: Florence-2 takes no instructions and can't {what}; {OTHERS}")
    print(
        f"{name}: Florence-2 takes no instructions: it describes everything, "
        f"{'the style' if purpose == 'style' else 'constant traits'} included",
        file=sys.stderr,
    )


def _check_head(folder: Path, *, name: str) -> None:
    """The weights must have an lm_head, or the config must say that the embedding serves as one.

    Without this check transformers ties the two by default, and answers noise.
    """
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sections = (config, config.get("text_config", {}))
    if any(section.get("tie_word_embeddings") is True for section in sections):
        return
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            if any(key.endswith("lm_head.weight") for key in weights.keys()):  # noqa: SIM118
                return
    raise CheckpointError(
        f"base {name}: the text encoder in {folder} has no lm_head, so it reads but can't write; "
        "it may have been stripped for encoding. Take the whole one from its repository, or "
        f"{OTHERS}"
    )


def _unavailable(name: str, error: Exception) -> MachineError:
    reason = " ".join(str(error).split())[:400]
    return MachineError(
        f"{name}: can't be loaded. It must be a repository of the hub (owner/name) or a folder; "
        f"a gated one needs `hf auth login`, an offline machine the download first. {reason}"
    )
