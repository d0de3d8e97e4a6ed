"""The process that chooses actions for all actors: rings, batches, and the newest weights. Knows no environment.

It is told what to build (Build), says what requests and answers are made of, and is told where they lie (Begin). It
takes newer weights between two batches. One that takes the place of another goes on with its generator.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import gymnasium

from longrein.lab.acting_role import generator_of, policy_arrays
from longrein.lab.channel import Form, Weights
from longrein.lab.inference import Batching, Desk, forms
from longrein.lab.role_process import enact
from longrein.learn import algorithms


@dataclass(frozen=True)
class InferenceRole:
    """What inference is to do, whenever it lives."""

    algorithm: str
    config: Any
    actors: int
    batching: Batching


@dataclass(frozen=True)
class Build:
    """What the policy is for: the spaces of one environment."""

    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]


@dataclass(frozen=True)
class Begin:
    """What inference begins with."""

    weights: tuple[str, Form]
    """Name and form of the segment where the policy's weights are published."""
    desk: str
    """Name of the segment where requests lie."""


def live(pipe: Connection, role: bytes, bells: Sequence[socket.socket]) -> None:
    """An inference process's life. bells: one to each actor, by which both say that there is something on the desk."""
    enact(pipe, lambda: _work(pipe, cloudpickle.loads(role), bells))


def _work(pipe: Connection, role: InferenceRole, bells: Sequence[socket.socket]) -> None:
    build: Build = pipe.recv()
    _, make = algorithms.load(role.algorithm)
    spaces = build.observation_space, build.action_space
    asks, answers = forms(make(role.config, *spaces, 0).policy, build.observation_space, role.batching.rows)
    policy = make(role.config, *spaces, 0).policy
    pipe.send((asks, answers))
    begin: Begin = pipe.recv()
    desk = Desk(role.actors, asks, answers, begin.desk)
    weights, arrays, version = Weights(begin.weights[1], begin.weights[0]), policy_arrays(policy), -1
    generator = generator_of(desk.draws)
    for bell in bells:  # one before us may have answered, and died before it rang
        ring(bell)
    with selectors.DefaultSelector() as selector:
        for bell in bells:
            selector.register(bell, selectors.EVENT_READ)
        while not desk.closed:
            actors = desk.waiting()
            since = desk.since(actors)
            left = role.batching.left(since, int(desk.acting.sum()), time.monotonic())
            if left == 0.0:
                if weights.version != version:
                    version = weights.read(arrays)
                actors = role.batching.chosen(actors, since)
                desk.answer(actors, policy, version, generator)
                for actor in actors:
                    ring(bells[actor])
                continue
            for key, _ in selector.select(left):
                key.fileobj.recv(4096)  # type: ignore[union-attr]  # a socket; how often it rang is no matter


def ring(bell: socket.socket) -> None:
    """Wake whoever waits at the other end."""
    bell.send(b"\0")
