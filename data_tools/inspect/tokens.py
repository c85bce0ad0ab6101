"""Tokens of captions, by the tokenizer of the base that they will be trained on.

Owns the rule that nothing is guessed and nothing is downloaded: where the tokenizer isn't on this
machine, captions aren't counted. How tokens are counted is the encoder's.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from data_tools.inspect.report import Tokens
from train.config import BaseConfig
from train.errors import UserError


def count(config: BaseConfig, texts: Iterable[str]) -> Tokens:
    """Tokens of each text with the base's chat template, special tokens included.

    Imports torch and transformers, which takes seconds.
    """
    from train.encoding import encode_text
    from train.loading import base

    source = base.NAMED_BASES.get(config.model, config.model)
    here = _local(source, config.revision)
    if here is None:
        return Tokens(f"not counted: {source} isn't on this machine")
    try:
        # only its tokenizer is wanted: whether it suits training is no matter here
        found = base.resolve(BaseConfig(model=str(here), allow_distilled=True))
        tokenizer = found.load_tokenizer()
    except (UserError, OSError, ValueError) as error:
        return Tokens(f"not counted: {config.model} has no usable tokenizer here ({_short(error)})")
    limit = base.max_text_tokens(tokenizer)
    tokenizer.model_max_length = sys.maxsize  # its warning of long texts says what we say better
    counts = {t: encode_text.count_tokens(found, tokenizer, t) for t in dict.fromkeys(texts)}
    return Tokens(f"by the tokenizer of {config.model}", limit, counts)


def _local(source: str, revision: str | None) -> Path | None:
    """The folder of a base: the folder itself, or what the hub's cache has of a repository."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
