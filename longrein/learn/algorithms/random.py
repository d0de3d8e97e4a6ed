"""Random: actions drawn uniformly from the space. The floor that learning is measured from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn.batch import Batch
from longrein.learn.torsos import encode

ACTION_SPACES: tuple[type[gymnasium.Space[Any]], ...] = (Discrete, MultiDiscrete, MultiBinary, Box)
TOLERATES_LAG = True  # there are no weights

Draw = Callable[[int, torch.Generator | None], Tensor]
"""(B, generator) -> B actions, as the environment takes them."""


@dataclass(frozen=True)
class Config:
    """Random's settings."""

    rollout_steps: int = 128
    """Vector steps of one batch, after which env steps are counted."""

    def __post_init__(self) -> None:
        if self.rollout_steps < 1:
            raise SpecError("random.rollout_steps", f"must be at least 1, got {self.rollout_steps}")


class Policy(nn.Module):
    """Acts without looking. Raises SpecError for a space it cannot draw from."""

    def __init__(self, observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.action_space = action_space
        self._draw = _draw_from(action_space)
        self._first = _first_of(action_space)

    def encode(self, observation: Any) -> NDArray[np.generic]:
        """Observations of B environments, as the vector environment batches them -> [B, ...]."""
        return encode(self.observation_space, observation)

    def act(
        self, observation: NDArray[np.generic], deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """B actions; when deterministic, the first of the equally likely ones: 0, or the middle of a bounded Box."""
        count = len(observation)
        if deterministic:
            return np.repeat(self._first[None], count, 0), {}
        return self._draw(count, generator).numpy(), {}

    def for_env(self, action: NDArray[np.generic]) -> NDArray[np.generic]:
        """Actions of `act` -> the same, in the space's own dtype."""
        return action.astype(self.action_space.dtype, copy=False)


class Random:
    """Counts env steps, and learns nothing."""

    def __init__(
        self, config: Config, observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]
    ) -> None:
        self.config = config
        self.policy = Policy(observation_space, action_space)
        self.env_steps = 0  # valid rows seen

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """Count. Raises ValueError when no row is valid."""
        rows = int(batch.valid.sum())
        if rows == 0:
            raise ValueError("valid: no row of the batch is; there is nothing to count")
        self.env_steps += rows
        return {"env_steps": float(self.env_steps), "reward": float(batch.reward[batch.valid].mean())}

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future: what it draws, it draws from the actor's generator."""
        return {"policy": self.policy.state_dict(), "env_steps": self.env_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.policy.load_state_dict(state["policy"])
        self.env_steps = state["env_steps"]


def _draw_from(space: gymnasium.Space[Any]) -> Draw:
    if isinstance(space, Discrete):
        first, n = int(space.start), int(space.n)
        return lambda count, generator: torch.randint(first, first + n, (count,), generator=generator)
    if isinstance(space, MultiDiscrete):
        start, sizes = torch.as_tensor(space.start), torch.as_tensor(space.nvec)
        return lambda count, generator: start + _whole(sizes, count, generator)
    if isinstance(space, MultiBinary):
        shape = space.shape
        return lambda count, generator: torch.randint(0, 2, (count, *shape), generator=generator)
    if isinstance(space, Box):
        return _draw_from_box(space)
    raise SpecError(
        "env.action_space",
        f"nothing is known of how to draw from {space}",
        hint="Discrete, MultiDiscrete, MultiBinary and Box will do; wrap the environment to give one of them",
    )


def _draw_from_box(space: Box) -> Draw:
    """Uniform between bounds; without bounds normal, and with one of them exponential from it, as in Gymnasium."""
    low, high = (torch.as_tensor(bound.astype(np.float64)) for bound in (space.low, space.high))
    if np.issubdtype(space.dtype, np.integer):
        sizes = (high - low + 1).long()
        return lambda count, generator: low.long() + _whole(sizes, count, generator)
    below, above = torch.isfinite(low), torch.isfinite(high)
    floor, ceiling = low.nan_to_num(0, 0, 0), high.nan_to_num(0, 0, 0)
    everywhere = bool((below & above).all())

    def draw(count: int, generator: torch.Generator | None) -> Tensor:
        share = torch.rand(count, *low.shape, dtype=torch.float64, generator=generator)
        between = floor + share * (ceiling - floor)
        if everywhere:
            return between
        away = -torch.log1p(-share)  # exponential, with mean 1
        normal = torch.empty_like(share).normal_(generator=generator)
        half = torch.where(below, floor + away, ceiling - away)
        return torch.where(below & above, between, torch.where(below | above, half, normal))

    return draw


def _whole(sizes: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Whole numbers from 0 to below sizes [...]: int64 [count, ...]."""
    share = torch.rand(count, *sizes.shape, dtype=torch.float64, generator=generator)
    return (share * sizes).long()


def _first_of(space: gymnasium.Space[Any]) -> NDArray[np.generic]:
    if isinstance(space, Discrete):
        return np.asarray(int(space.start))
    if isinstance(space, MultiDiscrete):
        return np.asarray(space.start)
    if isinstance(space, Box):
        low, high = np.nan_to_num(space.low, neginf=0.0, posinf=0.0), np.nan_to_num(space.high, neginf=0.0, posinf=0.0)
        middle = (low.astype(np.float64) + high.astype(np.float64)) / 2
        return np.asarray(middle.clip(space.low, space.high).astype(space.dtype))
    return np.zeros(space.shape or (), np.int64)


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> Random:
    """A Random for one environment's spaces. `seed` decides nothing: there are no weights."""
    return Random(config, observation_space, action_space)
