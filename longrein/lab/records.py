"""The run folder: the only code that knows its layout. Complete lines and whole files, readable while the run goes on.

{data}/{name}_{time}/
  settings.json           what was asked for, resolved; versions; fingerprint
  process.json            which process runs it, or ran it last
  session_{seed}/
    episodes.csv          a line for each finished training episode
    metrics.csv           a line for each update
    evaluation.csv        a line for each evaluation episode
    tensorboard/          the same metrics as events
    checkpoint.pt         the newest weights, and all that learning goes on from
    resume.pt             the last state from which a run can be resumed to the bit, where checkpoint.pt is younger
    graph.png             the session's graph
    result.json           what came of it; written last, so that a folder without it is unfinished
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import math
import os
import platform
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from numpy.typing import NDArray

from longrein.errors import RunError
from longrein.lab.sinks import Origin, open_sinks

if TYPE_CHECKING:  # it brings torch, which readers of a run need not wait for
    from longrein.lab.actor import Episode

EPISODE_COLUMNS = ("env_steps", "seconds", "env", "length", "return", "truncated")
EVALUATION_COLUMNS = ("env_steps", "seed", "length", "return")
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
        record_process(run)
        write_json(run / "settings.json", described(settings))
        return run
    raise RunError(f"{data}: a thousand runs of {name} in one second", hint="give each run a name of its own")


def record_process(run: Path) -> None:
    """Note that this process runs a run from now on: its id, its machine, and when it started (seconds since 1970).

    The start tells it from a later process with the same id.
    """
    me = psutil.Process()
    started = {"pid": me.pid, "host": platform.node(), "started": me.create_time(), "command": me.cmdline()}
    write_json(run / "process.json", started)


def record_end(run: Path) -> None:
    """Note that this process is done with a run, though the process may live on."""
    about = read_json(run / "process.json")
    if about.get("pid") == os.getpid():
        write_json(run / "process.json", about | {"ended": time.time()})


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
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{value.__module__}:{name}"  # as torsos.named finds it again, where it is a function of a module
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a whole file, then put it in its place: a reader sees the old one or the new one."""
    write_text(path, json.dumps(as_plain(value), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a whole file, then put it in its place. Raises RunError when the disk does not take it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> RunError:
    hint = "make room, then longrein run --resume RUN" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return RunError(f"{path} cannot be written: {error.strerror or error}; what stands in it is whole", hint=hint)


class Table:
    """A CSV file that grows by whole lines: each `append` is one write. Raises RunError when the disk is full."""

    def __init__(self, path: Path, columns: Sequence[str], rows: int = 0) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.rows = rows  # in the file, without its head
        self._file = path.open("ab", buffering=0)  # unbuffered: what a full disk refused is not tried again at close
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
            self.rows += len(rows)

    def sync(self) -> None:
        """Have all rows on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _write(self, rows: Iterable[Sequence[object]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        left = memoryview(text.getvalue().encode())
        before = os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(before)  # no half line
            raise _unwritten(self.path, error) from error


def cut_table(path: Path, rows: int) -> tuple[str, ...]:
    """Leave the first rows of a table's file, and return its columns. Raises RunError when it has fewer."""
    try:
        with path.open(newline="") as file:
            lines = [line for _, line in zip(range(rows + 1), file, strict=False) if line.endswith("\n")]
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(lines) < rows + 1:
        raise RunError(f"{path} has {len(lines) - 1} whole rows, the checkpoint knows of {rows}",
                       hint="the folder was changed; train anew")  # fmt: skip
    write_text(path, "".join(lines))
    return tuple(next(csv.reader(lines)))


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
    """One session's folder, open from its start to its end. Raises RunError when there is one of this seed already.

    bodies: whether there are several, so that rows must say whose they are.
    resume: what `position` said; rows that were added later are taken out again, and so is what came after them.
    """

    def __init__(self, run: Path, seed: int, *, bodies: bool = False, resume: Mapping[str, Any] | None = None) -> None:
        # Imported here: it takes a second, and readers of a run need none of it.
        from torch.utils.tensorboard import SummaryWriter

        self.folder = run / f"session_{seed}"
        self._bodies = bodies
        self._metric_table: Table | None = None
        columns = EPISODE_COLUMNS + (("body",) if bodies else ())
        if resume is None:
            try:
                self.folder.mkdir(parents=True)
            except OSError as error:
                raise RunError(
                    f"{self.folder}: cannot be made: {error}", hint="a session needs a folder of its own"
                ) from error
            rows, spent, purge = {"episodes": 0, "metrics": 0, "evaluation": 0}, 0.0, None
        else:
            rows, spent, purge = dict(resume["rows"]), float(resume["seconds"]), int(resume["env_steps"]) + 1
            for name in ("result.json", "failure.txt"):
                (self.folder / name).unlink(missing_ok=True)
            cut_table(self.folder / "episodes.csv", rows["episodes"])
            if rows["evaluation"]:
                cut_table(self.folder / "evaluation.csv", rows["evaluation"])
            else:
                (self.folder / "evaluation.csv").unlink(missing_ok=True)
            if rows["metrics"]:
                measured = cut_table(self.folder / "metrics.csv", rows["metrics"])
                self._metric_table = Table(self.folder / "metrics.csv", measured, rows["metrics"])
            else:
                (self.folder / "metrics.csv").unlink(missing_ok=True)
        self._evaluated = rows["evaluation"]  # rows of evaluation.csv
        self.episode_count = rows["episodes"]  # the episodes themselves are in the file, so that memory does not grow
        self._started = time.monotonic() - spent
        self._episode_table = Table(self.folder / "episodes.csv", columns, rows["episodes"])
        self._events = SummaryWriter(str(self.folder / "tensorboard"), max_queue=1000, flush_secs=10, purge_step=purge)

        about = read_about(run)
        asked = (about.spec.get("meta") or {}).get("sinks", ())
        self._sinks = open_sinks(asked, Origin(self.folder, about.name, about.spec, seed)) if asked else []

    def __enter__(self) -> SessionRecords:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RunError:
            if error is None:
                raise  # else the first error says more

    def position(self, env_steps: int) -> dict[str, Any]:
        """How far the files are, for a checkpoint; all of it is on the disk then."""
        metrics = self._metric_table
        for table in (self._episode_table, metrics):
            if table is not None:
                table.sync()
        rows = {"episodes": self._episode_table.rows, "metrics": 0 if metrics is None else metrics.rows,
                "evaluation": self._evaluated}  # fmt: skip
        return {"rows": rows, "seconds": self.seconds, "env_steps": env_steps}

    @property
    def seconds(self) -> float:
        """Since the session's records were opened, without the time that lay between a stop and its resumption."""
        return time.monotonic() - self._started

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave what is done meanwhile out of `seconds`."""
        before = time.monotonic()
        yield
        self._started += time.monotonic() - before

    @property
    def checkpoint(self) -> Path:
        """Where the newest checkpoint goes."""
        return self.folder / "checkpoint.pt"

    @property
    def boundary(self) -> Path:
        """Where the last checkpoint goes that a run can be resumed from, when a newer one cannot serve for that."""
        return self.folder / "resume.pt"

    @property
    def graph(self) -> Path:
        """Where the graph goes."""
        return self.folder / "graph.png"

    def add_episodes(self, episodes: Sequence[Episode]) -> None:
        """Note episodes that ended just now."""
        seconds = round(self.seconds, 3)
        self.episode_count += len(episodes)
        self._episode_table.append(
            (e.env_steps, seconds, e.env, e.length, e.return_, int(e.truncated), *((e.body,) if self._bodies else ()))
            for e in episodes
        )
        by_body: dict[str, list[Episode]] = {}
        for episode in episodes:
            by_body.setdefault(episode.body, []).append(episode)
        for body, own in by_body.items():
            mean = sum(e.return_ for e in own) / len(own)
            self._event(f"training/return/{body}" if body else "training/return", mean, own[-1].env_steps)

    def add_metrics(self, env_steps: int, metrics: Mapping[str, float], where: tuple[int, int] | None = None) -> None:
        """Note what one update measured. where: agent and environment, in a session with several.

        Raises ValueError when its names differ from the first update's; agents may differ from each other, and a cell
        of a name that one has not is empty.
        """
        about = {} if where is None else {"agent": where[0], "env": where[1]}
        row = {"env_steps": env_steps, "seconds": round(self.seconds, 3), **about, **metrics}
        if self._metric_table is None:
            self._metric_table = Table(self.folder / "metrics.csv", tuple(row))
        if where is not None and not row.keys() <= set(self._metric_table.columns):
            self._metric_table = _widened(self._metric_table, [*row])
        if where is None and tuple(row) != self._metric_table.columns:
            raise ValueError(f"metrics: expected {self._metric_table.columns}, got {tuple(row)}")
        self._metric_table.append([tuple(row.get(name, "") for name in self._metric_table.columns)])
        label = "" if where is None else f"/{where[0]}.{where[1]}"
        for name, value in metrics.items():
            self._event(f"learning/{name}{label}", value, env_steps)

    def add_evaluation(self, env_steps: int, rows: Sequence[tuple[int, int, float]], body: str = "") -> None:
        """Note evaluation episodes: (seed, length, return) each. body: who played, in a session with several."""
        columns = EVALUATION_COLUMNS + (("body",) if self._bodies else ())
        table = Table(self.folder / "evaluation.csv", columns, self._evaluated)
        table.append((env_steps, *row, body) if self._bodies else (env_steps, *row) for row in rows)
        table.sync()
        table.close()
        self._evaluated = table.rows
        mean = sum(row[2] for row in rows) / len(rows)
        self._event(f"evaluation/return/{body}" if body else "evaluation/return", mean, env_steps)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Note what came of the session."""
        write_json(self.folder / "result.json", dict(result))

    def close(self) -> None:
        """Finish all files."""
        self._episode_table.close()
        if self._metric_table is not None:
            self._metric_table.close()
        for sink in self._sinks:
            sink.close()
        try:
            self._events.close()
        except OSError as error:
            raise _unwritten(self.folder / "tensorboard", error) from error

    def _event(self, name: str, value: float, env_steps: int) -> None:
        for sink in self._sinks:
            sink.add(name, value, env_steps)
        try:
            self._events.add_scalar(name, value, env_steps)
        except OSError as error:
            raise _unwritten(self.folder / "tensorboard", error) from error


def _widened(table: Table, names: Sequence[str]) -> Table:
    """The table with columns for more names; in rows that are there these cells are empty."""
    table.close()
    columns = (*table.columns, *(name for name in names if name not in table.columns))
    blanks = "," * (len(columns) - len(table.columns))
    _, *rows = table.path.read_text().splitlines()
    head = ",".join(columns)
    write_text(table.path, "".join(f"{line}\n" for line in (head, *(row + blanks for row in rows))))
    return Table(table.path, columns, table.rows)


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class About:
    """What a run's settings.json says of it."""

    run: Path
    """Its folder."""
    name: str
    """The spec's name; of a run without a spec, the folder's."""
    title: str
    """Algorithm and environment."""
    spec: dict[str, Any]
    """The resolved spec as plain values; empty for a run without one."""
    fingerprint: str
    versions: dict[str, str | None]
    machine: dict[str, Any]
    started: str
    target: float | None
    """Mean training return at which a session ends."""
    window: int
    """Episodes of that mean."""


def read_about(run: Path) -> About:
    """What a run folder says of itself; where it has no settings.json, nothing but its name."""
    whole = read_json(run / "settings.json")
    settings = whole.get("settings", {})
    spec = dict(settings.get("spec") or {})
    asked = spec.get("meta") or settings.get("session") or {}
    title = title_of(spec) if spec else str(asked.get("title", run.name))
    return About(
        run, str(settings.get("name") or run.name), title, spec, str(settings.get("fingerprint") or ""),
        dict(whole.get("versions", {})), dict(whole.get("machine", {})), str(whole.get("started", "")),
        asked.get("target"), int(asked.get("window") or 100),
    )  # fmt: skip


def title_of(spec: Mapping[str, Any]) -> str:
    """Which algorithms on which environments, of a plain spec."""
    agents, envs = (part if isinstance(part, list) else [part] for part in (spec["agent"], spec["env"]))
    return f"{', '.join(agent['algorithm']['name'] for agent in agents)} on {', '.join(map(env_label, envs))}"


def env_label(env: Mapping[str, Any]) -> str:
    """How a plain env section is called: its id, or where it is served."""
    url = env.get("url") or ""
    return str(env.get("id") or (url if isinstance(url, str) else f"{len(url)} servers"))


def seed_in(session: Path) -> int:
    """The seed of a session, by its folder. Raises RunError for what is no session's folder."""
    seed = session.name.removeprefix("session_")
    if seed == session.name or not seed.isdigit():
        raise RunError(f"{session} is no session's folder", hint="data/NAME_TIME/session_SEED")
    return int(seed)


def read_result(session: Path) -> dict[str, Any]:
    """What came of a session; empty while it goes on."""
    return read_json(session / "result.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run; empty when there is no such file. Raises RunError when it is no JSON object."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}", hint="move it away; what it held is lost") from None
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no JSON object", hint="longrein runs lists what is a run")
    return found


def read_columns(path: Path) -> dict[str, NDArray[Any]]:
    """A CSV file of a run, by column [N]: numbers, or text where one is none. Empty when there is no such file.

    It is read line by line, so that no more than the numbers is held; an unfinished last line is left out, and an
    empty cell is NaN. Raises RunError for a line of another length.
    """
    columns: list[Any] = []
    head: list[str] = []
    try:
        with path.open(newline="") as file:
            for number, row in enumerate(csv.reader(line for line in file if line.endswith("\n")), 1):
                if not head:
                    head, columns = row, [array("d") for _ in row]
                    continue
                if len(row) != len(head):
                    raise RunError(f"{path}:{number}: expected {len(head)} values, got {len(row)}",
                                   hint="the file was written to by something else")  # fmt: skip
                for index, text in enumerate(row):
                    try:
                        columns[index].append(float(text or "nan") if isinstance(columns[index], array) else text)
                    except ValueError:  # a column of names
                        columns[index] = [f"{value:g}" for value in columns[index]] + [text]
    except FileNotFoundError:
        return {}
    return {name: np.array(column) for name, column in zip(head, columns, strict=True)}


def read_table(path: Path) -> dict[str, list[float]]:
    """A CSV file of numbers, by column; an unfinished last line is left out."""
    return {name: column.tolist() for name, column in read_columns(path).items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # run from a checkout
