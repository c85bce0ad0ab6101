"""What a captioner is told: the words for a purpose, in a language, around the pictures.

Owns choosing and filling in; the words themselves are in instructions.yaml.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from train.errors import ConfigError

FILE = Path(__file__).with_name("instructions.yaml")
LANGUAGES = ("en", "zh")
PURPOSES = ("style", "character", "product", "edit")
NAMED = ("character", "product")
"""Purposes that have a subject: it needs a trigger, and has traits."""


@dataclass(frozen=True)
class Instruction:
    """All the words of a question."""

    purpose: str
    system: str
    task: str
    labels: tuple[str, str, str]
    """What stands before a lone picture, a reference ({number} is its number) and a target."""

    @property
    def digest(self) -> str:
        """Changes with any word."""
        facts = json.dumps([self.system, self.task, self.labels])
        return hashlib.sha256(facts.encode()).hexdigest()

    def parts(
        self, target: Image.Image, *, references: Sequence[Image.Image]
    ) -> tuple[str | Image.Image, ...]:
        """The user's turn: the task, then the pictures that it speaks of."""
        picture, reference, goal = self.labels
        if self.purpose != "edit":
            return (f"{self.task}\n\n{picture}", target)
        labels = [reference.format(number=number) for number in range(1, len(references) + 1)]
        # two texts in a row would run together in most chat templates
        labels = [f"{self.task}\n\n{labels[0]}", *labels[1:], goal]
        pairs = zip(labels, [*references, target], strict=True)
        return tuple(part for pair in pairs for part in pair)


def build(
    purpose: str,
    *,
    language: str = "en",
    trigger: str = "",
    traits: str = "out",
    constant: str = "",
    own: str = "",
) -> Instruction:
    """The instruction for a purpose.

    traits: "out" leaves the constant traits of a character or product out, "in" describes them;
    constant: what they are, if the user listed them; own: a task in the user's words instead.
    Raises ConfigError where the purpose lacks a trigger or has no traits.
    """
    words = _words()[language]
    mine = words[purpose]
    if purpose in NAMED and not trigger:
        raise ConfigError(
            f"--for {purpose} needs --trigger, the word that will call the {purpose}, "
            "such as --trigger zibby"
        )
    if purpose not in NAMED and constant:
        raise ConfigError(f"--constant is for {' and '.join(NAMED)}, not for {purpose}")
    task = mine["task"]
    if "traits" in mine:
        task += " " + mine["traits"][traits + ("_known" if constant else "")]
    # the user's own words may hold braces of their own
    filled = own or task.format(trigger=trigger, constant=constant)
    labels = (words["picture"], words["reference"], words["target"])
    return Instruction(purpose, mine.get("system", words["system"]), filled, labels)


def _words() -> dict:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(FILE.read_text(encoding="utf-8"))
