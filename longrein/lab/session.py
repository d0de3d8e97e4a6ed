"""One seed, from its first step to its graph: wires actor, learner and records, and always leaves a finished folder."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from longrein.errors import CheckpointError, Error, RunError
from longrein.lab import checkpoint, course, plots, topology
from longrein.lab.acting_role import Hello, Role
from longrein.lab.actor import Seats
from longrein.lab.aeb import Space
from longrein.lab.arena import Together
from longrein.lab.course import HALF, Course, Progress, SessionSettings, Status, seed_of
from longrein.lab.crew import crewed
from longrein.lab.evaluation import evaluate, evaluate_games
from longrein.lab.evaluator import Evaluator
from longrein.lab.evaluator_process import EvaluatorRole
from longrein.lab.games import Games, Table
from longrein.lab.hogwild import hogwild
from longrein.lab.learner import Learner
from longrein.lab.ray_crew import crewed_by_ray
from longrein.lab.records import SessionRecords, read_result
from longrein.lab.stage import OpenWorld, alone, staged
from longrein.lab.station import Station
from longrein.learn import algorithms
from longrein.learn.algorithms import Algorithm

__all__ = ["BodyResult", "Progress", "SessionResult", "SessionSettings", "evaluation_seeds", "load_policy",
           "result_of", "run_session", "seed_of", "stop_on_signal"]  # fmt: skip


Scores = dict[str, list[tuple[int, int, float]]]
"""Of each body (seed, length, return) of its evaluation episodes."""


@dataclass(frozen=True)
class BodyResult:
    """What came of one body."""

    training_mean: float
    """Mean return of its last `window` training episodes; NaN without any."""
    evaluation: tuple[float, ...]
    """Return of each of its evaluation episodes. Bodies whose environments are copies of each other are played once."""


@dataclass(frozen=True)
class SessionResult:
    """What came of a session."""

    status: Status
    """How training ended."""
    env_steps: int
    """Env steps trained on, in the environment that had the fewest."""
    seconds: float
    """That training took, without opening environments and without evaluation."""
    episodes: int
    """Training episodes that finished."""
    training_mean: float
    """Mean return of the last `window` training episodes, over bodies; NaN without any."""
    evaluation: tuple[float, ...]
    """Return of each evaluation episode, of one body after another; empty when interrupted."""
    restarts: int
    """Environments that were lost and replaced."""
    folder: Path
    """The session's folder."""
    graph: Path
    """The session's graph."""
    bodies: Mapping[str, BodyResult] = field(default_factory=dict)
    """What came of each body, by its "a.e.b"; empty where there is one."""

    @property
    def solved(self) -> bool:
        """Whether the target was reached."""
        return self.status == "solved"


def evaluation_seeds(root: int, count: int) -> list[int]:
    """Seeds for evaluation: in another half of the numbers than any training seed."""
    first = HALF + seed_of(root, "evaluation") // 2
    return [first + index for index in range(count)]


def run_session(
    settings: SessionSettings,
    run: Path,
    open_envs: OpenWorld | Sequence[OpenWorld],
    on_progress: Callable[[Progress], None] | None = None,
    *,
    resume: bool = False,
) -> SessionResult:
    """Train, save, evaluate and draw, into `run`/session_{seed}.

    open_envs: for each environment, or for the only one. resume: go on from the checkpoint that is there, as if the
    session had never been stopped; from the start where there is none yet.
    Ctrl-C or SIGTERM ends training after the current vector step and leaves a finished folder; a second one stops hard.
    Sets torch to one thread in this process: for networks of this size more threads are slower, and sums are the same
    on every machine. Raises LinkError when an environment cannot be reached, SpecError when settings cannot be used,
    CheckpointError when the checkpoint was made by other settings, RunError when the disk takes no more.
    """
    torch.set_num_threads(1)
    opens = (open_envs,) if callable(open_envs) else tuple(open_envs)
    agents = ((settings.algorithm, settings.config), *settings.more_agents)
    worlds = tuple(zip(opens, (settings.num_envs, *settings.more_envs), strict=True))
    space = Space(settings.bodies)
    saved = course.newest(run / f"session_{settings.seed}") if resume else None
    position = saved["resume"]["records"] if saved is not None else None
    with (
        SessionRecords(run, settings.seed, bodies=len(space.bodies) > 1, resume=position) as records,
        stop_on_signal() as stop,
    ):
        try:
            with _stands(settings, space, agents, worlds, records) as stands:

                def judge(env_steps: int) -> Scores:
                    scores = _evaluations(settings, stands, worlds)
                    for body, rows in scores.items():
                        records.add_evaluation(env_steps, rows, body)
                    return scores

                with _evaluator(settings, worlds[0], stands[0], records) as evaluator:
                    outcome = Course(settings, stands, records, judge, evaluator).run(stop, on_progress, saved)
            judged = outcome.status != "interrupted" and settings.evaluation_episodes > 0
            scores = judge(outcome.env_steps) if judged else {}
            seconds = outcome.seconds
            plots.draw_session(
                records.folder, title=settings.title, target=settings.target, window=settings.window, seconds=seconds
            )
        except BaseException as error:
            # Not to act on it: only so that the folder says what happened, where the disk takes even that.
            with suppress(RunError):
                records.finish({"status": "failed", "error": f"{type(error).__name__}: {error}"})
            if isinstance(error, OSError) and not isinstance(error, Error):  # a LinkTimeout is both
                hint = "longrein run --resume RUN goes on from here"
                raise RunError(f"{records.folder}: {error}", hint=hint) from error
            raise
        evaluation = {body: tuple(row[2] for row in rows) for body, rows in scores.items()}
        result = SessionResult(
            outcome.status, outcome.env_steps, outcome.seconds, records.episode_count, outcome.mean_return,
            tuple(value for values in evaluation.values() for value in values), outcome.restarts, records.folder,
            records.graph,
            {} if len(space.bodies) == 1 else
            {body: BodyResult(mean, evaluation.get(body, ())) for body, mean in outcome.means.items()},
        )  # fmt: skip
        records.finish(vars(result))
    return result


def load_policy(folder: Path, envs: Seats | VectorEnv[Any, Any, Any], body: str = "0.0.0") -> Algorithm:
    """The algorithm that a session saved, ready to act in `envs` or to go on learning.

    folder: a session's folder. body: whose, "a.e.b". Raises CheckpointError when it cannot be read, has no such body,
    or was made for other spaces.
    """
    path = folder / "checkpoint.pt"
    saved = checkpoint.load(path)
    entries = [saved, *saved.get("others", ())]
    bodies = {label: one for one in entries for label in one["identity"].get("bodies", ("0.0.0",))}
    if body not in bodies:
        raise CheckpointError(str(path), f"has no body {body}", hint="one of " + ", ".join(bodies))
    identity = bodies[body]["identity"]
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
    algorithm.load_state_dict(bodies[body]["state"])
    return algorithm


def result_of(folder: Path) -> SessionResult | None:
    """What came of the session of a folder that trained to its end; None for any other, which may be resumed."""
    found = read_result(folder)
    if found.get("status") not in ("solved", "budget spent"):
        return None
    nan = float("nan")
    bodies = {
        label: BodyResult(nan if body["training_mean"] is None else body["training_mean"], tuple(body["evaluation"]))
        for label, body in found.get("bodies", {}).items()
    }
    return SessionResult(
        found["status"], found["env_steps"], found["seconds"], found["episodes"],
        nan if found["training_mean"] is None else found["training_mean"], tuple(found["evaluation"]),
        found["restarts"], folder, folder / "graph.png", bodies,
    )  # fmt: skip


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second raises KeyboardInterrupt. Outside the main thread, never set.

    What comes within a second of the first is the first: it may come from a service's end and through the parent.
    """
    stop = threading.Event()
    heard = math.inf
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if time.monotonic() - heard > 1.0:
            raise KeyboardInterrupt
        heard = min(heard, time.monotonic())
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _stands(
    settings: SessionSettings,
    space: Space,
    agents: Sequence[tuple[str, Any]],
    worlds: Sequence[tuple[OpenWorld, int]],
    records: SessionRecords,
) -> Iterator[Sequence[Station]]:
    """Who acts and who learns: in this process, or with actors in others."""
    seeds = partial(seed_of, settings.seed)
    if settings.topology is None:
        with staged(space, agents, worlds, seeds, records) as stands:
            yield stands
        return
    (open_world, copies), (name, config) = worlds[0], agents[0]
    topology.check(settings.topology, name, copies, len(space.bodies))

    def learner_of(hello: Hello) -> Learner:
        return alone(name, config, hello.observation_space, hello.action_space, seeds, records)

    if settings.topology.hogwild:
        role = Role(open_world, copies // settings.topology.hogwild, name, config)
        with hogwild(role, settings.topology, seeds, learner_of) as workers:
            yield workers
        return
    role = Role(open_world, copies // settings.topology.actors, name, config, settings.topology.first_ready)
    engine = crewed_by_ray if settings.topology.engine == "ray" else crewed
    with engine(role, settings.topology, seeds, learner_of) as crew:
        yield crew


@contextmanager
def _evaluator(
    settings: SessionSettings, world: tuple[OpenWorld, int], stand: Station, records: SessionRecords
) -> Iterator[Evaluator | None]:
    """Who evaluates while training goes on, in a process of its own; None where training waits for it."""
    many, episodes = settings.topology, settings.evaluation_episodes
    if many is None or not many.evaluator or not settings.evaluation_every or not episodes:
        yield None
        return
    seeds = tuple(evaluation_seeds(settings.seed, episodes))
    role = EvaluatorRole(world[0], min(world[1], episodes), seeds, settings.algorithm, settings.config)
    with closing(Evaluator(role, stand.learners[0].algorithm.policy, records.add_evaluation)) as evaluator:
        yield evaluator


def _evaluations(
    settings: SessionSettings, stands: Sequence[Station], worlds: Sequence[tuple[OpenWorld, int]]
) -> Scores:
    """The evaluation episodes of every body; of bodies in copies of one environment, of the first."""
    found: Scores = {}
    seeds = evaluation_seeds(settings.seed, settings.evaluation_episodes)
    for stand in stands:
        open_world, copies = worlds[stand.env]
        # No more copies than training had: a server may hold no more, and an older system is one environment.
        with closing(open_world(min(copies, len(seeds)))) as world:
            policies = [learner.algorithm.policy for learner in stand.learners]
            if isinstance(stand.arena, Together) and isinstance(world, Games):
                seats = evaluate_games(world, _like(world, stand.arena), policies, seeds)
                for actor, table in zip(stand.arena.actors, stand.arena.tables, strict=True):
                    found |= {body: seats[seat] for body, seat in zip(actor.bodies, table.seats, strict=True)}
            elif not isinstance(world, Games):
                found[stand.arena.actors[0].bodies[0]] = evaluate(policies[0], world, seeds)
    return dict(sorted(found.items()))


def _like(games: Games, arena: Together) -> list[Table]:
    """The same tables, in other copies of the game."""
    return [games.table(table.seats) for table in arena.tables]
