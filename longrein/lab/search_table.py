"""The trials of a search as a table in its folder, written and read. Knows no process, no Ray and no way of drawing.

{data}/{spec}_{time}/
  settings.json     the spec with its search block, as of every run
  experiment.json   what is searched and how, how far it is, and the best trial
  trials.csv        a line for each trial: what was drawn, fitness, and the numbers that it may be made of
  trial_N_{time}/   a run folder as `train` leaves it; again with a later time when the search was interrupted in it
  failures/         the traceback of each trial that died
  best.yaml         the best trial's spec, ready to train
  experiment.png    each searched setting against fitness and its parts
  ray/              Tune's own state, by which an interrupted search goes on
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from longrein.errors import RunError
from longrein.lab import records
from longrein.lab.search_space import METRICS, Drawn, Method, Space, encoded
from longrein.lab.spec import Source, Spec, as_yaml, overridden, resolve

Status = Literal["finished", "stopped early", "failed", "interrupted", "running", "waiting"]
ENDED = ("finished", "stopped early", "failed")
FIRST = ("trial", "status", "env_steps")
THEN = ("fitness", "mean_return", "evaluation")
LAST = ("run",)


@dataclass(frozen=True)
class Row:
    """One trial."""

    number: int
    status: Status
    env_steps: int
    """Of a session, on average."""
    drawn: Mapping[str, Any]
    """Setting by dotted key."""
    fitness: float | None = None
    """The number that is maximised: of a finished trial the whole one, else as far as it came."""
    mean_return: float | None = None
    """Of the last training episodes."""
    evaluation: float | None = None
    """Mean return of the evaluation episodes."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """The numbers of the trial's fitness; empty before its end."""
    run: str = ""
    """Name of its folder; empty before its end."""


@dataclass(frozen=True)
class Experiment:
    """A search, as its folder has it."""

    name: str
    """The spec's."""
    title: str
    """Algorithm and environment."""
    space: Space
    planned: int
    """Trials."""
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        """The finished trial with the highest fitness; None without any."""
        finished = [row for row in self.rows if row.status == "finished" and row.fitness is not None]
        return max(finished, key=lambda row: row.fitness or 0.0, default=None)

    @property
    def interrupted(self) -> bool:
        """Whether there are trials to come."""
        return sum(row.status in ENDED for row in self.rows) < self.planned

    @property
    def parts(self) -> tuple[str, ...]:
        """The numbers that any of the trials has, in the order of METRICS."""
        return tuple(name for name in METRICS if any(name in row.parts for row in self.rows))


def write(folder: Path, spec: Spec, found: Experiment) -> None:
    """Write experiment.json, trials.csv and, when a trial has finished, best.yaml: each whole, in its place at once."""
    best = found.best
    records.write_json(
        folder / "experiment.json",
        {
            "name": found.name, "title": found.title, "planned": found.planned, "method": asdict(found.space.method),
            "drawn": {key: drawn.plain for key, drawn in found.space.drawn.items()},
            "trials": {status: count for status, count in _counts(found.rows).items() if count},
            "best": None if best is None else asdict(best),
        },
    )  # fmt: skip
    records.write_text(folder / "trials.csv", as_csv(found))
    if best is not None:
        records.write_text(folder / "best.yaml", best_yaml(folder, spec, found, best))


def as_csv(found: Experiment) -> str:
    """The table: numbers bare, all else of what was drawn as JSON; what is not known is empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    keys, parts = list(found.space.drawn), found.parts
    writer.writerow([*FIRST, *keys, *THEN, *parts, *LAST])
    for row in found.rows:
        drawn = [encoded(row.drawn[key]) for key in keys]
        then = [row.fitness, row.mean_return, row.evaluation, *(row.parts.get(name) for name in parts)]
        writer.writerow(
            [row.number, row.status, row.env_steps, *drawn, *("" if v is None else v for v in then), row.run]
        )
    return text.getvalue()


def best_yaml(folder: Path, spec: Spec, found: Experiment, best: Row) -> str:
    """The best trial's spec as a file of one spec, with a line on where it is from."""
    plain = {name: part for name, part in spec.plain.items() if name != "search"}
    tried = resolve(overridden(Source(spec.name, spec.name, plain, {}), best.drawn)).plain
    tried.pop("search")
    metric = found.space.method.metric
    says = (
        f"# Trial {best.number} of {folder.name}: {metric} {best.fitness:.6g}, the best of {len(found.rows)} trials.\n"
    )
    return says + as_yaml({spec.name: tried})


def read(folder: Path) -> Experiment:
    """A search's folder as it is now. Raises RunError when it is none."""
    about = records.read_json(folder / "experiment.json")
    if not about:
        raise RunError(f"{folder} is no search", hint="longrein run SPEC_FILE NAME search makes one")
    try:
        drawn = {key: Drawn(kind, tuple(values)) for key, one in about["drawn"].items() for kind, values in one.items()}
        space = Space(drawn, Method(**about["method"]))
        rows = tuple(_rows(folder / "trials.csv", list(drawn)))
        return Experiment(about["name"], about["title"], space, int(about["planned"]), rows)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{folder} cannot be read: {error!r}", hint="experiment.json and trials.csv belong together"
        ) from None


def _rows(path: Path, keys: Sequence[str]) -> list[Row]:
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            status: Any = line["status"]
            then = {name: float(line[name]) if line[name] else None for name in THEN}
            parts = {name: float(line[name]) for name in METRICS if line.get(name)}
            drawn = {key: json.loads(line[key]) for key in keys}
            number, steps = int(line["trial"]), int(line["env_steps"])
            rows.append(Row(number, status, steps, drawn, **then, parts=parts, run=line["run"]))
    return rows


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    statuses = [row.status for row in rows]
    return {status: statuses.count(status) for status in dict.fromkeys(statuses)}
