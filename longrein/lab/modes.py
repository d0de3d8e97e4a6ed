"""Run modes: what `longrein run SPEC_FILE NAME MODE` does, with its progress. Knows no process and no algorithm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from longrein.errors import SpecError
from longrein.lab.experiment import run_trial
from longrein.lab.session import Progress as SessionProgress
from longrein.lab.spec import Spec, nearest

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
