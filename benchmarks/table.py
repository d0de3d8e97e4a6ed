"""The table: what each algorithm learns, beside what others published.

    make bench-table
    python benchmarks/table.py --only acrobot

Runs the benchmarks of spec/benchmark/table.yaml, one seed a session; a session whose data file is under docs/benchmarks
is not run again, so it may be stopped at any time. Then writes docs/benchmarks.md from those files and anchors.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from longrein.lab import benchmark, benchmark_results
from longrein.lab.benchmark_results import Row, number
from longrein.lab.session import Progress as SessionProgress

HERE = Path(__file__).parent
ROOT = HERE.parent
DATA = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
SPECS = ROOT / "spec" / "benchmark" / "table.yaml"
ABOUT = """# What the algorithms learn

Every spec as it ships, from seeds that nothing was tuned on. `make bench-table` runs what is missing and writes this
page again from the data files in `docs/benchmarks`: a file a seed, with its settings' fingerprint, versions, returns by
env step and wall time. `benchmarks/tuning` has what was tried to find the settings, on seeds of its own.

- ours: mean over seeds, lowest to highest; of the last 100 training returns, or of 20 evaluation episodes.
- IQM: mean of the middle half of the seeds' last 100 training returns, with its 95 % bootstrap interval.
- to reach: the best that was published for the task, or better. Published numbers are at the same budget and metric
  unless a budget stands in brackets; `benchmarks/anchors.yaml` has their sources.
- env steps/s: of one session beside another on two cores, environment included.
"""


def run(name: str, processes: int) -> bool:
    """The missing sessions of one task; False when it was interrupted."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[says]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(label: str, at: SessionProgress) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=None, says="")
            progress.update(tasks[label], says=f"{at.env_steps:,} env steps, mean return {at.mean_return:.1f}")

        return benchmark.run(benchmark.load(SPECS, name), DATA, processes=processes, on_progress=tell).missing == 0


def section(name: str, anchors: Mapping[str, Any]) -> list[str]:
    """The table of one task."""
    about = anchors[name]
    read = benchmark_results.read(DATA / f"{benchmark_results.slug(name)}_benchmark")
    found = {row.spec: row for row in benchmark_results.rows(read)}
    lines = [
        "", f"## {about['title']}", "",
        f"Compared by {'the last 100 training returns' if about['metric'] == 'last' else 'evaluation'}.", "",
        "| spec | seeds | ours | IQM [95 %] | to reach | published | env steps/s |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for spec, anchor in about["rows"].items():
        lines.append(f"| `{spec}` | {' | '.join(cells(found.get(spec), about['metric'], anchor))} |")
    lines += ["", f"![Curves of {about['title']}](benchmarks/{read.folder.name}/curves.png)"]
    return lines


def cells(row: Row | None, metric: str, anchor: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table; one that has not been run says so."""
    reach, published = f"{anchor['reach']}", str(anchor["published"])
    if row is None or not row.seeds or row.last is None:
        return "none yet", "", "", reach, published, ""
    value = row.last if metric == "last" else row.evaluation
    spread = f" ({number(row.last_low)} to {number(row.last_high)})" if metric == "last" else ""
    said = "yes" if value is not None and value >= anchor["reach"] else "no"
    interval = f" [{number(row.iqm_low)}, {number(row.iqm_high)}]" if row.iqm_low is not None else ""
    speed = f"{row.steps_per_second:,.0f}" if row.steps_per_second else ""
    return (
        f"{row.seeds}", f"{number(value)}{spread}", number(row.iqm) + interval, f"{reach}: {said}", published, speed,
    )  # fmt: skip


def main(
    only: Annotated[list[str] | None, typer.Option(help="Only these tasks.")] = None,
    draw: Annotated[bool, typer.Option(help="Write the page alone, run nothing.")] = False,
    processes: Annotated[int, typer.Option(help="Sessions side by side.")] = 2,
) -> None:
    """Run what is missing, and write the page."""
    anchors: dict[str, Any] = yaml.safe_load((HERE / "anchors.yaml").read_text())
    if not draw:
        for name in only or anchors:
            if not run(name, processes):
                break
    lines = [ABOUT]
    for name in anchors:
        if (DATA / f"{benchmark_results.slug(name)}_benchmark" / "benchmark.json").exists():
            lines += section(name, anchors)
    PAGE.write_text("\n".join([*lines, ""]))
    print(PAGE)


if __name__ == "__main__":
    typer.run(main)
