"""Captions from a model of transformers on this machine.

Owns loading and generating; how a kind of model is asked is its dialect's matter. Decoding is
greedy, so that a caption depends on the picture, the words and the model only.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.caption.captioners import Answer, Question
from data_tools.caption.captioners.dialects import Dialect
from train.errors import CheckpointError, ConfigError, MachineError

_WHOLE = ["lm_head", "visual", "vision_tower", "vision_model", "multi_modal_projector", "connector"]
"""Parts that are never quantised: small, and what they lose shows at once."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


@dataclass(frozen=True)
class Settings:
    """How a model is loaded and run."""

    batch_size: int = 1
    max_tokens: int = 512
    dtype: str = "bf16"
    """bf16, fp16 or fp32."""
    quantize: str = "none"
    """none, 8bit or 4bit (nf4): by bitsandbytes, on an NVIDIA GPU only."""


class Local:
    """A captioner on this machine."""

    def __init__(self, model: Any, *, dialect: Dialect, identity: str, settings: Settings) -> None:
        self.identity = f"{identity} {settings.dtype} {settings.quantize}"
        self._model = model
        self._dialect = dialect
        self._max_tokens = settings.max_tokens
        self._batch_size = settings.batch_size
        ends = model.generation_config.eos_token_id
        if ends is None:
            ends = dialect.tokenizer.eos_token_id
        self._ends = ends if isinstance(ends, list) else [ends]
        for name in _SAMPLING:  # what greedy decoding would warn of
            setattr(model.generation_config, name, None)

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        """Batch by batch; one that doesn't fit the GPU's memory is halved, as all after it."""
        import torch

        source = iter(questions)
        while batch := list(islice(source, self._batch_size)):
            while batch:
                part = batch[: self._batch_size]
                try:
                    found = self._generate(part)
                except torch.OutOfMemoryError:
                    found = None
                if found is None:  # out here the failed batch's tensors are free
                    self._halve(len(part))
                    continue
                yield from zip(part, found, strict=True)
                batch = batch[len(part) :]

    def _generate(self, questions: Sequence[Question]) -> list[Answer]:
        import torch

        inputs = self._dialect.inputs(questions).to(self._model.device, self._model.dtype)
        tokenizer = self._dialect.tokenizer
        pad = tokenizer.pad_token_id
        with torch.inference_mode():
            rows = self._model.generate(
                **inputs,
                max_new_tokens=self._max_tokens,
                do_sample=False,
                eos_token_id=self._ends,
                pad_token_id=self._ends[0] if pad is None else pad,
            )
        # a decoder repeats the prompt; an encoder-decoder starts with a token that may be an end
        start = 1 if self._model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return [self._answer(row) for row in rows[:, start:].tolist()]

    def _answer(self, tokens: list[int]) -> Answer:
        if not any(end in tokens for end in self._ends):
            return Answer(problem="cut off at the token limit; raise --max-tokens")
        return Answer(self._dialect.tokenizer.decode(tokens, skip_special_tokens=True))

    def _halve(self, size: int) -> None:
        import torch

        if size == 1:
            raise MachineError(
                "the GPU's memory doesn't hold the captioner and one picture; try --quantize 4bit, "
                "a smaller --longest-side, or a smaller model"
            )
        torch.cuda.empty_cache()
        self._batch_size = size // 2
        print(f"out of GPU memory: batches of {self._batch_size} from here on", file=sys.stderr)


def check_machine(settings: Settings) -> None:
    """Raises ConfigError for a quantisation that this machine can't do."""
    import torch

    if settings.quantize != "none" and not torch.cuda.is_available():
        raise ConfigError(
            f"--quantize {settings.quantize} needs an NVIDIA GPU, and PyTorch sees none here; "
            "leave it out, or use a server: --captioner http:URL"
        )


def load(model_class: Any, source: str | Path, *, settings: Settings, name: str) -> Any:
    """A model with all its weights, for inference, on the GPU if there is one.

    Raises CheckpointError for weights that don't fill the model: a layer left at random would
    answer noise.
    """
    import torch

    from train.loading.base import DTYPES

    on_gpu = torch.cuda.is_available()
    dtype = DTYPES[settings.dtype]
    model, report = model_class.from_pretrained(
        source,
        dtype=dtype,
        quantization_config=_quantization(settings.quantize, dtype),
        device_map={"": 0 if on_gpu else "cpu"},
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        raise CheckpointError(
            f"{name}: the weights lack {shown}, so it would answer noise. It was saved by another "
            "version of its code, or the download is not whole"
        )
    return model.requires_grad_(False).eval()


def _quantization(quantize: str, dtype: Any) -> Any:
    if quantize == "none":
        return None
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_WHOLE)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_WHOLE,
    )
