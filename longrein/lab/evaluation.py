"""Playing without learning: fixed seeds, each played once, so that short episodes are not counted more often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from longrein.errors import RunError
from longrein.lab.actor import act, autoreset_mode
from longrein.lab.games import Games, Table
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


def evaluate_games(
    games: Games, tables: Sequence[Table], policies: Sequence[Policy], seeds: Sequence[int]
) -> dict[str, list[tuple[int, int, float]]]:
    """Play one game on each seed without noise, as many at a time as there are copies; a policy for each table.

    Returns for each seat (seed, length in env steps, undiscounted return) of each game, in the order of `seeds`.
    """
    played: dict[str, list[tuple[int, int, float]]] = {seat: [] for table in tables for seat in table.seats}
    copies = len(games.copies)
    for first in range(0, len(seeds), copies):
        now = list(seeds[first : first + copies])
        observations = games.reset(tables, now + [now[-1]] * (copies - len(now)))
        states = [initial_state(policy, table.num_envs) for policy, table in zip(policies, tables, strict=True)]
        playing = [np.ones(table.num_envs, np.bool_) for table in tables]
        lengths = [np.zeros(table.num_envs, np.int64) for table in tables]
        returns = [np.zeros(table.num_envs) for table in tables]
        while any(rows.any() for rows in playing):
            actions = []
            for index, policy in enumerate(policies):
                action, extras = act(policy, policy.encode(observations[index]), states[index], deterministic=True)
                states[index] = extras.get("next_state")  # type: ignore[assignment]  # float32, as the contract says
                actions.append(policy.for_env(action))
            for index, (raw, reward, terminated, truncated, infos) in enumerate(games.step(tables, actions)):
                here = playing[index] & ~np.asarray(infos.get("idle", False))
                returns[index] += np.where(here, reward, 0.0)
                lengths[index] += here
                playing[index] &= ~(terminated | truncated)
                observations[index] = raw
        for table, length, total in zip(tables, lengths, returns, strict=True):
            for place, seat in enumerate(table.seats):
                rows = slice(place * copies, place * copies + len(now))
                played[seat] += zip(now, length[rows].tolist(), total[rows].tolist(), strict=True)
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
