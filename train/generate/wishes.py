"""Which pictures are wanted: prompts of the command line and of files, seeds, sizes, references.

Owns what a prompt file may hold and what can be wrong with it. A .txt file has a prompt on each
line; a .jsonl file an object: prompt, and if wanted seed, size ("1024x768") and references (paths,
relative ones from the file's folder).
"""

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools import captions, pictures
from data_tools.buckets import PIXEL_MULTIPLE, REFERENCE_SIDE, reference_fault
from data_tools.captions import TextError
from train.errors import ConfigError, DataError, bullet_list

KEYS = ("prompt", "seed", "size", "references")
MAX_ASPECT = 8
"""Of a reference picture; the pipeline refuses longer ones."""
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Reference:
    """A picture to start from."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Wish:
    """One picture that is wanted."""

    prompt: str
    seed: int
    width: int
    height: int
    references: tuple[Reference, ...] = ()


def size(text: str) -> tuple[int, int]:
    """Of WIDTHxHEIGHT, or one number for a square. Raises ValueError that says what is wrong."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"'{text}' is no size; 1024x768 is meant, or 1024 for a square")
    width, height = int(parts[0]), int(parts[-1])
    if width % PIXEL_MULTIPLE or height % PIXEL_MULTIPLE or min(width, height) < REFERENCE_SIDE:
        nearest = "x".join(str(_nearest(side)) for side in (width, height))
        raise ValueError(
            f"{width}x{height}: both sides must be multiples of {PIXEL_MULTIPLE}, "
            f"{REFERENCE_SIDE} or more; the nearest is {nearest}"
        )
    return width, height


def reference(path: Path) -> Reference:
    """A reference picture that is sure to be taken. Raises DataError."""
    found = pictures.probe(path)
    fault = reference_fault(found.width, found.height)
    if max(found.width, found.height) > MAX_ASPECT * min(found.width, found.height):
        fault = f"is {found.width}x{found.height}; a reference is at most {MAX_ASPECT}:1"
    if fault:
        raise DataError(f"{path} {fault}.")
    return Reference(path, found.sha256)


def read(path: Path, plain: Wish) -> list[Wish]:
    """The wishes of a prompt file; what a line doesn't say is as in `plain`.

    Raises DataError with all lines that are wrong.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"--prompts: {path} must be a .txt or .jsonl file.")
    try:
        lines = captions.decode(path.read_bytes()).splitlines()
    except (OSError, TextError) as error:
        reason = str(error) if isinstance(error, TextError) else f"can't be read ({error.strerror})"
        raise DataError(f"{path}: {reason}.") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{path}: holds no prompts.")
    wishes, faults = [], []
    for number, line in enumerate(lines, start=1):
        try:
            wishes.append(_wish(line, plain, path))
        except (ValueError, DataError) as error:
            faults.append(f"{path}:{number}: {error}")
    if faults:
        raise DataError(bullet_list(f"{path}: {len(faults)} lines can't be used:", faults))
    return wishes


def _wish(line: str, plain: Wish, path: Path) -> Wish:
    """Of one line. Raises ValueError, DataError."""
    text = line.strip()
    if not text:
        raise ValueError("empty line; remove it, or write a prompt")
    if path.suffix == ".txt":
        return replace(plain, prompt=text)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise ValueError('not an object; {"prompt": "..."} is meant')
    for key in row.keys() - set(KEYS):
        near = difflib.get_close_matches(key, KEYS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(KEYS)}"
        raise ValueError(f"unknown key '{key}'; {hint}")
    return _of_row(row, plain, path.parent)


def _of_row(row: dict[str, Any], plain: Wish, folder: Path) -> Wish:
    prompt, seed = row.get("prompt"), row.get("seed", plain.seed)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("has no prompt")
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: {seed!r} is no whole number from 0")
    width, height = plain.width, plain.height
    if "size" in row:
        width, height = size(str(row["size"]))
    references = plain.references
    if "references" in row:
        paths = row["references"]
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise ValueError("references: a list of paths is meant")
        references = tuple(reference(folder / path) for path in paths)
    return Wish(prompt.strip(), seed, width, height, references)


def _nearest(side: int) -> int:
    return max(REFERENCE_SIDE, round(side / PIXEL_MULTIPLE) * PIXEL_MULTIPLE)
