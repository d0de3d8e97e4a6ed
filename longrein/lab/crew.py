"""The learner's side of actors in processes of their own: starts, feeds, watches and replaces them.

1. A batch is put together out of rollouts by lab.assembly. With `ahead` 0 every actor has one slot, gets it when the
   learner has published, and so there is one rollout of each in a batch. Else rollouts are taken as they are ready.
2. What an actor has sent is good whatever becomes of it. An actor that died is replaced, and acts on from new episodes;
   what it had not sent is lost, and was counted nowhere. Memories see the hole, since observations do not join.
3. Whoever fails three times without a rollout in between is not replaced: its error, or RoleDied, ends the session. Who
   is killed from outside is given more lives.
4. Every process has ended, and every segment is removed, when the crew is closed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from longrein.lab.acting_role import Hello, Role, all_alike, policy_arrays, seeds_of_life
from longrein.lab.actor_process import Start, live
from longrein.lab.assembly import Assembling, Played
from longrein.lab.channel import Form, Inlet, Ring, Weights, form_of
from longrein.lab.inference_keeper import InferenceKeeper
from longrein.lab.learner import Learner
from longrein.lab.role_process import Post, check_memory, context_for, packed
from longrein.lab.station import Crewed
from longrein.lab.topology import Topology
from longrein.learn.algorithms import Policy
from longrein.learn.batch import Batch

SeedOf = Callable[..., int]


@dataclass
class _Member:
    """One actor's place, through all of its lives."""

    index: int
    post: Post
    life: int = 0
    hello: Hello | None = None
    started: bool = False
    ring: Ring | None = None
    inlet: Inlet | None = None
    kept: set[int] = field(default_factory=set)  # slots that are not with the actor
    owed: list[int] = field(default_factory=list)  # those of them that it gets when the next batch is begun
    draws: bytes | None = None  # the generator after the last cut


class ProcessCrew(Assembling):
    """Actors in processes, as one arena."""

    def __init__(self, role: Role, topology: Topology, seed_of: SeedOf) -> None:
        """role: with the copies of one actor. Opens nothing yet."""
        super().__init__(topology, role.copies)
        self._role = role
        self._seed_of = seed_of
        context = context_for(role.algorithm)
        self._central: InferenceKeeper | None = None
        if topology.inference == "central":
            self._central = InferenceKeeper(role.algorithm, role.config, role.copies, topology, context)
        self._members: list[_Member] = []
        whole = packed(role)
        for index in range(topology.actors):
            bell = () if self._central is None else (self._central.bells[index],)
            post = Post(f"actor {index}", context, live, (whole, *bell))
            post.replaceable = False  # before it was ever at work
            self._members.append(_Member(index, post))
        self._arrived: deque[tuple[_Member, int, Played]] = deque()
        self._weights: Weights | None = None
        self._choices: tuple[int, bytes | None] = 0, None  # its life, and its generator after the last cut
        self._waited = 0.0
        self._replaced = 0  # before a resume

    @property
    def replaced(self) -> int:
        """Actors that died, and were replaced."""
        return self._replaced + sum(member.post.replaced for member in self._members)

    @property
    def published(self) -> bool:
        """Whether there are weights to act with."""
        return self._weights is not None

    def open(self) -> Hello:
        """Start all actors; what they step. Raises what kept one from it, RoleDied, or RunError after too long."""
        check_memory(len(self._members), "actor")
        for member in self._members:
            member.post.start()
        while any(member.hello is None for member in self._members):
            self._listen(lambda: False)
        first = all_alike([member.hello for member in self._members], "actor")
        if self._central is not None:
            self._central.open(first.observation_space, first.action_space)
            while not self._central.ready:
                self._listen(lambda: False)
        return first

    def publish(self, policy: Policy, version: int) -> None:
        """Let the actors act with these weights from their next rollout on."""
        arrays = policy_arrays(policy)
        if self._weights is None:
            self._weights = Weights(form_of(arrays))
            for member in self._members:
                member.post.replaceable = True
        self._weights.publish(arrays, version)

    def collect(self, cut: int | None, stopped: Callable[[], bool]) -> tuple[Batch, dict[str, float]] | None:
        """The next batch [T, B, ...] and what was measured of it; None when it was stopped.

        The batch is good until the next call. cut: seed of one after it, for actors that take turns with the learner.
        """
        self._cut = cut
        if self._central is not None:
            self._let_choose(self._central)
        for member in self._members:
            if not member.started and member.hello is not None:
                self._start(member)
            for slot in member.owed:
                self._free(member, slot)
            member.owed = []
        while not self._assembly.full:
            while not self._arrived:
                self._listen(stopped)
                if stopped():
                    return None
            member, slot, played = self._arrived.popleft()
            assert member.ring is not None
            taken = self._assembly.add(member.index, member.ring.slots[slot], played, self._version)
            if self.topology.ahead or not taken:
                self._free(member, slot)
            else:
                member.owed.append(slot)
        waited, self._waited = self._waited, 0.0
        batch, measured = self._assembly.batch(waited)
        queue = len(self._arrived) / ((self.topology.ahead + 1) * len(self._members))
        measured |= {"queue": queue, "actors_replaced": float(self.replaced)}
        if self._central is not None:
            measured |= self._central.measured()
            self._choices = self._choices[0], None if cut is None else self._central.draws
        return batch, measured

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the generators of actors, or of whoever chooses for them, that were cut."""
        return super().state_dict() | {"replaced": self.replaced, "choices": self._choices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; `begin` comes after it."""
        super().load_state_dict(state)
        self._replaced = state["replaced"]
        life, draws = state["choices"]
        self._choices = (life, draws) if draws is not None else (life + 1, None)

    def close(self) -> None:
        """End all processes and remove all segments."""
        if self._central is not None:
            self._central.shut()
        for member in self._members:
            member.post.dismiss()
        for member in self._members:
            member.post.end()
            if member.ring is not None:
                member.ring.close()
        if self._central is not None:
            self._central.close()
        if self._weights is not None:
            self._weights.close()

    # ------------------------------------------------------------------------------------------------------ one actor

    @property
    def _version(self) -> int:
        assert self._weights is not None, "no weights were published"
        return self._weights.version

    def _let_choose(self, central: InferenceKeeper) -> None:
        """Before actors begin or go on together."""
        assert self._weights is not None
        if not central.begun:
            life, draws = self._choices
            path = ["inference", f"life {life}"] if life else []
            central.begin(self._weights, draws if draws is not None else self._seed_of("actor", *path))
        ready = (member for member in self._members if member.owed or (member.hello is not None and not member.started))
        central.expect(member.index for member in ready)

    def _start(self, member: _Member) -> None:
        """Tell an actor, which has said hello, what to begin with."""
        assert self._weights is not None
        life = member.life if member.draws is None else 0
        several = len(self._members) > 1
        seed, drawn = seeds_of_life(member.index, life, self._seed, self._role.copies, several, self._seed_of)
        ring = None if member.ring is None else (member.ring.name, member.ring.form, len(member.ring.slots))
        draws = member.draws if member.draws is not None else drawn
        place = None if self._central is None else self._central.place(member.index)
        start = Start((self._weights.name, self._weights.form), ring, seed, draws, self._cut_of(member.index), place)
        member.started = True
        member.post.send(start)
        if member.ring is not None:
            self._connect(member)

    def _connect(self, member: _Member) -> None:
        """Give an actor its slots."""
        assert member.post.pipe is not None
        assert member.ring is not None
        slots = [slot for slot in range(len(member.ring.slots)) if slot not in member.kept]
        member.inlet = Inlet(member.post.pipe, member.ring, slots, self._cut_of(member.index))

    def _free(self, member: _Member, slot: int) -> None:
        member.kept.discard(slot)
        if member.inlet is not None:
            member.inlet.free(slot, self._cut_of(member.index))

    def _listen(self, stopped: Callable[[], bool]) -> None:
        """Wait a little for whatever actors say, and take in all of it."""
        begun = time.monotonic()
        pipes = [member.post.pipe for member in self._members if member.post.pipe is not None]
        wait([*pipes, *([] if self._central is None else self._central.pipes)], 0.1)
        self._waited += time.monotonic() - begun
        if self._central is not None:
            self._central.hear()
        for member in self._members:
            for said in member.post.hear():
                self._heard(member, said)

    def _heard(self, member: _Member, said: Any) -> None:
        if said is None:
            self._lost(member)
        elif isinstance(said, Hello):
            member.hello = said
            if self._weights is not None:  # a replaced one: the others have begun
                self._start(member)
        elif member.inlet is None:
            form: Form = said
            member.ring = Ring(form, self.topology.ahead + 1)
            member.post.send((member.ring.name, len(member.ring.slots)))
            self._connect(member)
        else:
            slot, played = said
            member.post.lives()
            member.kept.add(slot)
            if played.draws is not None:
                member.draws = played.draws
            self._arrived.append((member, slot, played))

    def _lost(self, member: _Member) -> None:
        """Another one is in its place, and has begun nothing yet."""
        if self._central is not None:
            self._central.miss(member.index)
        if member.started:  # else this life goes on where it has not begun
            self._assembly.restarts += self._role.copies
            member.draws = None
            member.life += 1
        member.hello, member.inlet, member.started = None, None, False


@contextmanager
def crewed(
    role: Role, topology: Topology, seed_of: SeedOf, learner_of: Callable[[Hello], Learner]
) -> Iterator[list[Crewed]]:
    """A crew at work for as long as this is entered. learner_of: from what the actors step, which they say first.

    Raises what keeps an actor from starting: SpecError, LinkError, RunError.
    """
    crew = ProcessCrew(role, topology, seed_of)
    try:
        yield [Crewed(crew, (learner_of(crew.open()),))]
    finally:
        crew.close()
