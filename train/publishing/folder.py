"""The folder that is uploaded: making it whole or not at all, and checking one before it goes.

Owns what is in it. Nothing that is in a run is changed: adapter files are new ones, with the
metadata of `metadata`, and their certificates are checked to hold for them.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.adapters import files
from train.adapters.certify import write_certificate
from train.adapters.intent import PEFT_METADATA
from train.errors import CheckpointError, ConfigError
from train.files import writing
from train.publishing import card, licences, metadata
from train.publishing.facts import Exported, Publication, scrubbed
from train.publishing.sheets import SHEETS

CARD, TERMS, NOTICE = "README.md", "LICENSE.md", "NOTICE"
PRIVATE = "sheets"
"""Stays with the publisher."""
MARK = f"{PRIVATE}/civitai.json"
"""Every folder made here has it."""


def is_published(folder: Path) -> bool:
    """Whether `folder` was made here."""
    return (folder / MARK).is_file()


@contextmanager
def becoming(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write to that becomes `target` when the block ends well, and vanishes otherwise.

    Raises ConfigError if `target` is there and may not be replaced.
    """
    check_target(target, overwrite=overwrite)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made = scratch / "new"
        made.mkdir()
        yield made
        with writing(target):
            _swap(made, target, scratch / "old")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(made: Path, target: Path, aside: Path) -> None:
    """Rename `made` to `target`; what was there goes aside, or comes back where that fails."""
    if target.exists():
        os.replace(target, aside)
    try:
        os.replace(made, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raises ConfigError if `target` is there and may not be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_published(target):
        raise ConfigError(
            f"--to: {target} is there and wasn't made by `kindling publish`. Give another folder."
        )
    if not overwrite:
        raise ConfigError(
            f"--to: {target} is there, perhaps with words of yours in {CARD}. "
            f"`kindling publish {target} --push OWNER/NAME` uploads it as it is; --overwrite makes "
            "it anew."
        )


def write(publication: Publication, folder: Path, *, repository: str | None) -> None:
    """Everything but what is missing. Raises CheckpointError if a file isn't what it was."""
    for exported in publication.exported:
        _write_adapter(publication, exported, folder)
    samples = _copy(publication, folder)
    licence = publication.licence
    texts = {CARD: card.as_markdown(publication, repository=repository, samples=samples)}
    if licence is not None:
        base = publication.repository or f"the base {publication.base}"
        texts[NOTICE] = licences.statement(
            licence, title=publication.title, base=base, text=publication.terms
        )
    if publication.terms is not None:
        texts[TERMS] = publication.terms
    for name, fill in SHEETS.items():
        sheet = fill(publication, samples=samples)
        texts[f"{PRIVATE}/{name}.json"] = sheet.as_json()
        texts[f"{PRIVATE}/{name}.en.txt"] = sheet.as_text(0)
        texts[f"{PRIVATE}/{name}.zh.txt"] = sheet.as_text(1)
    with writing(folder):
        (folder / PRIVATE).mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def missing(publication: Publication) -> list[str]:
    """What would make it a better publication, and how to get it."""
    found = [publication.shown.fault] if publication.shown.fault else []
    if publication.author is None:
        found.append("no author; --author NAME")
    if publication.description is None:
        found.append("no description of yours; --description TEXT")
    if not publication.wishes.tags:
        found.append("no tags, such as character or style; --tags A,B")
    if publication.captions and not publication.wishes.tag_frequency:
        found.append(
            "the captions' words (ss_tag_frequency), left out as captions are private; "
            "--tag-frequency puts them in, whole sentences where captions are sentences"
        )
    return found


def faults(folder: Path) -> list[str]:
    """What forbids uploading a folder made here, perhaps edited since."""
    fields = front_matter(folder)
    found = []
    bound = licences.of(str(fields.get("base_model")), None)
    if bound and not bound.commercial and fields.get("license") != bound.hub:
        found.append(
            f"{CARD} says license: {fields.get('license')}, but an adapter of "
            f"{fields['base_model']} is bound by its {bound.name}: license: {bound.hub}"
        )
    elif fields.get("license") in (None, "unknown"):
        found.append(
            f"{CARD} doesn't say the licence: the base's isn't known here. Fill in `license` there"
        )
    elif fields["license"] in ("other", "apache-2.0"):
        where = f"the base's own repository ({fields.get('base_model', 'the base')})"
        if not (folder / TERMS).is_file():
            found.append(
                f"{TERMS} isn't there, a copy of which the licence asks for: take it from {where}, "
                "or publish again where the hub can be reached"
            )
        if not (folder / NOTICE).is_file():
            found.append(f"{NOTICE} isn't there, which the licence asks for")
    adapters = sorted(folder.glob("*.safetensors"))
    if not adapters:
        found.append("there is no adapter in it")
    return found + [fault for path in adapters if (fault := _unproven(path))]


def front_matter(folder: Path) -> dict[str, Any]:
    """The card's. Raises CheckpointError if there is none that can be read."""
    from huggingface_hub import RepoCard

    path = folder / CARD
    try:
        return RepoCard.load(path, ignore_metadata_errors=False).data.to_dict()
    except Exception as error:  # a YAML error of any kind
        raise CheckpointError(
            f"{path}: its first lines, between two ---, can't be read ({error})."
        ) from None


def listing(folder: Path) -> list[tuple[str, int]]:
    """The files that are uploaded, with their bytes."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = ((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
    return [(name, size) for name, size in named if not name.startswith(f"{PRIVATE}/")]


def name_repository(folder: Path, repository: str) -> None:
    """Put the repository's name where the card has a placeholder."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8")
    changed = text.replace(card.NOWHERE, repository)
    if changed != text:
        with files.replacing(path) as partial:
            partial.write_text(changed, encoding="utf-8")


def _write_adapter(publication: Publication, exported: Exported, folder: Path) -> None:
    """The file with its new metadata, and its certificate, which is then of this file.

    The proof was of the tensors and of peft's settings; both are checked to be the same.
    """
    target = folder / exported.path.name
    files.copy(exported.path, target, metadata=metadata.of(publication, exported))
    written, before = files.File(target), exported.metadata
    assert written.metadata.get(PEFT_METADATA) == before.get(PEFT_METADATA)
    assert files.body_hash(target) == files.body_hash(exported.path)
    text = scrubbed(json.dumps(exported.certificate, ensure_ascii=False), publication.run)
    certificate: dict[str, Any] = json.loads(text)
    certificate["file"] |= {"sha256": files.file_hash(target), "bytes": target.stat().st_size}
    certificate["exported"] = {
        "sha256": exported.certificate["file"]["sha256"],
        "note": "this file has its tensors and peft settings, and other metadata",
    }
    write_certificate(certificate, target)


def _copy(publication: Publication, folder: Path) -> list[str]:
    """Copies of samples, board and workflows; the samples' names in the folder."""
    names = []
    with writing(folder):
        if publication.shown.samples:
            (folder / "samples").mkdir()
        for number, sample in enumerate(publication.shown.samples):
            names.append(f"samples/{number:02d}{sample.path.suffix}")
            shutil.copyfile(sample.path, folder / names[-1])
        if publication.shown.board:
            shutil.copyfile(publication.shown.board, folder / "board.png")
        for path in publication.workflows:
            shutil.copyfile(path, folder / path.name)
    return names


def _unproven(path: Path) -> str | None:
    """Why a file's certificate doesn't hold for it; None if it does."""
    place = path.with_name(f"{path.stem}.certificate.json")
    try:
        certificate = json.loads(place.read_text(encoding="utf-8"))
        if certificate["file"]["sha256"] != files.file_hash(path):
            return f"{path.name} isn't the file that {place.name} is of"
        return None if certificate["passed"] else f"{place.name} says FAILED"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} has no certificate"
