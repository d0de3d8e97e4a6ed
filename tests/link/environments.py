"""Environments that the tests serve: each shows one thing that a link must get right."""

from __future__ import annotations

import time
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Counting(gymnasium.Env[Any, Any]):
    """Counts its own steps, across episodes: whoever loses or doubles a step is found out by the count.

    The observation is (steps since it was made, the last action, steps of this episode).
    """

    metadata = {"render_modes": ["rgb_array", "ansi"]}
    observation_space = spaces.Box(0, np.iinfo(np.int64).max, (3,), np.int64)
    action_space = spaces.Discrete(1_000_000)

    def __init__(self, length: int = 1_000_000, delay: float = 0.0, render_mode: str | None = None) -> None:
        self.length = length
        self.delay = delay
        self.render_mode = render_mode
        self.total = 0
        self.here = 0
        self.action = 0
        self.secret = "told to nobody"
        self.settings = {"speed": 1.0}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.here = 0
        return self._observation(), {"options": options} if options else {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.delay:
            time.sleep(self.delay)
        self.total += 1
        self.here += 1
        self.action = int(action)
        return self._observation(), float(self.total), self.here >= self.length, False, {"total": self.total}

    def render(self) -> Any:
        if self.render_mode == "ansi":
            return f"step {self.total}"
        return np.full((4, 5, 3), self.total % 256, np.uint8)

    def add(self, a: int, b: int = 10) -> int:
        """For Call."""
        return a + b

    def _observation(self) -> Any:
        return np.array([self.total, self.action, self.here], np.int64)


ZOO = spaces.Dict(
    {
        "b": spaces.Tuple((spaces.Discrete(5, start=-2), spaces.MultiBinary((2, 2)))),
        "a": spaces.Dict({"deep": spaces.Box(-np.inf, np.inf, (2, 3), np.float32), "n": spaces.MultiDiscrete([3, 4])}),
        "sequence": spaces.Sequence(spaces.Box(0, 1, (2,), np.float64)),
        "stacked": spaces.Sequence(spaces.Discrete(7), stack=True),
        "graph": spaces.Graph(spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(4)),
        "either": spaces.OneOf([spaces.Discrete(3), spaces.Box(0, 1, (2,), np.float32)]),
        "text": spaces.Text(8, min_length=0),
        "bytes": spaces.Box(0, 255, (4,), np.uint8),
    }
)


class Zoo(gymnasium.Env[Any, Any]):
    """Every kind of space there is, as observation and as action, with nested infos of every type."""

    def __init__(self, length: int = 25, large: bool = True) -> None:
        self.large = large  # an integer that Gymnasium's vector infos cannot hold
        self.observation_space = deepcopy(ZOO)  # it is sampled: two environments of a process must not share its seed
        self.action_space = spaces.Dict(
            {
                "turn": spaces.Discrete(3),
                "push": spaces.Box(-1, 1, (2,), np.float32),
                "say": spaces.Text(4, min_length=0),
                "path": spaces.Sequence(spaces.Discrete(5)),
                "which": spaces.OneOf([spaces.Discrete(2), spaces.MultiBinary(3)]),
            }
        )
        self.length = length
        self.here = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.here = 0
        return self.observation_space.sample(), self._info(None)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        assert action in self.action_space, action
        self.here += 1
        end = self.here >= self.length
        return self.observation_space.sample(), np.float32(self.np_random.random()), end, False, self._info(action)

    def _info(self, action: Any) -> dict[str, Any]:
        return {
            "action": action,
            "nested": {"array": np.arange(self.here), "pair": (1, "two", [3.0]), "none": None},
            "scalar": np.float32(0.5),
            "flag": np.bool_(True),
        } | ({"large": 2**80} if self.large else {})


class Broken(gymnasium.Env[Any, Any]):
    """Raises where it is told to: a negative number of steps raises at once."""

    observation_space = spaces.Discrete(10)
    action_space = spaces.Discrete(10)

    def __init__(self, where: str = "step") -> None:
        self.where = where
        if where == "init":
            raise OSError("the robot is not plugged in")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if self.where == "reset":
            raise RuntimeError("no ground under the wheels")
        return 0, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.where == "step" and action == 9:
            raise RuntimeError("the arm hit the table")
        if self.where == "outside" and action == 9:
            return "not a number", 0.0, False, False, {}
        if self.where == "die" and action == 9:
            import os

            os._exit(3)
        return int(action), 1, False, False, {}


class Strange(gymnasium.Env[Any, Any]):
    """Its observations are of a space that nobody else knows."""

    class Own(spaces.Space[Any]):
        """Not one of Gymnasium's."""

    observation_space = Own()
    action_space = spaces.Discrete(2)


class Vectorial(gymnasium.Env[Any, Any]):
    """A reward for each of two objectives."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    reward_space = spaces.Box(-10, 10, (2,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), np.array([1.5, -float(action)]), False, False, {}
