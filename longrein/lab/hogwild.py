"""The session's side of Hogwild workers: starts, feeds, hears and rests them. Learns nothing itself.

1. The learner's algorithm is the first worker's twin: it looks at the same shared weights, and is what a checkpoint
   and an evaluation are made of. Its shared memory is this process', which outlives every worker.
2. A worker acts one rollout, and learns from it, for each Go that it gets. Several have two, so that none waits for
   this process; one alone has one, and so takes turns with the course: it is cut where a serial session is.
3. Env steps are in shared memory, counted when an update begins. A worker that is killed in an update has counted rows
   of which the weights hold a part or nothing; one killed after it, rows whose episodes nobody hears of. Nothing counts
   twice.
4. At rest nobody holds a Go, so nobody writes. The weights are then the newest there are.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any

import torch

from longrein.lab.acting_role import Hello, Role, all_alike, seeds_of_life
from longrein.lab.actor import Episode
from longrein.lab.assembly import measured_lag
from longrein.lab.hogwild_process import OWN, Begin, Go, Owned, Report, live
from longrein.lab.learner import Learner, means
from longrein.lab.role_process import Post, check_memory, context_for, packed
from longrein.lab.topology import Topology
from longrein.learn.shared_weights import SharingWorker

SeedOf = Callable[..., int]


@dataclass
class _Place:
    """One worker's place, through all of its lives."""

    index: int
    post: Post
    life: int = 0
    hello: Hello | None = None
    begun: bool = False
    goes: int = 0
    """That it holds."""
    owned: Owned | None = None
    """What a worker here alone had when it was asked last, or when it was saved."""


class Workers:
    """Workers in processes, as one arena."""

    bodies: Sequence[str] = ("",)

    def __init__(self, role: Role, topology: Topology, seed_of: SeedOf) -> None:
        """role: with the copies of one worker. Opens nothing yet."""
        self.restarts = 0  # environments that were lost and replaced
        self.replaced = 0  # workers
        self._role = role
        self._seed_of = seed_of
        context, argument = context_for(role.algorithm), packed(role)
        self._places = [
            _Place(index, Post(f"worker {index}", context, live, (argument,))) for index in range(topology.hogwild)
        ]
        self._count = topology.hogwild
        self._learner: SharingWorker | None = None
        self._seed = 0
        self._reports: list[Report] = []
        self._episodes: list[Episode] = []
        self._noted = 0  # env steps of the newest episode that was noted
        self._taken_at = time.monotonic()

    @property
    def env_steps(self) -> int:
        """Valid rows that were learnt from, by all workers together."""
        return 0 if self._learner is None else self._learner.env_steps

    @property
    def actors(self) -> Sequence[Workers]:
        """Who has episodes."""
        return (self,)

    @property
    def copies(self) -> int:
        """Environments of all workers."""
        return self._role.copies * self._count

    @property
    def saves(self) -> bool:
        """Whether there is no need of a cut: only one worker alone can go on to the bit."""
        return self._count > 1

    def open(self) -> Hello:
        """Start all workers; what they step. Raises what kept one from it, RoleDied, or RunError after too long."""
        check_memory(self._count, "worker")
        for place in self._places:
            place.post.replaceable = False
            place.post.start()
        while any(place.hello is None for place in self._places):
            self._listen()
        for place in self._places:
            place.post.replaceable = True
        return all_alike([place.hello for place in self._places], "worker")

    def share(self, learner: SharingWorker) -> None:
        """Whose weights the workers share: the first worker."""
        self._learner = learner
        for _ in range(1, self._count):
            learner.worker()  # takes a place; who works there is made when it begins

    def begin(self, seed: int) -> None:
        """Let the workers begin new episodes, copy k of all with seed + k, when they first get a Go."""
        self._seed = seed

    def play(self, cut: int | None, stopped: Callable[[], bool]) -> tuple[list[Report], dict[str, float]]:
        """Let all work until there is about one rollout of each; what came of them, and what was measured beside.

        cut: seed of the environments' reset after it, for one worker alone. Comes back earlier when it is stopped.
        """
        while not stopped():
            enough = len(self._reports) >= self._count
            if self._count > 1 or not enough:
                for place in self._places:
                    self._feed(place, cut)
            if enough:
                break
            self._listen()
        reports, self._reports = self._reports, []
        return reports, self._measured(reports)

    def rest(self) -> tuple[list[Report], dict[str, float]]:
        """Wait until nobody holds a Go; the same."""
        while any(place.goes for place in self._places):
            self._listen()
        reports, self._reports = self._reports, []
        if self._learner is not None:
            self._learner.refresh()
        return reports, self._measured(reports)

    def finished(self) -> list[Episode]:
        """Episodes that ended since the last call."""
        episodes, self._episodes = self._episodes, []
        return sorted(episodes, key=lambda episode: (episode.env_steps, episode.env))

    def state_dict(self) -> dict[str, Any]:
        """Counters, and what each worker alone has; they are at rest. That of the first is put into the learner."""
        asked = [(place, place.life) for place in self._places if place.begun]
        for place in self._places:
            place.owned = None
        for place, _ in asked:
            place.post.send(OWN)
        while any(place.owned is None and place.life == life for place, life in asked):
            self._listen()
        first = self._places[0].owned
        if first is not None and first.own is not None and self._learner is not None:
            self._learner.load_own_state(torch.load(io.BytesIO(first.own), weights_only=True))
        return {
            "restarts": self.restarts, "replaced": self.replaced, "noted": self._noted,
            "lives": [place.life for place in self._places],
            "draws": [None if place.owned is None else place.owned.draws for place in self._places],
            "own": [None if place.owned is None or place.index == 0 else place.owned.own for place in self._places],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; `begin` comes after it."""
        self.restarts, self.replaced, self._noted = state["restarts"], state["replaced"], state["noted"]
        for place, life, draws, own in zip(self._places, state["lives"], state["draws"], state["own"], strict=True):
            # A worker whose generator was not saved draws anew: not what it drew after its start.
            place.life = life if draws is not None else life + 1
            place.owned = None if draws is None else Owned(own, draws)

    def save_state(self) -> Any:
        """None: environments of workers begin anew."""
        return None

    def reset_to(self, state: Any) -> None:
        """There is no such state."""
        raise AssertionError("workers save no state of environments")

    def close(self) -> None:
        """End all processes."""
        for place in self._places:
            place.post.dismiss()  # all at once, before we wait for each
        for place in self._places:
            place.post.end()

    # ------------------------------------------------------------------------------------------------------ one worker

    def _feed(self, place: _Place, cut: int | None) -> None:
        """Let a worker that is ready begin, and give it what it may hold of Gos."""
        if place.hello is None:
            return
        if not place.begun:
            self._begin(place)
        while place.goes < (1 if self._count == 1 else 2):
            place.goes += 1
            place.post.send(Go(cut))

    def _begin(self, place: _Place) -> None:
        assert self._learner is not None, "nobody shares weights"
        index, owned = place.index, place.owned
        life = place.life if owned is None else 0
        seed, draws = seeds_of_life(index, life, self._seed, self._role.copies, self._count > 1, self._seed_of)
        worker = self._learner
        if index or life:  # not the first one, which goes as it is: with draws of its own
            worker = worker.worker(self._seed_of("learner", f"worker {index}", f"life {life}"), index)
        place.begun = True
        if owned is None:
            place.post.send(Begin(worker, seed, draws, None))
        else:
            place.post.send(Begin(worker, seed, owned.draws, owned.own))

    def _listen(self) -> None:
        """Wait a little for whatever workers say, and take in all of it."""
        wait([place.post.pipe for place in self._places if place.post.pipe is not None], 0.1)
        for place in self._places:
            for said in place.post.hear():
                if said is None:
                    self._died(place)
                elif isinstance(said, Hello):
                    place.hello = said
                elif isinstance(said, Owned):
                    place.owned = said
                else:
                    self._heard(place, said)

    def _died(self, place: _Place) -> None:
        """Another one is in its place, and holds nothing."""
        self.replaced += 1
        if place.begun:  # else this life goes on where it has not begun
            self.restarts += self._role.copies
            place.life += 1
            place.owned = None
        place.hello, place.begun, place.goes = None, False, 0

    def _heard(self, place: _Place, report: Report) -> None:
        place.post.lives()
        place.goes -= 1
        self.restarts += report.restarts
        self._reports.append(report)
        for episode in report.episodes:
            # Nobody knows what the others had done by then; this is between what was counted before and after it.
            at = min(report.before + episode.env_steps * self._count, report.after)
            self._noted = max(self._noted, at)
            env = place.index * self._role.copies + episode.env
            self._episodes.append(replace(episode, env=env, env_steps=self._noted))

    def _measured(self, reports: Sequence[Report]) -> dict[str, float]:
        if not reports:
            return {}
        now = time.monotonic()
        took, self._taken_at = max(now - self._taken_at, 1e-9), now
        rows = sum(one.rows for one in reports)
        acting, learning, waiting = (
            sum(getattr(one, name) for one in reports) for name in ("acting", "learning", "waiting")
        )
        lags = [lag for one in reports for lag in one.lags] or [0]
        return {
            **measured_lag(lags),
            "actor_learning": learning / max(acting + learning, 1e-9),
            "actor_waiting": waiting / max(acting + learning + waiting, 1e-9),
            "learner_steps_per_second": rows / took,
            "actor_steps_per_second": rows / max(acting + learning, 1e-9),
            "actors_replaced": float(self.replaced),
        }  # fmt: skip


@dataclass(frozen=True)
class Hogwild:
    """Workers, and the learner whose weights they share."""

    arena: Workers
    learners: tuple[Learner]
    name: str = ""
    env: int = 0

    @property
    def chunk(self) -> int:
        """Vector steps of a rollout."""
        return self.learners[0].algorithm.rollout_steps

    def advance(self, cut: int | None, stopped: Callable[[], bool]) -> None:
        """Let the workers act and learn for about a rollout each. cut: as Workers.play has it."""
        self._record(*self.arena.play(cut, stopped))

    def rest(self) -> None:
        """Let nobody learn until the next `advance`, and let the learner hold the newest weights."""
        self._record(*self.arena.rest())

    def _record(self, reports: Sequence[Report], beside: dict[str, float]) -> None:
        measured = [one.measured for one in reports if one.measured is not None]
        if measured:
            env_steps = max(one.after for one in reports)
            self.learners[0].note(means(measured), env_steps, beside, len(measured))


@contextmanager
def hogwild(
    role: Role, topology: Topology, seed_of: SeedOf, learner_of: Callable[[Hello], Learner]
) -> Iterator[list[Hogwild]]:
    """Workers at work for as long as this is entered. learner_of: from what the workers step, which they say first.

    Raises what keeps a worker from starting: SpecError, LinkError, RunError.
    """
    workers = Workers(role, topology, seed_of)
    try:
        learner = learner_of(workers.open())
        assert isinstance(learner.algorithm, SharingWorker), "SHARES_WEIGHTS says that it is one"
        workers.share(learner.algorithm)
        yield [Hogwild(workers, (learner,))]
    finally:
        workers.close()
