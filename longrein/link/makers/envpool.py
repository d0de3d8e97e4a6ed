"""EnvPool: many environments stepped in C++, with seeds and same-step autoreset added.

1. A pool takes its seeds only when it is made: a reset with seeds makes a new pool.
2. A pool resets by itself in the step after an end. For same-step autoreset the ended ones are reset at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import envpool
import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from longrein.errors import SpecError
from longrein.link.makers import unknown
from longrein.link.makers.pools import MODES, Infos, One, drawn_seeds, final_infos, mapped, seeds_of

OPTIONS = frozenset(
    {
        "render_mode",
        "max_episode_steps",
        "noop_max",
        "episodic_life",
        "reward_clip",
        "use_fire_reset",
        "full_action_space",
        "repeat_action_probability",
    }
)


def names() -> list[str]:
    """All that the package lists."""
    return sorted(envpool.list_all_envs())


def check(name: str) -> None:
    """Raises SpecError for what the package does not know, cannot load here, or plays with several players."""
    if name not in envpool.list_all_envs():
        raise unknown("envpool", name, names())
    try:
        players = envpool.make_spec(name).config.max_num_players
    except (ImportError, RuntimeError) as error:  # a system library or a game's files are missing
        raise SpecError("env", f"envpool:{name}: {error}") from None
    if players != 1:
        raise SpecError("env", f"envpool:{name} has {players} players", hint="only games of one player can be served")


def make(
    name: str, num_envs: int, autoreset: str, *, render_mode: str | None = None, **options: Any
) -> VectorEnv[Any, Any, Any] | gymnasium.Env[Any, Any]:
    """`options` are those of the package for this environment: `envpool.make_spec(name)` lists them."""
    if render_mode not in (None, "rgb_array"):
        raise SpecError("render_mode", f"{render_mode!r} is neither None nor 'rgb_array'")
    if num_envs > 1 and autoreset in MODES:
        return Pool(name, num_envs, MODES[autoreset], render_mode, options)
    return One(Pool(name, 1, AutoresetMode.NEXT_STEP, render_mode, options))


class Pool(VectorEnv[Any, Any, Any]):
    """A pool with infos as Gymnasium has them; of those, the numbers that each environment has one of."""

    def __init__(
        self, name: str, num_envs: int, mode: AutoresetMode, render_mode: str | None, options: dict[str, Any]
    ) -> None:
        self._name, self._options = name, options
        self._same_step = mode is AutoresetMode.SAME_STEP
        self.num_envs = num_envs
        self.render_mode = render_mode
        self._pool = self._new(drawn_seeds(self.np_random, num_envs))
        self._seen: Any = None  # the last batch, what a partial reset answers with for the others
        self.single_observation_space = self._pool.single_observation_space
        self.single_action_space = self._pool.single_action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = {"render_modes": ["rgb_array"], "autoreset_mode": mode}
        self.spec = EnvSpec(f"envpool:{name}", max_episode_steps=self._pool.config.get("max_episode_steps") or None)

    def _new(self, seeds: list[int]) -> Any:
        shown = {} if self.render_mode is None else {"render_mode": self.render_mode}
        return envpool.make_gymnasium(self._name, num_envs=self.num_envs, seed=seeds, **shown, **self._options)

    def reset(self, *, seed: int | Sequence[int | None] | None = None, options: Infos | None = None) -> Any:
        """Reset all, or those of `options["reset_mask"]`. Raises SpecError for seeds with a mask, see rule 1."""
        super().reset(seed=seed if isinstance(seed, int) else None)
        mask = (options or {}).get("reset_mask")
        seeds = seeds_of(seed, self.num_envs)
        if any(one is not None for one in seeds):
            if mask is not None and not np.all(mask):
                raise SpecError("seed", "a pool takes seeds only for all of its environments at once",
                                hint="reset without reset_mask, or without a seed")  # fmt: skip
            drawn = drawn_seeds(self.np_random, self.num_envs)
            self._pool.close()
            self._pool = self._new([new if old is None else old for old, new in zip(seeds, drawn, strict=True)])
            mask = None
        if mask is None:
            observations, infos = self._pool.reset()
            self._seen = observations
            return observations, _numbers(infos)
        self._seen = self._restarted(np.flatnonzero(mask))
        return self._seen, {}

    def step(self, actions: Any) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Infos]:
        observations, rewards, terminated, truncated, found = self._pool.step(actions)
        infos, ended = _numbers(found), terminated | truncated
        self._seen = observations
        if self._same_step and ended.any():
            infos |= final_infos(observations, ended)
            self._seen = self._restarted(np.flatnonzero(ended))
        return self._seen, np.asarray(rewards, np.float64), terminated, truncated, infos

    def _restarted(self, rows: NDArray[np.int64]) -> Any:
        """What all see after these were reset; a pool answers for these alone."""
        news = self._pool.reset(rows.astype(np.int32))[0]

        def with_news(old: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
            whole = old.copy()
            whole[rows] = new
            return whole

        return mapped(with_news, self._seen, news)

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        if self.render_mode is None:
            return None
        return tuple(self._pool.render(env_ids=np.arange(self.num_envs, dtype=np.int32)))

    def close_extras(self, **kwargs: Any) -> None:
        self._pool.close()


def _numbers(infos: Infos) -> Infos:
    return {key: value for key, value in infos.items() if key != "env_id" and getattr(value, "ndim", 0) == 1}
