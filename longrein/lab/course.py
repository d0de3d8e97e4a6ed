"""A session's training, from its start or from a checkpoint: steps every arena in turn, learns, records and saves.

1. A round is a chunk of each arena whose env steps are not spent. Nothing is looked at or saved within one.
2. The round after which `checkpoint_every` env steps will have passed ends at a boundary: environments that cannot
   save their state are cut there, and a checkpoint is written from which the rest of the session follows to the bit.
   Which round that is follows from what a checkpoint holds, so that cuts come at the same places in every run.
3. Training that ends elsewhere (a signal, a lost environment) leaves its weights in the checkpoint, and the last
   boundary beside it: a resumed run goes on from there.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longrein.errors import CheckpointError, LinkError
from longrein.lab import checkpoint
from longrein.lab.aeb import Body
from longrein.lab.evaluator import Evaluator
from longrein.lab.records import SessionRecords
from longrein.lab.station import Station
from longrein.lab.topology import Topology
from longrein.learn.algorithms import Algorithm

Status = Literal["solved", "budget spent", "interrupted", "failed"]
HALF = 2**30  # training seeds lie below, evaluation seeds from here on


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
    more_agents: tuple[tuple[str, Any], ...] = ()
    """Algorithm and Config of agents 1, 2, ... of a session with several; agent 0 is above."""
    more_envs: tuple[int, ...] = ()
    """Copies of environments 1, 2, ... of a session with several."""
    bodies: tuple[Body, ...] = (Body(0, 0, 0),)
    """Which agents are in which environments."""
    max_env_steps: int = 200_000
    """Env steps in each environment, over all its copies together, after which training ends there."""
    target: float | None = None
    """Training return of every body at which training ends before that; None trains to the end."""
    window: int = 100
    """Episodes, the last ones, whose mean return is held against the target."""
    checkpoint_every: int = 20_000
    """Env steps, of all environments together, between checkpoints; there is also one at the end, whatever ends it.
    Environments that cannot save their state begin anew at each, so that a resumed run does as an undisturbed one."""
    evaluation_episodes: int = 20
    """Episodes played without noise when training has ended, each on a seed that training never saw."""
    evaluation_every: int = 0
    """Env steps in each environment between evaluations while it trains; 0 evaluates when training has ended only."""
    topology: Topology | None = None
    """The processes that take part beside the session's own; None: it steps and learns in turn."""
    prepare: Callable[[Algorithm], None] | None = None
    """Called with the algorithm when it is new, before it acts: to begin with the weights of another."""


@dataclass(frozen=True)
class Progress:
    """How far a session is."""

    env_steps: int
    """Env steps so far, in the environment that has had the fewest."""
    seconds: float
    """Since training began."""
    episodes: int
    """Finished so far."""
    mean_return: float
    """Of the last `window` episodes, over bodies; NaN before the first."""
    updates: int
    """Batches learnt from."""
    processes: Mapping[str, float] = field(default_factory=dict)
    """What was measured of actors beside the last batch; empty where one process does all."""


def seed_of(root: int, *path: str) -> int:
    """The seed of one role of a session, below 2**30: the same for the same path, whatever other roles there are."""
    words = np.frombuffer(hashlib.sha256("/".join(path).encode()).digest(), np.uint32)
    return int(np.random.SeedSequence([root, *words.tolist()]).generate_state(1)[0]) % HALF


@dataclass(frozen=True)
class Outcome:
    """How training ended."""

    status: Status
    env_steps: int
    seconds: float
    mean_return: float
    restarts: int
    means: Mapping[str, float]
    """Of each body, in a session with several."""


OnProgress = Callable[[Progress], None]
Evaluate = Callable[[int], object]
"""Plays without noise and notes it; is given the env steps trained so far."""


class Course:
    """The training of one session."""

    def __init__(
        self,
        settings: SessionSettings,
        stands: Sequence[Station],
        records: SessionRecords,
        evaluate: Evaluate,
        evaluator: Evaluator | None = None,
    ) -> None:
        """evaluator: who evaluates while training goes on; without one `evaluate` does, and training waits."""
        self.settings = settings
        self._evaluate = evaluate
        self._evaluator = evaluator
        self._evaluated_at = 0  # env steps, of the environment that has had the fewest
        self.stands = tuple(stands)
        self.records = records
        self._learners = [learner for stand in stands for learner in stand.learners]
        bodies = [body for stand in stands for actor in stand.arena.actors for body in actor.bodies]
        self._last: dict[str, deque[float]] = {body: deque(maxlen=settings.window) for body in bodies}
        self._boundaries = 0
        self._saved_at = 0  # env steps, of all environments together
        self._resumable = False  # whether checkpoint.pt is a boundary

    def run(
        self, stop: threading.Event, on_progress: OnProgress | None = None, saved: Mapping[str, Any] | None = None
    ) -> Outcome:
        """Train to the target or the budget, or until `stop` is set; saved: a checkpoint, as `newest` gave it."""
        ended: Mapping[str, Any] | None = None
        if saved is None:
            if self.settings.prepare is not None:
                for learner in self._learners:
                    self.settings.prepare(learner.algorithm)
            for stand in self.stands:
                stand.arena.begin(self._seed(stand))
        else:
            ended = self._load(saved)
        try:
            status: Status = ended["status"] if ended is not None else self._rounds(stop, on_progress)
            self._rest()
        except LinkError:
            self._save_between()  # the environments are gone for good, what was learnt from them is not
            raise
        outcome = self._outcome(status, self.records.seconds if ended is None else ended["seconds"])
        if self._evaluator is not None and status != "interrupted":
            self._evaluator.wait()
        if ended is None and status == "interrupted":
            self._save_between()
        elif ended is None:
            self._save({"status": status, "seconds": outcome.seconds})
        return outcome

    def _rounds(self, stop: threading.Event, on_progress: OnProgress | None) -> Status:
        settings = self.settings
        while playing := [stand for stand in self.stands if stand.arena.env_steps < settings.max_env_steps]:
            ahead = sum(stand.chunk * stand.arena.copies for stand in playing)
            boundary = self._clock + ahead - self._saved_at >= settings.checkpoint_every
            for stand in playing:
                cut = self._seed(stand, self._boundaries + 1) if boundary and not stand.arena.saves else None
                stand.advance(cut, stop.is_set)
                self._note_episodes(stand)
                if stop.is_set():
                    break
            if self._evaluator is not None:
                self._evaluator.look()
            means = self._means()
            if on_progress is not None:
                updates = sum(learner.version for learner in self._learners)
                seconds, episodes = self.records.seconds, self.records.episode_count
                beside = self._learners[0].beside
                on_progress(Progress(self._env_steps, seconds, episodes, float(np.mean(means)), updates, beside))
            if stop.is_set():
                return "interrupted"
            full = all(len(last) == settings.window for last in self._last.values())
            if settings.target is not None and full and min(means) >= settings.target:
                return "solved"
            every, now = settings.evaluation_every if settings.evaluation_episodes else 0, self._env_steps
            if every and now // every > self._evaluated_at // every and now < settings.max_env_steps:
                self._rest()
                now = self._env_steps
                with self.records.apart():
                    self._evaluate(now) if self._evaluator is None else self._evaluator.ask(now)
                self._evaluated_at = now
            if boundary:
                self._rest()
                self._boundaries += 1
                self._saved_at = self._clock
                self._save(None)
        return "budget spent"

    def _rest(self) -> None:
        """Let all learning come to a halt, and take in what came of it."""
        for stand in self.stands:
            stand.rest()
            self._note_episodes(stand)

    def _note_episodes(self, stand: Station) -> None:
        episodes = [episode for actor in stand.arena.actors for episode in actor.finished()]
        self.records.add_episodes(episodes)
        for episode in episodes:
            self._last[episode.body].append(episode.return_)

    @property
    def _clock(self) -> int:
        return sum(stand.arena.env_steps for stand in self.stands)

    @property
    def _env_steps(self) -> int:
        return min(stand.arena.env_steps for stand in self.stands)

    def _means(self) -> list[float]:
        return [float(np.mean(last)) if last else float("nan") for last in self._last.values()]

    def _outcome(self, status: Status, seconds: float) -> Outcome:
        means = self._means()
        restarts = sum(actor.restarts for stand in self.stands for actor in stand.arena.actors)
        each = dict(sorted(zip(self._last, means, strict=True)))
        return Outcome(status, self._env_steps, seconds, float(np.mean(means)), restarts, each)

    def _seed(self, stand: Station, boundary: int = 0) -> int:
        """Of the environments' first reset, and of that at each boundary; that of no copy is one of evaluation's."""
        path = [part for part in (stand.name, f"boundary {boundary}" if boundary else "") if part]
        return seed_of(self.settings.seed, "environments", *path) // 2

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, ended: Mapping[str, Any] | None) -> None:
        """A checkpoint that the session can be resumed from. ended: how training did, where it has."""
        resume = {
            "settings": _deciding(self.settings),
            "records": self.records.position(self._env_steps),
            "boundaries": self._boundaries,
            "saved_at": self._saved_at,
            "evaluated_at": self._evaluated_at,
            "evaluations": [] if self._evaluator is None else self._evaluator.state_dict(),
            "ended": None if ended is None else dict(ended),
            "last": {body: list(last) for body, last in self._last.items()},
            "learners": [learner.state_dict() for learner in self._learners],
            "actors": [[actor.state_dict() for actor in stand.arena.actors] for stand in self.stands],
            "environments": [stand.arena.save_state() for stand in self.stands],
        }
        checkpoint.save(self.records.checkpoint, self._published() | {"resume": resume})
        self.records.boundary.unlink(missing_ok=True)
        self._resumable = True

    def _save_between(self) -> None:
        """A checkpoint of the weights alone; the one that can be resumed from stays beside it."""
        if self._resumable:
            self.records.checkpoint.replace(self.records.boundary)
            self._resumable = False
        checkpoint.save(self.records.checkpoint, self._published() | {"resume": None})

    def _published(self) -> dict[str, Any]:
        first, *others = (
            {**learner.published(), "env_steps": stand.arena.env_steps}
            for stand in self.stands
            for learner in stand.learners
        )
        return {**first, "others": others}

    def _load(self, saved: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Take up where a checkpoint was written; how training had ended there, or None."""
        resume, path = saved["resume"], str(self.records.checkpoint)
        for key, value in _deciding(self.settings).items():
            if resume["settings"].get(key) != value:
                raise CheckpointError(path, f"was made with {key} {resume['settings'].get(key)}, and {value} was asked "
                                      f"for", hint="resume it as it was begun, or train anew")  # fmt: skip
        published = [saved, *saved["others"]]
        for learner, one in zip(self._learners, published, strict=True):
            for key, value in vars(learner.identity).items():
                if one["identity"][key] != value:
                    raise CheckpointError(path, f"was made for {key} {one['identity'][key]}, and {value} is here",
                                          hint="resume it where it was begun, or train anew")  # fmt: skip
        for learner, one, state in zip(self._learners, published, resume["learners"], strict=True):
            learner.load(one, state)
        for stand, actors, environments in zip(self.stands, resume["actors"], resume["environments"], strict=True):
            for actor, state in zip(stand.arena.actors, actors, strict=True):
                actor.load_state_dict(state)
            if stand.arena.env_steps >= self.settings.max_env_steps:
                continue  # it was not cut: it is over
            if environments is None:
                stand.arena.begin(self._seed(stand, resume["boundaries"]))
            else:
                stand.arena.reset_to(environments)
        for body, returns in resume["last"].items():
            self._last[body].extend(returns)
        self._boundaries, self._saved_at = resume["boundaries"], resume["saved_at"]
        self._evaluated_at = resume["evaluated_at"]
        if self._evaluator is not None:
            self._evaluator.load_state_dict(resume.get("evaluations", ()))
        self._resumable = not self.records.boundary.exists()
        ended: Mapping[str, Any] | None = resume["ended"]
        return ended


def newest(folder: Path) -> dict[str, Any] | None:
    """The checkpoint that a session's folder can be resumed from, or None; without one the folder is emptied.

    Raises CheckpointError when it cannot be read, or was written by a version that could not resume.
    """
    for path in (folder / "checkpoint.pt", folder / "resume.pt"):
        if path.exists():
            saved = checkpoint.load(path)
            if "resume" not in saved:
                raise CheckpointError(str(path), "holds weights only: another version wrote it", hint="train anew")
            if saved["resume"] is not None:
                return saved
    shutil.rmtree(folder, ignore_errors=True)  # a session that has not come to its first checkpoint begins again
    return None


def _deciding(settings: SessionSettings) -> dict[str, Any]:
    """Those settings that decide what a session does next, but for its agents'."""
    copies = [settings.num_envs, *settings.more_envs]
    return {
        "seed": settings.seed, "num_envs": copies, "checkpoint_every": settings.checkpoint_every,
        "window": settings.window, "bodies": [list(body) for body in settings.bodies],
    } | ({} if settings.topology is None else {"topology": vars(settings.topology)})  # fmt: skip
