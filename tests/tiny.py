"""Tiny random bases of the real classes, as diffusers folders: seconds to make, no meaning.

Every weight that a fresh model has at zero or one is drawn at random too, so that a test can tell
a used value from an unused one. For a base that draws, there is scripts/toy.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer
from transformers import (
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
    Qwen3Config,
    Qwen3ForCausalLM,
)

from scripts.toy import text as toy_text

TEXT_WIDTH = 48
LATENT_CHANNELS = 4

KLEIN_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{%- if enable_thinking is defined and enable_thinking is false -%}<think></think>{%- endif -%}
{%- endif -%}"""


def make_dev(folder: Path) -> Path:
    """A tiny base of dev's classes."""
    # words of our own, not the toy's: its captions mustn't move kept figures
    tokenizer = toy_text.as_dev(byte_level(toy_text.SPECIAL))
    text_encoder = toy_text.new_text_encoder(tokenizer, seed=1).float()
    return save_dev(folder, tokenizer=tokenizer, text_encoder=text_encoder)


def save_dev(
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: Mistral3ForConditionalGeneration,
) -> Path:
    """Words of any kind, and what is tiny of the rest of dev."""
    Flux2Pipeline(
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        transformer=transformer(guidance=True),
    ).save_pretrained(folder)
    return folder


def make_klein(folder: Path, *, distilled: bool = False) -> Path:
    """A tiny base of klein's classes."""
    tokenizer = _qwen_tokenizer()
    torch.manual_seed(2)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=24,
    )
    Flux2KleinPipeline(
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=Qwen3ForCausalLM(config).eval(),
        tokenizer=tokenizer,
        transformer=transformer(guidance=False),
        is_distilled=distilled,
    ).save_pretrained(folder)
    return folder


def transformer(
    *, guidance: bool, seed: int = 3, double: int = 2, single: int = 2
) -> Flux2Transformer2DModel:
    """Two double and two single blocks, or as many as asked for, 32 wide."""
    torch.manual_seed(seed)
    model = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    _randomize(model)
    return model.eval()


def vae(*, seed: int = 4) -> AutoencoderKLFlux2:
    """Four levels, with batch-norm statistics that are far from zero and one."""
    torch.manual_seed(seed)
    model = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    assert model.bn.running_mean is not None
    assert model.bn.running_var is not None
    model.bn.running_mean.normal_(0.3, 0.5)
    model.bn.running_var.uniform_(0.2, 3.0)
    return model.eval()


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Configured as dev's."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(0.1 * torch.randn_like(parameter))


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    return Qwen2TokenizerFast(
        tokenizer_object=byte_level(special),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
        model_max_length=40,
        chat_template=KLEIN_TEMPLATE,
    )


def byte_level(special: Sequence[str]) -> Tokenizer:
    """A few words and all bytes."""
    corpus = ["user assistant a red circle on a blue background"]
    return toy_text.byte_level(corpus, special=special, size=400)
