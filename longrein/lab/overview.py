"""Run folders at a glance: what each was asked, how far it came, how good it is, whether it runs. Reads, never writes.

finished     every session (of a search, every trial) that was asked for came to its end
running      its process is alive on this machine
elsewhere    it is unfinished, and its process is on another machine
failed       a session (of a search, a trial) died or failed
interrupted  none of these: it was ended before it was done, and can be taken up again
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from longrein.errors import RunError
from longrein.lab.processes import process_of
from longrein.lab.records import sessions_of

Status = Literal["finished", "running", "elsewhere", "failed", "interrupted"]
DONE = ("solved", "budget spent")
"""Statuses of a session that came to its end."""


@dataclass(frozen=True)
class Overview:
    """A run folder at a glance."""

    folder: Path
    kind: Literal["run", "search", "benchmark"]
    spec: str
    """The spec's or the benchmark's name; "" for the demo's run."""
    started: str
    """Date and time, with its zone; "" of a benchmark, which is started again and again."""
    status: Status
    asked: int
    """Sessions that it asks for; of a search, trials."""
    finished: int
    """How many of them came to their end."""
    env_steps: int
    """Env steps of the sessions with a result, together; 0 of searches and benchmarks, whose tables say more."""
    mean_return: float
    """Of the finished sessions' last training episodes; of a search, of its best trial; NaN without any."""
    fitness: dict[str, float] = field(default_factory=dict)
    """slm2018, and slm5's strength; of a search, what it maximises, of its best trial; empty before there is one."""

    @property
    def plain(self) -> dict[str, Any]:
        """What JSON can say of it."""
        mean = None if math.isnan(self.mean_return) else self.mean_return
        return {**asdict(self), "folder": str(self.folder), "mean_return": mean}


def overview(folder: Path) -> Overview:
    """A run, a search or a benchmark at a glance. Raises RunError for a folder that is none."""
    if (folder / "benchmark.json").is_file():
        return _benchmark(folder)
    about = _json(folder / "settings.json")
    settings = about.get("settings") if isinstance(about, dict) else None
    if not isinstance(settings, dict):
        raise RunError(f"{folder} is no run", hint="longrein runs lists what is there")
    whose = (str(settings.get("name", "")), str(about.get("started", "")))
    if (folder / "experiment.json").is_file():
        return _search(folder, *whose)
    asked = int(settings["spec"]["meta"]["max_session"]) if "spec" in settings else 1
    sessions = sessions_of(folder)
    results = [found for session in sessions if isinstance(found := _json(session / "result.json"), dict)]
    done = [result for result in results if result.get("status") in DONE]
    died = [session for session in sessions if (session / "failure.txt").exists()]
    failed = bool(died) or any(result.get("status") == "failed" for result in results)
    means = [float(result["training_mean"]) for result in done if result.get("training_mean") is not None]
    return Overview(
        folder, "run", *whose,
        status=_status(folder, complete=len(done) >= asked, failed=failed),
        asked=asked,
        finished=len(done),
        env_steps=sum(int(result.get("env_steps") or 0) for result in results),
        mean_return=sum(means) / len(means) if means else float("nan"),
        fitness=_fitness(folder),
    )  # fmt: skip


def overviews(data: Path) -> list[Overview]:
    """Everything of the kind in a folder, oldest first; what is no run is left out."""
    found = []
    marks = [*data.glob("*/settings.json"), *data.glob("*/benchmark.json")]
    for path in sorted(marks, key=lambda path: path.stat().st_mtime):
        try:
            found.append(overview(path.parent))
        except RunError:
            continue  # somebody else's settings.json
    return found


def _search(folder: Path, name: str, started: str) -> Overview:
    about = _json(folder / "experiment.json") or {}
    trials, best = about.get("trials", {}), about.get("best") or {}
    ended = sum(trials.get(status, 0) for status in ("finished", "stopped early"))
    failed = trials.get("failed", 0)
    asked = int(about.get("planned", 0))
    metric = about.get("method", {}).get("metric", "fitness")
    mean, fitness = best.get("mean_return"), best.get("fitness")
    return Overview(
        folder, "search", name, started,
        status=_status(folder, complete=ended + failed >= asked > 0, failed=failed > 0),
        asked=asked,
        finished=ended,
        env_steps=0,
        mean_return=float("nan") if mean is None else float(mean),
        fitness={} if fitness is None else {metric: float(fitness)},
    )  # fmt: skip


def _benchmark(folder: Path) -> Overview:
    about = _json(folder / "benchmark.json") or {}
    asked = len(about.get("entries", ())) * len(about.get("seeds", ()))
    finished = len(list(folder.glob("**/seed_*.json")))
    failed = any(folder.glob("**/seed_*.failed"))
    status = _status(folder, complete=finished >= asked > 0, failed=failed)
    return Overview(folder, "benchmark", str(about.get("name", "")), "", status, asked, finished, 0, float("nan"))


def run_named(data: Path, name: str | Path) -> Path:
    """The folder of a run, by its path or by its name below `data`. Raises RunError where there is none."""
    for run in (Path(name), data / name):
        if (run / "settings.json").is_file() or (run / "benchmark.json").is_file():
            return run
    there = [run.folder.name for run in overviews(data)]
    same = [one for one in there if one.startswith(str(name))]
    hint = (
        "did you mean " + " or ".join(same[-3:]) + "?" if same else f"longrein runs --data {data} lists what is there"
    )
    raise RunError(f"there is no run {str(name)!r}, here or in {data}", hint=hint)


def _status(run: Path, *, complete: bool, failed: bool) -> Status:
    process = process_of(run)
    state = process.state if process is not None else "ended"
    if state == "running":
        return "running"
    if complete:
        return "finished"
    if state == "elsewhere":
        return "elsewhere"
    return "failed" if failed else "interrupted"


def _fitness(run: Path) -> dict[str, float]:
    """The numbers of a trial's fitness that stand for the whole, from its trial.json."""
    trial = _json(run / "trial.json")
    whole = trial.get("fitness") if isinstance(trial, dict) else None
    found = {}
    for definition, part in (("slm2018", "fitness"), ("slm5", "strength")):
        parts = whole.get(definition) if isinstance(whole, dict) else None
        if isinstance(parts, dict) and isinstance(parts.get(part), int | float):
            found[definition if part == "fitness" else f"{definition}.{part}"] = float(parts[part])
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def show(runs: Sequence[Overview]) -> None:
    """Print runs as a table."""
    from rich.console import Console
    from rich.table import Column, Table

    definitions = sorted({name for run in runs for name in run.fitness})
    names = ("run", "kind", "status", "done", "env steps", "return", *definitions)
    right = {"env steps", "return", *definitions}
    columns = [Column(name, no_wrap=True, justify="right" if name in right else "left") for name in names]
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for run in runs:
        mean = "" if math.isnan(run.mean_return) else f"{run.mean_return:.1f}"
        fitness = [f"{run.fitness[name]:.3f}" if name in run.fitness else "" for name in definitions]
        done = f"{run.finished}/{run.asked}"
        steps = f"{run.env_steps:,}" if run.env_steps else ""
        table.add_row(run.folder.name, run.kind, run.status, done, steps, mean, *fitness)
    console = Console()
    # As wide as it is: what is cut off can be neither read nor copied.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
