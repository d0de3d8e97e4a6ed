"""Puts agents into environments: an arena for each, and a learner for each agent in it. Knows bodies and spaces.

An agent has one learner for each environment it is in, and one more for each form of its seats in a game, since each
has its own input and output head; what they share is `longrein.learn.sharing`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium
import torch
from gymnasium.vector import VectorEnv

from longrein.errors import SpecError
from longrein.lab.actor import Actor, Seats, described
from longrein.lab.aeb import Body, Space
from longrein.lab.arena import Alone, Arena, Together
from longrein.lab.games import Games, Table
from longrein.lab.learner import Identity, Learner
from longrein.lab.records import SessionRecords, as_plain
from longrein.learn import algorithms
from longrein.learn.algorithms import Algorithm
from longrein.learn.sharing import Shared

World = VectorEnv[Any, Any, Any] | Games
OpenWorld = Callable[[int], World]
"""Opens an environment with that many copies; the session closes it."""

SeedOf = Callable[..., int]
"""The seed of a role, by its path."""


@dataclass(frozen=True)
class Stand:
    """An arena, and a learner for each of its actors."""

    name: str
    """Told by its first body; empty where there is one stand."""
    env: int
    """Which environment it is."""
    arena: Arena
    learners: tuple[Learner, ...]

    @property
    def chunk(self) -> int:
        """Vector steps between two looks at anything but learning: the longest rollout."""
        return max(learner.algorithm.rollout_steps for learner in self.learners)

    def advance(self, cut: int | None, stopped: Callable[[], bool]) -> None:
        """Play a chunk, or less of it where it is stopped, and learn. cut: the seed of one after its last step."""
        for transitions in self.arena.collect(self.chunk, cut):
            for learner, transition in zip(self.learners, transitions, strict=True):
                learner.take(transition, self.arena.env_steps)
            if stopped():
                return

    def rest(self) -> None:
        """Nobody learns in between."""


@dataclass(frozen=True)
class _Role:
    """One learner to be: whose, where, and what it acts in."""

    agent: int
    env: int
    seats: Seats | VectorEnv[Any, Any, Any]
    bodies: tuple[Body, ...]

    @property
    def name(self) -> str:
        return self.bodies[0].label


@contextmanager
def staged(
    space: Space,
    agents: Sequence[tuple[str, Any]],
    worlds: Sequence[tuple[OpenWorld, int]],
    seed_of: SeedOf,
    records: SessionRecords,
) -> Iterator[list[Stand]]:
    """All of a session's environments, open as long as this is entered, with who learns in them. Nothing is reset yet.

    agents: name in the table of algorithms, and Config, of each. worlds: how each environment is opened; its copies.
    Raises SpecError where bodies and seats, or algorithms and spaces, do not fit, and LinkError.
    """
    with ExitStack() as stack:
        groups: list[tuple[World, list[_Role]]] = []
        for env, (open_world, copies) in enumerate(worlds):
            groups += _groups(space, env, open_world, copies, stack)
        roles = [role for _, group in groups for role in group]
        made = {id(role): _build(agents[role.agent], role, len(roles), seed_of) for role in roles}
        shared: dict[int, Shared] = {}
        for agent in range(space.agents):
            own = [made[id(role)] for role in roles if role.agent == agent]
            if len(own) > 1:
                shared[agent] = Shared(own)
        stands = []
        for world, group in groups:
            actors = [_actor(role, made[id(role)], space, len(roles), seed_of) for role in group]
            learners = tuple(
                Learner(
                    made[id(role)], _identity(agents[role.agent], role, space), records,
                    where=None if len(roles) == 1 else (role.agent, role.env), shared=shared.get(role.agent),
                )
                for role in group
            )  # fmt: skip
            name = "" if len(groups) == 1 else group[0].name
            stands.append(Stand(name, group[0].env, _arena(world, group, actors), learners))
        yield stands


def alone(
    name: str,
    config: Any,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed_of: SeedOf,
    records: SessionRecords,
) -> Learner:
    """The learner of a session's only agent, which acts elsewhere: the one that `staged` would make here."""
    _, build = algorithms.load(name)
    algorithm = build(config, observation_space, action_space, seed_of("learner"))
    said = described(observation_space), described(action_space)
    identity = Identity(name, as_plain(config), str(observation_space), str(action_space), spaces=said)
    return Learner(algorithm, identity, records)


def _groups(
    space: Space, env: int, open_world: OpenWorld, copies: int, stack: ExitStack
) -> Iterator[tuple[World, list[_Role]]]:
    """The worlds that one environment of a spec is, each with its roles: one game, or one vector for each agent."""
    here = space.in_env(env)
    first = open_world(copies)
    if isinstance(first, Games):
        stack.callback(first.close)
        yield first, _seated(first, here)
        return
    spare: World | None = first
    if len(here) > 1 and here[0].a == here[1].a:
        first.close()  # each body has copies of its own, and these are too few
        spare = None
    for agent in sorted({body.a for body in here}):
        bodies = tuple(body for body in here if body.a == agent)
        world, spare = spare or open_world(copies * len(bodies)), None
        stack.callback(world.close)
        assert not isinstance(world, Games), "an environment changed its kind"
        yield world, [_Role(agent, env, world, bodies)]


def _seated(games: Games, here: Sequence[Body]) -> list[_Role]:
    """Who sits at which table: the bodies in order, on the seats in the game's order."""
    if len(here) != len(games.seats):
        seats = ", ".join(games.seats)
        raise SpecError("body.num", f"environment {here[0].e} has {len(games.seats)} seats ({seats}), and {len(here)} "
                        f"bodies were asked for", hint="a body for each seat")  # fmt: skip
    forms: dict[tuple[int, tuple[str, str]], list[tuple[str, Body]]] = {}
    for seat, body in zip(games.seats, here, strict=True):
        forms.setdefault((body.a, games.form(seat)), []).append((seat, body))
    return [
        _Role(agent, here[0].e, games.table([seat for seat, _ in pairs]), tuple(body for _, body in pairs))
        for (agent, _), pairs in forms.items()
    ]


def _arena(world: World, group: Sequence[_Role], actors: Sequence[Actor]) -> Arena:
    if not isinstance(world, Games):
        return Alone(world, actors[0])
    tables = [role.seats for role in group if isinstance(role.seats, Table)]
    return Together(world, tables, actors)


def _build(agent: tuple[str, Any], role: _Role, roles: int, seed_of: SeedOf) -> Algorithm:
    name, config = agent
    _, build = algorithms.load(name)
    spaces = role.seats.single_observation_space, role.seats.single_action_space
    return build(config, *spaces, seed_of("learner", *_path(role, roles)))


def _actor(role: _Role, algorithm: Algorithm, space: Space, roles: int, seed_of: SeedOf) -> Actor:
    generator = torch.Generator().manual_seed(seed_of("actor", *_path(role, roles)))
    labels = ("",) if len(space.bodies) == 1 else tuple(body.label for body in role.bodies)
    return Actor(role.seats, algorithm.policy, seed=None, generator=generator, bodies=labels)


def _path(role: _Role, roles: int) -> tuple[str, ...]:
    return () if roles == 1 else (role.name,)


def _identity(agent: tuple[str, Any], role: _Role, space: Space) -> Identity:
    name, config = agent
    spaces = role.seats.single_observation_space, role.seats.single_action_space
    said = described(spaces[0]), described(spaces[1])
    labels = tuple(body.label for body in role.bodies)
    return Identity(name, as_plain(config), str(spaces[0]), str(spaces[1]), labels, said)
