"""Playing without learning: fixed seeds, each played once, so that short episodes are not counted more often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from longrein.errors import RunError
from longrein.lab.actor import act, autoreset_mode
from longrein.learn.algorithms import Policy, initial_state


def evaluate(
    policy: Policy,
    envs: VectorEnv[Any, Any, Any],
    seeds: Sequence[int],
    *,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
) -> list[tuple[int, int, float]]:
    """Play one episode on each seed, as many at a time as there are environments.

    Returns (seed, length in env steps, undiscounted return) for each, in the order of `seeds`.
    Raises RunError when an environment is lost meanwhile, since its episode was not played to its end.
    """
    played: list[tuple[int, int, float]] = []
    while len(played) < len(seeds):
        now = list(seeds[len(played) : len(played) + envs.num_envs])
        lengths, returns = _round(policy, envs, now, deterministic, generator)
        played += zip(now, lengths, returns, strict=True)
    return played


def _round(
    policy: Policy,
    envs: VectorEnv[Any, Any, Any],
    seeds: list[int],
    deterministic: bool,
    generator: torch.Generator | None,
) -> tuple[list[int], list[float]]:
    count = len(seeds)
    lengths = np.zeros(envs.num_envs, np.int64)
    returns = np.zeros(envs.num_envs)
    playing = np.arange(envs.num_envs) < count
    # Environments beyond the last seed are stepped along, and not looked at.
    all_seeds = seeds + [seeds[-1]] * (envs.num_envs - count)
    raw, _ = envs.reset(seed=all_seeds)  # type: ignore[arg-type]  # VectorEnv's classes take lists, its base does not say
    by_hand = autoreset_mode(envs) == AutoresetMode.DISABLED
    state = initial_state(policy, envs.num_envs)  # never reset: of each environment, one episode is looked at
    while playing.any():
        action, extras = act(policy, policy.encode(raw), state, deterministic=deterministic, generator=generator)
        state = extras.get("next_state")  # type: ignore[assignment]  # float32, as the policy's contract says
        raw, reward, terminated, truncated, infos = envs.step(policy.for_env(action))
        if np.any(np.asarray(infos.get("restarted", False)) & playing):
            raise RunError("an environment was lost during evaluation", hint="evaluate the checkpoint again")
        returns += np.where(playing, reward, 0.0)
        lengths += playing
        done = terminated | truncated
        playing &= ~done
        if by_hand and done.any():
            raw, _ = envs.reset(options={"reset_mask": done})
    return lengths[:count].tolist(), returns[:count].tolist()
