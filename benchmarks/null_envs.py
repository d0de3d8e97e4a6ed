"""Environments that cost nothing, or a known time, so that a benchmark sees the link alone."""

from __future__ import annotations

import itertools
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

SHORT_SECONDS, LONG_SECONDS = 0.002, 0.040
_made = itertools.count()


class Null(gymnasium.Env[Any, Any]):
    """Gives the same observation for ever."""

    action_space = spaces.Discrete(2)

    def __init__(self, observation: Any, space: spaces.Box, seconds: float = 0.0) -> None:
        self.observation_space = space
        self._observation = observation
        self._seconds = seconds

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._seconds:
            time.sleep(self._seconds)
        return self._observation, 1.0, False, False, {}


def tiny() -> Null:
    """An observation of CartPole's size."""
    return Null(np.zeros(4, np.float32), spaces.Box(-np.inf, np.inf, (4,), np.float32))


def pixels() -> Null:
    """An observation of Atari's size, as agents see it."""
    return Null(np.zeros((84, 84, 4), np.uint8), spaces.Box(0, 255, (84, 84, 4), np.uint8))


def slow_some() -> Null:
    """One in ten takes twenty times as long."""
    seconds = LONG_SECONDS if next(_made) % 10 == 0 else SHORT_SECONDS
    return Null(np.zeros(4, np.float32), spaces.Box(-np.inf, np.inf, (4,), np.float32), seconds)
