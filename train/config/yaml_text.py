"""A config as YAML 1.2: nodes with their lines, plain values, and what is wrong with the text.

Owns what of YAML is read and the words for a slip in it. Knows no setting.
"""

import re
from collections.abc import Callable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.tokens import AliasToken, AnchorToken, TagToken

from train.config.wording import show

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


class YamlError(Exception):
    """Text that isn't our YAML: message, line from 1."""


def compose(text: str) -> Node | None:
    """YAML nodes with their lines; None where there is no value at all. Raises YamlError."""
    try:
        for token in YAML(typ="safe", pure=True).scan(text):
            if isinstance(token, REFERENCES):
                sign = f"'{text[token.start_mark.index]}' starts an anchor, alias or tag"
                fault = f"{sign}; write the value out, or put the text in quotes"
                raise YamlError(fault, token.start_mark.line + 1)
        return YAML(typ="safe", pure=True).compose(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"control character U+{error.character:04X}; remove it", line) from None
    except MarkedYAMLError as error:
        for pattern, ours, at_start in SYNTAX:
            if match := re.search(pattern, error.problem):
                mark = error.context_mark if at_start else error.problem_mark
                raise YamlError(match.expand(ours), mark.line + 1) from None
        raise


def plain(node: Node | None) -> Any:
    """A node as None, bool, int, float, str, tuple or dict."""
    if isinstance(node, MappingNode):
        return {word(key): plain(value) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return tuple(plain(item) for item in node.value)
    if not isinstance(node, ScalarNode) or node.style:
        return node and node.value
    fits = (construct for pattern, construct in CORE_SCHEMA if pattern.fullmatch(node.value))
    return next(fits, str)(node.value)


def word(key: Node) -> str:
    return key.value if isinstance(key, ScalarNode) else show(plain(key))
