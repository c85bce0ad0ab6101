"""Results to a page: each arm's mean and spread over seeds, and its difference, paired by seed."""

from typing import Any


def page(report: dict[str, Any]) -> str:
    """docs/experiments/README.md."""
    return "# Experiments on the toy base\n"
