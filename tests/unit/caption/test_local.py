"""Generating on this machine, by tiny random models of the real classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.caption.captioners import Answer, Question
from data_tools.caption.captioners.local import Settings
from tests.tiny_vision import script
from tests.unit.caption.loading import load, questions
from train.errors import MachineError

CUT = Answer(problem="cut off at the token limit; raise --max-tokens")


def logits(captioner: Any, asked: Sequence[Question]) -> torch.Tensor:
    """Of the first token of each answer: (B, V)."""
    inputs = captioner._dialect.inputs(asked)
    if captioner._model.config.is_encoder_decoder:
        start = captioner._model.config.text_config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.full((len(asked), 1), start)
    with torch.no_grad():
        return captioner._model(**inputs).logits[:, -1]


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


@pytest.mark.gpu
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
