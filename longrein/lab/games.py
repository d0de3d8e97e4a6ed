"""Copies of a multi-agent game, stepped together and seen seat by seat. Knows PettingZoo's parallel API, no agent.

A *seat* is one of the game's possible agents; a *table* is some seats of one form (the same spaces) in all copies, as
rows: seat after seat, and within a seat copy after copy. A table looks as a vector environment with same-step autoreset
does. What differs from one:

 1. A seat may be out of its game before the others are: its row ends as any row does, and is idle (infos["idle"]) until
    the game is over and the copy begins again. A seat that the game has not called yet is idle, too.
 2. A copy begins again when none of its seats is left. Seats that the game dropped without a word were truncated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

Stepped = tuple[Any, np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], dict[str, Any]]
"""What a vector environment's step gives."""


@dataclass
class Table:
    """Some seats of one form, in all copies of a game."""

    seats: tuple[str, ...]
    single_observation_space: gymnasium.Space[Any]
    single_action_space: gymnasium.Space[Any]
    num_envs: int
    """Rows: seats times copies."""
    metadata: dict[str, Any] = field(default_factory=lambda: {"autoreset_mode": AutoresetMode.SAME_STEP})


class Games:
    """`copies` are PettingZoo parallel environments of one kind, from now on ours to step and to close."""

    def __init__(self, copies: Sequence[Any]) -> None:
        self.copies = list(copies)
        first = self.copies[0]
        self.seats: tuple[str, ...] = tuple(first.possible_agents)
        self.observation_spaces = {seat: first.observation_space(seat) for seat in self.seats}
        self.action_spaces = {seat: first.action_space(seat) for seat in self.seats}
        self._nothing = {seat: _zeros(space) for seat, space in self.observation_spaces.items()}
        self._seen: list[dict[str, Any]] = []  # of each copy, what each seat saw last

    def table(self, seats: Sequence[str]) -> Table:
        """The rows of some seats. Raises ValueError unless their spaces are the same."""
        first = seats[0]
        if any(self.form(seat) != self.form(first) for seat in seats):
            raise ValueError(f"seats {', '.join(seats)} do not see and do the same")
        rows = len(seats) * len(self.copies)
        return Table(tuple(seats), self.observation_spaces[first], self.action_spaces[first], rows)

    def form(self, seat: str) -> tuple[str, str]:
        """What tells seats with other spaces apart."""
        return str(self.observation_spaces[seat]), str(self.action_spaces[seat])

    def reset(self, tables: Sequence[Table], seed: int | Sequence[int]) -> list[Any]:
        """Begin all copies, copy k with seed + k or its own of several: the first observations of each table."""
        seeds = range(seed, seed + len(self.copies)) if isinstance(seed, int) else seed
        self._seen = [self._first(copy, own) for copy, own in zip(self.copies, seeds, strict=True)]
        return [self._observations(table) for table in tables]

    def step(self, tables: Sequence[Table], actions: Sequence[Any]) -> list[Stepped]:
        """One step of every copy. actions: of each table, batched. Gives each table what a vector environment would.

        Every seat must be at one of the tables.
        """
        chosen: list[dict[str, Any]] = [{} for _ in self.copies]
        for table, batch in zip(tables, actions, strict=True):
            rows = iter(iterate(batch_space(table.single_action_space, table.num_envs), batch))
            for seat in table.seats:
                for mine in chosen:
                    mine[seat] = next(rows)
        turns = [self._turn(index, mine) for index, mine in enumerate(chosen)]
        return [self._gathered(table, turns) for table in tables]

    def close(self) -> None:
        """Close all copies."""
        for copy in self.copies:
            copy.close()

    def _first(self, copy: Any, seed: int | None) -> dict[str, Any]:
        observations, _ = copy.reset(seed=seed)
        return {**self._nothing, **observations}

    def _turn(self, index: int, chosen: Mapping[str, Any]) -> dict[str, _Turn]:
        """One step of one copy; of each seat what came of it, and `_seen` what to act on next."""
        copy, before = self.copies[index], list(self.copies[index].agents)
        observations, rewards, terminated, truncated, _ = copy.step({seat: chosen[seat] for seat in before})
        left = set(copy.agents)
        turns, seen = {}, dict(self._seen[index]) | observations
        for seat in self.seats:
            over = bool(terminated.get(seat, False))
            stopped = bool(truncated.get(seat, False)) or (seat not in left and not over)
            played = seat in before
            turns[seat] = _Turn(played, float(rewards.get(seat, 0.0)), played and over, played and stopped, seen[seat])
        self._seen[index] = seen if left else self._first(copy, None)
        return turns

    def _gathered(self, table: Table, turns: Sequence[Mapping[str, _Turn]]) -> Stepped:
        rows = [turn[seat] for seat in table.seats for turn in turns]
        terminated = np.array([row.terminated for row in rows])
        truncated = np.array([row.truncated for row in rows])
        infos: dict[str, Any] = {}
        if not all(row.played for row in rows):
            infos["idle"] = np.array([not row.played for row in rows])
        if (terminated | truncated).any():
            infos["final_obs"] = [row.observation for row in rows]
        return self._observations(table), np.array([row.reward for row in rows]), terminated, truncated, infos

    def _observations(self, table: Table) -> Any:
        space, seen = table.single_observation_space, [mine[seat] for seat in table.seats for mine in self._seen]
        return concatenate(space, seen, create_empty_array(space, table.num_envs))


@dataclass(frozen=True, slots=True)
class _Turn:
    """What one step was for one seat."""

    played: bool
    reward: float
    terminated: bool
    truncated: bool
    observation: Any
    """The true successor."""


def _zeros(space: gymnasium.Space[Any]) -> Any:
    """Some observation, for a seat that has seen none."""
    return next(iter(iterate(batch_space(space, 1), create_empty_array(space, 1, fn=np.zeros))))
