"""Whether a run may go on from a checkpoint: what changed since, and what of it needs a yes.

Owns that judgement, and the list of pictures beside a run by which it names what changed.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from data_tools.records import Collection, Record
from train import checkpoint
from train.checkpoint import Checkpoint, Origin
from train.config import Config
from train.errors import ConfigError, bullet_list

FREE_TO_CHANGE = (
    "name",
    "output",
    "cache",
    "data.path",  # the digest tells whether its contents changed
    "more_data.*.path",
    "optim.lr",
    "train.steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "preview.*",
    "validation.every",
    "validation.path",
    "track.*",
    "export.*",
    "memory.*",
)
"""Settings that a resumed run may have otherwise."""

FIXED = ("base.*", "lora.*", "optim.name", "optim.lora_plus", "optim.betas")
"""Settings without which the checkpoint's weights or the optimizer's state mean nothing. All others
need a yes."""

ACCEPT = "--accept-changes"

PICTURES = "pictures.json"
"""In a run's folder: what it is trained on, by set and name."""


def find(
    folder: Path, config: Config, *, resume: bool, accept: bool, world: int
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, if any, and what there is to say about it.

    accept: whether changed settings are meant. Raises ConfigError rather than train over another
    run, and for changes that aren't accepted or can't be.
    """
    checkpoints = folder / "checkpoints"
    existing = checkpoint.list_checkpoints(checkpoints)
    if existing and not resume:
        raise ConfigError(
            f"{folder}: this run already has checkpoints (up to {existing[-1].name}). "
            "Continue it with --resume, or give the config another name."
        )
    newest, faults = checkpoint.newest_good(checkpoints)
    said = [f"passed over: {fault}" for fault in faults]
    if newest is None:
        nothing = f"{folder}: nothing to resume; starting from the beginning"
        return None, [*said, nothing] if resume else said
    saved = checkpoint.load(newest)
    before = completed(saved.progress.config)
    changed = changed_settings(before, config.model_dump(mode="json"))
    if saved.progress.world != world:
        changed["processes"] = f"{saved.progress.world} -> {world}"
    said += _judge(
        f"{folder}: the config differs from the run's.",
        {f"{key}: {change}": not _matches(key, FIXED) for key, change in changed.items()},
        accept=accept,
    )
    return saved, [*said, f"resuming after step {saved.progress.step} ({newest})"]


def check_origin(
    saved: Checkpoint, origin: Origin, *, folder: Path, pictures: dict[str, Any], accept: bool
) -> list[str]:
    """What to say of other data, if that is accepted. Raises ConfigError if not, or if the base is
    another one.
    """
    was, step = saved.progress.origin, saved.progress.step
    changes: dict[str, bool] = {}
    if was.base != origin.base:
        changes["the base model's files"] = False
    if was.data != origin.data:
        found = _changed_pictures(folder / PICTURES, pictures)
        changes |= dict.fromkeys(found or ["pictures or captions"], True)
    return _judge(f"{folder}: changed since step {step}.", changes, accept=accept)


def _judge(title: str, changes: dict[str, bool], *, accept: bool) -> list[str]:
    """changes: what -> whether it may be accepted. Returns what was accepted, for the console."""
    final = [change for change, acceptable in changes.items() if not acceptable]
    if final:
        raise ConfigError(bullet_list(f"{title} Put back, or use another name:", final))
    if changes and not accept:
        title += f" Put back, use another name, or say that it is meant with {ACCEPT}:"
        raise ConfigError(bullet_list(title, list(changes)))
    return [bullet_list("accepted changes:", list(changes))] if changes else []


def completed(before: dict[str, Any]) -> dict[str, Any]:
    """A run's config with the defaults of settings that are newer than it."""
    try:
        return Config.model_validate(before).model_dump(mode="json")
    except ValidationError:  # what has been renamed or is forbidden since is shown as it is
        return before


def changed_settings(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Key -> "old -> new" for each setting that differs and isn't free to change.

    A setting that is newer than the run was at its default; one that is no more is named.
    """
    old, new = _flat(_with_defaults(before, Config)), _flat(after)
    return {
        key: f"{old.get(key, 'not there')} -> {new.get(key, 'not there')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _matches(key, FREE_TO_CHANGE)
    }


def _with_defaults(saved: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """A saved section, and what it lacks as it is by default."""
    whole = dict(saved)
    for name, field in section.model_fields.items():
        if name not in saved:
            if not field.is_required():
                whole[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        elif inner := _section_in(field.annotation):
            some = saved[name]
            whole[name] = (
                [_with_defaults(one, inner) for one in some]
                if isinstance(some, list)
                else some and _with_defaults(some, inner)
            )
    return whole


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is, or is a list of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := _section_in(one))), None)


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value, start=1)}
        if isinstance(value, dict):
            leaves |= _flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


# ---- pictures


def list_pictures(collections: Iterable[Collection]) -> dict[str, Any]:
    """Of each picture, by set and name: its digest, its caption, and a digest of all else."""
    return {
        f"{number}:{record.name}": [record.sha256, record.caption, _digest(record)]
        for number, collection in enumerate(collections, start=1)
        for record in collection.records
    }


def _digest(record: Record) -> str:
    rest = [record.reference_sha256, record.mask_sha256, record.repeats]
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:16]


def write_pictures(folder: Path, pictures: dict[str, Any]) -> None:
    """Keep the list beside the run."""
    temporary = folder / f"{PICTURES}.part"
    temporary.write_text(json.dumps(pictures, ensure_ascii=False, indent=0), encoding="utf-8")
    os.replace(temporary, folder / PICTURES)


def _changed_pictures(path: Path, now: dict[str, Any]) -> list[str]:
    """`added a.png`, and so on; the second set's begin with `2:`."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    names = dict.fromkeys([*before, *now])
    return [f"{change} {name.removeprefix('1:')}" for name in names
            if (change := _change(before.get(name), now.get(name)))]  # fmt: skip


def _change(before: list[str] | None, now: list[str] | None) -> str:
    if before is None:
        return "added"
    if now is None:
        return "gone:"
    kinds = ("another picture in", "another caption of", "another reference, mask or repeats of")
    return next((kind for kind, a, b in zip(kinds, before, now, strict=True) if a != b), "")
