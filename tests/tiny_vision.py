"""Tiny random vision-language models of the real classes, saved as their repositories are.

`script` makes a model say given tokens whatever it sees, by way of its own `generate`: random
weights alone never say anything that could pass for a caption.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests import tiny

WIDTH = 32
PATCH = 16

# As Mistral-Small-3.2's: one system message, [INST] around the user's turn.
MISTRAL_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- '[SYSTEM_PROMPT]' + message['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}
{%- else %}
{{- '[INST]' }}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '[IMG]' }}{% endif %}
{%- endfor %}
{{- '[/INST]' }}
{%- endif %}
{%- endfor %}"""

QWEN_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


def make_dev(folder: Path, *, tied: bool = False) -> Path:
    """A base of dev's classes whose text encoder can see; its tokenizer folder is dev's."""
    tokenizer = _mistral_tokenizer()
    tiny.save_dev(folder, tokenizer=tokenizer, text_encoder=mistral(tokenizer, tied=tied))
    save_pixtral_processor(folder / "tokenizer")
    return folder


def save_pixtral_processor(folder: Path) -> None:
    """The files beside the tokenizer, which name classes that need torchvision."""
    PixtralImageProcessorPil(size={"longest_edge": 1540}).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    facts = json.loads(path.read_text()) | {
        "image_processor_type": "PixtralImageProcessorFast",
        "processor_class": "PixtralProcessor",
    }
    path.write_text(json.dumps(facts))
    own = {"processor_class": "PixtralProcessor", "patch_size": PATCH, "spatial_merge_size": 2}
    (folder / "processor_config.json").write_text(json.dumps(own))


def mistral(tokenizer: Any, *, tied: bool = False) -> Mistral3ForConditionalGeneration:
    """Two layers of words, one of sight; the head is its own unless tied."""
    ids = tokenizer.get_vocab()
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=None,
        tie_word_embeddings=tied,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
    )
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=1540,
        patch_size=PATCH,
    )
    torch.manual_seed(5)
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=text,
            vision_config=vision,
            image_token_index=ids["[IMG]"],
            tie_word_embeddings=tied,
        )
    ).eval()


def make_qwen(folder: Path) -> Path:
    """Qwen3-VL with its processor's files, video part and all."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=tiny.byte_level([*special, "<|image_pad|>", "<|video_pad|>"]),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
        chat_template=QWEN_TEMPLATE,
    )
    ids = tokenizer.get_vocab()
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
    torch.manual_seed(6)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": rope | {"mrope_interleaved": True},
        },
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    half = [0.5, 0.5, 0.5]
    Qwen2VLImageProcessorPil(
        size=size,
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=half,
        image_std=half,
    ).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    facts = json.loads(path.read_text()) | {"processor_class": "Qwen3VLProcessor"}
    path.write_text(json.dumps(facts | {"image_processor_type": "Qwen2VLImageProcessorFast"}))
    video = facts | {"video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


def make_florence(folder: Path) -> Path:
    """Florence-2."""
    core = tiny.byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    core.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    ids = core.get_vocab()
    core.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    vision = Florence2VisionConfig(
        depths=[1, 1],
        patch_size=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[3, 1],
        patch_prenorm=[False, True],
        embed_dim=[8, 16],
        num_heads=[2, 2],
        num_groups=[2, 2],
        window_size=4,
        projection_dim=WIDTH,
        initializer_range=0.3,
    )
    text = BartConfig(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=WIDTH,
        decoder_ffn_dim=WIDTH,
        max_position_embeddings=512,
        init_std=0.3,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        decoder_start_token_id=ids["</s>"],
    )
    torch.manual_seed(7)
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=ids["<image>"])
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    pictures.image_seq_length = 65  # pyright: ignore[reportAttributeAccessIssue]
    Florence2Processor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def script(captioner: Any, answers: Sequence[str], *, end: bool = True) -> None:
    """Have a Local's model give these answers, in the order of its rows, through `generate`."""
    tokenizer, model = captioner._dialect.tokenizer, captioner._model
    ends = captioner._ends[:1] if end else []
    rows = [tokenizer.encode(text, add_special_tokens=False) + ends for text in answers]
    given = iter(rows)
    generate = model.generate

    def scripted(**inputs: Any) -> torch.Tensor:
        mine = [next(given) for _ in range(len(inputs["input_ids"]))]
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]

        def allowed(row: int, sofar: torch.Tensor) -> list[int]:
            position = len(sofar) - start
            return mine[row][position : position + 1] or captioner._ends[:1]

        return generate(**inputs, prefix_allowed_tokens_fn=allowed)

    model.generate = scripted


def _mistral_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]"]
    special += ["[IMG_END]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny.byte_level(special),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=MISTRAL_TEMPLATE,
    )
