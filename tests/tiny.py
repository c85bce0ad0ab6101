"""Tiny random bases of the real classes, as diffusers folders: seconds to make, no meaning.

Every weight that a fresh model has at zero or one is drawn at random too, so that a test can tell
a used value from an unused one. For a base that draws, there is scripts/toy.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
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
    tokenizer = _mistral_tokenizer()
    Flux2Pipeline(
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=toy_text.new_text_encoder(tokenizer, seed=1).float(),
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


def _mistral_tokenizer() -> PreTrainedTokenizerFast:
    """The toy's template around words of our own: its captions mustn't move kept figures."""
    special = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]"]
    core = _byte_level(special)
    core.add_special_tokens([AddedToken(SYSTEM_MESSAGE, normalized=False, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        truncation_side="right",
        model_max_length=32,
        chat_template=toy_text.CHAT_TEMPLATE,
    )


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    return Qwen2TokenizerFast(
        tokenizer_object=_byte_level(special),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
        model_max_length=40,
        chat_template=KLEIN_TEMPLATE,
    )


def _byte_level(special: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["user assistant a red circle on a blue background"], trainer)
    return core
