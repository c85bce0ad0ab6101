"""From a YAML file and `key=value` overrides to a `Config`, or one error that lists every fault.

Owns the place (file and line, or override) of each setting. What is valid is the schema's business
(`config`), the messages are made from it (`wording`), and YAML is read by `yaml_text`.
"""

import difflib
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from train.config import Config
from train.config.schema import Section, either
from train.config.wording import Key, dotted, explain, narrow, show
from train.config.yaml_text import YamlError, compose, plain, word
from train.errors import ConfigError

S = TypeVar("S", bound=Section)
SCHEMA = Config.model_json_schema()


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


@dataclass(frozen=True)
class _Place:
    """Where a value was set: in a file, or by an override of the key `sets`."""

    source: str
    line: int = 0
    sets: Key | None = None

    def say(self, key: Key, message: str) -> str:
        where = f"{self.source}:{self.line}" if self.line else self.source
        name = "" if key in ((), self.sets) else f"{dotted(key)}: "
        return f"{where}: {name}{message}"


class _Draft:
    """The config as plain data, where each value was set, and what is wrong so far."""

    def __init__(self, path: Path, schema: dict[str, Any]) -> None:
        self.schema = schema
        self.places: dict[Key, _Place] = {(): _Place(str(path))}
        self.faults: list[tuple[_Place, Key, str]] = []
        try:
            node = compose(_read(path))
        except YamlError as error:
            raise ConfigError(f"{path}:{error.args[1]}: {error.args[0]}") from None
        if node is None:
            raise ConfigError(f"{path}: is empty; start from one of the recipes in configs/")
        if not isinstance(node, MappingNode):
            line, got = node.start_mark.line + 1, show(plain(node))
            raise ConfigError(f"{path}:{line}: must be lines of key: value; got {got}")
        self.tree: dict[str, Any] = plain(node)
        self._locate(node, (), str(path))

    def _locate(self, node: Node, key: Key, source: str) -> None:
        """Record the lines of all that is below `node`, and note keys that are there twice."""
        below: list[tuple[str | int, Node, Node]] = []
        if isinstance(node, MappingNode):
            below = [(word(name), name, value) for name, value in node.value]
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
            node = compose(text)
        except YamlError as error:
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
        section[str(key[-1])] = plain(node)
        self.places = {k: p for k, p in self.places.items() if k not in replaced} | {key: place}
        return None

    def validate(self, model: type[S]) -> S | None:
        """The config, or None with the faults noted."""
        for name, value in self.tree.items():
            if value is None and "properties" in narrow((name,), self.schema)[1]:
                self.tree[name] = {}  # a section whose lines are all commented out
        try:
            return model.model_validate(self.tree)
        except ValidationError as error:
            faults = dict(explain(error.errors(), self.tree, self.schema))
        for key, message in faults.items():
            prefixes = (key[:length] for length in range(len(key), -1, -1))
            place = next(self.places[prefix] for prefix in prefixes if prefix in self.places)
            self.faults.append((place, key, message))
        return None


if __name__ == "__main__":
    if sys.argv[1:] != ["--schema"]:
        sys.exit("usage: python -m train.config.reading --schema > configs/schema.json")
    sys.stdout.write(json.dumps(SCHEMA, indent=2) + "\n")
