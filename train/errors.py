"""Errors that a user can mend. They end with exit code 2 and one message, never a traceback.

Every message says where, what, and what to do next. A broken invariant of ours is an `assert`
or a plain exception instead, and keeps its traceback.
"""

from collections.abc import Sequence


class UserError(Exception):
    """Something in the user's files, settings or machine must change; `str(error)` says what."""


class ConfigError(UserError):
    """The config file or an override is wrong."""


class DataError(UserError):
    """A picture, a caption or the data set as a whole can't be used."""


class CheckpointError(UserError):
    """A checkpoint, a cache entry or an adapter file is missing, damaged or doesn't fit."""


class MachineError(UserError):
    """The machine lacks something: a package, a login, a licence, disk or memory."""


class TrainingError(UserError):
    """Training can't go on: the loss isn't a number any more."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A signal ended a run after all was saved; the exit status is 128 and its number."""

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def bullet_list(title: str, lines: Sequence[str], *, limit: int = 50) -> str:
    """`title` and one indented line for each of `lines`, the first `limit` of them in full."""
    shown = [f"  {line}" for line in lines[:limit]]
    rest = len(lines) - limit
    return "\n".join([title, *shown] + ([f"  … and {rest} more"] if rest > 0 else []))
