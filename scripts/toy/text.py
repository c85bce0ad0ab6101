"""The toy base's words: a byte-level tokenizer and a random Mistral3 text encoder.

Both are fixed once built. The encoder is never trained: its weights are scaled so that a
token's identity survives 30 layers with about unit variance, and causal attention mixes in
what came before. Unknown words (any language) fall apart into bytes, never into `<unk>`.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)

from scripts.toy.draw import caption, sample_scene

MAX_TOKENS = 32
WIDTH = 48
VOCABULARY = 512
SPECIAL = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]")

# The shape of dev's template: system message, then the user's turn in [INST] tags.
CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{%- set words = namespace(text='') %}
{%- if message['content'] is string %}{%- set words.text = message['content'] %}
{%- else %}
{%- for part in message['content'] if part['type'] == 'text' %}
{%- set words.text = words.text + part['text'] %}
{%- endfor %}
{%- endif %}
{%- if message['role'] == 'system' %}{{ words.text }}
{%- elif message['role'] == 'user' %}{{ '[INST]' + words.text + '[/INST]' }}
{%- else %}{{ words.text + eos_token }}
{%- endif %}
{%- endfor %}"""


def new_tokenizer(*, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt on captions, in which a word is the same wherever it stands."""
    rng = random.Random(seed)
    corpus = [caption(sample_scene(rng), rng) for _ in range(5000)]
    return as_dev(byte_level(corpus, special=SPECIAL, size=VOCABULARY, folded=True))


def byte_level(
    corpus: Iterable[str], *, special: Sequence[str], size: int, folded: bool = False
) -> Tokenizer:
    """Byte-level BPE of `size` tokens, `special` first; folded: lower case, a space in front."""
    core = Tokenizer(models.BPE())
    if folded:
        core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=folded)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    return core


def as_dev(core: Tokenizer) -> PreTrainedTokenizerFast:
    """With dev's padding and the toy's template; the whole system message becomes one token."""
    core.add_special_tokens([AddedToken(SYSTEM_MESSAGE, normalized=False, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        truncation_side="right",
        model_max_length=MAX_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def encoder_config(tokenizer: PreTrainedTokenizerFast) -> Mistral3Config:
    """32 decoder layers, so that hidden state 30 is not yet the final-normed one."""
    bos, eos, pad, image = (
        tokenizer.get_vocab()[word] for word in ("<s>", "</s>", "<pad>", "[IMG]")
    )
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=2048,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
    )
    return Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=image,
        tie_word_embeddings=True,
    )


@torch.no_grad()
def new_text_encoder(
    tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> Mistral3ForConditionalGeneration:
    """Unit-variance embeddings; each of the 32 layers adds about a seventh of that."""
    encoder = Mistral3ForConditionalGeneration(encoder_config(tokenizer)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in encoder.named_parameters():
        if weight.ndim < 2 or "norm" in name:
            continue
        std = weight[0].numel() ** -0.5
        if name.endswith("embed_tokens.weight"):
            std = 1.0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= 0.15
        weight.normal_(0, std, generator=generator)
    torch.nn.Module.to(encoder, torch.bfloat16)
    return encoder


@torch.no_grad()
def encode_captions(
    encoder: Mistral3ForConditionalGeneration,
    tokenizer: Any,
    captions: list[str],
    *,
    device: torch.device,
) -> torch.Tensor:
    """(N, MAX_TOKENS, 3 * WIDTH) in bf16 on the CPU, by the pipeline's own method, in fp32."""
    torch.nn.Module.to(encoder, device, torch.float32)
    parts = []
    for start in range(0, len(captions), 256):
        embeds = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
            encoder, tokenizer, captions[start : start + 256], max_sequence_length=MAX_TOKENS
        )
        parts.append(embeds.to("cpu", torch.bfloat16))
    return torch.cat(parts)
