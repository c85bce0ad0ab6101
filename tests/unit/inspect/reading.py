"""Reads what `kindling inspect` found, for the tests of it."""

import json
from pathlib import Path

from data_tools.inspect import command as inspect


def report_of(root: Path, tmp_path: Path, *options: str) -> dict:
    file = tmp_path / "facts.json"
    inspect.main([str(root), "--json", str(file), *options])
    return json.loads(file.read_text(encoding="utf-8"))
