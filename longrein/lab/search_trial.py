"""One trial of a search, as a Ray actor that Tune drives. Knows a trial's spec and how to end it, no searcher.

Sessions run in processes of their own, as in every trial: what one of them takes or leaves behind ends with it, and
the actor lives on from trial to trial.
"""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import queue
import shutil
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from longrein.errors import RunError
from longrein.lab import checkpoint, fitness, records, trial_fitness
from longrein.lab.experiment import TrialResult, run_trial
from longrein.lab.search_space import METRICS, Space, decoded
from longrein.lab.session import Progress
from longrein.lab.spec import Source, Spec, overridden, resolve

LOOK_SECONDS = 2.0
"""How long a step may wait for news: Tune asks a trial to end between two steps only."""
END_SECONDS = 30.0
"""How long sessions that were asked to end may take before they are killed."""


class Trial(tune.Trainable):
    """Runs a trial and reports how far it is.

    Its config: `spec` the spec's plain values without search, as JSON; `space`; `folder`, the experiment's;
    `working_folder`, where the search was started; and below `drawn` what the searcher drew.
    """

    _said_at: int
    _last: dict[str, Any]
    _thread: threading.Thread | None = None

    def setup(self, config: dict[str, Any]) -> None:
        if Path(config["working_folder"]).is_dir():
            os.chdir(config["working_folder"])  # file.py:factory is looked for where the search was started
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        self._start(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait until there is something to say. Raises RunError when a session died."""
        if self._thread is None:
            self._begin()
        deadline = time.monotonic() + LOOK_SECONDS
        while time.monotonic() < deadline:
            try:
                told = self._told.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                break
            if isinstance(told, TrialResult):
                return self._finished(told)
            if isinstance(told, str):
                raise RunError(told)
            seed, progress = told
            self._at[seed] = progress
            if self._env_steps >= self._said_at + self._every and self._has_returns:
                self._said_at = self._env_steps
                self._last = self._report()
                break
        return self._last | {"done": False}

    def cleanup(self) -> None:
        self._end()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Every session's newest checkpoint and tables. The sessions end for it, and go on with the next step."""
        self._end()
        for run in self._runs()[-1:]:
            save_sessions(run, Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        """Go on from where a trial was saved, with the settings of this one."""
        self._end()
        if next(Path(checkpoint_dir).glob("session_*"), None) is not None:
            settings = {"name": self.spec.name, "spec": self.spec.plain, "fingerprint": self.spec.fingerprint}
            run = records.create_run(self._folder, self.spec.name, settings)
            take_over(Path(checkpoint_dir), run, self.spec)

    def _start(self, config: Mapping[str, Any]) -> None:
        self._space: Space = config["space"]
        values = decoded(self._space, config["drawn"])
        name = str(self.trial_name)
        self.spec: Spec = resolve(overridden(Source(name, name, json.loads(config["spec"]), {}), values))
        self._every = max(self.spec.meta.env_steps // self._space.method.reports, 1)
        self._folder = Path(config["folder"])
        self._thread = None  # begun by the first step: a checkpoint may be loaded before
        self._said_at = 0
        self._last = {"env_steps": 0, "mean_return": math.nan, "fitness": math.nan}

    def _begin(self) -> None:
        """Run the trial, from where its newest folder is, when it has one."""
        self._told: queue.Queue[tuple[int, Progress] | TrialResult | str] = queue.Queue()
        self._at: dict[int, Progress] = {}
        self._stop = threading.Event()
        arguments = (self.spec, next(reversed(self._runs()), None), self._told, self._stop)
        self._thread = threading.Thread(target=self._run, name=self.spec.name, args=arguments)
        self._thread.start()

    def _run(self, spec: Spec, resume: Path | None, told: queue.Queue[Any], stop: threading.Event) -> None:
        def tell(seed: int, progress: Progress) -> None:
            told.put((seed, progress))
            if stop.is_set():
                raise KeyboardInterrupt  # what run_trial ends by; its sessions have had their signal

        try:
            processes = max(int(self._space.method.cpus), 1)
            told.put(run_trial(spec, self._folder, processes=processes, on_progress=tell, resume=resume))
        except Exception as error:  # the border of a trial: whatever ended it is told, with its traceback
            told.put("".join(traceback.format_exception(error)))
        gc.collect()  # pictures are rings of references, 1.5 MB each, which Python would leave for long

    def _end(self) -> None:
        """End the sessions as Ctrl-C does, so that each finishes its folder; kill what does not end."""
        if self._thread is None:
            return
        self._stop.set()
        deadline = time.monotonic() + END_SECONDS
        signalled: set[int] = set()
        while self._thread.is_alive() and time.monotonic() < deadline:
            for child in multiprocessing.active_children():
                if child.pid not in signalled and child.is_alive():
                    signalled.add(child.pid or 0)
                    child.terminate()
            self._thread.join(0.1)
        for child in multiprocessing.active_children():
            child.kill()
        self._thread.join(END_SECONDS)
        self._thread = None

    @property
    def _env_steps(self) -> int:
        """Of a session, on average."""
        return sum(progress.env_steps for progress in self._at.values()) // self.spec.meta.max_session

    @property
    def _has_returns(self) -> bool:
        return any(not math.isnan(progress.mean_return) for progress in self._at.values())

    def _report(self) -> dict[str, Any]:
        """How far the trial is, and how good so far."""
        means = [progress.mean_return for progress in self._at.values() if not math.isnan(progress.mean_return)]
        worth = worth_so_far(self._runs()[-1], self._space.method.metric)
        return {
            "env_steps": self._env_steps, "mean_return": sum(means) / len(means),
            "fitness": math.nan if worth is None else worth,
        }  # fmt: skip

    def _finished(self, trial: TrialResult) -> dict[str, Any]:
        if trial.failures:
            raise RunError("\n".join(f"session {seed} died:\n{text}" for seed, text in trial.failures.items()))
        if any(result is not None and result.status == "interrupted" for result in trial.sessions):
            raise RunError(f"{trial.run} was interrupted", hint="longrein run --resume goes on with its search")
        found = records.read_json(trial.run / "trial.json")["fitness"]
        metric = self._space.method.metric
        worth = number_of(found, metric)
        if worth is None:
            raise RunError(f"the trial has no {metric}", hint="more meta.env_steps, or another search.method.metric")
        evaluations = [value for result in trial.sessions if result is not None for value in result.evaluation]
        return {
            "done": True, "env_steps": self.spec.meta.env_steps, "fitness": worth,
            "mean_return": number_of(found, "final_return"), "parts": numbers_of(found), "run": trial.run.name,
            "evaluation": sum(evaluations) / len(evaluations) if evaluations else None,
        }  # fmt: skip

    def _runs(self) -> list[Path]:
        """The trial's folders, oldest first: pbt makes one whenever it goes on from another trial."""
        found = self._folder.glob(f"{self.spec.name}_*/settings.json")
        return sorted((path.parent for path in found), key=lambda path: path.stat().st_mtime)


def save_sessions(run: Path, into: Path) -> None:
    """Copy what each session of a run can be resumed from. A session without a checkpoint is left out."""
    for session in records.sessions_of(run):
        files = [session / name for name in ("checkpoint.pt", "resume.pt", "episodes.csv", "metrics.csv")]
        if files[0].exists():
            (into / session.name).mkdir()
            for file in files:
                if file.exists():
                    shutil.copy(file, into / session.name)


def take_over(saved: Path, run: Path, spec: Spec) -> None:
    """Copy saved sessions into a new run of a spec whose algorithm has other settings. Raises CheckpointError."""
    for session in records.sessions_of(saved):
        shutil.copytree(session, run / session.name)
        for path in (run / session.name).glob("*.pt"):
            state = checkpoint.load(path)
            state["identity"]["config"] = records.as_plain(spec.agents[0].config)
            checkpoint.save(path, {name: part for name, part in state.items() if name != "format"})


def worth_so_far(run: Path, metric: str) -> float | None:
    """A trial's number to maximise while it goes on, of its files; None before there is one."""
    if metric != "area_under_curve":
        return number_of(trial_fitness.appraise(run), metric)
    areas = []
    for folder in records.sessions_of(run):  # over the env steps so far: the last return says little of those to come
        table = records.read_columns(folder / "episodes.csv")
        if len(table.get("return", ())):
            budget = max(float(table["env_steps"][-1]), 1.0)
            areas.append(fitness.area_under_curve(table["return"], table["env_steps"], budget))
    return sum(areas) / len(areas) if areas else None


def numbers_of(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a trial's fitness by name: area_under_curve, slm2018.strength and so on; unknown ones left out."""
    named = dict(found.get("beside") or {})
    for definition in ("slm2018", "slm5"):
        named |= {f"{definition}.{part}": value for part, value in (found.get(definition) or {}).items()}
    return {name: float(named[name]) for name in METRICS if named.get(name) is not None}


def number_of(found: Mapping[str, Any], metric: str) -> float | None:
    """One of them."""
    return numbers_of(found).get(metric)
