"""A trial: the sessions of one spec, each in a process of its own. Knows processes and run folders, no algorithm."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from longrein.errors import RoleDied, SpecError
from longrein.lab import actor
from longrein.lab.records import create_run, write_json
from longrein.lab.session import Progress, SessionResult, SessionSettings, run_session
from longrein.lab.spec import EnvSpec, Spec

Told = Callable[[int, Progress], None]


@dataclass(frozen=True)
class TrialResult:
    """What came of a trial."""

    run: Path
    """Its folder."""
    sessions: tuple[SessionResult | None, ...]
    """Each session's result, in the order of the seeds; None for one that died."""
    failures: dict[int, str]
    """The traceback of each session that died, by its seed."""


def session_settings(spec: Spec, seed: int) -> SessionSettings:
    """What one session of a spec is asked to do. Raises SpecError for what only several processes can do."""
    if len(spec.agents) != 1 or len(spec.envs) != 1:
        raise SpecError("agent", "several agents or environments in one session are not there yet",
                        hint="one agent, one environment")  # fmt: skip
    agent, env, meta = spec.agents[0], spec.envs[0], spec.meta
    where = env.id or (env.url if isinstance(env.url, str) else f"{len(env.url)} servers")
    return SessionSettings(
        title=f"{agent.algorithm} on {where}",
        algorithm=agent.algorithm,
        config=agent.config,
        seed=seed,
        num_envs=env.num_envs,
        max_env_steps=meta.env_steps,
        target=meta.target,
        window=meta.window,
        checkpoint_every=meta.checkpoint_every,
        evaluation_episodes=meta.eval.episodes,
    )


def open_envs(env: EnvSpec, count: int) -> Any:
    """The environments of a spec, here or elsewhere. Raises SpecError, LinkError."""
    if env.id:
        return actor.make_envs(env.id, count, env.options)
    return actor.connect(list(env.url) if isinstance(env.url, tuple) else env.url, count)


def run_trial(spec: Spec, data: Path, *, processes: int | None = None, on_progress: Told | None = None) -> TrialResult:
    """All sessions of a spec, so many at a time as there are processors. A session that dies takes no other with it.

    on_progress: called with the seed of a session, and how far it is. Raises SpecError.
    """
    run = create_run(data, spec.name, {"name": spec.name, "spec": spec.plain, "fingerprint": spec.fingerprint})
    seeds = [spec.meta.seed + index for index in range(spec.meta.max_session)]
    session_settings(spec, seeds[0])  # what cannot run is said before a process is started
    at_once = min(processes or os.cpu_count() or 1, len(seeds))
    results: dict[int, SessionResult] = {}
    failures: dict[int, str] = {}
    context = multiprocessing.get_context("spawn")
    waiting, running = list(seeds), dict[Connection, tuple[int, Any]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                seed = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_session, args=(theirs, spec, run, seed), name=f"session-{seed}")
                process.start()
                theirs.close()
                running[ours] = seed, process
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                seed, process = running[pipe]
                try:
                    told = pipe.recv()
                except EOFError:
                    process.join()
                    del running[pipe]
                    if seed not in results and seed not in failures:
                        failures[seed] = str(RoleDied(f"session {seed}", process.exitcode))
                    continue
                if isinstance(told, Progress):
                    if on_progress is not None:
                        on_progress(seed, told)
                elif isinstance(told, SessionResult):
                    results[seed] = told
                else:
                    failures[seed] = told
    except KeyboardInterrupt:
        waiting.clear()  # each session has heard it too, and finishes its folder
        for pipe, (seed, process) in running.items():
            process.join(30.0)
            while pipe.poll():
                try:
                    told = pipe.recv()
                except EOFError:
                    break
                if isinstance(told, SessionResult):
                    results[seed] = told
            if process.is_alive():
                process.terminate()
                process.join()
    for seed, text in failures.items():
        (run / f"session_{seed}").mkdir(exist_ok=True)
        (run / f"session_{seed}" / "failure.txt").write_text(text)
    write_json(run / "trial.json", {"sessions": {s: _plain(r) for s, r in results.items()}, "failures": failures})
    return TrialResult(run, tuple(results.get(seed) for seed in seeds), failures)


def _plain(result: SessionResult) -> dict[str, Any]:
    return {key: value for key, value in vars(result).items() if key not in ("folder", "graph")}


def _session(pipe: Connection, spec: Spec, run: Path, seed: int) -> None:
    """One session in its process: progress a few times a second, then the result, or the traceback that ended it."""
    last = 0.0

    def tell(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.2:
            last = now
            pipe.send(progress)

    try:
        env = spec.envs[0]
        pipe.send(run_session(session_settings(spec, seed), run, lambda count: open_envs(env, count), tell))
    except Exception as error:  # the border of a session: whatever ended it is told, with its traceback
        pipe.send("".join(traceback.format_exception(error)))
