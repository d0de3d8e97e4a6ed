"""A T-maze: what was seen at the start says where to turn at the end, so that only a policy with memory gets there.

See "Reinforcement Learning with Long Short-Term Memory", Bakker 2001 (NeurIPS 14), section 5.

    longrein run spec/ppo.yaml ppo_memory
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

Observation = NDArray[np.float32]
NORTH, EAST, SOUTH, WEST = range(4)


class TMaze(gymnasium.Env[Observation, np.int64]):
    """A corridor of `length` steps to the east, then a junction: 4 for the turn that the start showed, else -0.1.

    Observes (0, 1, 1) or (1, 1, 0) at the start, (1, 0, 1) in the corridor, (0, 1, 0) at the junction. Walking into a
    wall costs 0.1. Without memory 1.95 is the best mean return, with it 4. Stopped after 3 * length + 10 steps.
    """

    observation_space = Box(0.0, 1.0, (3,), np.float32)
    action_space = Discrete(4)

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """At the start, with another sign."""
        super().reset(seed=seed)
        self.place = self.time = 0
        self.turn = int(self.np_random.choice([NORTH, SOUTH]))
        return self._seen(), {}

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One step towards NORTH, EAST, SOUTH or WEST."""
        self.time += 1
        reward, over, before = 0.0, False, self.place
        if self.place == self.length and action in (NORTH, SOUTH):
            reward, over = (4.0 if action == self.turn else -0.1), True
        elif action in (EAST, WEST):
            self.place = min(max(self.place + (1 if action == EAST else -1), 0), self.length)
        if not over and self.place == before:
            reward = -0.1
        return self._seen(), reward, over, self.time >= 3 * self.length + 10, {}

    def _seen(self) -> Observation:
        if self.place == self.length:
            return np.array([0, 1, 0], np.float32)
        if self.place > 0:
            return np.array([1, 0, 1], np.float32)
        return np.array([0, 1, 1] if self.turn == NORTH else [1, 1, 0], np.float32)


def t_maze(length: int = 10) -> TMaze:
    """What a server, or a spec's env.id, makes."""
    return TMaze(length)
