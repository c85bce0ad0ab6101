"""One captioning run: which pictures, asked how, and what became of each.

Owns the order of things between folder, journal and captioner. Prints nothing but progress and
writes no captions but the journal's.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data_tools import folder, pictures, sources
from data_tools.caption import answers
from data_tools.caption import journal as journals
from data_tools.caption.captioners import Captioner, Question
from data_tools.caption.instructions import Instruction
from data_tools.caption.journal import Journal
from data_tools.pictures import PictureError
from data_tools.sources import Draft
from train.errors import DataError, MachineError, bullet_list

GIVE_UP = 20
"""Failed answers, with no caption before them, after which asking on makes no sense."""
SMALLEST = 28
"""Pixels of a side: one patch of most models; below it some of them stop with an error."""


@dataclass
class Todo:
    """What a folder holds, sorted by what is to be done."""

    drafts: list[Draft]
    """All of them, in order."""
    wanted: list[Draft]
    """Those to caption."""
    unlisted: list[str]
    """Pictures that metadata.jsonl doesn't name."""
    has_sidecars: bool
    failed: dict[str, str] = field(default_factory=dict)
    """What can't be captioned, and why."""


@dataclass
class Outcome:
    """What became of the wanted pictures, by name."""

    captions: dict[str, str] = field(default_factory=dict)
    """New ones and kept ones, trigger included."""
    kept: int = 0
    """How many of them were in the journal."""
    prefixed: int = 0
    """How many got the trigger put in front."""
    failed: dict[str, str] = field(default_factory=dict)


def survey(root: Path, *, replace: bool, add_unlisted: bool, needs_references: bool) -> Todo:
    """Sort a folder. Raises DataError if it has no pictures or a metadata.jsonl with faults."""
    found, gathered = sources.gather(root)
    for table in found.tables:
        if table != folder.METADATA:
            raise DataError(
                f"{root}: its captions are in {table}, which isn't written to; make a folder with "
                f"a {folder.METADATA} of it first: kindling pack {root} NEW_FOLDER"
            )
    if found.tables and gathered.faults:
        lines = [f"{fault.path}: {fault.reason}" for fault in gathered.faults]
        raise DataError(bullet_list(f"{root}: mend these first:", lines))
    drafts = list(gathered.drafts)
    used = {name for d in drafts for name in (d.name, d.mask, *d.references)}
    unlisted = [name for name in found.pictures if name not in used] if found.tables else []
    if add_unlisted:
        drafts += [Draft(name, "", name) for name in unlisted]
        unlisted = []
    if not drafts and not gathered.faults:
        raise DataError(f"{root}: no pictures to caption in this folder")
    wanted = [draft for draft in drafts if replace or not draft.caption]
    failed = {fault.path: fault.reason for fault in gathered.faults}
    if needs_references:
        bare = [draft for draft in wanted if not draft.references]
        failed |= {
            draft.name: "no references to compare with; list them in metadata.jsonl as "
            '"references": ["before.png"]'
            for draft in bare
        }
        wanted = [draft for draft in wanted if draft.references]
    return Todo(drafts, wanted, unlisted, bool(found.captions), failed)


@dataclass
class Job:
    """Asks a captioner about drafts."""

    root: Path
    captioner: Captioner
    journal: Journal
    instruction: Instruction | None
    """None: the captioner doesn't look at pictures and isn't told anything."""
    longest_side: int
    language: str
    trigger: str
    on_caption: Callable[[Draft, str], None]
    """Called with each caption as soon as it is there."""
    outcome: Outcome = field(default_factory=Outcome)

    def run(self, drafts: Sequence[Draft]) -> Outcome:
        """Caption them all. `outcome` is current even if this raises."""
        pending: dict[str, tuple[Draft, str]] = {}
        for draft in tqdm(drafts, desc="read", unit="picture", delay=2):
            try:
                key = self._key(draft)
            except OSError as error:
                self.outcome.failed[draft.name] = f"can't be opened ({error.strerror or error})"
                continue
            known = self.journal.get(key)
            if known is None:
                pending[draft.name] = (draft, key)
            else:
                self.outcome.kept += 1
                self._accept(draft, known)
        with tqdm(
            total=len(pending), desc="caption", unit="picture", smoothing=0.1, delay=0.5
        ) as bar:
            for question, answer in self.captioner.answers(self._questions(pending, bar)):
                draft, key = pending[question.name]
                text = answers.tidy(answer.text)
                problem = answer.problem or answers.fault(text, language=self.language)
                if problem:
                    self._refuse(draft, problem)
                else:
                    named = self.captioner.identity
                    self.journal.add(key, text, name=draft.name, captioner=named)
                    self._accept(draft, text)
                bar.update()
        return self.outcome

    def _accept(self, draft: Draft, text: str) -> None:
        caption, prefixed = answers.with_trigger(text, trigger=self.trigger)
        self.outcome.captions[draft.name] = caption
        self.outcome.prefixed += prefixed
        self.on_caption(draft, caption)

    def _refuse(self, draft: Draft, problem: str) -> None:
        self.outcome.failed[draft.name] = problem
        if not self.outcome.captions and len(self.outcome.failed) >= GIVE_UP:
            lines = [f"{name}: {reason}" for name, reason in self.outcome.failed.items()]
            title = f"not one caption after {len(lines)} pictures; the rest wasn't asked:"
            raise MachineError(bullet_list(title, lines))

    def _key(self, draft: Draft) -> str:
        digests = []
        for name in (*draft.references, draft.name):
            path = self.root / name
            if not path.is_file():
                raise OSError(f"{name} is not a regular file")
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        if self.instruction is None:
            told = draft.name  # the name is all that such a captioner goes by
        else:
            told = f"{self.instruction.digest} {self.longest_side}"
        return journals.key(
            pictures=tuple(digests), captioner=self.captioner.identity, instruction=told
        )

    def _questions(self, pending: dict[str, tuple[Draft, str]], bar: tqdm) -> Iterator[Question]:
        """One after the other, when the captioner is ready for it."""
        for draft, _ in pending.values():
            if self.instruction is None:
                yield Question(draft.name, "", ())
                continue
            try:
                references = [self._picture(name) for name in draft.references]
                parts = self.instruction.parts(self._picture(draft.name), references=references)
            except PictureError as error:
                name = error.path.relative_to(self.root).as_posix()
                whose = "" if name == draft.name else f"its reference {name}: "
                self.outcome.failed[draft.name] = whose + error.reason
                bar.update()
                continue
            yield Question(draft.name, self.instruction.system, parts)

    def _picture(self, name: str) -> Image.Image:
        path = self.root / name
        image = pictures.load_rgb(path)
        # the gap lets Pillow halve a large picture cheaply first
        image.thumbnail(
            (self.longest_side, self.longest_side), Image.Resampling.LANCZOS, reducing_gap=3.0
        )
        if min(image.size) < SMALLEST:
            size = f"{image.width}x{image.height}"
            raise PictureError(path, f"too small or too narrow to see anything in it ({size})")
        return image
