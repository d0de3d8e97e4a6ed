"""Playing without learning: fixed seeds, each played once, so that short episodes are not counted more often."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from longrein.errors import RunError
from longrein.lab.actor import act, autoreset_mode
from longrein.lab.games import Games, Table
from longrein.learn.algorithms import Policy, initial_state

LOSSES = 20
"""Of its environment, before its end, after which an episode is given up."""
log = logging.getLogger(__name__)


def evaluate(
    policy: Policy,
    envs: VectorEnv[Any, Any, Any],
    seeds: Sequence[int],
    *,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
) -> list[tuple[int, int, float]]:
    """Play one episode on each seed, as many at a time as there are environments.

    An episode whose environment is lost meanwhile is played again from its start.
    Returns (seed, length in env steps, undiscounted return) for each, in the order of `seeds`.
    Raises RunError when that happens LOSSES times to one.
    """
    played: dict[int, tuple[int, int, float]] = {}
    waiting, losses = list(range(len(seeds))), [0] * len(seeds)
    while waiting:
        now, waiting = waiting[: envs.num_envs], waiting[envs.num_envs :]
        lengths, returns, lost = _round(policy, envs, [seeds[index] for index in now], deterministic, generator)
        for row, index in enumerate(now):
            if not lost[row]:
                played[index] = seeds[index], lengths[row], returns[row]
                continue
            losses[index] += 1
            if losses[index] == LOSSES:
                raise RunError(f"an environment was lost {LOSSES} times while it was evaluated on seed {seeds[index]}",
                               hint="longrein run --resume RUN evaluates again")  # fmt: skip
            log.warning("an environment was lost during evaluation; seed %d is played again", seeds[index])
            waiting.append(index)
    return [played[index] for index in range(len(seeds))]


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
) -> tuple[list[int], list[float], list[bool]]:
    """Of one episode on each seed: lengths, returns, and whether its environment was lost before its end."""
    count = len(seeds)
    lost = np.zeros(envs.num_envs, np.bool_)
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
        lost |= playing & np.asarray(infos.get("restarted", False), np.bool_)
        playing &= ~lost
        returns += np.where(playing, reward, 0.0)
        lengths += playing
        done = terminated | truncated
        playing &= ~done
        if by_hand and done.any():
            raw, _ = envs.reset(options={"reset_mask": done})
    return lengths[:count].tolist(), returns[:count].tolist(), lost[:count].tolist()
