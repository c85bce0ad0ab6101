"""A signal as a wish: finish the step, save, end. Ctrl-C and SIGTERM, as schedulers send it.

Owns the handlers, which hold only while steps are taken; before that, nothing is lost by ending at
once. What is done about the wish is the trainer's and `loop`'s.
"""

import signal
import sys
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """Within `with`, `signal` is the first signal that came, or None.

    The same signal once more has its usual effect. A launcher of several processes answers Ctrl-C,
    which all of them get, with SIGTERM to each: so one of either kind is still only a wish.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, signal.Handlers | int | None] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)  # pyright: ignore
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in list(self._before):
            self._restore(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            print("stopping after this step; again stops at once, unsaved", file=sys.stderr)
        self._restore(signal.Signals(number))

    def _restore(self, number: signal.Signals) -> None:
        signal.signal(number, self._before.pop(number))
