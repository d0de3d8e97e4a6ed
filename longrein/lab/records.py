"""The run folder: the only code that knows its layout. Complete lines and whole files, readable while the run goes on.

{data}/{name}_{time}/
  settings.json           what was asked for, resolved; versions; fingerprint
  session_{seed}/
    episodes.csv          a line for each finished training episode
    metrics.csv           a line for each update
    evaluation.csv        a line for each evaluation episode
    tensorboard/          the same metrics as events
    checkpoint.pt         the newest weights, and all that learning goes on from
    graph.png             the session's graph
    result.json           what came of it; written last, so that a folder without it is unfinished
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from longrein.errors import RunError
from longrein.lab.actor import Episode

EPISODE_COLUMNS = ("env_steps", "seconds", "env", "length", "return", "truncated")
EVALUATION_COLUMNS = ("seed", "length", "return")
PACKAGES = ("gymnasium", "numpy", "torch")


def create_run(data: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """A new run folder with its settings.json; two runs never share one. Raises RunError when it cannot be made."""
    stamp = time.strftime("%Y-%m-%d_%H%M%S")
    for number in range(1, 1000):
        run = data / (f"{name}_{stamp}" if number == 1 else f"{name}_{stamp}-{number}")
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"{run}: cannot be made: {error}", hint="give another folder for run data") from error
        write_json(run / "settings.json", described(settings))
        return run
    raise RunError(f"{data}: a thousand runs of {name} in one second", hint="give each run a name of its own")


def described(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with their fingerprint, and the versions that ran them."""
    plain = {key: as_plain(value) for key, value in settings.items()}
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    versions = {name: _version(name) for name in ("longrein", *PACKAGES)}
    return {
        "settings": plain,
        "fingerprint": hashlib.sha256(canonical.encode()).hexdigest()[:16],
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def as_plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as what JSON can say. NaN and infinities become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return as_plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): as_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    if callable(value):
        return f"{value.__module__}:{value.__qualname__}"  # as torsos.named finds it again
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a whole file, then put it in its place: a reader sees the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(as_plain(value), indent=2) + "\n")
    beside.replace(path)


class Table:
    """A CSV file that grows by whole lines: each `append` is one write."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self._file = path.open("a", newline="")
        if path.stat().st_size == 0:
            self._write([self.columns])

    def append(self, rows: Iterable[Sequence[object]]) -> None:
        """Add rows, each with a value for every column. Raises ValueError for a row of another length."""
        rows = list(rows)
        for row in rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row: expected {len(self.columns)} values ({', '.join(self.columns)}), got {row!r}")
        if rows:
            self._write(rows)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _write(self, rows: Iterable[Sequence[object]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._file.write(text.getvalue())
        self._file.flush()


@dataclass(frozen=True)
class RunSummary:
    """A run folder at a glance."""

    folder: Path
    spec: str
    """The spec's name; "" for the demo's run."""
    started: str
    sessions: int
    finished: int
    """Sessions with a result."""
    mean_return: float
    """Of the finished sessions' last training episodes; NaN without any."""


def spec_of(run: Path) -> tuple[str, dict[str, Any]]:
    """The name and the plain values of the spec that a run was made by. Raises RunError for what is no such folder."""
    try:
        settings = json.loads((run / "settings.json").read_text())["settings"]
        return str(settings["name"]), dict(settings["spec"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run} is no run of a spec: {error!r}", hint="longrein runs lists what is there") from None


def sessions_of(run: Path) -> list[Path]:
    """The session folders of a run, by seed."""
    return sorted(run.glob("session_*"), key=lambda folder: int(folder.name.partition("_")[2]))


def list_runs(data: Path) -> list[RunSummary]:
    """Every run below a folder, oldest first; what is no run is left out."""
    found = []
    for path in sorted(data.glob("*/settings.json"), key=lambda path: path.stat().st_mtime):
        try:
            about = json.loads(path.read_text())
        except ValueError:
            continue
        sessions = sessions_of(path.parent)
        results = [json.loads((s / "result.json").read_text()) for s in sessions if (s / "result.json").exists()]
        means = [float(r["training_mean"] or "nan") for r in results if "training_mean" in r]
        name = str(about.get("settings", {}).get("name", ""))
        mean = sum(means) / len(means) if means else float("nan")
        found.append(RunSummary(path.parent, name, str(about.get("started", "")), len(sessions), len(means), mean))
    return found


class SessionRecords:
    """One session's folder, open from its start to its end. Raises RunError when there is one of this seed already."""

    def __init__(self, run: Path, seed: int) -> None:
        # Imported here: it takes a second, and readers of a run need none of it.
        from torch.utils.tensorboard import SummaryWriter

        self.folder = run / f"session_{seed}"
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise RunError(
                f"{self.folder}: cannot be made: {error}", hint="a session needs a folder of its own"
            ) from error
        self.episodes: list[Episode] = []
        self.metrics: list[dict[str, float]] = []
        self._started = time.monotonic()
        self._episode_table = Table(self.folder / "episodes.csv", EPISODE_COLUMNS)
        self._metric_table: Table | None = None
        self._events = SummaryWriter(str(self.folder / "tensorboard"), max_queue=1000, flush_secs=10)

    def __enter__(self) -> SessionRecords:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Since the session's records were opened."""
        return time.monotonic() - self._started

    @property
    def checkpoint(self) -> Path:
        """Where the newest checkpoint goes."""
        return self.folder / "checkpoint.pt"

    @property
    def graph(self) -> Path:
        """Where the graph goes."""
        return self.folder / "graph.png"

    def add_episodes(self, episodes: Sequence[Episode]) -> None:
        """Note episodes that ended just now."""
        seconds = round(self.seconds, 3)
        self.episodes += episodes
        self._episode_table.append(
            (e.env_steps, seconds, e.env, e.length, e.return_, int(e.truncated)) for e in episodes
        )
        if episodes:
            mean = sum(e.return_ for e in episodes) / len(episodes)
            self._events.add_scalar("training/return", mean, episodes[-1].env_steps)

    def add_metrics(self, env_steps: int, metrics: Mapping[str, float]) -> None:
        """Note what one update measured. Raises ValueError when its names differ from the first update's."""
        row = {"env_steps": env_steps, "seconds": round(self.seconds, 3), **metrics}
        if self._metric_table is None:
            self._metric_table = Table(self.folder / "metrics.csv", tuple(row))
        if tuple(row) != self._metric_table.columns:
            raise ValueError(f"metrics: expected {self._metric_table.columns}, got {tuple(row)}")
        self.metrics.append(row)
        self._metric_table.append([tuple(row.values())])
        for name, value in metrics.items():
            self._events.add_scalar(f"learning/{name}", value, env_steps)

    def add_evaluation(self, env_steps: int, rows: Sequence[tuple[int, int, float]]) -> None:
        """Note evaluation episodes: (seed, length, return) each."""
        table = Table(self.folder / "evaluation.csv", EVALUATION_COLUMNS)
        table.append(rows)
        table.close()
        self._events.add_scalar("evaluation/return", sum(row[2] for row in rows) / len(rows), env_steps)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Note what came of the session."""
        write_json(self.folder / "result.json", dict(result))

    def close(self) -> None:
        """Finish all files."""
        self._episode_table.close()
        if self._metric_table is not None:
            self._metric_table.close()
        self._events.close()


def read_table(path: Path) -> dict[str, list[float]]:
    """A CSV file of a run, by column; an unfinished last line is left out."""
    text = path.read_text()
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    head, rows = lines[0], lines[1:]
    return {name: [float(row[index]) for row in rows] for index, name in enumerate(head)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # run from a checkout
