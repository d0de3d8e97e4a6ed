"""Agents x Environments x Bodies: which body of which agent is in which environment. Pure functions of a spec.

A coordinate is (a, e, b): agent a, environment e, and b, the how-manieth body of that pair. The rules:

 1. outer: every agent in every environment, `num` bodies each. inner: agent k in environment k.
 2. `num` is one number, or one for each environment.
 3. custom: `num` is the list of coordinates itself.
 4. A set of coordinates is compact: agents, environments, and the bodies of each pair, count from 0 without a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from longrein.errors import SpecError
from longrein.lab.spec import BodySpec


class Body(NamedTuple):
    """One incarnation of an agent in an environment."""

    a: int
    e: int
    b: int

    @property
    def label(self) -> str:
        """As records name it: "a.e.b"."""
        return f"{self.a}.{self.e}.{self.b}"


@dataclass(frozen=True)
class Space:
    """All bodies of a session, sorted, and who they belong to."""

    bodies: tuple[Body, ...]

    @property
    def agents(self) -> int:
        """How many agents there are."""
        return 1 + max(body.a for body in self.bodies)

    @property
    def envs(self) -> int:
        """How many environments there are."""
        return 1 + max(body.e for body in self.bodies)

    def of_agent(self, a: int) -> tuple[Body, ...]:
        """An agent's projection: its bodies, by environment."""
        return tuple(body for body in self.bodies if body.a == a)

    def in_env(self, e: int) -> tuple[Body, ...]:
        """An environment's projection: who is in it, by agent."""
        return tuple(body for body in self.bodies if body.e == e)

    @property
    def simple(self) -> bool:
        """One agent in one environment: nothing has to be grouped or scattered."""
        return self.agents == self.envs == 1


def resolve(body: BodySpec, agents: int, envs: int) -> Space:
    """The bodies of a spec with so many agents and environments. Raises SpecError, with the coordinates that miss."""
    if body.product == "custom":
        return Space(_custom(body.num, agents, envs))
    counts = _counts(body.num, envs)
    if body.product == "outer":
        pairs = [(a, e) for a in range(agents) for e in range(envs)]
    else:
        if agents != envs:
            raise SpecError(
                "body.product", f"inner pairs agents with environments, and there are {agents} and {envs}",
                hint="as many of each, or product: outer",
            )  # fmt: skip
        pairs = [(index, index) for index in range(agents)]
    return Space(tuple(Body(a, e, b) for a, e in pairs for b in range(counts[e])))


def _counts(num: Any, envs: int) -> list[int]:
    counts = [num] * envs if isinstance(num, int) and not isinstance(num, bool) else num
    if not isinstance(counts, (list, tuple)) or not all(type(count) is int for count in counts):
        raise SpecError("body.num", f"is {num!r}", hint="a number of bodies, or one for each environment")
    if len(counts) != envs:
        raise SpecError("body.num", f"has {len(counts)} numbers for {envs} environments", hint="one for each")
    if min(counts) < 1:
        raise SpecError("body.num", f"is {num!r}: every pair has at least one body")
    return list(counts)


def _custom(num: Any, agents: int, envs: int) -> tuple[Body, ...]:
    listed = isinstance(num, (list, tuple)) and num
    if not listed or not all(isinstance(one, (list, tuple)) and len(one) == 3 for one in num):
        raise SpecError("body.num", f"is {num!r}", hint="custom takes a list of [agent, env, body]")
    for one in num:
        if not all(type(index) is int and index >= 0 for index in one):
            raise SpecError("body.num", f"{list(one)} is no coordinate", hint="three whole numbers from 0 on")
    bodies = sorted(Body(*one) for one in num)
    twice = sorted({body for body in bodies if bodies.count(body) > 1})
    if twice:
        raise SpecError("body.num", f"{[list(body) for body in twice]} stand there twice")
    for name, used, count in (
        ("agent", {body.a for body in bodies}, agents),
        ("environment", {body.e for body in bodies}, envs),
    ):
        _refuse_gaps(name, used, count)
    missing = [
        [a, e, b]
        for a, e in sorted({(body.a, body.e) for body in bodies})
        for b in range(1 + max(body.b for body in bodies if (body.a, body.e) == (a, e)))
        if Body(a, e, b) not in bodies
    ]
    if missing:
        raise SpecError("body.num", f"the bodies of a pair count from 0 without a gap: {missing} are missing")
    return tuple(bodies)


def _refuse_gaps(name: str, used: set[int], count: int) -> None:
    beyond, missing = sorted(used - set(range(count))), sorted(set(range(count)) - used)
    if beyond:
        raise SpecError("body.num", f"{name} {beyond[0]} does not exist: there are {count}")
    if missing:
        raise SpecError("body.num", f"{name} {missing[0]} is in no coordinate", hint="leave it out of the spec, too")


def rows(space: Space, per_body: Sequence[int]) -> dict[Body, slice]:
    """Where the rows of each body lie in its agent's batch, when body k has per_body[k] copies."""
    found, ends = {}, [0] * space.agents
    for body, count in zip(space.bodies, per_body, strict=True):
        found[body] = slice(ends[body.a], ends[body.a] + count)
        ends[body.a] += count
    return found
