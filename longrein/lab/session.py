"""One seed, from its first step to its graph: wires actor, learner and records, and always leaves a finished folder."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from longrein.errors import CheckpointError, LinkError
from longrein.lab import checkpoint, plots
from longrein.lab.actor import Actor
from longrein.lab.evaluation import evaluate
from longrein.lab.learner import Identity, Learner
from longrein.lab.records import SessionRecords, as_plain
from longrein.learn import algorithms
from longrein.learn.algorithms import Algorithm

OpenEnvs = Callable[[int], VectorEnv[Any, Any, Any]]
"""Opens a vector environment with that many copies; the session closes it."""

Status = Literal["solved", "budget spent", "interrupted", "failed"]
_HALF = 2**30  # training seeds lie below, evaluation seeds from here on


@dataclass(frozen=True)
class SessionSettings:
    """What one session is asked to do."""

    title: str
    """What the graph says: the environment, and how it is reached."""
    algorithm: str
    """Name in the table of algorithms."""
    config: Any
    """The algorithm's Config."""
    seed: int = 0
    """Root of every random number in the session."""
    num_envs: int = 8
    """Environments stepped together."""
    max_env_steps: int = 200_000
    """Env steps, over all environments together, after which training ends."""
    target: float | None = None
    """Training return at which training ends before that; None trains to the end."""
    window: int = 100
    """Episodes, the last ones, whose mean return is held against the target."""
    checkpoint_every: int = 20_000
    """Env steps between checkpoints; there is also one at the end, whatever ends it."""
    evaluation_episodes: int = 20
    """Episodes played without noise when training has ended, each on a seed that training never saw."""


@dataclass(frozen=True)
class Progress:
    """How far a session is."""

    env_steps: int
    """Env steps so far."""
    seconds: float
    """Since training began."""
    episodes: int
    """Finished so far."""
    mean_return: float
    """Of the last `window` episodes; NaN before the first."""
    updates: int
    """Batches learnt from."""


@dataclass(frozen=True)
class SessionResult:
    """What came of a session."""

    status: Status
    """How training ended."""
    env_steps: int
    """Env steps trained on."""
    seconds: float
    """That training took, without opening environments and without evaluation."""
    episodes: int
    """Training episodes that finished."""
    training_mean: float
    """Mean return of the last `window` training episodes; NaN without any."""
    evaluation: tuple[float, ...]
    """Return of each evaluation episode; empty when interrupted."""
    restarts: int
    """Environments that were lost and replaced."""
    folder: Path
    """The session's folder."""
    graph: Path
    """The session's graph."""

    @property
    def solved(self) -> bool:
        """Whether the target was reached."""
        return self.status == "solved"


def seed_of(root: int, *path: str) -> int:
    """The seed of one role of a session, below 2**30: the same for the same path, whatever other roles there are."""
    words = np.frombuffer(hashlib.sha256("/".join(path).encode()).digest(), np.uint32)
    return int(np.random.SeedSequence([root, *words.tolist()]).generate_state(1)[0]) % _HALF


def evaluation_seeds(root: int, count: int) -> list[int]:
    """Seeds for evaluation: in another half of the numbers than any training seed."""
    first = _HALF + seed_of(root, "evaluation") // 2
    return [first + index for index in range(count)]


def run_session(
    settings: SessionSettings,
    run: Path,
    open_envs: OpenEnvs,
    on_progress: Callable[[Progress], None] | None = None,
) -> SessionResult:
    """Train, save, evaluate and draw, into `run`/session_{seed}.

    Ctrl-C or SIGTERM ends training after the current vector step and leaves a finished folder; a second one stops hard.
    Sets torch to one thread in this process: for networks of this size more threads are slower, and sums are the same
    on every machine. Raises LinkError when an environment cannot be reached, SpecError when settings cannot be used.
    """
    torch.set_num_threads(1)
    with SessionRecords(run, settings.seed) as records, stop_on_signal() as stop:
        try:
            with closing(open_envs(settings.num_envs)) as envs:
                algorithm, identity = _build(settings, envs)
                learner = Learner(algorithm, identity, records)
                outcome = _train(settings, envs, learner, records, stop, on_progress)
            rows: list[tuple[int, int, float]] = []
            if outcome.status != "interrupted" and settings.evaluation_episodes > 0:
                seeds = evaluation_seeds(settings.seed, settings.evaluation_episodes)
                with closing(open_envs(settings.evaluation_episodes)) as envs:
                    rows = evaluate(algorithm.policy, envs, seeds)
                records.add_evaluation(outcome.env_steps, rows)
        except BaseException as error:
            # Not to act on it: only so that the folder says what happened.
            records.finish({"status": "failed", "error": f"{type(error).__name__}: {error}"})
            raise
        plots.session_graph(
            records.graph, records.episodes, records.metrics, title=settings.title, target=settings.target,
            evaluation=[row[2] for row in rows], seconds=outcome.seconds, window=settings.window,
        )  # fmt: skip
        result = SessionResult(
            outcome.status, outcome.env_steps, outcome.seconds, len(records.episodes), outcome.mean_return,
            tuple(row[2] for row in rows), outcome.restarts, records.folder, records.graph,
        )  # fmt: skip
        records.finish(vars(result))
    return result


def load_policy(folder: Path, envs: VectorEnv[Any, Any, Any]) -> Algorithm:
    """The algorithm that a session saved, ready to act in `envs` or to go on learning.

    folder: a session's folder. Raises CheckpointError when it cannot be read, or was made for other spaces.
    """
    path = folder / "checkpoint.pt"
    saved = checkpoint.load(path)
    identity = saved["identity"]
    for name, space in (
        ("observation_space", envs.single_observation_space),
        ("action_space", envs.single_action_space),
    ):
        if identity[name] != str(space):
            raise CheckpointError(
                str(path), f"was made for {name} {identity[name]}, got {space}", hint="play it where it was trained"
            )
    config_class, build = algorithms.load(identity["algorithm"])
    config = algorithms.config_from(config_class, identity["config"])
    algorithm = build(config, envs.single_observation_space, envs.single_action_space, 0)
    algorithm.load_state_dict(saved["state"])
    return algorithm


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second raises KeyboardInterrupt. Outside the main thread, never set."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _Outcome:
    status: Status
    env_steps: int
    seconds: float
    mean_return: float
    restarts: int


def _build(settings: SessionSettings, envs: VectorEnv[Any, Any, Any]) -> tuple[Algorithm, Identity]:
    _, build = algorithms.load(settings.algorithm)
    spaces = (envs.single_observation_space, envs.single_action_space)
    algorithm = build(settings.config, *spaces, seed_of(settings.seed, "learner"))
    return algorithm, Identity(settings.algorithm, as_plain(settings.config), str(spaces[0]), str(spaces[1]))


def _train(
    settings: SessionSettings,
    envs: VectorEnv[Any, Any, Any],
    learner: Learner,
    records: SessionRecords,
    stop: threading.Event,
    on_progress: Callable[[Progress], None] | None,
) -> _Outcome:
    generator = torch.Generator().manual_seed(seed_of(settings.seed, "actor"))
    actor = Actor(envs, learner.algorithm.policy, seed=seed_of(settings.seed, "environments") // 2, generator=generator)
    last: deque[float] = deque(maxlen=settings.window)
    status: Status = "budget spent"
    start, saved = records.seconds, 0
    try:
        while actor.env_steps < settings.max_env_steps:
            for transition in actor.collect(learner.algorithm.rollout_steps):
                learner.take(transition, actor.env_steps)
                if stop.is_set():
                    break
            episodes = actor.finished()
            records.add_episodes(episodes)
            last.extend(episode.return_ for episode in episodes)
            mean = float(np.mean(last)) if last else float("nan")
            if on_progress is not None:
                seconds = records.seconds - start
                on_progress(Progress(actor.env_steps, seconds, len(records.episodes), mean, learner.version))
            if stop.is_set():
                status = "interrupted"
                break
            if settings.target is not None and len(last) == settings.window and mean >= settings.target:
                status = "solved"
                break
            if actor.env_steps - saved >= settings.checkpoint_every:
                learner.save(actor.env_steps)
                saved = actor.env_steps
    except LinkError:
        learner.save(actor.env_steps)  # the environments are gone for good, what was learnt from them is not
        raise
    seconds = records.seconds - start
    learner.save(actor.env_steps)
    return _Outcome(status, actor.env_steps, seconds, float(np.mean(last)) if last else float("nan"), actor.restarts)
