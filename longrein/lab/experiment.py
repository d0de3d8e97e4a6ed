"""A trial: the sessions of one spec, each in a process of its own. Knows processes and run folders, no algorithm."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from longrein.errors import Error, RoleDied, RunError
from longrein.lab import actor, aeb, plots, sinks, trial_fitness
from longrein.lab.baseline import kept, measure_missing
from longrein.lab.processes import refuse_running
from longrein.lab.records import create_run, env_label, record_end, record_process, spec_of, title_of, write_json
from longrein.lab.session import Progress, SessionResult, SessionSettings, result_of, run_session
from longrein.lab.spec import EnvSpec, Spec, from_plain
from longrein.lab.stage import World

Told = Callable[[int, Progress], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialResult:
    """What came of a trial."""

    run: Path
    """Its folder."""
    sessions: tuple[SessionResult | None, ...]
    """Each session's result, in the order of the seeds; None for one that died."""
    failures: dict[int, str]
    """The traceback of each session that died, by its seed."""
    interrupted: bool = False
    """Whether it was asked to end, though its sessions may have come to their ends all the same."""


def session_settings(spec: Spec, seed: int) -> SessionSettings:
    """What one session of a spec is asked to do. Raises SpecError for impossible bodies."""
    agent, env, meta = spec.agents[0], spec.envs[0], spec.meta
    return SessionSettings(
        title=title_of(spec.plain),
        algorithm=agent.algorithm,
        config=agent.config,
        seed=seed,
        num_envs=env.num_envs,
        more_agents=tuple((other.algorithm, other.config) for other in spec.agents[1:]),
        more_envs=tuple(other.num_envs for other in spec.envs[1:]),
        bodies=aeb.resolve(spec.body, len(spec.agents), len(spec.envs)).bodies,
        max_env_steps=meta.env_steps,
        target=meta.target,
        window=meta.window,
        checkpoint_every=meta.checkpoint_every,
        evaluation_episodes=meta.eval.episodes,
        evaluation_every=meta.eval.every,
        topology=None if isinstance(meta.topology, str) else meta.topology,
    )


def open_envs(env: EnvSpec, count: int) -> Any:
    """The environments of a spec, here or elsewhere. Raises SpecError, LinkError."""
    if env.id:
        return actor.make_envs(env.id, count, env.options)
    urls = list(env.url) if isinstance(env.url, tuple) else env.url
    return (actor.connect_any if env.elastic else actor.connect)(urls, count, options=env.options)


def open_world(env: EnvSpec, count: int, each: bool = False) -> World:
    """As open_envs; copies of a game where several agents act at once in it. each: to answer each for itself."""
    if env.id:
        return actor.make_world(env.id, count, env.options)
    urls = list(env.url) if isinstance(env.url, tuple) else env.url
    if each:
        return actor.connect(urls, count, options=env.options, each=True, elastic=env.elastic)
    if env.elastic:
        return actor.connect_any(urls, count, options=env.options)
    return actor.connect_world(urls, count, env.options)


def run_trial(
    spec: Spec,
    data: Path,
    *,
    processes: int | None = None,
    on_progress: Told | None = None,
    resume: Path | None = None,
) -> TrialResult:
    """All sessions of a spec, so many at a time as there are processors. A session that dies takes no other with it.

    on_progress: called with the seed of a session, and how far it is. resume: the run of this spec to go on with, in
    place of a new one in `data`: sessions that came to their end are kept, the others go on from their checkpoints.
    Raises SpecError; RunError when what is to be resumed is no run of this spec, or still runs.
    """
    seeds = [spec.meta.seed + index for index in range(spec.meta.max_session)]
    session_settings(spec, seeds[0])  # what cannot run is said before a folder is made
    sinks.check(spec.meta.sinks)
    results: dict[int, SessionResult] = {}
    if resume is None:
        run = create_run(data, spec.name, {"name": spec.name, "spec": spec.plain, "fingerprint": spec.fingerprint})
    else:
        run = _taken_up(resume, spec)
        found = {seed: result_of(run / f"session_{seed}") for seed in seeds}
        results = {seed: result for seed, result in found.items() if result is not None}
    at_once = min(processes or os.cpu_count() or 1, len(seeds))
    failures: dict[int, str] = {}
    interrupted = False
    context = multiprocessing.get_context("spawn")
    waiting = [seed for seed in seeds if seed not in results]
    running = dict[Connection, tuple[int, Any]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                seed = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_session, args=(theirs, spec, run, seed, resume is not None), name=f"session-{seed}"
                )
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
        interrupted = True
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
    ended = [result.status != "interrupted" for result in results.values()]
    analyse(run, spec, play_random=bool(ended) and all(ended))  # who interrupts a run does not want to wait
    record_end(run)
    return TrialResult(run, tuple(results.get(seed) for seed in seeds), failures, interrupted)


def _taken_up(run: Path, spec: Spec) -> Path:
    """A run's folder, from now on this process's. Raises RunError when it is another spec's, or still runs."""
    name, plain = spec_of(run)
    if from_plain(name, plain).fingerprint != spec.fingerprint:
        raise RunError(f"{run} was made by another spec than {spec.name}", hint=f"longrein run --resume {run}")
    refuse_running(run)
    record_process(run)
    return run


def analyse(run: Path, spec: Spec, *, play_random: bool = True) -> None:
    """Note a trial's fitness in its trial.json and draw its graph.png, from its files.

    play_random: measure first what a random policy gets; where it cannot be played, slm5 stays out of the fitness.
    """
    if play_random:
        names = [env_label(asdict(env)) for env in spec.envs]
        try:
            above = kept(run.parent.parent) | kept(run.parent)  # of the search or benchmark that the trial is part of
            envs = [(name, partial(open_envs, env)) for name, env in zip(names, spec.envs, strict=True)]
            measure_missing(run, envs, above)
        except Error as error:
            log.warning("%s: no random policy was played: %s", run, error)
    trial_fitness.write(run)
    plots.draw_trial(run)


def _plain(result: SessionResult) -> dict[str, Any]:
    return {key: value for key, value in vars(result).items() if key not in ("folder", "graph")}


def _session(pipe: Connection, spec: Spec, run: Path, seed: int, resume: bool) -> None:
    """One session in its process: progress a few times a second, then the result, or the traceback that ended it."""
    last = 0.0

    def tell(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.2:
            last = now
            pipe.send(progress)

    try:
        opens = [partial(open_world, env) for env in spec.envs]
        pipe.send(run_session(session_settings(spec, seed), run, opens, tell, resume=resume))
    except Exception as error:  # the border of a session: whatever ended it is told, with its traceback
        pipe.send("".join(traceback.format_exception(error)))
