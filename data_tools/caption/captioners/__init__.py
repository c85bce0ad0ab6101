"""Who writes captions: the interface that all captioners have, an implementation a file.

Owns the question and the answer. A captioner pulls questions as it is ready for them, so that only
those pictures are in memory that it works on, and gives answers as they come, in any order.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True, eq=False)
class Question:
    """What a captioner is asked about one record."""

    name: str
    """The target's file name, relative to its folder."""
    system: str
    parts: tuple[str | Image.Image, ...]
    """The user's turn in order: words and RGB pictures."""

    @property
    def pictures(self) -> list[Image.Image]:
        """The pictures alone, in order."""
        return [part for part in self.parts if isinstance(part, Image.Image)]


@dataclass(frozen=True)
class Answer:
    """Words as they came, or why there are none that can be used."""

    text: str = ""
    problem: str = ""


class Captioner(Protocol):
    """Anything that answers questions about pictures."""

    @property
    def identity(self) -> str:
        """Names everything about the captioner that its answers depend on; no secret in it."""
        ...

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        """Each question with its answer, as soon as there is one.

        Raises UserError where asking on makes no sense: no server, no memory, no login.
        """
        ...
