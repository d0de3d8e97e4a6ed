"""What a benchmark found, made of its data files: rows of a table, curves, aggregates. Knows no process.

{data}/{name}_benchmark/
  benchmark.json          what was asked for: specs, environments, seeds; a fingerprint of each entry
  baseline.json           what a random policy gets in each environment
  results/{spec}/{environment}_{fingerprint}/
    seed_{seed}.json      one session: fingerprint, versions, wall time, evaluation, training returns by env step
    seed_{seed}.failed    the traceback of one that died
  runs/                   run folders of sessions that are running
  table.md, table.csv, curves.png, aggregate.png, report.html
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrein.errors import RunError
from longrein.lab import baseline, curves, fitness, records, trial_fitness
from longrein.lab.curves import Band, Line


@dataclass(frozen=True)
class Entry:
    """One spec in one environment."""

    spec: str
    env: str
    fingerprint: str
    """Of the resolved spec, whatever its seed and its number of sessions."""
    env_steps: int
    target: float | None
    """The mean training return that counts as solved, where the spec says."""
    window: int
    plain: dict[str, Any]
    """The resolved spec."""

    @property
    def label(self) -> str:
        """How a reader calls it."""
        return f"{self.spec} in {self.env}"

    def folder(self, benchmark: Path) -> Path:
        """Where its results are."""
        return benchmark / "results" / slug(self.spec) / f"{slug(self.env)}_{self.fingerprint}"


@dataclass(frozen=True)
class Panel:
    """The curves of one environment."""

    env: str
    bands: tuple[Band, ...]
    """IQM over seeds of the moving mean of training returns, with its 95 % interval; a band for each spec."""
    solved: float | None
    window: int


@dataclass(frozen=True)
class Aggregate:
    """One spec over all environments and seeds."""

    spec: str
    iqm: float
    """Of its scores: 0 is a random policy, 1 is solved."""
    interval: tuple[float, float] | None
    """Stratified bootstrap, 95 %; None with one seed."""


@dataclass(frozen=True)
class Row:
    """One line of the table; returns are means of the last `window` training returns."""

    spec: str
    env: str
    seeds: int
    """That are there."""
    asked: int
    failed: int
    last: float | None
    last_low: float | None
    last_high: float | None
    best: float | None
    solved: int
    steps_to_solved: float | None
    """Median over the seeds that got there."""
    evaluation: float | None
    iqm: float | None
    """Over seeds, of `last`."""
    iqm_low: float | None
    iqm_high: float | None
    steps_per_second: float | None
    """Median over seeds."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's folder, read."""

    folder: Path
    name: str
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    results: dict[tuple[str, str], dict[int, dict[str, Any]]]
    """By spec and environment, then by seed."""
    failures: dict[tuple[str, str, int], str]
    baselines: dict[str, baseline.Baseline]
    about: dict[str, Any]
    """benchmark.json as it is."""

    def solved_at(self, entry: Entry) -> float | None:
        """The return that counts as solved: the spec's target, or what is known of the environment."""
        if entry.target is not None:
            return entry.target
        standard = self._standard(entry)
        return standard.solved if standard is not None else None

    def _standard(self, entry: Entry) -> fitness.Standard | None:
        random = self.baselines.get(entry.env)
        return trial_fitness.standard_of(entry.env, entry.target, random.mean if random else None, entry.env_steps)

    def lines(self, entry: Entry) -> list[Line]:
        """The moving mean of training returns of each seed that finished an episode."""
        found = []
        for seed, result in sorted(self.results[entry.spec, entry.env].items()):
            steps, returns = (np.asarray(result["episodes"][name], np.float64) for name in ("env_steps", "return"))
            if len(returns):
                found.append(Line(f"seed {seed}", steps, curves.moving_mean(returns, entry.window)))
        return found


def read(folder: Path) -> Benchmark:
    """A benchmark's folder. Raises RunError for what is none."""
    about = records.read_json(folder / "benchmark.json")
    if not about:
        raise RunError(f"{folder} is no benchmark", hint="longrein run FILE NAME benchmark makes one")
    entries = tuple(Entry(**values) for values in about["entries"])
    seeds = tuple(about["seeds"])
    results: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    failures = {}
    for entry in entries:
        place = entry.folder(folder)
        found = {seed: records.read_json(place / f"seed_{seed}.json") for seed in seeds}
        results[entry.spec, entry.env] = {seed: result for seed, result in found.items() if result}
        for seed in seeds:
            if not found[seed] and (place / f"seed_{seed}.failed").exists():
                failures[entry.spec, entry.env, seed] = (place / f"seed_{seed}.failed").read_text()
    return Benchmark(folder, str(about["name"]), seeds, entries, results, failures, baseline.kept(folder), about)


def rows(benchmark: Benchmark) -> list[Row]:
    """The table, in the order of the entries; an entry without any result has a row that says so."""
    return [_row(benchmark, entry) for entry in benchmark.entries]


def _row(benchmark: Benchmark, entry: Entry) -> Row:
    results = benchmark.results[entry.spec, entry.env]
    failed = sum(key[:2] == (entry.spec, entry.env) for key in benchmark.failures)
    lines = benchmark.lines(entry)
    lasts = [float(line.values[-1]) for line in lines]
    bests = [float(line.values[min(entry.window, len(line.values)) - 1 :].max()) for line in lines]
    solved = benchmark.solved_at(entry)
    reached = []
    for result in results.values():
        episodes = result["episodes"]
        if solved is not None:
            steps = fitness.steps_to(episodes["return"], episodes["env_steps"], solved, entry.window)
            reached += [steps] if steps is not None else []
    evaluations = [float(np.mean(result["evaluation"])) for result in results.values() if result["evaluation"]]
    speeds = [result["env_steps"] / result["seconds"] for result in results.values() if result["seconds"]]
    interval = fitness.iqm_interval([lasts]) if lasts else None
    return Row(
        entry.spec, entry.env, len(results), len(benchmark.seeds), failed,
        float(np.mean(lasts)) if lasts else None, min(lasts, default=None), max(lasts, default=None),
        float(np.mean(bests)) if bests else None, len(reached), float(np.median(reached)) if reached else None,
        float(np.mean(evaluations)) if evaluations else None, fitness.iqm(lasts) if lasts else None,
        interval[0] if interval else None, interval[1] if interval else None,
        float(np.median(speeds)) if speeds else None,
    )  # fmt: skip


def panels(benchmark: Benchmark) -> list[Panel]:
    """The curves, a panel for each environment; specs and environments without a result are left out."""
    found: dict[str, list[tuple[Entry, Band]]] = {}
    for entry in benchmark.entries:
        lines = benchmark.lines(entry)
        if lines:
            grid = curves.grid_of(lines)
            middle, low, high = fitness.iqm_band(curves.on_grid(lines, grid))
            band = Band(entry.spec, grid, middle, low, high, len(lines))
            found.setdefault(entry.env, []).append((entry, band))
    return [
        Panel(env, tuple(band for _, band in pairs), benchmark.solved_at(pairs[0][0]), pairs[0][0].window)
        for env, pairs in found.items()
    ]


def aggregates(benchmark: Benchmark) -> list[Aggregate]:
    """Each spec over all of its environments, the best first. Environments without a baseline are left out."""
    scores: dict[str, list[list[float]]] = {}
    tops = _tops(benchmark)
    for entry in benchmark.entries:
        lines, random = benchmark.lines(entry), benchmark.baselines.get(entry.env)
        if lines and random is not None and tops[entry.env] > random.mean:
            reach = tops[entry.env] - random.mean
            scores.setdefault(entry.spec, []).append([(line.values[-1] - random.mean) / reach for line in lines])
    found = [
        Aggregate(spec, fitness.iqm(np.concatenate(tasks)), fitness.iqm_interval(tasks))
        for spec, tasks in scores.items()
    ]
    return sorted(found, key=lambda one: -one.iqm)


def _tops(benchmark: Benchmark) -> dict[str, float]:
    """What a score of 1 stands for: solved, or, where nobody says what that is, the best last mean of any seed."""
    tops: dict[str, float] = {}
    for entry in benchmark.entries:
        solved = benchmark.solved_at(entry)
        lasts = [float(line.values[-1]) for line in benchmark.lines(entry)]
        tops[entry.env] = max([tops.get(entry.env, -np.inf), *(lasts if solved is None else [solved])])
    return tops


# ------------------------------------------------------------------------------------------------------------- as text

COLUMNS = ("spec", "environment", "seeds", "last", "best", "solved", "evaluation", "IQM [95 %]", "env steps/s")


def cells(row: Row) -> tuple[str, ...]:
    """A row as a reader wants it, in the order of COLUMNS."""
    seeds = f"{row.seeds} of {row.asked}" + (f", {row.failed} died" if row.failed else "")
    solved = f"{row.solved} of {row.seeds}" + (f", {row.steps_to_solved:,.0f}" if row.steps_to_solved else "")
    spread = (
        f"{number(row.last)} ({number(row.last_low)} to {number(row.last_high)})" if row.last is not None else "none"
    )
    interval = f" [{number(row.iqm_low)}, {number(row.iqm_high)}]" if row.iqm_low is not None else ""
    speed = f"{row.steps_per_second:,.0f}" if row.steps_per_second else "none"
    return (
        row.spec, row.env, seeds, spread, number(row.best), solved, number(row.evaluation), number(row.iqm) + interval,
        speed,
    )  # fmt: skip


def number(value: float | None) -> str:
    """Four digits or so of a number, all of a whole one; "none" where there is none."""
    if value is None or not np.isfinite(value):
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def as_markdown(benchmark: Benchmark) -> str:
    """The table, with what its columns say."""
    found = rows(benchmark)
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells(row))} |" for row in found]
    best = aggregates(benchmark)
    if best:
        lines += ["", "| spec | score over all environments, IQM [95 %] |", "|---|---|"]
        lines += [f"| {one.spec.replace('|', '&#124;')} | {score(one)} |" for one in best]
    return "\n".join([f"# {benchmark.name}", "", *lines, "", *EXPLAINED, ""])


def score(one: Aggregate) -> str:
    """An aggregate as a reader wants it."""
    interval = f" [{one.interval[0]:z.3f}, {one.interval[1]:z.3f}]" if one.interval else ""
    return f"{one.iqm:z.3f}{interval}"


EXPLAINED = (
    "- last: mean of the last training returns (as many as the spec's window, 100 by default): mean over seeds, lowest "
    "to highest.",
    "- best: the highest such mean on the way, mean over seeds.",
    "- solved: seeds whose mean reached the target, and the median env steps at which they did.",
    "- evaluation: episodes without noise, on seeds that training never saw.",
    "- IQM: mean of the middle half of the seeds' last means, with its bootstrap interval.",
    "- score: (last - random) / (solved - random). Random is measured; the best seed stands for solved where nobody "
    "says what that is.",
    "- env steps/s: of one session while others ran beside it, environment included.",
)


def as_csv(benchmark: Benchmark) -> str:
    """The table as numbers; an empty cell where there is none."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row.__dataclass_fields__)
    writer.writerows(["" if value is None else value for value in vars(row).values()] for row in rows(benchmark))
    return text.getvalue()


def slug(name: str) -> str:
    """A name that may be a file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "x"


def write_tables(folder: Path) -> Sequence[Path]:
    """Write table.md and table.csv of a benchmark's folder, from its data files."""
    benchmark = read(folder)
    paths = (folder / "table.md", folder / "table.csv")
    for path, text in zip(paths, (as_markdown(benchmark), as_csv(benchmark)), strict=True):
        records.write_text(path, text)
    return paths
