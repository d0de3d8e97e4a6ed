"""Rollouts of many actors -> batches of a serial session's size, and what was measured of them. Knows no process.

A batch is so many rollouts as there are actors, each in the columns of one actor where these are still free.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from longrein.lab.actor import Episode
from longrein.lab.channel import Arrays
from longrein.lab.topology import Topology
from longrein.learn.batch import Batch
from longrein.learn.rollout import batch_of

LAGS = (0, 1, 2, 4, 8, 16)
"""Where the bins of the lag's histogram begin, in updates; a bin ends where the next begins."""

COUNTS = ("env_steps", "restarts", "dropped", "joined", "left")
"""Attributes of an Assembly that a checkpoint keeps."""


class Population(NamedTuple):
    """Environments of one actor that come and go."""

    live: int
    """There now."""
    joined: int
    """Since the rollout before; those that were there when the actor began are not counted."""
    left: int
    """Since the rollout before."""


@dataclass(frozen=True)
class Played:
    """What goes with a rollout."""

    version: int
    """Of the weights that acted."""
    episodes: tuple[Episode, ...]
    """Those that ended in it; their env steps are counted from its start, over this actor's environments."""
    restarts: int
    """Environments that were lost in it, and replaced."""
    acting: float
    """Seconds that it took."""
    waiting: float
    """Seconds before it in which there was no slot."""
    draws: bytes | None
    """State of the generator after a cut."""
    population: Population | None = None
    """Of environments that come and go."""


class Assembly:
    """The batch that is being put together, and counts over all of them.

    actors: how many there are. copies: environments of each. max_lag: updates that a rollout's weights may be old.
    """

    def __init__(self, actors: int, copies: int, max_lag: int | None = None) -> None:
        self.actors = actors
        self.copies = copies
        self.max_lag = max_lag
        self.env_steps = 0  # valid rows handed out
        self.restarts = 0  # environments that were lost and replaced
        self.dropped = 0  # rollouts that were too old
        self.joined, self.left = 0, 0  # environments that came and went
        self._live: dict[int, int] = {}  # actor -> its environments that are there, where they come and go
        self._batch: Arrays = {}
        self._blocks: dict[int, Played] = {}
        self._open = set(range(actors))  # blocks that are not there yet
        self._lags = Counter[int]()
        self._episodes: list[Episode] = []
        self._last_batch = time.monotonic()

    @property
    def full(self) -> bool:
        """Whether `batch` may be called."""
        return len(self._blocks) == self.actors

    def add(self, actor: int, arrays: Arrays, played: Played, version: int) -> bool:
        """Copy an actor's rollout [T, b, ...] in, and note its episodes; False where it is too old to be learnt from.

        version: of the weights that are learnt from now.
        """
        self.restarts += played.restarts
        if played.population is not None:
            self._live[actor] = played.population.live
            self.joined += played.population.joined
            self.left += played.population.left
        self._episodes += [
            replace(
                episode,
                env=actor * self.copies + episode.env,
                env_steps=self.env_steps + episode.env_steps * self.actors,
            )
            for episode in played.episodes
        ]
        lag = version - played.version
        if self.max_lag is not None and lag > self.max_lag:
            self.dropped += 1
            return False
        block = actor if actor in self._open else min(self._open)
        self._open.remove(block)
        self._copy(arrays, block)
        self._blocks[block] = played
        self._lags[lag] += 1
        return True

    def batch(self, waited: float) -> tuple[Batch, dict[str, float]]:
        """The batch [T, B, ...], good until the next `add`, and what was measured of it; the next one is begun.

        waited: seconds in which the learner had nothing to do since the last.
        """
        assert self.full, "rollouts are missing"
        batch = batch_of(self._batch)
        rows = int(batch.valid.sum())
        self.env_steps += rows
        measured = self._measured(rows, waited)
        self._blocks, self._open, self._lags = {}, set(range(self.actors)), Counter()
        return batch, measured

    def finished(self) -> list[Episode]:
        """Episodes that ended since the last call."""
        episodes, self._episodes = self._episodes, []
        return sorted(episodes, key=lambda episode: (episode.env_steps, episode.env))

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {name: getattr(self, name) for name in COUNTS}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting."""
        for name in COUNTS:
            setattr(self, name, state[name])

    def _copy(self, arrays: Arrays, block: int) -> None:
        """To the columns of one actor."""
        first = block * self.copies
        if not self._batch:
            shapes = {name: (a.shape[0], self.copies * self.actors, *a.shape[2:]) for name, a in arrays.items()}
            self._batch = {name: np.empty(shape, arrays[name].dtype) for name, shape in shapes.items()}
        for name, array in arrays.items():
            self._batch[name][:, first : first + self.copies] = array

    def _measured(self, rows: int, waited: float) -> dict[str, float]:
        rollouts: Sequence[Played] = list(self._blocks.values())
        now = time.monotonic()
        took, self._last_batch = max(now - self._last_batch, 1e-9), now
        acting, waiting = sum(one.acting for one in rollouts), sum(one.waiting for one in rollouts)
        population = {
            "environments": float(sum(self._live.values())),
            "environments_joined": float(self.joined), "environments_left": float(self.left),
        }  # fmt: skip
        return {
            **measured_lag(list(self._lags.elements())),
            "learner_waiting": min(waited / took, 1.0),
            "actor_waiting": waiting / max(acting + waiting, 1e-9),
            "learner_steps_per_second": rows / took,
            "actor_steps_per_second": rows / max(acting, 1e-9),
            "rollouts_dropped": float(self.dropped), **(population if self._live else {}),
        }  # fmt: skip


def measured_lag(lags: Sequence[int]) -> dict[str, float]:
    """The mean of some lags, and the shares of them in each bin."""
    ends = (*LAGS[1:], float("inf"))
    bins = {f"lag_{low}": sum(low <= lag < high for lag in lags) / len(lags)
            for low, high in zip(LAGS, ends, strict=True)}  # fmt: skip
    return {"actor_lag": sum(lags) / len(lags), **bins}


class Member(Protocol):
    """One actor's place, through all of its lives."""

    life: int
    draws: bytes | None
    """The generator of its choices after the last cut."""


class Assembling:
    """What all crews have in common as a scene: they count what they put together, and keep no environment's state."""

    bodies: Sequence[str] = ("",)
    _members: Sequence[Member]

    def __init__(self, topology: Topology, copies: int) -> None:
        """copies: environments of one actor."""
        self.topology = topology
        self._assembly = Assembly(topology.actors, copies, topology.max_lag)
        self._seed = 0  # of the first reset, from which every copy's follows
        self._cut: int | None = None  # seed of the reset after the batch at hand

    @property
    def env_steps(self) -> int:
        """Valid rows handed out."""
        return self._assembly.env_steps

    @property
    def restarts(self) -> int:
        """Environments that were lost and replaced."""
        return self._assembly.restarts

    @property
    def actors(self) -> Sequence[Self]:
        """Who has episodes."""
        return (self,)

    @property
    def copies(self) -> int:
        """Environments of all actors."""
        return self._assembly.copies * self._assembly.actors

    @property
    def saves(self) -> bool:
        """Whether there is no need of a cut: only actors that take turns with the learner can go on to the bit."""
        return self.topology.ahead > 0

    def begin(self, seed: int) -> None:
        """Let the actors begin new episodes, copy k of all with seed + k, when they are asked for the next batch."""
        self._seed = seed

    def finished(self) -> list[Episode]:
        """Episodes that ended since the last call."""
        return self._assembly.finished()

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the generators of actors that were cut."""
        return {
            **self._assembly.state_dict(),
            "lives": [member.life for member in self._members], "draws": [member.draws for member in self._members],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; `begin` comes after it."""
        self._assembly.load_state_dict(state)
        for member, life, draws in zip(self._members, state["lives"], state["draws"], strict=True):
            # An actor whose generator was not saved draws anew: not what it drew after its start.
            member.life, member.draws = (life, draws) if draws is not None else (life + 1, None)

    def save_state(self) -> Any:
        """None: environments of actors begin anew."""
        return None

    def reset_to(self, state: Any) -> None:
        """There is no such state."""
        raise AssertionError("actors save no state of environments")

    def _cut_of(self, actor: int) -> int | None:
        """The seed of an actor's part of the reset after the batch at hand."""
        return None if self._cut is None else self._cut + actor * self._assembly.copies
