"""An actor in whichever environments have answered, each on a clock of its own -> rollouts. Knows no link, no learner.

1. A column is one environment's time line of so many rows, filled as fast as that environment answers. Invalid rows
   keep their place in it, as in a rollout of environments that are stepped together.
2. A full column joins the rollout that is being made. That one is whole when it has as many columns as there are
   environments: a fast one may give several, and a slow one carries its unfinished column over.
3. Weights may change between two rows of a column. A rollout's version is that of the oldest weights that acted in it.
4. An episode is told with the column that it ended in. So what was never sent was counted nowhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from longrein.errors import SpecError
from longrein.lab.actor import Actor, Episode
from longrein.lab.assembly import Population
from longrein.lab.channel import Arrays
from longrein.learn.algorithms import Policy
from longrein.learn.batch import Transition
from longrein.learn.columns import columns_of
from longrein.learn.rollout import kept

Rows = NDArray[np.int64]


class AsReady(Protocol):
    """A vector environment whose environments answer each for itself."""

    num_envs: int
    metadata: dict[str, Any]
    single_observation_space: gymnasium.Space[Any]
    single_action_space: gymnasium.Space[Any]

    def send(self, actions: Any, env_ids: Any = None) -> None:
        """Act in these environments [K], and do not wait."""

    def recv(self, min_ready: int = 1) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """What so many of them gave; infos["env_id"] [K] says which."""


class TimeLines:
    """A column of `length` rows for each of `count` environments, each filled at its own pace."""

    def __init__(self, length: int, count: int) -> None:
        self.length = length
        self.count = count
        self.columns: Arrays = {}  # name -> [B, T, ...]
        self._filled = np.zeros(count, np.int64)

    def add(self, rows: Rows, transition: Transition) -> Rows:
        """Copy one step of the environments `rows` in; those whose column is now full."""
        arrays = columns_of(transition)
        if not self.columns:
            self.columns = {
                name: np.empty((self.count, self.length, *array.shape[1:]), kept(array.dtype))
                for name, array in arrays.items()
            }
        at = self._filled[rows]
        for name, array in arrays.items():
            self.columns[name][rows, at] = array
        self._filled[rows] = at + 1
        full: Rows = rows[at + 1 == self.length]
        return full

    def move(self, row: int, into: Arrays, place: int) -> None:
        """Copy a full column to column `place` of a rollout [T, B, ...], and begin the next."""
        assert self._filled[row] == self.length, "the column is not full"
        for name, column in self.columns.items():
            into[name][:, place] = column[row]
        self._filled[row] = 0

    def empty(self) -> Arrays:
        """Memory for a rollout of as many columns; once something was added."""
        return {
            name: np.empty((self.length, self.count, *column.shape[2:]), column.dtype)
            for name, column in self.columns.items()
        }


class FirstReady:
    """Plays in environments as they answer; `fill` makes a rollout.

    least: environments whose answer is waited for. length: rows of a column. newest: puts the newest weights into the
    policy, and says their version. Raises SpecError where the environments cannot answer each for itself.
    """

    def __init__(
        self,
        envs: Any,
        policy: Policy,
        *,
        least: int,
        length: int,
        newest: Callable[[], int],
        generator: torch.Generator | None = None,
    ) -> None:
        if not (hasattr(envs, "send") and hasattr(envs, "recv")):
            raise SpecError("meta.topology.first_ready", f"{type(envs).__name__} has no send and recv",
                            hint="it takes environments that longrein serves, by their url")  # fmt: skip
        self.envs: AsReady = envs
        self.actor = Actor(envs, policy, seed=None, generator=generator)
        if self.actor.mode == AutoresetMode.DISABLED:
            raise SpecError("meta.topology.first_ready", "the environments do not reset themselves",
                            hint="autoreset same_step or next_step")  # fmt: skip
        self._least = min(least, envs.num_envs)
        self._newest = newest
        self._lines = TimeLines(length, envs.num_envs)
        self._full = deque[int]()  # environments whose column waits for its place; they do not act meanwhile
        self._due: Rows = np.zeros(0, np.int64)  # environments that are to act next
        self._version = np.zeros(envs.num_envs, np.int64)  # of the weights that chose a row's last action
        self._oldest = np.zeros(envs.num_envs, np.int64)  # of those that chose any of its column's rows
        self._fresh = np.ones(envs.num_envs, np.bool_)  # whose column has no row yet
        self._episodes: list[list[Episode]] = [[] for _ in range(envs.num_envs)]  # of each one's column
        self._told: list[Episode] = []

    def begin(self, observation: Any) -> None:
        """Go on from the first observations of new episodes, in every row."""
        self.actor.begin(observation)
        self._due = np.arange(self.envs.num_envs)

    def fill(self, into: Arrays) -> int:
        """Play until `into` [T, B, ...] is full; the oldest version that acted in it. Without arrays it gets them."""
        place, count, version = 0, self.envs.num_envs, -1
        while True:
            while self._full and place < count:
                if not into:
                    into |= self._lines.empty()
                row = self._full.popleft()
                self._lines.move(row, into, place)
                self._told += self._episodes[row]
                self._episodes[row] = []
                oldest = int(self._oldest[row])
                version = oldest if place == 0 else min(version, oldest)
                self._fresh[row] = True
                self._due = np.append(self._due, row)
                place += 1
            if place == count:
                return version
            self._act()
            self._receive()

    def finished(self) -> list[Episode]:
        """Episodes that ended in the columns of the last rollout."""
        told, self._told = self._told, []
        return sorted(told, key=lambda episode: episode.env_steps)

    def population(self) -> Population | None:
        """Where environments come and go: how many are there now, and how many joined and left."""
        live = getattr(self.envs, "live", None)
        return None if live is None else Population(live, self.envs.joined, self.envs.left)  # type: ignore[attr-defined]

    def _act(self) -> None:
        """Let those that are due act, with the newest weights there are."""
        if not len(self._due):
            return
        rows, self._due = np.sort(self._due), self._due[:0]  # in their order, so that equal answers draw equal numbers
        version = self._newest()
        self._version[rows] = version
        some = self.actor.part(rows)
        actions = some.choose()
        self.actor.join(rows, some)
        self.envs.send(actions, rows)

    def _receive(self) -> None:
        """Take in what environments answered."""
        raw, reward, terminated, truncated, infos = self.envs.recv(self._least)
        rows = np.asarray(infos.pop("env_id"), np.int64)
        some = self.actor.part(rows)
        transition = some.take(raw, reward, terminated, truncated, infos)
        self.actor.join(rows, some)
        fresh = self._fresh[rows]
        self._oldest[rows] = np.where(fresh, self._version[rows], np.minimum(self._oldest[rows], self._version[rows]))
        self._fresh[rows] = False
        for episode in self.actor.finished():
            self._episodes[episode.env].append(episode)
        full = self._lines.add(rows, transition)
        self._full += full.tolist()
        self._due = np.append(self._due, rows[~np.isin(rows, full)])


def since(before: int, episode: Episode) -> Episode:
    """The same, with its env steps counted from there."""
    return replace(episode, env_steps=max(episode.env_steps - before, 0))
