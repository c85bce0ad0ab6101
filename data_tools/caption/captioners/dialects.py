"""How kinds of vision-language models are asked: words and pictures to a model's inputs.

Owns chat templates, image tokens and padding. Loads no weights.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from data_tools.caption.captioners import Question
from train.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import BatchFeature

FLORENCE_TASK = "<MORE_DETAILED_CAPTION>"
"""The only way to ask Florence-2 for a paragraph; it takes no words of ours."""


class Dialect(Protocol):
    """What `Local` needs to know of a kind of model."""

    @property
    def tokenizer(self) -> Any: ...
    def inputs(self, questions: Sequence[Question]) -> "BatchFeature":
        """Tensors for `generate`, padded on the left where the model goes on from the prompt."""
        ...


class Chat:
    """Any model whose processor has a chat template."""

    def __init__(self, processor: Any, *, name: str) -> None:
        """Raises CheckpointError if there is no usable chat template."""
        self.tokenizer = processor.tokenizer
        self._processor = processor
        self._template = _Template(processor, name=name)

    def inputs(self, questions: Sequence[Question]) -> "BatchFeature":
        """By the model's own processor."""
        texts = [self._template(question) for question in questions]
        bos = self.tokenizer.bos_token
        return self._processor(
            text=texts,
            images=[question.pictures for question in questions],
            padding=True,
            padding_side="left",
            # most templates write the first token themselves
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            return_tensors="pt",
        )


class Pixtral:
    """Mistral 3 with its Pixtral eyes, as PixtralProcessor does it.

    That processor needs torchvision, which Kindling does without; the image processor doesn't. A
    picture of h x w patches becomes h rows of w `[IMG]`, each row closed by `[IMG_BREAK]`, the last
    by `[IMG_END]`. A patch here is patch_size * spatial_merge_size pixels wide (28).
    """

    IMAGE, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"

    def __init__(self, tokenizer: Any, *, image_processor: Any, config: Any, name: str) -> None:
        """config: the model's. Raises CheckpointError if the tokenizer isn't this model's."""
        self.tokenizer = tokenizer
        self._image_processor = image_processor
        self._patch = config.vision_config.patch_size * config.spatial_merge_size
        self._name = name
        vocabulary = tokenizer.get_vocab()
        lacking = [token for token in (self.IMAGE, self.BREAK, self.END) if token not in vocabulary]
        if lacking or vocabulary[self.IMAGE] != config.image_token_id:
            what = f"lacks {', '.join(lacking)}" if lacking else "has another number for [IMG]"
            raise CheckpointError(
                f"{name}: the tokenizer {what}; its text encoder can't be shown pictures with it"
            )
        self._template = _Template(tokenizer, name=name)

    def inputs(self, questions: Sequence[Question]) -> "BatchFeature":
        """input_ids and attention_mask (B, L), pixel_values (N, 3, H, W), image_sizes (N, 2)."""
        from transformers import BatchFeature

        images = [picture for question in questions for picture in question.pictures]
        pixels = self._image_processor(images, patch_size=self._patch, return_tensors="pt")
        grids = iter((pixels["image_sizes"] // self._patch).tolist())
        texts = [self._text(question, grids) for question in questions]
        tokens = self.tokenizer(
            texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        )
        names = ("input_ids", "attention_mask")
        return BatchFeature({**{name: tokens[name] for name in names}, **pixels})

    def _text(self, question: Question, grids: Any) -> str:
        first, *rest = self._template(question).split(self.IMAGE)
        if len(rest) != len(question.pictures):
            raise CheckpointError(
                f"{self._name}: the chat template puts {len(rest)} pictures into a question of "
                f"{len(question.pictures)}; it isn't one of a model that sees"
            )
        return first + "".join(self.tokens(*next(grids)) + text for text in rest)

    @classmethod
    def tokens(cls, height: int, width: int) -> str:
        """What stands for a picture of height x width patches."""
        row = cls.IMAGE * width
        return (row + cls.BREAK) * (height - 1) + row + cls.END


class Florence:
    """Florence-2, which knows tasks instead of instructions and sees one picture."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = processor.tokenizer
        self._processor = processor

    def inputs(self, questions: Sequence[Question]) -> "BatchFeature":
        """By the model's own processor; the question's words are not used."""
        return self._processor(
            text=[FLORENCE_TASK] * len(questions),
            images=[question.pictures[-1] for question in questions],
            padding=True,
            return_tensors="pt",
        )


class _Template:
    """A question through a chat template."""

    def __init__(self, renderer: Any, *, name: str) -> None:
        """renderer: a processor or tokenizer. Raises CheckpointError if it has no template."""
        if not renderer.chat_template:
            raise CheckpointError(
                f"{name}: it has no chat template, so it can't be told what a caption is for; "
                "use an instruction-tuned model, such as hf:Qwen/Qwen3-VL-8B-Instruct"
            )
        self._renderer = renderer
        # a processor takes a setting that its template doesn't know for one of its own
        can_think = "enable_thinking" in str(renderer.chat_template)
        self._settings = {"enable_thinking": False} if can_think else {}
        self._has_system = self._takes_system()

    def __call__(self, question: Question) -> str:
        """The prompt, with the model's own mark where each picture goes."""
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in question.parts
        ]
        system = [{"type": "text", "text": question.system}]
        if not self._has_system:
            return self._render([{"role": "user", "content": system + content}])
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        return self._render(messages)

    def _render(self, messages: list[dict]) -> str:
        return self._renderer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self._settings
        )

    def _takes_system(self) -> bool:
        """Some templates refuse a system message, and some drop it."""
        from jinja2 import TemplateError

        word = "obey"
        messages = [
            {"role": "system", "content": [{"type": "text", "text": word}]},
            {"role": "user", "content": [{"type": "text", "text": "look"}]},
        ]
        try:
            return word in self._render(messages)
        except (TemplateError, TypeError):
            return False
