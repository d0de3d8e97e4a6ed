"""What native vector environments share: one of them as an Env, and seeds and infos as Gymnasium has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

Infos = dict[str, Any]

MODES = {"next_step": AutoresetMode.NEXT_STEP, "same_step": AutoresetMode.SAME_STEP}
_SEED_LIMIT = 2**31 - 1  # they keep seeds in 32 bits with a sign, and take -1 for none


class One(gymnasium.Env[Any, Any]):
    """The only environment of a vector environment of one, whose autoreset never shows: a reset follows each end."""

    def __init__(self, vector: VectorEnv[Any, Any, Any]) -> None:
        assert vector.num_envs == 1
        self.vector = vector
        self.observation_space = vector.single_observation_space
        self.action_space = vector.single_action_space
        self.metadata = {key: value for key, value in vector.metadata.items() if key != "autoreset_mode"}
        self.render_mode = vector.render_mode
        self.spec = vector.spec

    def reset(self, *, seed: int | None = None, options: Infos | None = None) -> tuple[Any, Infos]:
        super().reset(seed=seed)
        observations, infos = self.vector.reset(seed=seed, options=options)
        return _first(observations), {key: value[0].item() for key, value in infos.items()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Infos]:
        observations, rewards, terminated, truncated, infos = self.vector.step(np.asarray(action)[None])
        info = {key: value[0].item() for key, value in infos.items()}
        return _first(observations), float(rewards[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> Any:
        frames = self.vector.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        self.vector.close()


def _first(batch: Any) -> Any:
    return mapped(lambda leaf: leaf[0], batch)


def mapped(function: Callable[..., Any], *batches: Any) -> Any:
    """The same function of each array; a batch is one array, or a dict of batches where the space is a Dict."""
    if isinstance(batches[0], dict):
        return {key: mapped(function, *(batch[key] for batch in batches)) for key in batches[0]}
    return function(*(np.asarray(batch) for batch in batches))


def seeds_of(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int | None]:
    """One seed for each, in the range that native code keeps; None where none was given."""
    given = [seed + row for row in range(num_envs)] if isinstance(seed, int) else list(seed or [None] * num_envs)
    return [None if one is None else int(one) % _SEED_LIMIT for one in given]


def drawn_seeds(rng: np.random.Generator, num_envs: int) -> list[int]:
    """Seeds for environments that were given none."""
    return [int(one) for one in rng.integers(_SEED_LIMIT, size=num_envs)]


def final_infos(observations: Any, ended: NDArray[np.bool_]) -> Infos:
    """Gymnasium's infos for the episodes that ended under same-step autoreset: what each saw last."""
    if not ended.any():
        return {}
    final = np.full(len(ended), None, dtype=object)
    for row in np.flatnonzero(ended):
        final[row] = mapped(lambda leaf, row=row: leaf[row].copy(), observations)
    return {"final_obs": final, "_final_obs": ended, "final_info": {}, "_final_info": ended}
