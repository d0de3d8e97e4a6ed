"""An environment that tells which one it is and counts its own steps: what is lost or doubled on the way shows."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import gymnasium
import numpy as np

MADE = itertools.count()


class Ticking(gymnasium.Env[Any, Any]):
    """Shows (its number, its steps since it was made, its episodes, the steps of this one); a reward of 1 a step.

    Episodes have 3 to 12 steps, and are terminated or truncated by turns. delay: seconds that a step takes at most.
    """

    observation_space = gymnasium.spaces.Box(0.0, np.inf, (4,), np.float64)
    action_space: gymnasium.Space[Any] = gymnasium.spaces.Discrete(3)

    def __init__(self, delay: float = 0.0, number: int | None = None) -> None:
        self.number = os.getpid() % 10_000 * 1000 + next(MADE) if number is None else number  # exact as float32
        self.delay = delay
        self.total, self.episode, self.here = 0, 0, 0
        self.draw = np.random.default_rng(self.number)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.here, self.length = 0, int(self.draw.integers(3, 13))
        return self._shown(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.delay:
            time.sleep(self.draw.uniform(0.0, self.delay))
        self.total += 1
        self.here += 1
        over = self.here == self.length
        return self._shown(), 1.0, over and self.episode % 2 == 0, over and self.episode % 2 == 1, {}

    def _shown(self) -> Any:
        return np.array([self.number, self.total, self.episode, self.here], np.float64)
