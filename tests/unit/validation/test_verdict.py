"""The rules: which checkpoint is best, and when a run overfits, on made-up histories."""

import json
import math
import statistics
from collections.abc import Sequence

import pytest

from train.validation import verdict
from train.validation.verdict import Check, History

APART = (-0.3, -0.1, 0.1, 0.3)
"""What four pictures' losses differ by: far more than the checks do."""


def history(
    *levels: float,
    shake: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    training: Sequence[float] = (),
    held_out: bool = True,
    saved: bool = True,
) -> History:
    """Checks each 10 steps from 0. shake: added to every other check's pictures."""
    found = History(held_out, "m")
    for number, level in enumerate(levels):
        noise = shake if number % 2 else (0.0,) * 4
        losses = tuple(level + a + b for a, b in zip(APART, noise, strict=True))
        if number and training:
            found = found.trained(training[number - 1])
        found = found.checked(Check(10 * number, losses, (level,)))
        if saved and number:
            found = found.saved(10 * number)
    return found


def best_step(found: History) -> int | None:
    best = verdict.best(found.checks)
    return best and best.step


def test_mean_and_standard_error_are_the_textbook_s():
    values = [0.4, 0.7, 0.1, 0.9, 0.3]
    found = verdict.summary(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert verdict.summary([0.4]).error is None


def test_critical_values_are_student_s():
    from scipy.stats import t

    for freedom, value in verdict.CRITICAL.items():
        assert value == pytest.approx(t.ppf(0.95, freedom), abs=6e-4)


def test_differences_are_taken_picture_by_picture():
    """Pictures that differ by 0.3 don't hide that each of them got better by 0.01."""
    found = history(0.5, 0.49)
    gain = verdict.change(found.checks[1], since=found.checks[0])
    assert gain.mean == pytest.approx(-0.01)
    assert gain.error == pytest.approx(0, abs=1e-12)
    assert (verdict.summary(found.checks[1].losses).error or 0) > 0.1


def test_the_lowest_is_best():
    assert best_step(history(0.6, 0.5, 0.4, 0.45, 0.41)) == 20


def test_a_gain_within_one_standard_error_keeps_the_earlier():
    # the difference's standard error is stdev(0.1, -0.1, 0.1, -0.1) / 2 = 0.0577
    shake = (0.1, -0.1, 0.1, -0.1)
    assert best_step(history(0.6, 0.5, 0.45, shake=shake)) == 10
    assert best_step(history(0.6, 0.5, 0.44, shake=shake)) == 20


def test_small_gains_add_up():
    """Each check is within the error of the one before it, but not of the best so far."""
    shake = (0.01, -0.01, 0.01, -0.01)  # an error of 0.0058
    levels = [0.6, 0.500, 0.496, 0.492, 0.488]
    assert best_step(history(*levels, shake=shake)) == 30  # 0.008 below, with no shake against 10


def test_only_checkpoints_can_be_best():
    found = history(0.6, 0.5, 0.4, saved=False)
    assert best_step(found) is None
    assert best_step(found.saved(10)) == 10


def test_the_base_is_no_checkpoint():
    assert best_step(history(0.4, 0.5, 0.6)) == 10


RISING = [0.6, 0.40, 0.42, 0.44]
FALLING = [0.6, 0.5, 0.4]


def test_the_alarm_needs_two_rises_in_a_row_and_a_falling_training_loss():
    assert verdict.overfits(history(*RISING, training=FALLING))
    assert not verdict.overfits(history(*RISING[:3], training=FALLING[:2]))
    assert not verdict.overfits(history(0.6, 0.40, 0.42, 0.40, training=FALLING))
    assert not verdict.overfits(history(*RISING, training=[0.4, 0.5, 0.6]))
    assert not verdict.overfits(history(0.6, 0.5, 0.4, 0.3, training=FALLING))


def test_the_alarm_counts_from_the_base_too():
    assert verdict.overfits(history(0.4, 0.42, 0.44, training=[0.6, 0.5]))


def test_chance_gives_no_alarm():
    """A mean rise of 0.02, in which pictures disagree: t = 0.02 / 0.0577."""
    shake = (0.1, -0.1, 0.1, -0.1)
    found = history(0.6, 0.40, 0.42, 0.42, 0.42, training=[*FALLING, 0.3], shake=shake)
    assert not verdict.overfits(found)


def test_trained_pictures_never_give_the_alarm():
    assert not verdict.overfits(history(*RISING, training=FALLING, held_out=False))


def test_the_training_loss_is_the_mean_since_the_last_check():
    found = History(True, "m").checked(Check(0, (1.0,), (1.0,)))
    for loss in (0.1, 0.2, 0.6):
        found = found.trained(loss)
    found = found.checked(Check(3, (1.0,), (1.0,)))
    assert [check.training_loss for check in found.checks] == [None, pytest.approx(0.3)]
    assert found.losses_since == (0.0, 0)


def test_a_history_survives_json_to_the_bit():
    found = history(1 / 3, 0.1 + 0.2, 2**-30, training=[0.1, 1 / 7]).trained(1 / 9)
    assert History.of_json(json.loads(json.dumps(found.to_json()))) == found
