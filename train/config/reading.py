"""From a YAML file and `key=value` overrides to a `Config`, or one error that lists every fault.

Owns the reading of YAML 1.2, the place (file and line, or override) of each setting, and the words
of the messages. What is valid is the schema's business (`config`): the messages are made from it.
"""

import difflib
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.tokens import AliasToken, AnchorToken, TagToken

from train.config import Config
from train.config.schema import Section, allowed, either
from train.errors import ConfigError

Key = tuple[str | int, ...]
"""Where a value is: section, setting, item of a list."""

S = TypeVar("S", bound=Section)
SCHEMA = Config.model_json_schema()
REFERENCES = (AliasToken, AnchorToken, TagToken)
"""Refused: they hide where a value comes from, or what it is."""

CORE_SCHEMA: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"null|Null|NULL|~|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+"), lambda text: int(text, 0)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda s: float(s.replace(".", ""))),
)
"""YAML 1.2.2, section 10.3.2: what a scalar without quotes means; anything else is text."""

SYNTAX = (  # ruamel's words -> ours, and whether the start of the construct is the better line
    (r"found character '\\t'", "a tab where YAML wants spaces; replace the tab", False),
    (r"mapping values are", "a second ': '; put text in quotes, or mend the indentation", False),
    (r"unexpected end of stream", "a quote opens here and never closes", True),
    (r"expected ',' or", "a bracket opens here and never closes, or lacks a comma", True),
    (r"expected <block end>", "text after a closing quote or bracket, or indented askew", False),
    (r"could not find expected ':'", "a line without ': '; write key: value", True),
    (r"found character '(.)' that", r"text can't start with '\1'; put it in quotes", False),
    (r"escape", r"'\\' in double quotes has a meaning of its own; use single quotes", False),
    (r"another document", "a second document begins here; a config is one document", False),
    (r"(?s)(.*)", r"not valid YAML: \1", False),
)

SYNONYMS = {  # what other trainers call it
    "learning_rate": "optim.lr", "lr_scheduler": "optim.schedule", "max_train_steps": "train.steps",
    "train_batch_size": "train.batch_size", "gradient_accumulation_steps": "train.accumulate",
    "network_dim": "lora.rank", "network_alpha": "lora.alpha", "name_or_path": "base.model",
    "pretrained_model_name_or_path": "base.model", "instance_data_dir": "data.path",
    "folder_path": "data.path", "trigger_word": "data.trigger", "output_dir": "output",
}  # fmt: skip


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in `path`, changed by `overrides` such as "lora.rank=32" (value as in YAML).

    Relative paths in it stay as typed: they start at the current directory, not at the file.
    Raises ConfigError, with one line for each fault.
    """
    return load_as(Config, path=path, overrides=overrides)


def load_as(model: type[S], *, path: Path, overrides: Sequence[str] = ()) -> S:
    """Like `load`, for files of another model."""
    draft = _Draft(path, model.model_json_schema())
    for override in overrides:
        draft.override(override)
    config = draft.validate(model)
    if config is None or draft.faults:
        ordered = sorted(draft.faults, key=lambda fault: (fault[0].sets is not None, fault[0].line))
        raise ConfigError("\n".join(place.say(key, text) for place, key, text in ordered))
    return config


def dump(config: Section) -> str:
    """The whole config as YAML, defaults written out; loads back equal."""
    yaml, text = YAML(typ="safe", pure=True), StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(config.model_dump(mode="json"), text)
    return text.getvalue()


def digest(config: Config) -> str:
    """SHA-256, in hex, of the whole config as canonical JSON; defaults count as if written out."""
    tree = config.model_dump(mode="json")
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {_near_files(path)}") from None
    except OSError as error:
        hint = f"is a folder; {_near_files(path / '*')}" if path.is_dir() else error.strerror
        raise ConfigError(f"{path}: {hint}") from None
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise ConfigError(f"{path}:{line}: byte 0x{byte:02x} isn't UTF-8; save as UTF-8") from None


def _near_files(path: Path) -> str:
    names = sorted(file.name for file in path.parent.glob("*.yaml"))
    if near := difflib.get_close_matches(path.name, names, cutoff=0.6):
        return f"did you mean {either([str(path.parent / name) for name in near])}?"
    return f"configs in {path.parent}: {', '.join(names) or 'none'}"


class _SyntaxError(Exception):
    """Text that isn't our YAML: message, line from 1."""


def _compose(text: str) -> Node | None:
    """YAML nodes with their lines; None where there is no value at all. Raises _SyntaxError."""
    try:
        for token in YAML(typ="safe", pure=True).scan(text):
            if isinstance(token, REFERENCES):
                sign = f"'{text[token.start_mark.index]}' starts an anchor, alias or tag"
                fault = f"{sign}; write the value out, or put the text in quotes"
                raise _SyntaxError(fault, token.start_mark.line + 1)
        return YAML(typ="safe", pure=True).compose(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _SyntaxError(f"control character U+{error.character:04X}; remove it", line) from None
    except MarkedYAMLError as error:
        for pattern, ours, at_start in SYNTAX:
            if match := re.search(pattern, error.problem):
                mark = error.context_mark if at_start else error.problem_mark
                raise _SyntaxError(match.expand(ours), mark.line + 1) from None
        raise


def _plain(node: Node | None) -> Any:
    """A node as None, bool, int, float, str, tuple or dict."""
    if isinstance(node, MappingNode):
        return {_word(key): _plain(value) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return tuple(_plain(item) for item in node.value)
    if not isinstance(node, ScalarNode) or node.style:
        return node and node.value
    fits = (construct for pattern, construct in CORE_SCHEMA if pattern.fullmatch(node.value))
    return next(fits, str)(node.value)


def _word(key: Node) -> str:
    return key.value if isinstance(key, ScalarNode) else _show(_plain(key))


@dataclass(frozen=True)
class _Place:
    """Where a value was set: in a file, or by an override of the key `sets`."""

    source: str
    line: int = 0
    sets: Key | None = None

    def say(self, key: Key, message: str) -> str:
        where = f"{self.source}:{self.line}" if self.line else self.source
        name = "" if key in ((), self.sets) else f"{_dotted(key)}: "
        return f"{where}: {name}{message}"


class _Draft:
    """The config as plain data, where each value was set, and what is wrong so far."""

    def __init__(self, path: Path, schema: dict[str, Any]) -> None:
        self.schema = schema
        self.places: dict[Key, _Place] = {(): _Place(str(path))}
        self.faults: list[tuple[_Place, Key, str]] = []
        try:
            node = _compose(_read(path))
        except _SyntaxError as error:
            raise ConfigError(f"{path}:{error.args[1]}: {error.args[0]}") from None
        if node is None:
            raise ConfigError(f"{path}: is empty; start from one of the recipes in configs/")
        if not isinstance(node, MappingNode):
            line, got = node.start_mark.line + 1, _show(_plain(node))
            raise ConfigError(f"{path}:{line}: must be lines of key: value; got {got}")
        self.tree: dict[str, Any] = _plain(node)
        self._locate(node, (), str(path))

    def _locate(self, node: Node, key: Key, source: str) -> None:
        """Record the lines of all that is below `node`, and note keys that are there twice."""
        below: list[tuple[str | int, Node, Node]] = []
        if isinstance(node, MappingNode):
            below = [(_word(name), name, value) for name, value in node.value]
        elif isinstance(node, SequenceNode):
            below = [(i, item, item) for i, item in enumerate(node.value)]
        for part, start, value in below:
            inner, place = (*key, part), _Place(source, start.start_mark.line + 1)
            if first := self.places.get(inner):
                self.faults.append((place, inner, f"is set in line {first.line} too; remove one"))
            self.places[inner] = place
            self._locate(value, inner, source)

    def override(self, text: str) -> None:
        """Set what "section.key=value" says, or note why that can't be."""
        name, equals, value = text.partition("=")
        key: Key = tuple(name.strip().split("."))
        place = _Place(f"override {text}", sets=key)
        fault = self._override(key, value, place) if equals else "must be key=value: lora.rank=32"
        if fault:
            self.faults.append((place, (), fault))

    def _override(self, key: Key, text: str, place: _Place) -> str | None:
        try:
            node = _compose(text)
        except _SyntaxError as error:
            return error.args[0]
        if node is None and text.strip():
            return "'#' starts a comment; put the value in quotes"
        if isinstance(node, MappingNode):
            return "YAML reads the value as a mapping; put it in quotes, or set one key at a time"
        replaced = {k: p for k, p in self.places.items() if k[: len(key)] == key}
        if any(earlier.sets for earlier in replaced.values()):
            return "another override sets this too; leave one out"
        section = self.tree
        for depth, part in enumerate(map(str, key[:-1]), 1):
            if section.get(part) is None:
                section[part] = {}
                self.places.setdefault(key[:depth], place)
            section = section[part]
            if not isinstance(section, dict):
                return f"'{part}' isn't a section"
        section[str(key[-1])] = _plain(node)
        self.places = {k: p for k, p in self.places.items() if k not in replaced} | {key: place}
        return None

    def validate(self, model: type[S]) -> S | None:
        """The config, or None with the faults noted."""
        for name, value in self.tree.items():
            if value is None and "properties" in _narrow((name,), self.schema)[1]:
                self.tree[name] = {}  # a section whose lines are all commented out
        try:
            return model.model_validate(self.tree)
        except ValidationError as error:
            faults = dict(_explain(error.errors(), self.tree, self.schema))
        for key, message in faults.items():
            prefixes = (key[:length] for length in range(len(key), -1, -1))
            place = next(self.places[prefix] for prefix in prefixes if prefix in self.places)
            self.faults.append((place, key, message))
        return None


def _explain(
    errors: Sequence[ErrorDetails], tree: Any, root: dict[str, Any]
) -> Iterator[tuple[Key, str]]:
    """Key and message of each fault; a key that is only misspelt isn't also reported missing."""
    unknown = [error["loc"] for error in errors if error["type"] == "extra_forbidden"]
    meant = [key for loc in unknown for key in _meant(loc, root)]
    for error in errors:
        kind, loc = error["type"], error["loc"]
        if kind == "missing" and isinstance(loc[-1], int):  # an item of a list that is too short
            kind, loc = "too_short", loc[:-1]
        key, schema = _narrow(loc, root)
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
    names = [f"'{k[-1] if k[:-1] == key[:-1] else _dotted(k)}'" for k in meant]
    if names == [f"'{key[-1]}'"]:  # a dotted key
        return f"unknown key; in a file, write '{meant[0][-1]}' below '{meant[0][0]}:'"
    if names:
        return f"unknown key; did you mean {either(names)}?"
    return f"unknown key; allowed here: {', '.join(_narrow(key[:-1], root)[1]['properties'])}"


def _mismatch(schema: dict[str, Any], value: Any) -> str:
    hint, branches = "", schema.get("anyOf", [schema])
    words = [word for branch in branches for word in branch.get("enum", ())]
    if isinstance(value, str) and (near := difflib.get_close_matches(value.lower(), words, n=1)):
        hint = f"; did you mean '{near[0]}'?"
    elif isinstance(value, bool | int | float | dict) and not words:
        hint = "; put it in quotes" if any(b["type"] == "string" for b in branches) else ""
    return f"must be {allowed(schema)}; got {_show(value)}{hint}"


def _narrow(loc: Key, root: dict[str, Any]) -> tuple[Key, dict[str, Any]]:
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
    below = {top: _narrow(top, root)[1].get("properties", ()) for top in tops}
    keys = tops + [(*top, name) for top, names in below.items() for name in names]
    if same := [key for key in keys if word in (key[-1], _dotted(key))]:
        return same
    for among, cutoff in (([key for key in keys if key[:-1] == loc[:-1]], 0.6), (keys, 0.75)):
        names = [str(key[-1]) for key in among]
        if near := difflib.get_close_matches(word, names, n=1, cutoff=cutoff):
            return [key for key in among if key[-1] == near[0]]
    return []


def _show(value: Any) -> str:
    """A value as in YAML, cut to 60 characters."""
    match value:
        case tuple():
            text = f"[{', '.join(map(_show, value))}]"
        case dict():
            text = "a mapping"
        case None | bool():
            text = json.dumps(value)
        case _:
            text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _dotted(key: Key) -> str:
    return "".join(f", item {k + 1}" if isinstance(k, int) else f".{k}" for k in key)[1:]


if __name__ == "__main__":
    if sys.argv[1:] != ["--schema"]:
        sys.exit("usage: python -m train.config.reading --schema > configs/schema.json")
    sys.stdout.write(json.dumps(SCHEMA, indent=2) + "\n")
