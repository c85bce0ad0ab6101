"""The checks of one run: made, kept and reported.

Owns their history while the run lasts, and the words and rows that tell of them. The measure is
`validate`'s, the rules are `verdict`'s, and when a check is made is `loop`'s.
"""

import time
from typing import Any

from train.track import Tracker
from train.validation import verdict
from train.validation.validate import Model, Validator
from train.validation.verdict import Check, History


class Watch:
    """Every process has one, and all come to the same history."""

    def __init__(self, validator: Validator, *, tracker: Tracker) -> None:
        self._validator, self._tracker = validator, tracker
        self._history = History(validator.trial.held_out, validator.digest)
        self._resumed_at: int | None = None

    def restore(self, facts: dict[str, Any] | None, *, step: int) -> None:
        """Go on with the history in a checkpoint of `step`."""
        self._resumed_at = step
        if facts is None:
            return
        history = History.of_json(facts)
        if history.measure == self._history.measure:
            self._history = history
        else:  # of another version, which takes other pictures or prompts
            self._tracker.say("earlier checks were of other pictures or prompts; they start anew")

    def trained(self, loss: float) -> None:
        """Take note of a step's training loss."""
        self._history = self._history.trained(loss)

    def saved(self, step: int) -> tuple[dict[str, Any], int | None]:
        """The history with a checkpoint of `step`, and the step of the best one, if one can tell.

        One can't by pictures that are trained: their loss goes down all the time.
        """
        before = verdict.best(self._history.checks)
        self._history = self._history.saved(step)
        best = verdict.best(self._history.checks) if self._history.held_out else None
        if best and best != before and best.step == step:
            self._tracker.say(f"step {step}: the best checkpoint so far, by held-out loss")
        return self._history.to_json(), best and best.step

    def check(self, step: int, model: Model) -> None:
        """Make a check, unless there is one of this step, and report it."""
        if any(check.step == step for check in self._history.checks):
            return
        began = time.monotonic()
        check = self._validator.check(step, model)
        seconds = time.monotonic() - began
        self._history = self._history.checked(check)
        if step == self._resumed_at:
            self._history = self._history.saved(step)
        report = Report(self._history, self._validator)
        text = report.text(seconds=seconds)
        self._tracker.check(report.row(seconds=seconds), scalars=report.scalars(), text=text)


class Report:
    """The last check of a history, for people and for files."""

    def __init__(self, history: History, validator: Validator) -> None:
        self._history, self._check = history, history.checks[-1]
        self._loss = verdict.summary(self._check.losses)
        first = history.checks[0]
        self._base = first if first.step == 0 < self._check.step else None
        self._gain = verdict.change(self._check, since=self._base) if self._base else None
        self._overfits = verdict.overfits(history)
        self._worth = None if self._check.worth is None else verdict.summary(self._check.worth)
        self._names = [example.name for example in validator.trial.examples]
        self._levels = [f"{sigma:.3f}" for sigma in validator.sigmas]
        self._group = "held_out" if history.held_out else "fixed_noise_training"

    def row(self, *, seconds: float) -> dict[str, Any]:
        """The line of validation.jsonl."""
        check, gain = self._check, self._gain
        return {
            "step": check.step,
            "held_out": self._history.held_out,
            "loss": self._loss.mean,
            "error": self._loss.error,
            "to_base": gain and gain.mean,
            "to_base_error": gain and gain.error,
            "drift": check.drift,
            "references_worth": self._worth and self._worth.mean,
            "references_worth_error": self._worth and self._worth.error,
            "training_loss": check.training_loss,
            "overfits": self._overfits,
            "by_sigma": dict(zip(self._levels, check.bands, strict=True)),
            "by_picture": [list(pair) for pair in zip(self._names, check.losses, strict=True)],
            "seconds": seconds,
        }

    def scalars(self) -> dict[str, float]:
        """For trackers; what is measured on trained pictures has another name."""
        figures: dict[str, float | None] = {
            "loss": self._loss.mean,
            "to_base": self._gain and self._gain.mean,
            "drift": self._check.drift,
            "references_worth": self._worth and self._worth.mean,
            "overfits": float(self._overfits),
        }
        bands = zip(self._levels, self._check.bands, strict=True)
        figures |= {f"sigma {level}": loss for level, loss in bands}
        return {f"{self._group}/{key}": v for key, v in figures.items() if v is not None}

    def text(self, *, seconds: float) -> str:
        """For the console: all in two lines, one more for edits, and the alarm."""
        check = self._check
        kind = "held-out loss" if self._history.held_out else "training loss at fixed noise"
        line = f"step {check.step}: {kind} {self._loss}"
        if self._gain:
            line += f", to the base {self._gain:+}"
        if check.drift is not None:
            line += f"; drift {check.drift:.2%}"
        lines = [f"{line}; {seconds:.1f} s", f"  by sigma: {self._by_sigma()}"]
        if self._worth is not None:
            lines.append(f"  without the references the loss is {self._worth} higher")
            if not self._worth.rises:
                lines[-1] += ", no more than chance: so far the model doesn't use them"
        return "\n".join(lines + ([self._alarm()] if self._overfits else []))

    def _by_sigma(self) -> str:
        before = self._base.bands if self._base else (None,) * len(self._levels)
        return "  ".join(
            f"{level} {loss:.3f}" + ("" if base is None else f" ({loss - base:+.3f})")
            for level, loss, base in zip(self._levels, self._check.bands, before, strict=True)
        )

    def _alarm(self) -> str:
        lowest: Check = min(self._history.checks, key=lambda check: check.loss)
        rise = verdict.change(self._check, since=lowest)
        return (
            f"overfit alarm: the held-out loss is {rise} above its lowest, at step {lowest.step}, "
            "and so was the check before, while the training loss has fallen. Training goes on; "
            "fewer steps, a lower rank or more pictures would help."
        )
