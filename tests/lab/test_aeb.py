"""Which body is where, by the examples of those who had the words first, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from longrein.errors import SpecError
from longrein.lab.aeb import Body, resolve, rows
from longrein.lab.spec import BodySpec


@pytest.mark.parametrize(
    ("product", "num", "agents", "envs", "bodies"),
    [
        ("outer", 1, 1, 1, [(0, 0, 0)]),
        ("outer", 2, 1, 1, [(0, 0, 0), (0, 0, 1)]),
        ("outer", [1, 3], 1, 2, [(0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 1, 2)]),
        ("outer", 1, 2, 2, [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]),
        ("inner", 2, 2, 2, [(0, 0, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1)]),
        ("custom", [[1, 0, 0], [0, 0, 0]], 2, 1, [(0, 0, 0), (1, 0, 0)]),
    ],
)
def test_products(product: Any, num: Any, agents: int, envs: int, bodies: list[tuple[int, int, int]]) -> None:
    assert resolve(BodySpec(product, num), agents, envs).bodies == tuple(Body(*body) for body in bodies)


def test_two_agents_in_one_environment_with_six_bodies_each() -> None:
    space = resolve(BodySpec("outer", 6), 2, 1)
    assert len(space.bodies) == 12
    assert [body.b for body in space.of_agent(1)] == list(range(6))
    assert len(space.in_env(0)) == 12
    assert not space.simple
    assert resolve(BodySpec(), 1, 1).simple


@pytest.mark.parametrize(
    ("product", "num", "agents", "envs", "says"),
    [
        ("inner", 1, 2, 1, "there are 2 and 1"),
        ("outer", 0, 1, 1, "at least one body"),
        ("outer", [1], 1, 2, "has 1 numbers for 2 environments"),
        ("outer", "many", 1, 1, "is 'many'"),
        ("outer", True, 1, 1, "is True"),
        ("custom", 3, 1, 1, "is 3"),
        ("custom", [[0, 0]], 1, 1, "is [[0, 0]]"),
        ("custom", [[0, 0, -1]], 1, 1, "is no coordinate"),
        ("custom", [[0, 0, 0], [0, 0, 0]], 1, 1, "stand there twice"),
        ("custom", [[0, 0, 0], [2, 0, 0]], 2, 1, "agent 2 does not exist: there are 2"),
        ("custom", [[0, 0, 0]], 2, 1, "agent 1 is in no coordinate"),
        ("custom", [[0, 0, 0]], 1, 2, "environment 1 is in no coordinate"),
        ("custom", [[0, 0, 0], [0, 0, 2]], 1, 1, "[[0, 0, 1]] are missing"),
    ],
)
def test_what_is_refused(product: Any, num: Any, agents: int, envs: int, says: str) -> None:
    with pytest.raises(SpecError) as raised:
        resolve(BodySpec(product, num), agents, envs)
    assert says in str(raised.value)


def test_rows_of_an_agents_batch() -> None:
    space = resolve(BodySpec("outer", [1, 2]), 2, 2)
    found = rows(space, [4, 2, 2, 4, 2, 2])
    assert found[Body(0, 0, 0)] == slice(0, 4)
    assert found[Body(0, 1, 1)] == slice(6, 8)
    assert found[Body(1, 0, 0)] == slice(0, 4)
