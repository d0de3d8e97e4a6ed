"""MinAtar: five Atari games on a 10x10 grid, boolean [10, 10, channels].

See "MinAtar: An Atari-Inspired Testbed for Thorough and Reproducible Reinforcement Learning Experiments",
Young & Tian 2019 (arXiv:1903.03176), whose defaults these are but for the actions.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import TimeLimit
from minatar.gym import BaseEnv
from numpy.typing import NDArray

from longrein.errors import SpecError

OPTIONS = frozenset({"sticky", "ramping", "full_action_space", "max_episode_steps", "render_mode"})

_GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
_SCALE = 16  # a cell's side in a picture, in pixels


def names() -> list[str]:
    """The five games."""
    return list(_GAMES)


def make(
    name: str,
    num_envs: int,
    autoreset: str,
    *,
    sticky: float = 0.1,
    ramping: bool = True,
    full_action_space: bool = False,
    max_episode_steps: int = 0,
    render_mode: str | None = None,
) -> gymnasium.Env[Any, Any]:
    """sticky: the chance that the last action is repeated. ramping: games grow harder as they go on.

    full_action_space: all 6 actions as in the paper, or those that the game uses (the package's ids of version 1).
    max_episode_steps: truncates after so many, 0 never. render_mode: "rgb_array".
    """
    if render_mode not in (None, "rgb_array"):
        raise SpecError("render_mode", f"{render_mode!r} is neither None nor 'rgb_array'")
    game = Pictured(
        name,
        render_mode=render_mode,
        use_minimal_action_set=not full_action_space,
        sticky_action_prob=float(sticky),
        difficulty_ramping=bool(ramping),
    )
    game.spec = EnvSpec(f"minatar:{name}", max_episode_steps=max_episode_steps or None)
    return TimeLimit(game, max_episode_steps) if max_episode_steps else game


class Pictured(BaseEnv):  # type: ignore[misc]  # the package has no types
    """A game whose pictures are what others' are: uint8 and large enough to see."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def render(self) -> NDArray[np.uint8] | None:
        if self.render_mode is None:
            return None
        cells = np.round(np.asarray(super().render()) * 255).astype(np.uint8)  # it gives floats from 0 to 1
        return cells.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
