"""How good a run was, in a few numbers: two fitness vectors by name, and what is reported beside them. Pure functions.

slm2018: SLM-Lab's of January 2018: strength, speed, stability, consistency, against a standard for the environment.
slm5: SLM-Lab's of version 5: strength above a random policy, sample and training efficiency, stability, consistency.
Both divide by quantities that may be 0: what cannot be said is 0 here, never infinite and never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
WINDOW = 100  # episodes of a moving average
NOISE = 0.05  # by how much strength may fall from one episode to the next and still count as stable
OUTLIER = 3.5  # modified z-score (Iglewicz and Hoaglin 1993)


@dataclass(frozen=True)
class Standard:
    """What is known of an environment: returns of a random policy and of a solution, and env steps until there."""

    random: float
    solved: float
    env_steps: float


STANDARDS = {
    "CartPole-v0": Standard(20.0, 200.0, 1500.0),
    "CartPole-v1": Standard(22.0, 475.0, 20_000.0),
}
"""Standards by environment id; the first is SLM-Lab's own."""


def moving_mean(values: ArrayLike, window: int = WINDOW) -> Floats:
    """Means of `window` values in a row: [n - window + 1]; empty when there are fewer."""
    array = np.asarray(values, np.float64)
    if len(array) < window:
        return np.empty(0)
    sums = np.cumsum(np.insert(array, 0, 0.0))
    means: Floats = (sums[window:] - sums[:-window]) / window
    return means


# ------------------------------------------------------------------------------------------------------------ slm2018


@dataclass(frozen=True)
class Session2018:
    """Strength, speed, stability of one session, each about 1 for a run that meets the standard."""

    strength: float
    speed: float
    stability: float

    @property
    def vector(self) -> Floats:
        return np.array([self.strength, self.speed, self.stability])

    @property
    def fitness(self) -> float:
        """The vector's length, over that of a vector of ones."""
        return length(self.vector)


def session_2018(returns: ArrayLike, env_steps: ArrayLike, standard: Standard) -> Session2018:
    """returns [n] of episodes, env_steps [n] when each ended. All 0 with fewer than WINDOW episodes."""
    raw = np.asarray(returns, np.float64)
    strength = np.maximum(raw - standard.random, 0.0) / (standard.solved - standard.random)
    means = moving_mean(strength)
    if not len(means):
        return Session2018(0.0, 0.0, 0.0)
    stable = np.flatnonzero(means >= 1.0)
    if not len(stable):
        return Session2018(float(means.max()), 0.0, 0.0)
    first = int(stable[0])  # the window's first episode, as the original takes it: its last one less WINDOW - 1
    at = float(np.asarray(env_steps, np.float64)[first])
    speed = standard.env_steps / at if at > 0 else 0.0
    changes = np.diff(strength[first:])
    stability = float((changes >= -NOISE).mean()) if len(changes) else 0.0
    return Session2018(float(means.max()), speed, stability)


def consistency_2018(vectors: Sequence[Floats]) -> float:
    """The share of sessions whose vector is no outlier; 0 when all vectors are 0."""
    matrix = np.asarray(vectors, np.float64)
    if not matrix.any():
        return 0.0
    if len(matrix) == 2:  # no median to be far from: the two agree or they do not
        gap = np.linalg.norm(matrix[0] - matrix[1]) / np.linalg.norm(np.ones(matrix.shape[1]))
        return 1.0 if gap <= NOISE else 0.0
    distance = np.linalg.norm(matrix - np.median(matrix, axis=0), axis=1)
    deviation = np.median(np.abs(distance - np.median(distance)))
    if deviation == 0:
        return 1.0
    score = 0.6745 * np.abs(distance - np.median(distance)) / deviation
    return float((score <= OUTLIER).mean())


def trial_2018(sessions: Sequence[Session2018]) -> dict[str, float]:
    """Means over sessions, consistency, and the fitness of the four."""
    vectors = [session.vector for session in sessions]
    means = np.mean(vectors, axis=0)
    vector = np.append(means, consistency_2018(vectors))
    names = ("strength", "speed", "stability", "consistency")
    return dict(zip(names, vector.tolist(), strict=True)) | {"fitness": length(vector)}


def length(vector: Floats) -> float:
    """The vector's length over that of ones: 1 for all ones."""
    return float(np.linalg.norm(vector) / np.sqrt(len(vector)))


# --------------------------------------------------------------------------------------------------------------- slm5


def session_5(returns: ArrayLike, env_steps: ArrayLike, updates: ArrayLike, random: float) -> dict[str, float]:
    """Of mean returns [n] at checkpoints, with the env steps and the updates of each; `random` is a random policy's."""
    strength = np.asarray(returns, np.float64) - random
    if not len(strength):
        return dict.fromkeys(_NAMES_5, 0.0)
    total = strength.sum()
    falls = np.minimum(np.diff(strength), 0.0).sum()
    before = strength[:-1].sum()
    values = (
        strength.mean(), strength.max(), strength[-1],
        _ratio((strength / np.maximum(np.asarray(env_steps, np.float64), 1.0)).sum(), total),
        _ratio((strength / np.maximum(np.asarray(updates, np.float64), 1.0)).sum(), total),
        1.0 - abs(_ratio(falls, before)) if before > 0 else 0.0,
    )  # fmt: skip
    return dict(zip(_NAMES_5, map(float, values), strict=True))


_NAMES_5 = ("strength", "max_strength", "final_strength", "sample_efficiency", "training_efficiency", "stability")


def consistency_5(curves: Sequence[Sequence[float]]) -> float:
    """1 - 2 * sum of deviations / sum of means over checkpoints, of the strengths of several sessions."""
    shortest = min(len(curve) for curve in curves)
    matrix = np.asarray([curve[:shortest] for curve in curves], np.float64)
    means = matrix.mean(axis=0).sum()
    return float(1.0 - 2.0 * matrix.std(axis=0).sum() / means) if means > 0 else 0.0


def _ratio(above: Any, below: Any) -> float:
    return float(above / below) if below > 0 else 0.0


# ------------------------------------------------------------------------------------------------------------- beside


def iqm(values: ArrayLike) -> float:
    """The mean of the middle half (Agarwal et al. 2021, arXiv:2108.13264)."""
    from scipy import stats  # by itself: it takes half a second

    return float(stats.trim_mean(np.ravel(np.asarray(values, np.float64)), 0.25))


def iqm_interval(scores: Sequence[ArrayLike], confidence: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """The bootstrap interval of the IQM over tasks, each with its seeds' scores; seeds are drawn within a task.

    None where a task has one seed only: what lies around it cannot be known.
    """
    from scipy import stats

    samples = [np.asarray(one, np.float64) for one in scores]
    if any(len(sample) < 2 for sample in samples):
        return None

    def statistic(*parts: Any, axis: int = -1) -> Any:
        return stats.trim_mean(np.concatenate(parts, axis=axis), 0.25, axis=axis)

    found = stats.bootstrap(
        samples, statistic, n_resamples=2000, confidence_level=confidence, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def iqm_band(
    lines: Floats, confidence: float = 0.95, seed: int = 0, resamples: int = 400
) -> tuple[Floats, Floats, Floats]:
    """The IQM over curves [S, N] at each of their N places, and its bootstrap interval: three arrays [N].

    The same curves are drawn for all places. Of one curve, all three are that curve; NaN where any curve has none.
    """
    unknown = np.isnan(lines).any(axis=0)
    known = lines[:, ~unknown]
    drawn = np.random.default_rng(seed).integers(len(lines), size=(resamples, len(lines)))
    means = _middle_half(known[drawn], axis=1) if len(lines) > 1 else known  # [resamples, N]
    half = (1.0 - confidence) / 2.0
    found = np.full((3, lines.shape[1]), np.nan)
    found[:, ~unknown] = _middle_half(known, axis=0), *np.quantile(means, [half, 1.0 - half], axis=0)
    return found[0], found[1], found[2]


def _middle_half(values: Floats, axis: int) -> Floats:
    """The mean without the lowest and the highest quarter, as scipy's trim_mean, which is slow for many."""
    count = values.shape[axis]
    cut = count // 4
    mean: Floats = np.take(np.sort(values, axis=axis), range(cut, count - cut), axis=axis).mean(axis=axis)
    return mean


def area_under_curve(returns: ArrayLike, env_steps: ArrayLike, budget: float) -> float:
    """The mean return over the budget's env steps: each episode's return holds until the next one ends."""
    values, steps = np.asarray(returns, np.float64), np.asarray(env_steps, np.float64)
    if not len(values) or budget <= 0:
        return 0.0
    ends = np.minimum(np.append(steps[1:], budget), budget)
    return float((values * np.maximum(ends - np.minimum(steps, budget), 0.0)).sum() / budget)


def steps_to(returns: ArrayLike, env_steps: ArrayLike, threshold: float, window: int = WINDOW) -> float | None:
    """Env steps when the mean of `window` returns first reached the threshold; None where it never did."""
    reached = np.flatnonzero(moving_mean(returns, window) >= threshold)
    return float(np.asarray(env_steps)[reached[0] + window - 1]) if len(reached) else None
