"""What each algorithm learns on CartPole-v1: 200,000 env steps, four seeds, the moving average of 100 training returns.

`python benchmarks/learning.py` runs every `NAME_cartpole` of `spec/`, one session a processor, and writes
`docs/benchmarks.md` with its picture. Sessions that are in `learning_results.json` already are not run again: stop it
with Ctrl-C and start it again as you like. Nothing here is tuned on: seeds 0 to 3 are the settings' own training seeds,
and the evaluation's seeds are apart from them.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from longrein.lab import spec as specs
from longrein.lab.experiment import run_trial
from longrein.lab.records import read_table

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "learning_results.json"
TARGET = 475.0
WINDOW = 100
POINTS = 200  # of a curve


def cartpole_specs() -> list[tuple[Path, str]]:
    """Every spec of CartPole-v1 that ships."""
    found = []
    for path in sorted((ROOT / "spec").glob("*.yaml")):
        found += [(path, name) for name in specs.read(path) if name.endswith("_cartpole")]
    return found


def curve(folder: Path, env_steps: int) -> tuple[list[float], list[float]]:
    """The moving average of WINDOW training returns over env steps: at most POINTS points."""
    table = read_table(folder / "episodes.csv")
    returns, steps = np.asarray(table["return"]), np.asarray(table["env_steps"])
    if len(returns) < WINDOW:
        return [], []
    sums = np.cumsum(np.insert(returns, 0, 0.0))
    mean = (sums[WINDOW:] - sums[:-WINDOW]) / WINDOW
    at = np.linspace(0, len(mean) - 1, min(POINTS, len(mean))).astype(int)
    return steps[WINDOW - 1 :][at].tolist(), mean[at].round(2).tolist()


def run(path: Path, name: str, seeds: list[int], env_steps: int, tell: Any) -> dict[str, dict[str, Any]]:
    """The sessions of one spec that are not there yet."""
    spec = specs.load(path, name, {"meta.env_steps": env_steps, "meta.target": None})
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    key = f"{name} {spec.fingerprint}"
    missing = [seed for seed in seeds if str(seed) not in known.get(key, {})]
    while missing:
        batch, missing = missing[:2], missing[2:]
        part = replace(spec, meta=replace(spec.meta, seed=batch[0], max_session=len(batch)))
        with tempfile.TemporaryDirectory() as data:
            trial = run_trial(part, Path(data), on_progress=tell)
            for seed, result in zip(batch, trial.sessions, strict=True):
                if result is None or result.status == "interrupted":
                    raise SystemExit(f"{name}, seed {seed}: {trial.failures.get(seed, 'interrupted')}")
                steps, means = curve(result.folder, env_steps)
                reached = next((s for s, m in zip(steps, means, strict=True) if m >= TARGET), None)
                known.setdefault(key, {})[str(seed)] = {
                    "last": means[-1] if means else None, "best": max(means, default=None), "reached": reached,
                    "evaluation": float(np.mean(result.evaluation)), "seconds": round(result.seconds, 1),
                    "env_steps": result.env_steps, "curve": [steps, means],
                }  # fmt: skip
        RESULTS.write_text(json.dumps(known))
    return dict(known.get(key, {}))


def write_page(rows: dict[str, dict[str, dict[str, Any]]], env_steps: int) -> None:
    """docs/benchmarks.md, and its picture."""
    draw(rows, ROOT / "docs" / "images" / "cartpole.png", env_steps)
    lines = [
        "# What the algorithms learn",
        "",
        f"CartPole-v1, {env_steps:,} env steps, seeds 0 to 3, every spec as it ships.",
        "",
        "| column | says |",
        "|---|---|",
        "| last | mean of the last 100 training returns when the budget is spent: over seeds, lowest to highest |",
        "| best | the highest such mean on the way |",
        "| solved | seeds whose mean reached 475, and the median env steps at which they did |",
        "| evaluation | mean of 20 episodes without noise, on seeds that training never saw |",
        "| env steps/s | of one process beside another on two cores, environment included |",
        "",
        "```",
        ".venv/bin/python benchmarks/learning.py",
        "```",
        "",
        "| spec | last | best | solved | evaluation | env steps/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, seeds in sorted(rows.items()):
        runs = list(seeds.values())
        reached = sorted(run["reached"] for run in runs if run["reached"] is not None)
        solved = f"{len(reached)} of {len(runs)}" + (f", {int(np.median(reached)):,}" if reached else "")
        speed = np.median([run["env_steps"] / run["seconds"] for run in runs])
        lines.append(
            f"| `{name}` | {_spread(runs, 'last')} | {_spread(runs, 'best')} | {solved} | "
            f"{np.mean([run['evaluation'] for run in runs]):.0f} | {speed:,.0f} |"
        )
    lines += [
        "",
        "![Moving average of 100 training returns over env steps, one panel a spec](images/cartpole.png)",
        "",
        f"Made on {time.strftime('%Y-%m-%d')}; `benchmarks/learning_results.json` has the curves.",
        "",
    ]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(lines))


def _spread(runs: list[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs if run[name] is not None]
    return f"{np.mean(values):.0f} ({min(values):.0f} to {max(values):.0f})" if values else "none"


def draw(rows: dict[str, dict[str, dict[str, Any]]], path: Path, env_steps: int) -> None:
    """A panel for each spec, a line for each seed."""
    from matplotlib.figure import Figure

    columns = 4
    height = -(-len(rows) // columns)
    figure = Figure((3.2 * columns, 2.4 * height), layout="constrained")
    for index, (name, seeds) in enumerate(sorted(rows.items())):
        panel = figure.add_subplot(height, columns, index + 1)
        for run in seeds.values():
            panel.plot(*run["curve"], linewidth=1)
        panel.axhline(TARGET, color="grey", linewidth=0.5, linestyle="--")
        panel.set(title=name, ylim=(0, 510), xlim=(0, env_steps))
        panel.ticklabel_format(axis="x", style="sci", scilimits=(3, 3))
    figure.savefig(path, dpi=80)


def main(
    only: Annotated[list[str] | None, typer.Option(help="Only these specs.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.")] = 4,
    env_steps: Annotated[int, typer.Option(help="Env steps of each session.")] = 200_000,
) -> None:
    """Run what is missing, and write the page."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for path, name in cartpole_specs():
            if only and name not in only:
                continue
            task = progress.add_task(name, total=env_steps)
            rows[name] = run(
                path, name, list(range(seeds)), env_steps,
                lambda seed, at, task=task: progress.update(task, completed=at.env_steps),
            )  # fmt: skip
            progress.update(task, completed=env_steps)
            print(
                name,
                {seed: (run["last"], run["reached"], run["seconds"]) for seed, run in rows[name].items()},
                flush=True,
            )
    write_page(rows, env_steps)


if __name__ == "__main__":
    typer.run(main)
