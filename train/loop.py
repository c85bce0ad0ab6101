"""When things happen in training. What happens is the trainer's."""

from collections.abc import Iterable
from typing import Any, Protocol


class Trainer(Protocol):
    """What the loop drives; `done` counts finished optimizer steps."""

    def batches(self, start: int, steps: int) -> Iterable[Any]:
        """The input of each step from `start` on."""
        ...

    def step(self, done: int, batch: Any) -> None:
        """One optimizer step; it is the `done`-th."""
        ...

    def save(self, done: int) -> None:
        """Write a checkpoint."""
        ...

    def preview(self, done: int) -> None:
        """Make preview pictures."""
        ...

    def validate(self, done: int) -> None:
        """Measure the loss on fixed pictures, unless that was done after this step before."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether to save and end after this step."""
        ...


def fit(
    trainer: Trainer,
    *,
    start: int,
    steps: int,
    checkpoint_every: int,
    preview_every: int,
    validate_every: int,
) -> int:
    """Train from `start` steps done to `steps`. After the last step everything is done once more.

    Returns the steps done: fewer than `steps` if the trainer is told to stop. Then only the save
    is done, which is urgent; a check that was due is made when the run goes on.
    """
    if start == 0:
        trainer.preview(0)
    if start < steps and start % validate_every == 0:
        trainer.validate(start)
    for done, batch in enumerate(trainer.batches(start, steps), start=start + 1):
        trainer.step(done, batch)
        stopping = trainer.stopping and done < steps
        if (done == steps or done % validate_every == 0) and not stopping:
            trainer.validate(done)
        if done == steps or done % checkpoint_every == 0 or stopping:
            trainer.save(done)
        if stopping:
            return done
        if done == steps or done % preview_every == 0:
            trainer.preview(done)
    return steps
