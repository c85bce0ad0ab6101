"""What is said of a setting that is wrong: from pydantic's faults and the schema to messages.

Owns their words and the guess at what was meant. Knows no file.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

from pydantic_core import ErrorDetails

from train.config.schema import allowed, either

Key = tuple[str | int, ...]
"""Where a value is: section, setting, item of a list."""

SYNONYMS = {  # what other trainers call it
    "learning_rate": "optim.lr", "lr_scheduler": "optim.schedule", "max_train_steps": "train.steps",
    "train_batch_size": "train.batch_size", "gradient_accumulation_steps": "train.accumulate",
    "network_dim": "lora.rank", "network_alpha": "lora.alpha", "name_or_path": "base.model",
    "pretrained_model_name_or_path": "base.model", "instance_data_dir": "data.path",
    "folder_path": "data.path", "trigger_word": "data.trigger", "output_dir": "output",
}  # fmt: skip


def explain(
    errors: Sequence[ErrorDetails], tree: Any, root: dict[str, Any]
) -> Iterator[tuple[Key, str]]:
    """Key and message of each fault; a key that is only misspelt isn't also reported missing."""
    unknown = [error["loc"] for error in errors if error["type"] == "extra_forbidden"]
    meant = [key for loc in unknown for key in _meant(loc, root)]
    for error in errors:
        kind, loc = error["type"], error["loc"]
        if kind == "missing" and isinstance(loc[-1], int):  # an item of a list that is too short
            kind, loc = "too_short", loc[:-1]
        key, schema = narrow(loc, root)
        match kind:
            case "extra_forbidden":
                yield loc, _unknown(loc, root)
            case "missing" if key in meant:
                pass
            case "missing":
                yield key, f"missing; it must be {allowed(schema)}"
            case "conflict":
                yield key, error["msg"]
            case _:
                yield key, _mismatch(schema, reduce(lambda value, part: value[part], key, tree))


def _unknown(key: Key, root: dict[str, Any]) -> str:
    meant = _meant(key, root)
    names = [f"'{k[-1] if k[:-1] == key[:-1] else dotted(k)}'" for k in meant]
    if names == [f"'{key[-1]}'"]:  # a dotted key
        return f"unknown key; in a file, write '{meant[0][-1]}' below '{meant[0][0]}:'"
    if names:
        return f"unknown key; did you mean {either(names)}?"
    return f"unknown key; allowed here: {', '.join(narrow(key[:-1], root)[1]['properties'])}"


def _mismatch(schema: dict[str, Any], value: Any) -> str:
    hint, branches = "", schema.get("anyOf", [schema])
    words = [word for branch in branches for word in branch.get("enum", ())]
    if isinstance(value, str) and (near := difflib.get_close_matches(value.lower(), words, n=1)):
        hint = f"; did you mean '{near[0]}'?"
    elif isinstance(value, bool | int | float | dict) and not words:
        hint = "; put it in quotes" if any(b["type"] == "string" for b in branches) else ""
    return f"must be {allowed(schema)}; got {show(value)}{hint}"


def narrow(loc: Key, root: dict[str, Any]) -> tuple[Key, dict[str, Any]]:
    """The part of pydantic's location that is a key, and its schema; unions add branch names."""
    key, schema = (), root
    for part in loc:
        if part in schema.get("properties", ()):
            below = schema["properties"][part]
        elif isinstance(part, int) and schema.get("type") == "array":
            below = schema["items"] if "items" in schema else schema["prefixItems"][part]
        else:
            break
        if "$ref" in below:
            below = root["$defs"][below["$ref"].removeprefix("#/$defs/")]
        key, schema = (*key, part), below
    return key, schema


def _meant(loc: Key, root: dict[str, Any]) -> list[Key]:
    """The settings that an unknown key may stand for: the same word anywhere, else a near one."""
    word = str(loc[-1]).lower().replace("-", "_")
    word = SYNONYMS.get(word, word)
    tops: list[Key] = [(name,) for name in root["properties"]]
    below = {top: narrow(top, root)[1].get("properties", ()) for top in tops}
    keys = tops + [(*top, name) for top, names in below.items() for name in names]
    if same := [key for key in keys if word in (key[-1], dotted(key))]:
        return same
    for among, cutoff in (([key for key in keys if key[:-1] == loc[:-1]], 0.6), (keys, 0.75)):
        names = [str(key[-1]) for key in among]
        if near := difflib.get_close_matches(word, names, n=1, cutoff=cutoff):
            return [key for key in among if key[-1] == near[0]]
    return []


def show(value: Any) -> str:
    """A value as in YAML, cut to 60 characters."""
    match value:
        case tuple():
            text = f"[{', '.join(map(show, value))}]"
        case dict():
            text = "a mapping"
        case None | bool():
            text = json.dumps(value)
        case _:
            text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def dotted(key: Key) -> str:
    return "".join(f", item {k + 1}" if isinstance(k, int) else f".{k}" for k in key)[1:]
