"""An evaluator in a process of its own: plays without noise with the weights that it is given. Knows no training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from longrein.lab.acting_role import policy_arrays
from longrein.lab.channel import Form, Weights
from longrein.lab.evaluation import evaluate
from longrein.lab.role_process import enact
from longrein.learn import algorithms
from longrein.learn.algorithms import Policy


@dataclass(frozen=True)
class EvaluatorRole:
    """What an evaluator is to do, whenever it lives."""

    open_world: Callable[[int], Any]
    """Opens an environment with that many copies; each evaluation has its own."""
    copies: int
    seeds: tuple[int, ...]
    """Of the episodes."""
    algorithm: str
    config: Any


@dataclass(frozen=True)
class Play:
    """One evaluation."""

    weights: tuple[str, Form]
    """Name and form of the segment where the policy's weights are."""


def live(pipe: Connection, role: bytes) -> None:
    """An evaluator's life, in its process."""
    enact(pipe, lambda: _work(pipe, cloudpickle.loads(role)))


def _work(pipe: Connection, role: EvaluatorRole) -> None:
    _, build = algorithms.load(role.algorithm)
    policy: Policy | None = None
    pipe.send("ready")
    while True:
        play: Play = pipe.recv()
        with closing(role.open_world(role.copies)) as world:
            if policy is None:
                policy = build(role.config, world.single_observation_space, world.single_action_space, 0).policy
            Weights(play.weights[1], play.weights[0]).read(policy_arrays(policy))
            played = evaluate(policy, world, role.seeds)
        pipe.send(played)
