"""Prompts to cache entries, in a phase of its own.

Loads the text encoder only if a prompt is missing from the cache and frees it before it returns.
An embedding is what the pipeline's own `encode_prompt` makes of its prompt alone, to the bit.
Owns what is left out to get there sooner: with dev's pads on the left, most of what the pipeline
computes are pads, the same for every prompt.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from train import usage
from train.config import EncodeConfig
from train.encoding import texts
from train.encoding.cache import Cache
from train.encoding.encode import Keys, free, mine
from train.errors import MachineError
from train.loading.base import Base, max_text_tokens

PARTS = (8, 4, 2, 1)
"""A prompt may run in the last 1/8, 1/4, 1/2 of all positions, with as many others beside it: as
many tokens a run as one whole prompt, so on a GPU the same matrix shapes."""

OWN_PADS = "own_pads"
"""Note of an entry whose pads differ from the shared ones: how many it keeps."""

WORTH_A_PROOF = 3
"""Prompts of one length that pay for the run that proves a shorter window."""


@torch.no_grad()
def encode_prompts(
    base: Base,
    wanted: Sequence[str],
    *,
    keys: Keys,
    cache: Cache,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Encode the prompts of this share that the cache lacks; returns how many those were.

    share: (rank, world): this process looks after every world-th of them.
    Raises MachineError if an embedding isn't finite.
    """
    jobs = mine({keys.prompt(prompt): prompt for prompt in wanted}, share)
    missing = {prompt: name for name, prompt in jobs if not texts.holds(cache, name)}
    if not missing:
        return 0
    show = share[0] == 0
    with (
        usage.phase("encode captions", len(missing), device=device, show=show),
        tqdm(total=len(missing), desc="encode captions", delay=2, disable=not show) as bar,
    ):
        encoder = TextEncoder(base, device=device, settings=keys.settings)
        pads = texts.put_pads(cache, encoder.pads()) if encoder.pads_first else None
        for prompt, rows in encoder.encode(missing):
            _put(cache, missing[prompt], prompt, rows, encoder=encoder, pads=pads)
            bar.update()
        del encoder
        free()
    return len(missing)


class TextEncoder:
    """The base's text encoder inside its pipeline; runs prompts in as few positions as it may.

    With pads first, attention looks back only and pads are masked, so positions before a prompt's
    own change nothing; but another shape may be another kernel, with other last bits. So a window
    is used where the empty prompt has the same bits in it as whole, on this machine; otherwise
    prompts run whole.
    """

    def __init__(self, base: Base, *, device: torch.device, settings: EncodeConfig) -> None:
        self._base = base
        self._device = device
        self._tokenizer = base.load_tokenizer()
        self.model = base.load_text_encoder(device, quantize=settings.text_quantize)
        self.model.register_forward_pre_hook(self._cut, with_kwargs=True)
        self._pipeline: Any = base.pipeline(text_encoder=self.model, tokenizer=self._tokenizer)
        self.limit = max_text_tokens(self._tokenizer)
        """Positions of a whole run."""
        self._window = self.limit
        self.eight_bits = settings.text_storage == "8bit"
        self.pads_first = base.family.padding_side == "left"
        # LLM.int8 may treat a column by all rows that it sees, so no row can be left out
        self._may_cut = self.pads_first and settings.text_quantize != "int8"
        self._proved: dict[int, bool] = {}

    def run(self, prompts: Sequence[str], *, window: int) -> Tensor:
        """Embeddings (B, window, J) on the CPU, of the last `window` positions."""
        self._window = window
        embeds, _ = self._pipeline.encode_prompt(
            prompt=list(prompts),
            device=self._device,
            max_sequence_length=self.limit,
            text_encoder_out_layers=self._base.family.text_layers,
        )
        if not embeds.isfinite().all():
            raise MachineError(
                f"the text encoder's output isn't finite, for {prompts[0]!r} or one beside it. "
                "Nothing of it was stored. Try base.dtype: bf16 without encode.text_quantize, or "
                "the torch version in constraints.txt."
            )
        return embeds.cpu()

    def encode(self, prompts: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Each prompt with its embedding's last rows (n, J): its own tokens and a pad or more.

        All rows where a shorter run isn't the same, or wouldn't be sooner.
        """
        groups: dict[int, list[str]] = defaultdict(list)
        for prompt in prompts:
            groups[self._shortest(self.tokens(prompt))].append(prompt)
        for window, group in groups.items():
            if window < self.limit and (len(group) < WORTH_A_PROOF or not self._same_bits(window)):
                window = self.limit
            beside = self.limit // window
            for start in range(0, len(group), beside):
                some = group[start : start + beside]
                filled = [*some, *[""] * (beside - len(some))]  # every run has the proved shape
                yield from zip(some, self.run(filled, window=window), strict=False)

    def tokens(self, prompt: str) -> int:
        """Tokens of a prompt in its chat template, uncut."""
        return count_tokens(self._base, self._tokenizer, prompt)

    def pads(self) -> Tensor:
        """The rows before the empty prompt, which has more of them than any other (P, J)."""
        return self._empty[: -self.tokens("")].contiguous()

    @cached_property
    def _empty(self) -> Tensor:
        """The empty prompt's embedding, whole (L, J)."""
        return self.run([""], window=self.limit)[0]

    def _shortest(self, tokens: int) -> int:
        """The smallest window with room for the tokens and a pad, by which it can be checked."""
        if not self._may_cut:
            return self.limit
        windows = (self.limit // part for part in PARTS if self.limit % part == 0)
        return next((window for window in windows if window > tokens), self.limit)

    def _same_bits(self, window: int) -> bool:
        if window not in self._proved:
            alike = self.run([""] * (self.limit // window), window=window)
            self._proved[window] = all(torch.equal(rows, self._empty[-window:]) for rows in alike)
        return self._proved[window]

    def _cut(self, module: Any, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict]:
        """The encoder's inputs without their first positions; the others keep their numbers."""
        first = self.limit - self._window
        if first:
            for name in ("input_ids", "attention_mask"):
                inputs[name] = inputs[name][:, first:]
            inputs["position_ids"] = torch.arange(first, self.limit, device=self._device)[None]
        return args, inputs


def _put(
    cache: Cache,
    name: str,
    prompt: str,
    rows: Tensor,
    *,
    encoder: TextEncoder,
    pads: texts.Pads | None,
) -> None:
    """Store an embedding without its pads if all that were computed are the shared ones."""
    tokens, limit = encoder.tokens(prompt), encoder.limit
    notes = {"tokens": str(tokens), "limit": str(limit)}
    count = len(rows) - tokens
    if pads is not None and count > 0:
        if texts.begins_with(rows, pads, count=count, at=limit - len(rows)):
            rows = rows[count:]
        else:
            rows = rows if len(rows) == limit else encoder.run([prompt], window=limit)[0]
            notes[OWN_PADS] = str(limit - tokens)
    texts.put(
        cache,
        name,
        rows,
        length=limit,
        pads=pads if len(rows) < limit else None,
        eight_bits=encoder.eight_bits,
        notes=notes,
    )


def truncated(wanted: Sequence[str], *, keys: Keys, cache: Cache) -> dict[str, tuple[int, int]]:
    """Of encoded prompts those that were cut: prompt -> (its tokens, the limit)."""
    notes = {prompt: cache.notes(keys.prompt(prompt)) for prompt in wanted}
    counts = {p: (int(note["tokens"]), int(note["limit"])) for p, note in notes.items()}
    return {prompt: (n, limit) for prompt, (n, limit) in counts.items() if n > limit}


def describe(wanted: Iterable[str], *, keys: Keys, cache: Cache) -> str:
    """`text cache: 24 captions, 0.6 MB each; pads once, 14.3 MB`, and what kept its own pads."""
    names = [keys.prompt(prompt) for prompt in wanted]
    notes = [cache.notes(name) for name in names]
    blocks = {note["pads"] for note in notes if "pads" in note}
    line = f"text cache: {len(names)} captions, {_megabytes(cache, names) / len(names):.2g} MB each"
    own = sum(OWN_PADS in note for note in notes)
    if blocks:
        line += f"; pads once, {_megabytes(cache, blocks):.2g} MB"
    if own:
        line += f"; {own} with pads of their own, which weren't the shared ones"
    return line


def _megabytes(cache: Cache, names: Iterable[str]) -> float:
    return sum(cache.path(name).stat().st_size for name in names) / 1e6


def count_tokens(base: Base, tokenizer: Any, prompt: str) -> int:
    """Tokens of a prompt in its chat template, before anything is cut or padded."""
    if base.family.name == "dev":
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        ids = tokenizer.apply_chat_template(
            format_input([prompt]), add_generation_prompt=False, tokenize=True, return_dict=True
        )["input_ids"]
        return len(ids[0])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return len(tokenizer(text)["input_ids"])
