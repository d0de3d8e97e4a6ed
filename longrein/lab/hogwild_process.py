"""A Hogwild worker in a process of its own: steps environments, learns, and writes to the shared weights.

1. It says what it steps (Hello), and is told who it is and from which seeds it begins (Begin).
2. Each Go lets it act one rollout and learn from it; then it says what came of that (Report). The env steps were
   counted in shared memory when the update began, so a report that is never sent costs a row of metrics and the
   rollout's episodes, and no count.
3. Asked for what it alone has (OWN), it says that (Owned). It is asked when it has no Go left.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import cloudpickle
import torch

from longrein.lab.acting_role import Hello, Role, fill, generator_of, opened
from longrein.lab.actor import Actor, Episode
from longrein.lab.first_ready import since
from longrein.lab.role_process import enact
from longrein.learn.rollout import Rollout
from longrein.learn.shared_weights import SharingWorker

OWN = "own"


@dataclass(frozen=True)
class Begin:
    """What a worker begins with."""

    worker: SharingWorker
    seed: int
    """Of the environments' first reset, copy k with seed + k."""
    draws: int | bytes
    """The generator of the policy's choices: its seed, or its state."""
    own: bytes | None
    """What a worker in this place alone had, as it was saved."""


@dataclass(frozen=True)
class Go:
    """One more rollout."""

    cut: int | None
    """Seed of the environments' reset after it; they go on as they are where it is None."""


@dataclass(frozen=True)
class Report:
    """What came of a rollout."""

    rows: int
    """Valid ones."""
    before: int
    """Env steps of all workers together when it began."""
    after: int
    """The same when it was learnt from."""
    measured: dict[str, float] | None
    """By the update; None where there was no valid row, and so no update."""
    lags: tuple[int, ...]
    """Of each write to the shared weights: writes of others since this worker had copied them."""
    episodes: tuple[Episode, ...]
    """Those that ended in it; their env steps are counted from its start, over this worker's environments."""
    restarts: int
    """Environments that were lost in it, and replaced."""
    acting: float
    """Seconds."""
    learning: float
    """Seconds."""
    waiting: float
    """Seconds before it in which there was no Go."""


@dataclass(frozen=True)
class Owned:
    """What a worker alone has."""

    own: bytes | None
    """As torch saves it; None where a checkpoint has it elsewhere."""
    draws: bytes
    """State of the generator of the policy's choices."""


def live(pipe: Connection, role: bytes) -> None:
    """A worker's life, in its process."""
    enact(pipe, partial(_live, pipe, role))


def _live(pipe: Connection, packed: bytes) -> None:
    role: Role = cloudpickle.loads(packed)
    envs = opened(role, "meta.topology.hogwild")
    try:
        pipe.send(Hello.of(envs))
        begin: Begin = pipe.recv()
        if begin.own is not None:
            begin.worker.load_own_state(torch.load(io.BytesIO(begin.own), weights_only=True))
        begin.worker.refresh()
        actor = Actor(envs, begin.worker.policy, seed=None, generator=generator_of(begin.draws))
        actor.begin(envs.reset(seed=begin.seed)[0])
        _work(pipe, begin.worker, actor)
    finally:
        envs.close()


def _work(pipe: Connection, worker: SharingWorker, actor: Actor) -> None:
    """Rollouts until the session is done, which closes the pipe."""
    rollout = Rollout(worker.rollout_steps)
    while True:
        waited = time.monotonic()
        asked = pipe.recv()
        if asked == OWN:
            torch.save(worker.own_state(), own := io.BytesIO())
            assert actor.generator is not None
            pipe.send(Owned(own.getvalue(), actor.generator.get_state().numpy().tobytes()))
        else:
            pipe.send(_turn(worker, actor, rollout, asked, waited))


def _turn(worker: SharingWorker, actor: Actor, rollout: Rollout, go: Go, waited: float) -> Report:
    begun = time.monotonic()
    before, steps, restarts = worker.env_steps, actor.env_steps, actor.restarts
    fill(rollout, actor, go.cut)
    acted = time.monotonic()
    batch = rollout.take()
    measured = worker.update(batch) if batch.valid.any() else None  # none: all environments were lost at once
    return Report(
        rows=int(batch.valid.sum()),
        before=before,
        after=worker.env_steps,
        measured=measured,
        lags=() if measured is None else tuple(worker.lags),
        episodes=tuple(since(steps, episode) for episode in actor.finished()),
        restarts=actor.restarts - restarts,
        acting=acted - begun,
        learning=time.monotonic() - acted,
        waiting=begun - waited,
    )
