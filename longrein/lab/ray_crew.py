"""The learner's side of actors on a Ray cluster: makes, asks, watches and replaces them. Knows no environment.

1. Weights are put into Ray's store once a version, and rollouts come back as objects of it. Each actor is asked for
   `ahead` + 1 rollouts before the first is taken. With `ahead` 0 it is asked when the learner has published.
2. A rollout that arrived is good whatever becomes of its actor. One that was lost with its machine is dropped.
3. An actor that died is replaced, wherever there is room. Ray does not say whether somebody killed it: what ended
   without a word counts as killed (KILLS), what told its error does not (FAILURES).
4. Every actor has ended when the crew is closed, and Ray too, where it was started here.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from longrein.errors import Error, RoleDied, RunError
from longrein.lab import ray_cluster
from longrein.lab.acting_role import Hello, Role, all_alike, policy_arrays, seeds_of_life
from longrein.lab.assembly import Assembling
from longrein.lab.learner import Learner
from longrein.lab.ray_actor import BESIDE, Place, RayActor, cost
from longrein.lab.role_process import FAILURES, KILLS, READY_SECONDS, packed
from longrein.lab.station import Crewed
from longrein.lab.topology import KEY, Topology
from longrein.learn.algorithms import Policy
from longrein.learn.batch import Batch

CLOSE_SECONDS = 5.0
"""That actors may take to close their environments."""

WARN_SECONDS = 20.0
"""After which it is said that an actor is not ready: one that is replaced may wait for room."""

log = logging.getLogger(__name__)
SeedOf = Callable[..., int]


@dataclass
class _Member:
    """One actor's place, through all of its lives."""

    index: int
    life: int = 0
    actor: Any = None
    since: float = 0.0  # when this life began
    hello: Hello | None = None
    started: bool = False
    warned: bool = False  # whether it was said that it is late
    asked: deque[Any] = field(default_factory=deque)  # what it owes an answer to, in order
    taken: bool = False  # whether its rollout is in the batch, where it takes turns with the learner
    deaths: int = 0  # in a row
    draws: bytes | None = None  # the generator after the last cut

    @property
    def name(self) -> str:
        """As it is told."""
        return f"actor {self.index}"


class RayCrew(Assembling):
    """Actors on a Ray cluster, which this process has joined, as one arena."""

    def __init__(self, role: Role, topology: Topology, seed_of: SeedOf) -> None:
        """role: with the copies of one actor. Makes no actor yet."""
        import ray

        super().__init__(topology, role.copies)
        self.replaced = 0  # actors
        self._ray = ray
        self._role = role
        self._packed = packed(role)
        self._place = Place.here()
        self._seed_of = seed_of
        self._members: list[_Member] = [_Member(index) for index in range(topology.actors)]
        self._turn = deque(self._members)  # who has waited longest for the learner comes first
        for call in (RayActor.renew, RayActor.end):
            ray.method(concurrency_group=BESIDE)(call)
        self._kind: Any = ray.remote(**cost(topology.actor_cpus))(RayActor)
        self._weights: Any = None  # a reference to what was published
        self._version = 0
        self._waited = 0.0

    @property
    def published(self) -> bool:
        """Whether there are weights to act with."""
        return self._weights is not None

    def open(self) -> Hello:
        """Make all actors; what they step. Raises what kept one from it, RoleDied, or RunError after too long."""
        ray_cluster.check_room(f"{KEY}.actors", len(self._members), self.topology.actor_cpus)
        for member in self._members:
            self._spawn(member)
        while any(member.hello is None for member in self._members):
            self._listen(lambda: False)
        return all_alike([member.hello for member in self._members], "actor")

    def publish(self, policy: Policy, version: int) -> None:
        """Let the actors act with these weights from their next rollout on."""
        self._weights, self._version = self._ray.put((version, policy_arrays(policy))), version
        if self.topology.ahead:  # rollouts were asked for with older ones
            for member in self._members:
                if member.started:
                    member.actor.renew.remote(self._weights)

    def collect(self, cut: int | None, stopped: Callable[[], bool]) -> tuple[Batch, dict[str, float]] | None:
        """The next batch [T, B, ...] and what was measured of it; None when it was stopped.

        The batch is good until the next call. cut: seed of one after it, for actors that take turns with the learner.
        """
        self._cut = cut
        for member in self._members:
            if not member.started and member.hello is not None:
                self._start(member)
            if member.taken:
                member.taken = False
                self._ask(member)
        while not self._assembly.full:
            self._listen(stopped)
            if stopped():
                return None
        waited, self._waited = self._waited, 0.0
        queue = self._queued() / ((self.topology.ahead + 1) * len(self._members))
        batch, measured = self._assembly.batch(waited)
        return batch, measured | {"queue": queue, "actors_replaced": float(self.replaced)}

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the generators of actors that were cut."""
        return super().state_dict() | {"replaced": self.replaced}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; `begin` comes after it."""
        super().load_state_dict(state)
        self.replaced = state["replaced"]

    def close(self) -> None:
        """End all actors."""
        living = [member.actor for member in self._members if member.actor is not None]
        with suppress(self._ray.exceptions.RayError):
            for actor in living:
                actor.end.remote()
            closed = [actor.close.remote() for actor in living]
            if closed:
                self._ray.wait(closed, num_returns=len(closed), timeout=CLOSE_SECONDS)
            for actor in living:
                self._ray.kill(actor)

    # ------------------------------------------------------------------------------------------------------ one actor

    def _spawn(self, member: _Member) -> None:
        member.actor, member.since = self._kind.remote(self._packed, self._place), time.monotonic()
        member.hello, member.started, member.warned = None, False, False
        member.asked = deque([member.actor.open.remote()])

    def _start(self, member: _Member) -> None:
        """Tell an actor, which has said hello, what to begin with, and ask it for rollouts."""
        life = member.life if member.draws is None else 0
        several = len(self._members) > 1
        seed, drawn = seeds_of_life(member.index, life, self._seed, self._role.copies, several, self._seed_of)
        member.started = True
        draws = drawn if member.draws is None else member.draws
        member.asked.append(member.actor.begin.remote(self._weights, seed, draws))
        for _ in range(self.topology.ahead + 1 - member.taken):
            self._ask(member)

    def _ask(self, member: _Member) -> None:
        """For a rollout."""
        if member.started:
            member.asked.append(member.actor.play.remote(self._weights, self._cut_of(member.index)))

    def _queued(self) -> int:
        """Rollouts that wait for the learner."""
        asked = [one for member in self._members for one in member.asked]
        return len(self._ray.wait(asked, num_returns=len(asked), timeout=0)[0]) if asked else 0

    def _listen(self, stopped: Callable[[], bool]) -> None:
        """Wait a little for whatever actors answer, and take an answer of each, until the batch is full."""
        begun = time.monotonic()
        first = {member.asked[0]: member for member in self._turn if member.asked}
        ready, _ = self._ray.wait(list(first), num_returns=len(first), timeout=0)
        if not ready:
            ready, _ = self._ray.wait(list(first), num_returns=1, timeout=0.1)
        self._waited += time.monotonic() - begun
        for one in ready:
            if self._assembly.full:
                break
            member = first[one]
            self._turn.remove(member)
            self._turn.append(member)
            self._answered(member, member.asked.popleft())
        for member in self._members:
            waits = time.monotonic() - member.since if member.hello is None else 0.0
            if waits > READY_SECONDS:
                problem = f"{member.name} was not ready within {READY_SECONDS:g} s; {self._free()}"
                hint = "do its environments open at all? longrein run --dry-run; ray status"
                self._lost(member, RunError(problem, hint=hint))
            elif waits > WARN_SECONDS and not member.warned:
                member.warned = True
                log.warning("%s is not ready after %g s; %s", member.name, WARN_SECONDS, self._free())

    def _free(self) -> str:
        """What room there is."""
        free: dict[str, float] = self._ray.available_resources()  # type: ignore[no-untyped-call]  # ray's
        return f"free processors in the cluster: {free.get('CPU', 0.0):g}"

    def _answered(self, member: _Member, answer: Any) -> None:
        exceptions = self._ray.exceptions
        try:
            said = self._ray.get(answer)
        except (exceptions.RayActorError, exceptions.OutOfMemoryError) as error:
            self._lost(member, RoleDied(member.name, None, hint=f"Ray says: {error}"), killed=True)
        except exceptions.ObjectLostError as error:
            log.warning("a rollout of %s is lost: %s", member.name, error)
            self._assembly.dropped += 1
            self._ask(member)
        except exceptions.RayError as error:
            self._lost(member, RunError(f"{member.name} cannot work: {error}"))
        else:
            self._heard(member, said)

    def _heard(self, member: _Member, said: Any) -> None:
        if isinstance(said, Error):
            self._lost(member, said)
        elif isinstance(said, Hello):
            member.hello = said
            if self._weights is not None:  # a replaced one: the others have begun
                self._start(member)
        elif said is not None:
            played, columns = said
            member.deaths = 0
            if played.draws is not None:
                member.draws = played.draws
            used = self._assembly.add(member.index, columns, played, self._version)
            if self.topology.ahead or not used:
                self._ask(member)
            else:
                member.taken = True

    def _lost(self, member: _Member, error: Error, *, killed: bool = False) -> None:
        """Replace an actor, or raise what ended it when it has died too often or never worked."""
        self._ray.kill(member.actor)
        member.deaths += 1
        if member.deaths >= (KILLS if killed else FAILURES if self._weights is not None else 1):
            raise error
        log.warning("%s ended and is replaced: %s", member.name, error)
        self.replaced += 1
        self._assembly.restarts += self._role.copies
        member.life += 1
        member.draws = None
        self._spawn(member)


@contextmanager
def crewed_by_ray(
    role: Role, topology: Topology, seed_of: SeedOf, learner_of: Callable[[Hello], Learner]
) -> Iterator[list[Crewed]]:
    """A crew at work for as long as this is entered. learner_of: from what the actors step, which they say first.

    Raises what keeps an actor from starting (SpecError, LinkError, RunError), and RunError where Ray cannot be used.
    """
    with ray_cluster.joined(topology.address, topology.actors * topology.actor_cpus):
        there = RayCrew(role, topology, seed_of)
        try:
            yield [Crewed(there, (learner_of(there.open()),))]
        finally:
            there.close()
