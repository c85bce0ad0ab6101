"""Captions out of file names: for pictures that somebody has named well."""

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from data_tools.caption.captioners import Answer, Question

_SEPARATORS = re.compile(r"[\s_\-.,;+~=]+")
_NUMBER = re.compile(r"[(\[]?\d+[)\]]?")
_CAMERA = {"img", "dsc", "dscf", "dscn", "pict", "photo", "image", "screenshot", "untitled", "scan"}


class FileName:
    """`red-fox_in snow (3).jpg` -> `red fox in snow`."""

    identity = "filename"

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        """At once; a name without words (`IMG_0001`) is no answer."""
        for question in questions:
            text = words(question.name)
            problem = "" if text else "the file name has no words"
            yield question, Answer(text, problem)


def words(name: str) -> str:
    """The words of a file name: separators become spaces, numbers at either end go.

    A name that is only a camera's (`DSC`, `IMG`, `Screenshot`) has no words.
    """
    parts = [part for part in _SEPARATORS.split(PurePosixPath(name).stem) if part]
    while parts and _NUMBER.fullmatch(parts[-1]):
        parts.pop()
    while parts and _NUMBER.fullmatch(parts[0]):
        parts.pop(0)
    if len(parts) == 1 and parts[0].casefold() in _CAMERA:
        return ""
    if not any(character.isalpha() for part in parts for character in part):
        return ""
    return " ".join(parts)
