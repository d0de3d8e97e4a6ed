"""An actor in a process of its own: steps environments with a copy of the policy, and sends rollouts. Knows no learner.

1. It says what it steps (Hello), and is told what to act with and from which seeds (Start).
2. It acts a rollout only when it holds a slot for it, with the newest weights there are, and changes them at no other
   moment. The first rollout is made before there are slots: what it looks like decides theirs.
3. It ends when the learner's end of the pipe closes, and at once when the learner's process ends.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import gymnasium
import torch
from torch import Tensor

from longrein.errors import Error, RunError, SpecError
from longrein.lab.actor import Actor, Episode
from longrein.lab.assembly import Played
from longrein.lab.channel import Arrays, Form, Outlet, Ring, Weights, form_of
from longrein.lab.games import Games
from longrein.learn import algorithms
from longrein.learn.algorithms import Policy
from longrein.learn.rollout import Rollout


@dataclass(frozen=True)
class Role:
    """What an actor is to do, whenever it lives."""

    open_world: Callable[[int], Any]
    """Opens an environment with that many copies."""
    copies: int
    algorithm: str
    config: Any


@dataclass(frozen=True)
class Hello:
    """What an actor steps."""

    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    num_envs: int


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


def packed(role: Any) -> bytes:
    """What a process is to do, with functions and classes that only this one knows. Raises SpecError if it cannot be.

    By value where multiprocessing would want to import them: from a notebook, or as a lambda.
    """
    try:
        return cloudpickle.dumps(role)  # type: ignore[no-any-return]  # it is not annotated
    except (TypeError, pickle.PicklingError) as error:
        raise SpecError("env", f"cannot be sent to another process: {error}",
                        hint="let its maker open what it needs, or topology: serial") from error  # fmt: skip


def live(pipe: Connection, role: bytes) -> None:
    """An actor's life, in its process."""
    try:
        _live(pipe, cloudpickle.loads(role))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # all is closed, and to take torch down would need more than a second


def policy_arrays(policy: Policy) -> Arrays:
    """Weights and buffers of a policy: views, good as long as it lives. Nothing of one that is no module of torch."""
    tensors: dict[str, Tensor] = policy.state_dict() if isinstance(policy, torch.nn.Module) else {}
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _live(pipe: Connection, role: Role) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the learner, which closes the pipe
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        envs = role.open_world(role.copies)
        try:
            if isinstance(envs, Games):
                raise SpecError("meta.topology.actors", "goes with one agent alone in its environment, and this is a "
                                f"game of {len(envs.seats)} seats", hint="topology: serial")  # fmt: skip
            _work(pipe, role, envs)
        finally:
            envs.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the learner is done; or an environment of ours is gone, and the learner sees that we are
    except Error as error:
        _tell(pipe, error)
    except Exception as error:  # the border of a process: whatever ended it is told, with its traceback
        _tell(pipe, RunError("".join(traceback.format_exception(error)).rstrip()))


def _work(pipe: Connection, role: Role, envs: Any) -> None:
    pipe.send(Hello(envs.single_observation_space, envs.single_action_space, envs.num_envs))
    start: Start = pipe.recv()
    _, build = algorithms.load(role.algorithm)
    algorithm = build(role.config, envs.single_observation_space, envs.single_action_space, 0)
    arrays = policy_arrays(algorithm.policy)
    weights = Weights(start.weights[1], start.weights[0])
    version = weights.read(arrays)
    generator = torch.Generator()
    if isinstance(start.draws, int):
        generator.manual_seed(start.draws)
    else:
        generator.set_state(torch.frombuffer(bytearray(start.draws), dtype=torch.uint8))
    actor = Actor(envs, algorithm.policy, seed=None, generator=generator)
    actor.begin(envs.reset(seed=start.seed)[0])
    outlet = None if start.ring is None else Outlet(pipe, Ring(start.ring[1], start.ring[2], start.ring[0]))
    rollout, cut = Rollout(algorithm.rollout_steps), start.cut
    while True:
        waited = time.monotonic()
        if outlet is not None:
            slot, columns, cut = outlet.take()
            rollout.use(columns)
        begun = time.monotonic()
        if weights.version != version:
            version = weights.read(arrays)
        before, restarts = actor.env_steps, actor.restarts
        for left in range(rollout.length - 1, -1, -1):
            rollout.add(actor.step(cut is not None and left == 0))
        if cut is not None:
            actor.begin(envs.reset(seed=cut)[0])
        acted = time.monotonic()
        if outlet is None:
            form = form_of(rollout.columns)
            pipe.send(form)
            name, slots = pipe.recv()
            outlet = Outlet(pipe, Ring(form, slots, name))
            slot, columns, _ = outlet.take()
            for name, column in rollout.columns.items():
                columns[name][...] = column
        rollout.take()
        episodes = tuple(_since(before, episode) for episode in actor.finished())
        state = None if cut is None else generator.get_state().numpy().tobytes()
        outlet.send(
            slot, Played(version, episodes, actor.restarts - restarts, acted - begun, begun - waited, state)
        )  # fmt: skip


def _since(before: int, episode: Episode) -> Episode:
    return Episode(episode.env, episode.env_steps - before, episode.length, episode.return_, episode.truncated)


def _tell(pipe: Connection, error: Error) -> None:
    try:
        pipe.send(error)
    except OSError:
        return  # nobody is there to be told


def _end_with_parent() -> None:
    """A learner that is killed closes its pipes, but an environment may keep us from looking there."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
