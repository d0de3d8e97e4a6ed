"""An actor in a process of its own: steps environments with a copy of the policy, and sends rollouts. Knows no learner.

1. It says what it steps (Hello), and is told what to act with and from which seeds (Start).
2. It acts a rollout only when it holds a slot for it, with the newest weights there are, and changes them at no other
   moment. The first rollout is made before there are slots: what it looks like decides theirs.
3. It ends when the learner's end of the pipe closes, and at once when the learner's process ends.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import cloudpickle
from numpy.typing import NDArray

from longrein.lab.acting_role import ActingRole, Role
from longrein.lab.channel import Arrays, Form, Outlet, Ring, Weights, form_of
from longrein.lab.inference import Asking, Desk, Place
from longrein.lab.inference_process import ring
from longrein.lab.role_process import enact
from longrein.learn.algorithms import Policy


@dataclass(frozen=True)
class Start:
    """What an actor begins with."""

    weights: tuple[str, Form]
    """Name and form of the segment where the policy's weights are published."""
    ring: tuple[str, Form, int] | None
    """Name, form and slots of the ring that an actor before this one had; None where there is none yet."""
    seed: int
    """Of the environments' first reset, copy k with seed + k."""
    draws: int | bytes
    """The generator of the policy's choices: its seed, or its state."""
    cut: int | None
    """Seed of the cut after the first rollout, where there is one. Of those after it the slots' notes tell."""
    place: Place | None = None
    """Where it asks what to do; None: it chooses by itself."""


def live(pipe: Connection, role: bytes, bell: socket.socket | None = None) -> None:
    """An actor's life, in its process. bell: to whoever chooses for it, where it does not by itself."""
    enact(pipe, lambda: _live(pipe, cloudpickle.loads(role), bell))


def _live(pipe: Connection, role: Role, bell: socket.socket | None) -> None:
    acting = ActingRole(role)
    try:
        _work(pipe, acting, bell)
    finally:
        acting.close()


def _work(pipe: Connection, acting: ActingRole, bell: socket.socket | None) -> NoReturn:
    """Rollouts until the learner is done."""
    pipe.send(acting.hello)
    start: Start = pipe.recv()
    weights, held = Weights(start.weights[1], start.weights[0]), -1

    def newest(arrays: Arrays) -> int:
        nonlocal held
        if weights.version != held:
            held = weights.read(arrays)
        return held

    outlet = None if start.ring is None else Outlet(pipe, Ring(start.ring[1], start.ring[2], start.ring[0]))
    acting.begin(start.seed, start.draws, newest, _asking(start.place, bell))
    while True:
        waited = time.monotonic()
        slot, columns, cut = outlet.take() if outlet is not None else (0, {}, start.cut)
        played = acting.play(columns, cut, time.monotonic() - waited)
        if outlet is None:
            outlet, slot = _first(pipe, columns)
        outlet.send(slot, played)


def _asking(place: Place | None, bell: socket.socket | None) -> Callable[[Policy], Asking] | None:
    """How to ask another process what to do; None where nobody is to be asked."""
    if place is None:
        return None
    assert bell is not None, "there is nobody to ring"
    desk = Desk(place.actors, place.asks, place.answers, place.name)

    def wait() -> None:
        bell.recv(4096)
        if not desk.answered(place.actor):  # somebody new is there, who may not know of us
            ring(bell)

    return lambda policy: Asking(policy, desk, place.actor, partial(ring, bell), wait)


def _first(pipe: Connection, made: Mapping[str, NDArray[Any]]) -> tuple[Outlet, int]:
    """The way to the learner, for rollouts that look like the first one, and the slot that this one is in."""
    form = form_of(made)
    pipe.send(form)
    name, slots = pipe.recv()
    outlet = Outlet(pipe, Ring(form, slots, name))
    slot, columns, _ = outlet.take()
    for name, column in made.items():
        columns[name][...] = column
    return outlet, slot
