"""Run modes: what `longrein run SPEC_FILE NAME MODE` does, with its progress. Knows no process and no algorithm."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from longrein.errors import RunError, SpecError
from longrein.lab.evaluation import evaluate
from longrein.lab.experiment import open_envs, run_trial
from longrein.lab.records import list_runs, sessions_of, spec_of
from longrein.lab.session import Progress as SessionProgress
from longrein.lab.session import evaluation_seeds, load_policy
from longrein.lab.spec import Spec, from_plain, nearest

DEV_ENV_STEPS = 2_000


def dev(spec: Spec) -> Spec:
    """The spec cut to one short session."""
    meta = replace(spec.meta, env_steps=min(spec.meta.env_steps, DEV_ENV_STEPS), max_session=1, max_trial=1)
    return replace(spec, meta=meta)


MODES = {"train": lambda spec: spec, "dev": dev}


def run_mode(spec: Spec, mode: str, data: Path, processes: int | None = None) -> int:
    """Run a spec, show how far it is and what came of it; the exit status. Raises SpecError for an unknown mode."""
    if mode not in MODES:
        raise SpecError("mode", f"there is no mode {mode!r}", hint=nearest(mode, MODES))
    spec = MODES[mode](spec)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[says]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[int, TaskID] = {}

        def tell(seed: int, at: SessionProgress) -> None:
            if seed not in tasks:
                tasks[seed] = progress.add_task(f"session {seed}", total=spec.meta.env_steps, says="")
            says = f"{at.env_steps:,} env steps, mean return {at.mean_return:.1f}"
            progress.update(tasks[seed], completed=at.env_steps, says=says)

        trial = run_trial(spec, data, processes=processes, on_progress=tell)
    for result in trial.sessions:
        if result is not None:
            evaluation = f"{np.mean(result.evaluation):.1f}" if result.evaluation else "none"
            print(f"{result.folder}: {result.status}, {result.env_steps:,} env steps in {result.seconds:.0f} s, "
                  f"mean return {result.training_mean:.1f}, evaluation {evaluation}")  # fmt: skip
    for seed, text in trial.failures.items():
        console.print(f"session {seed} died:\n{text}", style="red", markup=False)
    return 1 if trial.failures else 0


def enjoy(folder: Path, *, episodes: int = 5, url: str = "", render: bool = False, noise: bool = False) -> list[float]:
    """Play what a run learned, and print each episode: folder is a run's, or one of its sessions'.

    url: play it there, rather than where it was trained. render: in a window. noise: act as in training.
    Raises RunError for what is no run, CheckpointError, LinkError.
    """
    run = folder if (folder / "settings.json").exists() else folder.parent
    name, plain = spec_of(run)
    spec = from_plain(name, plain)
    sessions = [folder] if folder != run else sessions_of(run)
    if not sessions:
        raise RunError(f"{run} has no session", hint="train it first")
    env = replace(spec.envs[0], id="", url=url) if url else spec.envs[0]
    if render:
        env = replace(env, options={**env.options, "render_mode": "human"})
    with closing(open_envs(env, 1)) as envs:
        policy = load_policy(sessions[0], envs).policy
        generator = torch.Generator().manual_seed(spec.meta.seed)
        seeds = evaluation_seeds(spec.meta.seed, episodes)
        returns: list[float] = []
        for seed in seeds:
            ((_, length, total),) = evaluate(policy, envs, [seed], deterministic=not noise, generator=generator)
            print(f"episode {len(returns) + 1}: return {total:.1f}, {length} steps", flush=True)
            returns.append(total)
    print(f"mean return {np.mean(returns):.1f} over {episodes} episodes of {sessions[0]}")
    return returns


def show_runs(data: Path) -> None:
    """Print the runs below a folder."""
    table = Table("run", "spec", "started", "sessions", "mean return")
    for run in list_runs(data):
        done = f"{run.finished} of {run.sessions}"
        table.add_row(run.folder.name, run.spec or "demo", run.started, done, f"{run.mean_return:.1f}")
    Console().print(table)
