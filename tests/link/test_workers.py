"""Where environments run makes no difference to what they give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import env_url

import longrein

LARGE = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box

SIDE = 800


class Large(gymnasium.Env):
    observation_space = Box(0, 255, (SIDE, SIDE), np.uint8)
    action_space = Box(0, 255, (SIDE, SIDE), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full((SIDE, SIDE), 7, np.uint8), {}

    def step(self, action):
        return action, 0.0, False, False, {}
"""


@pytest.mark.parametrize("workers", ["inline", "thread", "process"])
def test_what_is_larger_than_a_pipes_buffer_comes_whole(workers: str, tmp_path: Path) -> None:
    """A process worker took a long reply's first part for the end of its process."""
    (tmp_path / "large.py").write_text(LARGE)
    with longrein.Server([f"{tmp_path}/large.py:Large"], at="ws://127.0.0.1:0", workers=workers) as server:
        env = longrein.connect(env_url(server))
        env.reset()
        rng = np.random.default_rng(0)
        for _ in range(30):
            action = rng.integers(256, size=(800, 800), dtype=np.uint8)
            assert np.array_equal(env.step(action)[0], action)
