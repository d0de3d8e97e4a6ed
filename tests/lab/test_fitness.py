"""Fitness against numbers worked by hand, and safe where its definitions divide by nothing."""

from __future__ import annotations

import numpy as np
import pytest

from longrein.lab import fitness
from longrein.lab.fitness import Session2018, Standard

STANDARD = Standard(20.0, 200.0, 1500.0)


def test_a_session_that_meets_the_standard_at_once() -> None:
    # Every episode returns 200: strength (200 - 20) / 180 = 1; the first window begins with episode 0, which ended at
    # env step 200: speed 1500 / 200 = 7.5; nothing ever falls: stability 1.
    session = fitness.session_2018([200.0] * 120, np.arange(1, 121) * 200, STANDARD)
    assert (session.strength, session.speed, session.stability) == (1.0, 7.5, 1.0)
    assert session.fitness == pytest.approx(np.sqrt((1 + 7.5**2 + 1) / 3))


def test_a_session_that_never_gets_there() -> None:
    session = fitness.session_2018([110.0] * 150, np.arange(150), STANDARD)
    assert (session.strength, session.speed, session.stability) == (0.5, 0.0, 0.0)
    assert fitness.session_2018([200.0] * 99, np.arange(99), STANDARD) == Session2018(0.0, 0.0, 0.0)


def test_stability_counts_falls() -> None:
    # 100 episodes at 200, then 100, 200, 100, 200: of the 103 changes from episode 0 on, two fall.
    session = fitness.session_2018([200.0] * 100 + [100.0, 200.0, 100.0, 200.0], np.arange(1, 105), STANDARD)
    assert session.stability == pytest.approx(101 / 103)


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([[0, 0, 0]] * 3, 0.0),
        ([[1, 1, 1], [1, 1, 1.05]], 1.0),
        ([[1, 1, 1], [1, 1, 2]], 0.0),
        ([[1, 1, 1]] * 4, 1.0),
        ([[1, 0, 0], [1.1, 0, 0], [0.9, 0, 0], [1.05, 0, 0], [9, 0, 0]], 0.8),
    ],
)
def test_consistency_is_the_share_without_outliers(vectors: list[list[float]], expected: float) -> None:
    assert fitness.consistency_2018([np.array(v, float) for v in vectors]) == pytest.approx(expected)


def test_a_trial_of_ones_has_fitness_one() -> None:
    trial = fitness.trial_2018([Session2018(1.0, 1.0, 1.0)] * 3)
    assert trial == {"strength": 1.0, "speed": 1.0, "stability": 1.0, "consistency": 1.0, "fitness": 1.0}


def test_slm5_by_hand() -> None:
    # Strengths 10, 30, 20 at 100, 200, 400 env steps and 1, 2, 4 updates.
    found = fitness.session_5([12.0, 32.0, 22.0], [100, 200, 400], [1, 2, 4], 2.0)
    assert (found["strength"], found["max_strength"], found["final_strength"]) == (20.0, 30.0, 20.0)
    assert found["sample_efficiency"] == pytest.approx((0.1 + 0.15 + 0.05) / 60)
    assert found["training_efficiency"] == pytest.approx((10 + 15 + 5) / 60)
    assert found["stability"] == pytest.approx(1 - 10 / 40)


def test_slm5_is_safe_below_the_random_policy() -> None:
    found = fitness.session_5([0.0, 0.0], [0, 0], [0, 0], 5.0)
    assert all(np.isfinite(value) for value in found.values())
    assert fitness.session_5([], [], [], 0.0)["strength"] == 0.0
    assert fitness.consistency_5([[0.0, 0.0], [0.0, 0.0]]) == 0.0
    assert fitness.consistency_5([[10.0, 10.0], [10.0, 10.0, 10.0]]) == 1.0


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert fitness.iqm([0.0, 2.0, 4.0, 1000.0]) == 3.0
    low, high = fitness.iqm_interval([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]])
    assert low < fitness.iqm([1, 2, 3, 4, 2, 3, 4, 5]) < high


def test_the_area_and_the_threshold() -> None:
    # 10 from env step 2 to 6, 20 from 6 to 10, and nothing before 2: (4 * 10 + 4 * 20) / 10.
    assert fitness.area_under_curve([10.0, 20.0], [2, 6], 10) == 12.0
    assert fitness.steps_to([0.0, 10.0, 10.0], [5, 6, 7], 10.0, window=2) == 7.0
    assert fitness.steps_to([0.0], [5], 10.0, window=2) is None
