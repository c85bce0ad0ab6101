"""Captioners on this machine, on tiny random models of the real classes."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_tools.caption.captioners import Answer, Question, dialects, models
from data_tools.caption.captioners.local import Local, Settings
from tests import tiny_vision
from tests.tiny_vision import PATCH, script
from train.errors import CheckpointError, ConfigError, MachineError, UserError

SETTINGS = Settings(batch_size=2, max_tokens=24, dtype="fp32")
CUT = Answer(problem="cut off at the token limit; raise --max-tokens")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("vision")
    makers = {
        "dev": tiny_vision.make_dev,
        "qwen": tiny_vision.make_qwen,
        "florence": tiny_vision.make_florence,
    }
    return {name: make(top / name) for name, make in makers.items()}


def load(folders: dict[str, Path], kind: str, settings: Settings = SETTINGS) -> Any:
    """A fresh captioner."""
    if kind == "dev":
        return models.of_base(str(folders["dev"]), settings=settings)
    source = str(folders[kind])
    return models.of_hub(source, settings=settings, purpose="style", language="en")


def questions(sizes: Sequence[tuple[int, int]] = ((64, 48), (96, 48), (40, 90))) -> list[Question]:
    """One about a picture of noise for each size."""
    found = []
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        parts = ("describe it\n\nThe picture:", Image.fromarray(pixels))
        found.append(Question(f"{number}.png", "be brief", parts))
    return found


@pytest.mark.parametrize("kind", ["dev", "qwen", "florence"])
def test_every_picture_is_answered_in_batches(folders: dict[str, Path], kind: str) -> None:
    captioner = load(folders, kind)
    script(captioner, ["one red fox", "two", "a third answer"])
    found = {question.name: answer for question, answer in captioner.answers(questions())}
    texts = ("one red fox", "two", "a third answer")
    assert found == {f"{number}.png": Answer(text) for number, text in enumerate(texts)}


@pytest.mark.parametrize("kind", ["dev", "qwen"])
def test_an_answer_without_an_end_is_cut_off(folders: dict[str, Path], kind: str) -> None:
    captioner = load(folders, kind, Settings(batch_size=2, max_tokens=5, dtype="fp32"))
    script(captioner, ["a very long tale", "ok"])
    long, short = (answer for _, answer in captioner.answers(questions()[:2]))
    assert (long, short) == (CUT, Answer("ok"))


def logits(captioner: Any, asked: Sequence[Question]) -> torch.Tensor:
    """Of the first token of each answer: (B, V)."""
    inputs = captioner._dialect.inputs(asked)
    if captioner._model.config.is_encoder_decoder:
        start = captioner._model.config.text_config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.full((len(asked), 1), start)
    with torch.no_grad():
        return captioner._model(**inputs).logits[:, -1]


@pytest.mark.parametrize("kind", ["dev", "qwen", "florence"])
def test_a_batch_sees_what_each_alone_sees(folders: dict[str, Path], kind: str) -> None:
    """Padding, masks and the order of pictures: a mix-up shows as another picture's logits."""
    captioner = load(folders, kind)
    asked = questions()
    together = logits(captioner, asked)
    alone = torch.cat([logits(captioner, [question]) for question in asked])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    for first, second in ((0, 1), (1, 2)):
        assert (alone[first] - alone[second]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["dev", "qwen"])
def test_words_and_every_picture_count(folders: dict[str, Path], kind: str) -> None:
    captioner = load(folders, kind)
    one, two, _ = (question.pictures[0] for question in questions(((64, 64),) * 3))
    variants = [
        Question("x", "be brief", ("before", one, "after", two)),
        Question("x", "be brief", ("before", two, "after", one)),
        Question("x", "be brief", ("other", one, "after", two)),
        Question("x", "be long", ("before", one, "after", two)),
    ]
    rows = [logits(captioner, [question])[0] for question in variants]
    for row in rows[1:]:
        assert (row - rows[0]).abs().max() > 1e-4


def test_out_of_memory_halves_the_batch(
    folders: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    captioner = load(folders, "dev", Settings(batch_size=4, max_tokens=8, dtype="fp32"))
    sizes = []
    generate = captioner._generate

    def crowded(asked: Sequence[Question]) -> list[Answer]:
        sizes.append(len(asked))
        if len(asked) > 1:
            raise torch.OutOfMemoryError
        return generate(asked)

    captioner._generate = crowded
    found = [question.name for question, _ in captioner.answers(questions(((64, 64),) * 5))]
    assert found == [f"{number}.png" for number in range(5)]
    assert sizes == [4, 2, 1, 1, 1, 1, 1]
    assert "batches of 1 from here on" in capsys.readouterr().err


def test_out_of_memory_with_one_picture(folders: dict[str, Path]) -> None:
    captioner = load(folders, "dev")

    def crowded(_: Sequence[Question]) -> list[Answer]:
        raise torch.OutOfMemoryError

    captioner._generate = crowded
    with pytest.raises(MachineError, match="--quantize 4bit"):
        list(captioner.answers(questions()[:1]))


def test_decoding_is_greedy_whatever_the_model_says(folders: dict[str, Path]) -> None:
    captioner = load(folders, "qwen")
    captioner._model.generation_config.do_sample = True
    found = [[answer for _, answer in captioner.answers(questions())] for _ in range(2)]
    assert found[0] == found[1]


# ---- Pixtral without torchvision


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


def test_a_template_that_shows_no_pictures(folders: dict[str, Path]) -> None:
    captioner = load(folders, "dev")
    tokenizer = captioner._dialect.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("'[IMG]'", "''")
    with pytest.raises(CheckpointError, match="puts 0 pictures into a question of 1"):
        list(captioner.answers(questions()[:1]))


# ---- a base that can't


def test_the_head_that_is_used_is_the_checkpoints(folders: dict[str, Path]) -> None:
    """Mistral3Config ties head and embedding by default; dev's weights have both, and differ."""
    captioner = load(folders, "dev")
    saved = load_file(folders["dev"] / "text_encoder" / "model.safetensors")
    (name,) = (name for name in saved if name.endswith("lm_head.weight"))
    assert torch.equal(captioner._model.lm_head.weight, saved[name])
    embedding = captioner._model.get_input_embeddings().weight
    assert not torch.equal(captioner._model.lm_head.weight, embedding)


def changed_dev(folder: Path, *, drop: str, config: dict[str, Any]) -> Path:
    """A fresh base whose text encoder lacks weights with `drop` in their names."""
    tiny_vision.make_dev(folder)
    path = folder / "text_encoder" / "model.safetensors"
    weights = {name: weight for name, weight in load_file(path).items() if drop not in name}
    save_file(weights, path, metadata={"format": "pt"})
    path = path.with_name("config.json")
    facts = json.loads(path.read_text())
    facts["text_config"].pop("tie_word_embeddings", None)
    facts.pop("tie_word_embeddings", None)
    path.write_text(json.dumps(facts | config))
    return folder


def test_a_head_that_is_missing_is_no_noise(tmp_path: Path) -> None:
    base = changed_dev(tmp_path / "dev", drop="lm_head", config={})
    with pytest.raises(CheckpointError, match="has no lm_head, so it reads but can't write"):
        models.of_base(str(base), settings=SETTINGS)


def test_a_silent_config_with_a_head_is_fine(tmp_path: Path) -> None:
    base = changed_dev(tmp_path / "dev", drop="nothing", config={})
    captioner: Any = models.of_base(str(base), settings=SETTINGS)
    embedding = captioner._model.get_input_embeddings().weight
    assert not torch.equal(captioner._model.lm_head.weight, embedding)


def test_a_tied_head_is_a_head(tmp_path: Path) -> None:
    base = tiny_vision.make_dev(tmp_path / "dev", tied=True)
    assert isinstance(models.of_base(str(base), settings=SETTINGS), Local)


def test_eyes_that_are_missing_are_no_noise(tmp_path: Path) -> None:
    base = changed_dev(tmp_path / "dev", drop="vision_tower", config={})
    with pytest.raises(CheckpointError, match=r"the weights lack .*vision_tower.* and \d+ more"):
        models.of_base(str(base), settings=SETTINGS)


def test_klein_is_blind(klein_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no vision tower.* hf:MODEL or http:URL"):
        models.of_base(str(klein_folder), settings=SETTINGS)


def test_the_toy_is_random() -> None:
    with pytest.raises(ConfigError, match="random weights"):
        models.of_base("toy", settings=SETTINGS)


def test_a_tokenizer_without_image_tokens(dev_folder: Path, folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dev_folder / "tokenizer")
    config = load(folders, "dev")._model.config
    with pytest.raises(CheckpointError, match=r"lacks \[IMG_BREAK\], \[IMG_END\]"):
        dialects.Pixtral(tokenizer, image_processor=None, config=config, name="x")


# ---- other models that can't


def hub(source: str | Path, **changes: str) -> Local:
    asked = {"purpose": "style", "language": "en", **changes}
    return models.of_hub(
        str(source), settings=SETTINGS, purpose=asked["purpose"], language=asked["language"]
    )


def test_a_hub_model_of_mistrals_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    """A repository has in one folder what a base has in two."""
    for part in ("text_encoder", "tokenizer"):
        for path in (folders["dev"] / part).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    captioner = hub(tmp_path)
    script(captioner, ["a fox"])
    assert [answer for _, answer in captioner.answers(questions()[:1])] == [Answer("a fox")]


@pytest.mark.parametrize(("purpose", "language"), [("edit", "en"), ("style", "zh")])
def test_florence_cant_be_told(folders: dict[str, Path], purpose: str, language: str) -> None:
    with pytest.raises(ConfigError, match="Florence-2 takes no instructions"):
        hub(folders["florence"], purpose=purpose, language=language)


def test_florence_says_what_it_will_do(
    folders: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    captioner: Any = hub(folders["florence"])
    assert "it describes everything, the style included" in capsys.readouterr().err
    tokens = captioner._dialect.inputs(questions()[:1])["input_ids"][0]
    text = captioner._dialect.tokenizer.decode(tokens)
    assert "Describe with a paragraph what is shown in the image." in text


def test_a_model_without_words(klein_folder: Path) -> None:
    with pytest.raises(ConfigError, match="a model of type qwen3 doesn't take pictures"):
        hub(klein_folder / "text_encoder")


@pytest.mark.parametrize("source", ["nobody/nothing", "./no/such/folder"])
def test_no_such_model(source: str) -> None:
    with pytest.raises(MachineError, match="can't be loaded"):
        hub(source)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantising_needs_a_gpu_and_says_so_first(quantize: str) -> None:
    settings = Settings(quantize=quantize)
    for opened in (
        lambda: models.of_base("dev", settings=settings),
        lambda: models.of_hub("a/b", settings=settings, purpose="style", language="en"),
    ):
        with pytest.raises(UserError, match=f"--quantize {quantize} needs an NVIDIA GPU"):
            opened()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["dev", "qwen"])
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantised_on_a_gpu(folders: dict[str, Path], kind: str, quantize: str) -> None:
    captioner = load(folders, kind, Settings(batch_size=2, max_tokens=24, quantize=quantize))
    kinds = {type(module).__name__ for module in captioner._model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    assert type(captioner._model.get_output_embeddings()) is torch.nn.Linear
    script(captioner, ["one red fox", "two", "a third answer"])
    found = [answer.text for _, answer in captioner.answers(questions())]
    assert found == ["one red fox", "two", "a third answer"]
