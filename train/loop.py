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


def fit(
    trainer: Trainer, *, start: int, steps: int, checkpoint_every: int, preview_every: int
) -> None:
    """Train from `start` steps done to `steps`. The last step is always saved and previewed."""
    if start == 0:
        trainer.preview(0)
    for done, batch in enumerate(trainer.batches(start, steps), start=start + 1):
        trainer.step(done, batch)
        if done == steps or done % checkpoint_every == 0:
            trainer.save(done)
        if done == steps or done % preview_every == 0:
            trainer.preview(done)
