"""How models are asked: Pixtral without torchvision, and chat templates."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.caption.captioners import dialects
from tests import tiny_vision
from tests.tiny_vision import PATCH
from tests.unit.caption.loading import hub, load, questions
from train.errors import CheckpointError


def library_processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' PixtralProcessor, whose module imports torchvision only to get at a helper."""
    from transformers.models.pixtral import image_processing_pil_pixtral as pil

    package = "transformers.models.pixtral"
    if importlib.util.find_spec("torchvision") is None:
        stand_in = ModuleType(f"{package}.image_processing_pixtral")
        helper = pil.get_resize_output_image_size
        stand_in.get_resize_output_image_size = helper  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    spec = importlib.util.find_spec(f"{package}.processing_pixtral")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where it looks for its own source
    spec.loader.exec_module(module)
    return module.PixtralProcessor


def test_pixtral_inputs_equal_the_librarys(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = load(folders, "dev")
    ours: dialects.Pixtral = captioner._dialect
    theirs = library_processor(monkeypatch)(
        image_processor=ours._image_processor,
        tokenizer=ours.tokenizer,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=ours.tokenizer.chat_template,
    )
    asked = questions(((64, 48), (2000, 700), (33, 65)))
    messages = [
        [
            {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": question.parts[0]},
                    {"type": "image", "image": question.parts[1]},
                ],
            },
        ]
        for question in asked
    ]
    text = [theirs.apply_chat_template(turn, add_generation_prompt=True) for turn in messages]
    wanted = theirs(
        text=text,
        images=[question.pictures for question in asked],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    found = ours.inputs(asked)
    assert set(found) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    for name in found:
        assert torch.equal(found[name], wanted[name]), name


def test_pixtral_pixels_are_the_documented_ones(folders: dict[str, Path]) -> None:
    """Longest side to 1540, each side up to a multiple of patch x merge (32 here), bicubic, then
    (x / 255 - mean) / std with CLIP's figures; smaller pictures are padded below and right."""
    captioner = load(folders, "dev")
    wide, small = questions(((2000, 700), (33, 65)))
    found = captioner._dialect.inputs([wide, small])
    # 2000 x 700 scales by 0.77 to 1540 x 539
    assert found["image_sizes"].tolist() == [[544, 1568], [96, 64]]
    assert found["pixel_values"].shape == (2, 3, 544, 1568)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    resized = small.pictures[0].resize((64, 96), Image.Resampling.BICUBIC)
    wanted = ((np.asarray(resized) / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(found["pixel_values"][1, :, :96, :64], wanted, atol=1e-5)
    assert not found["pixel_values"][1, :, 96:].any()
    assert not found["pixel_values"][1, :, :, 64:].any()


def test_pixtral_tokens() -> None:
    image, row, end = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
    assert dialects.Pixtral.tokens(1, 1) == image + end
    assert dialects.Pixtral.tokens(2, 3) == image * 3 + row + image * 3 + end


def test_a_tokenizer_without_image_tokens(dev_folder: Path, folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dev_folder / "tokenizer")
    config = load(folders, "dev")._model.config
    with pytest.raises(CheckpointError, match=r"lacks \[IMG_BREAK\], \[IMG_END\]"):
        dialects.Pixtral(tokenizer, image_processor=None, config=config, name="x")


# ---- chat templates


def test_a_template_that_shows_no_pictures(folders: dict[str, Path]) -> None:
    captioner = load(folders, "dev")
    tokenizer = captioner._dialect.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("'[IMG]'", "''")
    with pytest.raises(CheckpointError, match="puts 0 pictures into a question of 1"):
        list(captioner.answers(questions()[:1]))


def test_no_chat_template(folders: dict[str, Path], tmp_path: Path) -> None:
    for path in folders["qwen"].iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="no chat template"):
        hub(tmp_path)


@pytest.mark.parametrize("refuses", [True, False])
def test_a_template_without_a_system_message(
    folders: dict[str, Path], tmp_path: Path, refuses: bool
) -> None:
    """The system's words go into the user's turn, neither lost nor fatal."""
    for path in folders["qwen"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    inside = "{{ raise_exception('no system role') }}" if refuses else ""
    loop = "{%- for message in messages -%}"
    template = tiny_vision.QWEN_TEMPLATE.replace(
        loop,
        loop + "{%- if message['role'] == 'system' -%}" + inside + "{%- continue -%}{%- endif -%}",
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    captioner: Any = hub(tmp_path)
    tokens = captioner._dialect.inputs(questions()[:1])["input_ids"][0]
    assert "user\nbe briefdescribe it" in captioner._dialect.tokenizer.decode(tokens)
