"""The environment of a case, the same for all contestants: Gymnasium environments. Knows no learning package."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

PONG = "Pong frames"


class Pong(gymnasium.Env[Any, Any]):
    """Pong with the usual preprocessing: uint8 [4, 84, 84], rewards -1, 0 and 1.

    Four emulator frames an action, the last two joined, grey, stacked; up to 30 no-ops and FIRE at a reset; no sticky
    actions. It is ALE's own preprocessing in C++, for one game on one thread, so that nobody pays for Python's.
    """

    def __init__(self) -> None:
        from ale_py.vector_env import AtariVectorEnv

        self._game = AtariVectorEnv(
            "pong", 1, num_threads=1, frameskip=4, stack_num=4, noop_max=30, use_fire_reset=True,
            repeat_action_probability=0.0,
        )  # fmt: skip
        self.observation_space = self._game.single_observation_space
        self.action_space = self._game.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        observations, _ = self._game.reset(seed=np.array([-1 if seed is None else seed]))
        return observations[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observations, rewards, terminated, truncated, _ = self._game.step(np.array([action], np.int64))
        return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), {}


def make(name: str) -> gymnasium.Env[Any, Any]:
    """The environment that a case names."""
    return Pong() if name == PONG else gymnasium.make(name)


def make_vec(name: str, num_envs: int) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    """So many of it, one by one, each begun anew within the step that ended it."""
    from gymnasium.vector import AutoresetMode, SyncVectorEnv  # which an older Gymnasium beside another package has not

    return SyncVectorEnv([lambda: make(name)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
