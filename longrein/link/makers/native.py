"""CartPole stepped as one array of all copies: Gymnasium's own vector environment, with what it leaves out added.

`gymnasium.make_vec(..., vectorization_mode="vector_entry_point")` alone would do for training: it resets in the step
after an end (NEXT_STEP, as its metadata say), so that the step that ended shows the true last observation, and it
truncates at max_episode_steps by itself. But:
1. All copies draw from one generator, and a reset takes one seed: an episode could not be played on a seed of its own,
   as evaluation does. Here each copy has its generator and draws from it as a single CartPole does, so that a seed
   begins the same episode as there.
2. A reset of some copies resets all. Here it heeds `reset_mask`.
3. One vector step in NEXT_STEP mode is no step of those that ended. Same-step autoreset is added.
Of Gymnasium's environments none but CartPole has such a class in NumPy; others that have one need JAX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from longrein.errors import SpecError
from longrein.link.makers.pools import MODES, Infos, final_infos

_IDS = ("CartPole-v0", "CartPole-v1")
_OPTIONS = ("max_episode_steps", "render_mode", "sutton_barto_reward")


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raises SpecError for what cannot be stepped as one array, or not with these options."""
    if name not in _IDS:
        raise SpecError("env.options.vectorization", f"{name} cannot be stepped as one array",
                        hint=f"vectorization: sync; native is for {' and '.join(_IDS)}")  # fmt: skip
    for option in options:
        if option not in _OPTIONS:
            raise SpecError(f"env.options.{option}", f"{name} has no such option where it is stepped as one array",
                            hint="one of " + ", ".join(_OPTIONS))  # fmt: skip


def make(name: str, num_envs: int, autoreset: str, **options: Any) -> CartPoles:
    """So many copies of what `check` lets pass, in the autoreset mode asked for."""
    spec = gymnasium.spec(name)
    limit = {"max_episode_steps": spec.max_episode_steps}
    made = CartPoles(num_envs, MODES.get(autoreset, AutoresetMode.DISABLED), **limit | options)
    made.spec = spec
    return made


class CartPoles(CartPoleVectorEnv):
    """Copies of CartPole that answer as a SyncVectorEnv of single ones does; rewards and dynamics are Gymnasium's."""

    state: Any  # float64 [4, num_envs]; None until the first reset

    def __init__(self, num_envs: int, mode: AutoresetMode, **options: Any) -> None:
        super().__init__(num_envs, **options)
        self.metadata = {**self.metadata, "autoreset_mode": mode}
        self._mode = mode
        self._rngs = [seeding.np_random()[0] for _ in range(num_envs)]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Infos | None = None
    ) -> tuple[NDArray[np.float32], Infos]:
        """Reset all, or those of `options["reset_mask"]`. seed: one for each copy, or of the first; the k-th adds k."""
        seeds = [seed + row for row in range(self.num_envs)] if isinstance(seed, int) else seed
        bounds = {key: value for key, value in (options or {}).items() if key != "reset_mask"}
        mask = (options or {}).get("reset_mask")
        if mask is None or self.state is None:
            super().reset(options=bounds)  # which also keeps the bounds within which `_begin` draws
            mask = np.ones(self.num_envs, np.bool_)
        for row in np.flatnonzero(mask).tolist():
            if seeds is not None and seeds[row] is not None:
                self._rngs[row] = seeding.np_random(seeds[row])[0]
        self._begin(mask)
        return self.state.T.astype(np.float32), {}

    def step(
        self, action: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_], Infos]:
        """One step of all; what ended begins anew where the autoreset mode says so."""
        begin = self.prev_done  # under next-step autoreset: what ended in the last step, and takes none now
        observations, rewards, terminated, truncated, infos = super().step(action)
        ended = self.prev_done  # by now another array: what ended in this step
        if self._mode is AutoresetMode.DISABLED:
            self.prev_done = np.zeros_like(ended)
        elif self._mode is AutoresetMode.SAME_STEP and ended.any():
            infos, begin = final_infos(observations, ended), ended
        if begin.any():
            self._begin(begin)
            observations = self.state.T.astype(np.float32)
        return observations, rewards, terminated, truncated, infos

    def _begin(self, rows: NDArray[np.bool_]) -> None:
        """A new episode in these rows, drawn as a single CartPole draws it."""
        for row in np.flatnonzero(rows):
            self.state[:, row] = self._rngs[row].uniform(self.low, self.high, (4,))
        self.steps[rows] = 0
        self.prev_done = self.prev_done & ~rows
