"""When steps, checkpoints, previews and checks happen."""

from collections.abc import Iterable

import pytest

from train import loop


class Diary:
    """A trainer that writes down what it is told, such as "step 3"."""

    def __init__(self, *, stop_at: int = 0) -> None:
        self.lines: list[str] = []
        self._stop_at = stop_at

    def batches(self, start: int, steps: int) -> Iterable[int]:
        return range(start, steps)

    def step(self, done: int, batch: int) -> None:
        assert batch == done - 1
        self.lines.append(f"step {done}")

    def save(self, done: int) -> None:
        self.lines.append(f"save {done}")

    def preview(self, done: int) -> None:
        self.lines.append(f"preview {done}")

    def validate(self, done: int) -> None:
        self.lines.append(f"validate {done}")

    @property
    def stopping(self) -> bool:
        return self.lines[-1] == f"step {self._stop_at}"


def fit(
    *,
    start: int,
    steps: int,
    checkpoint_every: int,
    preview_every: int,
    validate_every: int = 10,
    stop_at: int = 0,
) -> list[str]:
    """The diary of a run."""
    diary = Diary(stop_at=stop_at)
    done = loop.fit(
        diary,
        start=start,
        steps=steps,
        checkpoint_every=checkpoint_every,
        preview_every=preview_every,
        validate_every=validate_every,
    )
    assert done == (stop_at or steps)
    return diary.lines


def test_a_run_previews_and_checks_first_and_last():
    assert fit(start=0, steps=3, checkpoint_every=10, preview_every=10) == [
        *("preview 0", "validate 0", "step 1", "step 2", "step 3"),
        *("validate 3", "save 3", "preview 3"),
    ]


def test_a_check_comes_before_the_checkpoint_that_keeps_it():
    assert fit(start=0, steps=4, checkpoint_every=2, preview_every=10, validate_every=2) == [
        *("preview 0", "validate 0", "step 1", "step 2", "validate 2", "save 2"),
        *("step 3", "step 4", "validate 4", "save 4", "preview 4"),
    ]


def test_each_has_its_own_pace_and_nothing_happens_twice():
    assert fit(start=0, steps=6, checkpoint_every=2, preview_every=3) == [
        *("preview 0", "validate 0", "step 1", "step 2", "save 2", "step 3", "preview 3"),
        *("step 4", "save 4", "step 5", "step 6", "validate 6", "save 6", "preview 6"),
    ]


@pytest.mark.parametrize("start", [1, 2, 4])
def test_a_resumed_run_does_exactly_the_rest(start):
    whole = fit(start=0, steps=6, checkpoint_every=2, preview_every=3)
    assert (
        fit(start=start, steps=6, checkpoint_every=2, preview_every=3)
        == (whole[whole.index(f"step {start + 1}") :])
    )


def test_a_finished_run_does_nothing():
    assert fit(start=6, steps=6, checkpoint_every=2, preview_every=3) == []


def test_a_check_that_a_stop_left_out_is_made_when_the_run_goes_on():
    """The trainer knows of one that it made before."""
    settings = {"steps": 5, "checkpoint_every": 10, "preview_every": 10, "validate_every": 2}
    assert fit(start=0, stop_at=2, **settings)[-2:] == ["step 2", "save 2"]
    assert fit(start=2, **settings)[:2] == ["validate 2", "step 3"]


@pytest.mark.parametrize(
    ("stop_at", "expected"),
    [
        (1, ["step 1", "save 1"]),
        (2, ["step 1", "step 2", "save 2"]),  # once, though it is due anyway
        (
            4,
            [
                *("step 1", "step 2", "save 2", "step 3", "step 4"),
                *("validate 4", "save 4", "preview 4"),
            ],
        ),
    ],
)
def test_told_to_stop_it_saves_and_ends(stop_at: int, expected: list[str]):
    """After the last step there is nothing to stop."""
    found = fit(start=0, steps=4, checkpoint_every=2, preview_every=10, stop_at=stop_at)
    assert found == ["preview 0", "validate 0", *expected]
