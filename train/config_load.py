"""From a YAML file and `key=value` overrides to a `Config`, or one error that lists every fault.

Owns the reading of YAML 1.2, the place (file and line, or override) of each setting, and the words
of the messages. What is valid is the schema's business (`config`): the messages are made from it.
"""

import difflib
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from train.config import Config, ConflictError, allowed, either
from train.errors import ConfigError

Key = tuple[str | int, ...]
"""Where a value is: section, setting, item of a list."""

CORE_SCHEMA: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"null|Null|NULL|~|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+"), lambda text: int(text, 0)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (
        re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        lambda text: float(text.replace(".", "")),
    ),
)
"""YAML 1.2.2, section 10.3.2: what a scalar without quotes means; anything else is text."""

SYNTAX = (  # ruamel's words -> ours, and whether the start of the construct is the better line
    (r"found character '\\t'", "a tab where YAML wants spaces; replace the tab", False),
    (
        r"mapping values are not",
        "a second ': '; put text in quotes, or mend the indentation",
        False,
    ),
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
    "learning_rate": "optim.lr", "lr_scheduler": "optim.schedule", "lr_warmup_steps": "optim.warmup",
    "max_train_steps": "train.steps", "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate", "mixed_precision": "base.dtype",
    "network_dim": "lora.rank", "network_alpha": "lora.alpha", "name_or_path": "base.model",
    "pretrained_model_name_or_path": "base.model", "instance_data_dir": "data.path",
    "folder_path": "data.path", "trigger_word": "data.trigger", "output_dir": "output",
}  # fmt: skip


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in `path`, changed by `overrides` such as "lora.rank=32" (value as in YAML).

    Relative paths in it stay as typed: they start at the current directory, not at the file.
    Raises ConfigError, with one line for each fault.
    """
    draft = _Draft(path)
    for override in overrides:
        draft.override(override)
    config = draft.validate()
    if config is None or draft.faults:
        ordered = sorted(draft.faults, key=lambda fault: (fault[0].sets is not None, fault[0].line))
        raise ConfigError("\n".join(place.say(key, text) for place, key, text in ordered))
    return config


def dump(config: Config) -> str:
    """The whole config as YAML, defaults written out; loads back equal."""
    yaml, text = YAML(typ="safe", pure=True), StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(config.model_dump(mode="json"), text)
    return text.getvalue()


def digest(config: Config) -> str:
    """SHA-256, in hex, of the whole config as canonical JSON; defaults count as if written out."""
    tree = config.model_dump(mode="json")
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def schema_text() -> str:
    """What configs/schema.json holds: JSON schema, with the fields' docs for editors."""
    return json.dumps(_schema(), indent=2, ensure_ascii=False) + "\n"


# ---- reading: text to nodes


def _read(path: Path) -> str:
    """The file's text; a byte order mark is dropped."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {_near_files(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; {_near_files(path / '*')}") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise ConfigError(f"{path}:{line}: byte 0x{byte:02x} isn't UTF-8; save as UTF-8") from None


def _near_files(path: Path) -> str:
    names = sorted(file.name for file in path.parent.glob("*.yaml"))
    if near := difflib.get_close_matches(path.name, names, cutoff=0.6):
        return f"did you mean {either([str(path.parent / name) for name in near])}?"
    return f"configs in {path.parent}: {', '.join(names) or 'none'}"


class _SyntaxError(Exception):
    """Text that isn't our YAML; `line` counts from 1."""

    def __init__(self, message: str, *, line: int) -> None:
        super().__init__(message)
        self.line = line


def _compose(text: str) -> Node | None:
    """YAML nodes with their lines; None where there is no value at all. Raises _SyntaxError."""
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            _refuse_reference(event)
        return YAML(typ="safe", pure=True).compose(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"control character U+{error.character:04X}; remove it"
        raise _SyntaxError(character, line=line) from None
    except MarkedYAMLError as error:
        for pattern, ours, at_start in SYNTAX:
            if match := re.search(pattern, error.problem):
                mark = error.context_mark if at_start else error.problem_mark
                raise _SyntaxError(match.expand(ours), line=mark.line + 1) from None
        raise


def _refuse_reference(event: Any) -> None:
    """Anchors, aliases and tags hide where a value comes from, or what it is."""
    sign = "*" if isinstance(event, AliasEvent) else ""
    if isinstance(event, NodeEvent) and not sign:
        sign = "&" if event.anchor else "!" if event.tag else ""
    if sign:
        what = f"'{sign}' starts an anchor, alias or tag; write the value out, or quote the text"
        raise _SyntaxError(what, line=event.start_mark.line + 1)


def _plain(node: Node | None) -> Any:
    """A node as None, bool, int, float, str, tuple or dict."""
    if isinstance(node, MappingNode):
        return {_word(key): _plain(value) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return tuple(_plain(item) for item in node.value)
    if node is None or node.style:
        return node and node.value
    fits = (construct for pattern, construct in CORE_SCHEMA if pattern.fullmatch(node.value))
    return next(fits, str)(node.value)


def _word(key: Node) -> str:
    return key.value if isinstance(key, ScalarNode) else _show(_plain(key))


# ---- drafting: nodes to a plain tree


@dataclass(frozen=True)
class _Place:
    """Where a value was set: in a file, or by an override of the key `sets`."""

    source: str
    line: int = 0
    sets: Key | None = None

    def say(self, key: Key, message: str) -> str:
        where = f"{self.source}:{self.line}" if self.line else self.source
        return ": ".join(
            [where, message] if key in ((), self.sets) else [where, _dotted(key), message]
        )


class _Draft:
    """The config as plain data, where each value was set, and what is wrong so far."""

    def __init__(self, path: Path) -> None:
        self.places: dict[Key, _Place] = {(): _Place(str(path))}
        self.faults: list[tuple[_Place, Key, str]] = []
        try:
            node = _compose(_read(path))
        except _SyntaxError as error:
            raise ConfigError(f"{path}:{error.line}: {error}") from None
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
            return str(error)
        if node is None and text.strip():
            return "'#' starts a comment; put the value in quotes"
        if isinstance(node, MappingNode):
            return "YAML reads the value as a mapping; put it in quotes, or set one key at a time"
        if key in self.places and self.places[key].sets:
            return f"{_dotted(key)} has two overrides; leave one out"
        section = self.tree
        for part in key[:-1]:
            if section.get(str(part)) is None:
                section[str(part)] = {}
            section = section[str(part)]
            if not isinstance(section, dict):
                return f"'{part}' isn't a section"
        # Lines of what the override replaces would point at text that no longer counts.
        kept = {k: p for k, p in self.places.items() if k[: len(key)] != key}
        self.places = {**kept, key: place}
        section[str(key[-1])] = _plain(node)
        return None

    def validate(self) -> Config | None:
        """The config, or None with the faults noted."""
        for name, value in self.tree.items():
            if value is None and "properties" in _narrow((name,))[1]:
                self.tree[name] = {}  # a section whose lines are all commented out
        try:
            return Config.model_validate(self.tree)
        except ValidationError as error:
            faults: dict[Key, str] = {}
            for key, message in _explain(error.errors(include_url=False), self.tree):
                faults.setdefault(key, message)  # a union has an error for each of its branches
        for key, message in faults.items():
            prefixes = (key[:length] for length in range(len(key), -1, -1))
            place = next(self.places[prefix] for prefix in prefixes if prefix in self.places)
            self.faults.append((place, key, message))
        return None


# ---- explaining: pydantic's errors to our words


def _explain(errors: Sequence[ErrorDetails], tree: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    """Key and message of each fault. A key that is only misspelt isn't also reported missing."""
    meant = {
        k for error in errors if error["type"] == "extra_forbidden" for k in _meant(error["loc"])
    }
    for error in errors:
        if error["type"] != "missing" or error["loc"] not in meant:
            yield from MAKERS.get(error["type"], _mismatch)(error, tree)


def _unknown(error: ErrorDetails, tree: dict[str, Any]) -> Iterable[tuple[Key, str]]:
    key = error["loc"]
    meant = _meant(key)
    names = [f"'{k[-1] if k[:-1] == key[:-1] else _dotted(k)}'" for k in meant]
    if names == [f"'{key[-1]}'"]:  # a dotted key
        yield key, f"unknown key; in a file, write '{meant[0][-1]}' below '{meant[0][0]}:'"
    elif names:
        yield key, f"unknown key; did you mean {either(names)}?"
    else:
        yield key, f"unknown key; allowed here: {', '.join(_narrow(key[:-1])[1]['properties'])}"


def _missing(error: ErrorDetails, tree: dict[str, Any]) -> Iterable[tuple[Key, str]]:
    key, schema = _narrow(error["loc"])
    if isinstance(key[-1], int):  # of a list that is too short
        yield from _mismatch({**error, "loc": key[:-1]}, tree)
    elif "properties" in schema:
        yield key, f"missing; add the section, with at least {', '.join(schema['required'])}"
    else:
        yield key, f"missing; it must be {allowed(schema)}"


def _refused(error: ErrorDetails, tree: dict[str, Any]) -> Iterable[tuple[Key, str]]:
    key, reason = _narrow(error["loc"])[0], error.get("ctx", {})["error"]
    problems = reason.problems if isinstance(reason, ConflictError) else {"": str(reason)}
    return [((*key, *filter(None, name.split("."))), text) for name, text in problems.items()]


def _mismatch(error: ErrorDetails, tree: dict[str, Any]) -> Iterable[tuple[Key, str]]:
    key, schema = _narrow(error["loc"])
    value: Any = tree
    for part in key:
        value = value[part]
    hint, branches = "", schema.get("anyOf", [schema])
    words = [word for branch in branches for word in branch.get("enum", ())]
    if isinstance(value, str) and (near := difflib.get_close_matches(value.lower(), words, n=1)):
        hint = f"; did you mean '{near[0]}'?"
    elif isinstance(value, bool | int | float | dict) and not words:
        hint = "; put it in quotes" if any(b["type"] == "string" for b in branches) else ""
    yield key, f"must be {allowed(schema)}; got {_show(value)}{hint}"


MAKERS: dict[str, Callable[[ErrorDetails, dict[str, Any]], Iterable[tuple[Key, str]]]] = {
    "extra_forbidden": _unknown,
    "missing": _missing,
    "value_error": _refused,
}


@cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _narrow(loc: Key) -> tuple[Key, dict[str, Any]]:
    """The part of pydantic's location that is a key, and its schema; unions add branch names."""
    key, schema = (), _schema()
    for part in loc:
        if part in schema.get("properties", ()):
            below = schema["properties"][part]
        elif isinstance(part, int) and schema.get("type") == "array":
            below = schema["items"] if "items" in schema else schema["prefixItems"][part]
        else:
            break
        if "$ref" in below:
            below = _schema()["$defs"][below["$ref"].removeprefix("#/$defs/")]
        key, schema = (*key, part), below
    return key, schema


def _meant(loc: Key) -> list[Key]:
    """The settings that an unknown key may stand for: the same word anywhere, else a near one."""
    word = str(loc[-1]).lower().replace("-", "_")
    word = SYNONYMS.get(word, word)
    tops: list[Key] = [(name,) for name in _schema()["properties"]]
    keys = tops + [(*top, name) for top in tops for name in _narrow(top)[1].get("properties", ())]
    if same := [key for key in keys if word in (key[-1], _dotted(key))]:
        return same
    for among, cutoff in (([key for key in keys if key[:-1] == loc[:-1]], 0.6), (keys, 0.75)):
        names = [str(key[-1]) for key in among]
        if near := difflib.get_close_matches(word, names, n=1, cutoff=cutoff):
            return [key for key in among if key[-1] == near[0]]
    return []


def _show(value: Any) -> str:
    """A value as in YAML, cut to 60 characters."""
    if isinstance(value, tuple):
        text = f"[{', '.join(_show(item) for item in value)}]"
    elif value is None or isinstance(value, bool | dict):
        text = "a mapping" if isinstance(value, dict) else json.dumps(value)
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


if __name__ == "__main__":
    if sys.argv[1:] != ["--schema"]:
        sys.exit("usage: python -m train.config_load --schema > configs/schema.json")
    sys.stdout.write(schema_text())
