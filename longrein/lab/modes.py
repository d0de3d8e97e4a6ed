"""Run modes: what `longrein run SPEC_FILE NAME MODE` does, with its progress. Knows no process and no algorithm."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from longrein.errors import RunError, SpecError
from longrein.lab import benchmark, ray_cluster, report, schedule
from longrein.lab.evaluation import evaluate
from longrein.lab.experiment import open_envs, open_world, run_trial, session_settings
from longrein.lab.games import Games
from longrein.lab.records import env_label, list_runs, read_table, sessions_of, spec_of
from longrein.lab.schedule import INTERRUPTED
from longrein.lab.session import Progress as SessionProgress
from longrein.lab.session import evaluation_seeds, load_policy
from longrein.lab.spec import Spec, as_yaml, from_plain, nearest
from longrein.lab.topology import Topology
from longrein.lab.video import Filmed
from longrein.learn import algorithms

DEV_ENV_STEPS = 2_000


def dev(spec: Spec) -> Spec:
    """The spec cut to one short session."""
    meta = replace(spec.meta, env_steps=min(spec.meta.env_steps, DEV_ENV_STEPS), max_session=1, max_trial=1)
    return replace(spec, meta=meta)


def train(spec: Spec, data: Path, processes: int | None = None, *, resume: Path | None = None) -> int:
    """Run every session of a spec; show how far each is, and what came of it. The exit status.

    resume: the run to go on with, in place of a new one.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[says]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[int, TaskID] = {}

        def tell(seed: int, at: SessionProgress) -> None:
            if seed not in tasks:
                tasks[seed] = progress.add_task(f"session {seed}", total=spec.meta.env_steps, says="")
            says = f"{at.env_steps:,} env steps, mean return {at.mean_return:.1f}{told_of(at.processes)}"
            progress.update(tasks[seed], completed=at.env_steps, says=says)

        trial = run_trial(spec, data, processes=processes, on_progress=tell, resume=resume)
    for result in trial.sessions:
        if result is not None:
            evaluation = f"{np.mean(result.evaluation):.1f}" if result.evaluation else "none"
            print(f"{result.folder}: {result.status}, {result.env_steps:,} env steps in {result.seconds:.0f} s, "
                  f"mean return {result.training_mean:.1f}, evaluation {evaluation}")  # fmt: skip
    for seed, text in trial.failures.items():
        console.print(f"session {seed} died:\n{text}", style="red", markup=False)
    print(report.write(trial.run))
    if trial.failures:
        return 1
    ended = [result is None or result.status == "interrupted" for result in trial.sessions]
    return INTERRUPTED if any(ended) else 0


def told_of(processes: Mapping[str, float]) -> str:
    """What the live line says of a session's processes, where it has several: ", lag 0.9, queue 50 %, ..."."""
    said = [f"lag {processes['actor_lag']:.1f}"] if "actor_lag" in processes else []
    for name, word in (("queue", "queue"), ("learner_waiting", "learner waits"), ("actor_waiting", "actors wait")):
        if name in processes:
            said.append(f"{word} {processes[name]:.0%}")
    if "inference_batch" in processes:
        said.append(f"batches of {processes['inference_batch']:.0f}")
    for name, word in (("actors_replaced", "replaced"), ("inference_replaced", "times new inference"),
                       ("environments", "environments")):  # fmt: skip
        if processes.get(name):
            said.append(f"{processes[name]:.0f} {word}")
    return "".join(f", {one}" for one in said)


def resume_run(folder: Path, processes: int | None = None) -> int:
    """Go on with a run that was ended before its end. The exit status, as of `run_mode`.

    Raises RunError for what is no run, or one that still runs.
    """
    spec = from_plain(*spec_of(folder))
    with ending_like_ctrl_c():
        return train(spec, folder.parent, processes, resume=folder)


def develop(spec: Spec, data: Path, processes: int | None = None) -> int:
    """One short session, with all that is known of it; then, where there is a screen, two episodes in a window."""
    spec = dev(spec)
    print(as_yaml({spec.name: spec.plain}), end="")
    status = train(spec, data, processes)
    run = newest_run(data, spec.name)
    for session in sessions_of(run):
        if (session / "metrics.csv").exists():
            _show_metrics(session / "metrics.csv")
    if status == 0 and has_screen() and spec.envs[0].id:
        enjoy(run, episodes=2, render=True)
    return status


def enjoy_newest(spec: Spec, data: Path, processes: int | None = None) -> int:
    """Play what the newest run of a spec learned. Raises RunError when there is none."""
    enjoy(newest_run(data, spec.name))
    return 0


def benchmark_one(spec: Spec, data: Path, processes: int | None = None) -> int:
    """Benchmark one spec, with as many seeds as it has sessions."""
    seeds = tuple(range(spec.meta.seed, spec.meta.seed + spec.meta.max_session))
    return run_benchmark(benchmark.of_specs(spec.name, [(spec.name, spec)], seeds), data, processes)


def search(spec: Spec, data: Path, processes: int | None = None) -> int:
    """Search over the spec's search block, on this machine. The exit status, as of `run_mode`."""
    from longrein.lab.search import search_mode  # Ray is loaded where it is asked for only

    return search_mode(spec, data, processes)


def run_benchmark(asked: benchmark.Benchmark, data: Path, processes: int | None = None) -> int:
    """Run what is missing, show how far it is, and print the table. The exit status, as of `run_mode`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[says]}"), TimeRemainingColumn())
    with ending_like_ctrl_c(), Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}
        steps = {entry.label: entry.env_steps for entry, _ in asked.specs}

        def tell(label: str, at: SessionProgress) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=steps[label.rpartition(", ")[0]], says="")
            says = f"{at.env_steps:,} env steps, mean return {at.mean_return:.1f}"
            progress.update(tasks[label], completed=at.env_steps, says=says)

        outcome = benchmark.run(asked, data, processes=processes, on_progress=tell)
    print((outcome.folder / "table.md").read_text())
    print(outcome.folder / "report.html")
    if outcome.failed:
        return 1
    return INTERRUPTED if outcome.missing else 0


Mode = Callable[[Spec, Path, int | None], int]
MODES: Mapping[str, Mode] = {"train": train, "dev": develop, "enjoy": enjoy_newest, "benchmark": benchmark_one,
                              "search": search}  # fmt: skip


def run_mode(spec: Spec, mode: str, data: Path, processes: int | None = None) -> int:
    """Run a spec in a mode; the exit status: 0, 1 when something failed, 130 when it was ended before its end.

    Raises SpecError for an unknown mode, and when the spec asks for what its mode cannot do.
    """
    run = mode_named(mode)
    if spec.search and mode in ("train", "dev"):
        aside = f"{spec.name} has a search block, which {mode} leaves aside; mode search draws from it"
        print(aside, file=sys.stderr)
    with ending_like_ctrl_c():
        return run(spec, data, processes)


def mode_named(mode: str) -> Mode:
    """What a mode runs. Raises SpecError for an unknown one, naming the nearest."""
    if mode not in MODES:
        raise SpecError("mode", f"there is no mode {mode!r}", hint=nearest(mode, MODES))
    return MODES[mode]


def run_entries(
    file: Path,
    data: Path,
    *,
    side_by_side: int = 1,
    processes: int | None = None,
    again: bool = False,
    stop_on_failure: bool = False,
) -> int:
    """Run a schedule and tell what comes of each entry; the exit status, as of `run_mode`. Raises SpecError, RunError.

    processes: sessions at once of each entry; without it the processors are shared among the entries.
    """
    folder = schedule.state_folder(data, file)
    entries = schedule.with_state(schedule.read(file, list(MODES)), data, folder, again=again)
    if processes is None and side_by_side > 1:
        processes = max(1, (os.cpu_count() or 1) // side_by_side)

    def tell(entry: schedule.Entry) -> None:
        says = [entry.state + (f" in {entry.seconds:g} s" if entry.seconds else ""), entry.run, entry.log]
        print(f"{entry.title}: {', '.join(part for part in says if part)}", flush=True)

    for entry in entries:
        if entry.state == "finished":
            print(f"{entry.title}: was finished before")
    done = schedule.run_schedule(
        entries, data, folder, lambda entry: schedule.run_command(entry, data, processes),
        side_by_side=side_by_side, stop_on_failure=stop_on_failure, on_change=tell,
    )  # fmt: skip
    states = [entry.state for entry in done]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    if "failed" in states:
        return 1
    return 0 if set(states) == {"finished"} else INTERRUPTED


def dry_run(spec: Spec, mode: str, data: Path) -> None:
    """Print what a run would do, after making one copy of its environment and its algorithm: nothing is trained.

    Raises SpecError, LinkError, RunError when it could not run.
    """
    mode_named(mode)
    spec = dev(spec) if mode == "dev" else spec
    print(as_yaml({spec.name: spec.plain}), end="")
    for env in spec.envs:
        with closing(open_world(env, 1)) as world:
            if isinstance(world, Games):
                print(f"{env_label(asdict(env))}: a game of {len(world.seats)} seats")
                continue
            spaces = (world.single_observation_space, world.single_action_space)
            print(f"{env_label(asdict(env))}: observation space {spaces[0]}, action space {spaces[1]}")
            if len(spec.agents) == len(spec.envs) == 1:
                _, build = algorithms.load(spec.agents[0].algorithm)
                build(spec.agents[0].config, *spaces, spec.meta.seed)
    for seed in range(spec.meta.seed, spec.meta.seed + spec.meta.max_session):
        settings = session_settings(spec, seed)
        print(f"session {seed}: {settings.title}, {settings.max_env_steps:,} env steps")
    if isinstance(spec.meta.topology, Topology) and spec.meta.topology.address:
        ray_cluster.reach(spec.meta.topology.address)
        print(f"the Ray cluster at {spec.meta.topology.address} answers")
    if mode == "search":
        print(f"trials: {spec.meta.max_trial} at most, over {', '.join(key for key in spec.search if key != 'method')}")
    print(f"nothing was run; {mode} would write {data / spec.name}_TIME, fingerprint {spec.fingerprint}")


def newest_run(data: Path, name: str) -> Path:
    """The newest run of a spec. Raises RunError when there is none."""
    runs = [run.folder for run in list_runs(data) if run.spec == name and run.sessions]
    if not runs:
        raise RunError(f"{data} has no run of {name!r}", hint="train it first, or name its folder in --data")
    return runs[-1]


def has_screen() -> bool:
    """Whether windows can be opened here."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@contextmanager
def ending_like_ctrl_c() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, and so does SIGINT where a shell had it ignored, as for `longrein run &`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():  # a terminal tells them all; who sends SIGTERM tells one
            child.terminate()
        raise KeyboardInterrupt

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_metrics(path: Path) -> None:
    table = Table("metric", "first", "last", title=str(path), title_justify="left")
    for name, values in read_table(path).items():
        if values:
            table.add_row(name, f"{values[0]:.4g}", f"{values[-1]:.4g}")
    Console().print(table)


def enjoy(
    folder: Path,
    *,
    episodes: int = 5,
    url: str = "",
    render: bool = False,
    record: Path | None = None,
    noise: bool = False,
) -> list[float]:
    """Play what a run learned, and print each episode: folder is a run's, or one of its sessions'.

    url: play it there, rather than where it was trained. render: in a window. record: a folder for a video of each
    episode. noise: act as in training. Raises RunError for what is no run, CheckpointError, LinkError, SpecError.
    """
    if render and record is not None:
        raise SpecError("record", "an environment is shown or recorded, not both", hint="leave --render out")
    run = folder.parent if folder.name.startswith("session_") else folder
    name, plain = spec_of(run)
    spec = from_plain(name, plain)
    sessions = [folder] if folder != run else sessions_of(run)
    if not sessions:
        raise RunError(f"{run} has no session", hint="train it first")
    env = replace(spec.envs[0], id="", url=url) if url else spec.envs[0]
    if render or record is not None:
        env = replace(env, options={**env.options, "render_mode": "human" if render else "rgb_array"})
    with closing(open_envs(env, 1)) as opened:
        envs = opened if record is None else Filmed(opened)
        policy = load_policy(sessions[0], envs).policy
        generator = torch.Generator().manual_seed(spec.meta.seed)
        seeds = evaluation_seeds(spec.meta.seed, episodes)
        returns: list[float] = []
        for seed in seeds:
            ((_, length, total),) = evaluate(policy, envs, [seed], deterministic=not noise, generator=generator)
            returns.append(total)
            print(f"episode {len(returns)}: return {total:.1f}, {length} steps", flush=True)
            if isinstance(envs, Filmed) and record is not None:
                print(envs.save(record / f"episode_{len(returns)}.mp4"), flush=True)
    print(f"mean return {np.mean(returns):.1f} over {episodes} episodes of {sessions[0]}")
    return returns
