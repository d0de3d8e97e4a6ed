"""The table: what each algorithm learns, beside what others published.

    make bench-table
    python benchmarks/table.py --only acrobot

Runs the benchmarks that anchors.yaml names, one seed a session; a session whose data file is under docs/benchmarks is
not run again, so it may be stopped at any time. Then writes docs/benchmarks.md from those files and anchors.yaml.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from longrein.lab import benchmark, benchmark_results, modes, report
from longrein.lab.benchmark_results import Row, number

HERE = Path(__file__).parent
ROOT = HERE.parent
DATA = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
SPECS = ROOT / "spec" / "benchmark"
ABOUT = """# What the algorithms learn

Every spec as it ships, from seeds that nothing was tuned on. `make bench-table` runs what is missing and writes this
page again from the data files in `docs/benchmarks`: a file a seed, with its settings' fingerprint, versions, returns by
env step and wall time. `benchmarks/tuning` has what was tried to find the settings, on seeds of its own.

- ours: mean over seeds, lowest to highest; of the last 100 training returns, or of evaluation episodes on seeds that
  training never saw.
- IQM: mean of the middle half of the seeds' last 100 training returns, with its 95 % bootstrap interval.
- to reach: the best that was published for the task, or better. Published numbers are at the same budget and metric
  unless a budget stands in brackets.
- SLM: SLM-Lab 5, mean of 100 training returns, 4 sessions. CRL: CleanRL, 3 seeds, 500,000 env steps. zoo:
  rl-baselines3-zoo, 1 run, evaluation. Tianshou: 10 seeds, evaluation.
- env steps/s: of one session beside another on two cores that had other work, environment included.
"""
"""What the page says before its tables."""


@contextmanager
def served(about: Mapping[str, Any]) -> Iterator[None]:
    """A server in a process of its own for the task's remote environment, where it has one."""
    if "serve" not in about:
        yield
        return
    line = [sys.executable, "-m", "longrein.cli", "serve", about["serve"], "--at", about["at"]]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            if not server.stdout.readline():
                raise SystemExit(f"{' '.join(line)} did not start")
            yield
        finally:
            server.terminate()


def run(name: str, about: Mapping[str, Any], processes: int) -> bool:
    """The missing sessions of one task; False when it was interrupted, or one died."""
    with served(about):
        wanted = benchmark.load(SPECS / f"{about.get('file', name)}.yaml", name)
        return modes.run_benchmark(wanted, DATA, about.get("processes", processes)) == 0


def section(name: str, about: Mapping[str, Any]) -> list[str]:
    """The table of one task, and its curves."""
    folder = DATA / f"{benchmark_results.slug(name)}_benchmark"
    lines = ["", f"## {about['title']}", "", *([about["note"], ""] if "note" in about else [])]
    if not (folder / "benchmark.json").exists():
        return [*lines, f"Not run yet: `python benchmarks/table.py --only {name}`."]
    found: dict[str, Row] = {}
    for row in benchmark_results.rows(benchmark_results.read(folder)):
        found |= {row.spec: row, f"{row.spec} in {row.env}": row}
    lines += [
        f"Compared by {'the last 100 training returns' if about['metric'] == 'last' else 'evaluation'}.", "",
        "| spec | seeds | ours | IQM [95 %] | to reach | published | env steps/s |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for label, anchor in about["rows"].items():
        lines.append(f"| {label} | {' | '.join(cells(found.get(label), about['metric'], anchor))} |")
    notes = [f"- {label}: {anchor['note']}" for label, anchor in about["rows"].items() if "note" in anchor]
    curves = f"![Curves of {about['title']}](benchmarks/{folder.name}/curves.png)"
    return [*lines, *([""] if notes else []), *notes, "", curves]


def cells(row: Row | None, metric: str, anchor: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table; one that has not been run says so."""
    reach, published = str(anchor.get("reach", "")), str(anchor.get("published", "none"))
    value = None if row is None else row.last if metric == "last" else row.evaluation
    if row is None or value is None:
        return "none yet", "", "", reach, published, ""
    spread = f" ({number(row.last_low)} to {number(row.last_high)})" if metric == "last" else ""
    said = f"{reach}: {'yes' if value >= anchor['reach'] else 'no'}" if reach else ""
    interval = f" [{number(row.iqm_low)}, {number(row.iqm_high)}]" if row.iqm_low is not None else ""
    speed = f"{row.steps_per_second:,.0f}" if row.steps_per_second else ""
    return f"{row.seeds}", number(value) + spread, number(row.iqm) + interval, said, published, speed


def main(
    only: Annotated[list[str] | None, typer.Option(help="Only these tasks.")] = None,
    draw: Annotated[bool, typer.Option(help="Draw and write from what is there, run nothing.")] = False,
    processes: Annotated[int, typer.Option(help="Sessions side by side.")] = 2,
) -> None:
    """Run what is missing, and write the page."""
    anchors: dict[str, Any] = yaml.safe_load((HERE / "anchors.yaml").read_text())
    for name in only or ():
        if name not in anchors:
            raise typer.BadParameter(f"{name} is none of {', '.join(anchors)}", param_hint="--only")
    whole = True
    if draw:
        for made in DATA.glob("*_benchmark"):
            report.write(made)
    else:
        for name in only or anchors:
            whole = run(name, anchors[name], processes)
            if not whole:
                print(f"{name}: not all of its sessions have ended; start this again to go on", file=sys.stderr)
                break
    PAGE.write_text("\n".join([ABOUT, *(line for name in anchors for line in section(name, anchors[name])), ""]))
    print(PAGE)
    raise typer.Exit(0 if whole else 1)


if __name__ == "__main__":
    typer.run(main)
