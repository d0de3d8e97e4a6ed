"""Schedules: which specs to run, in which mode, one after another or side by side; what is finished is not run again.

A file maps spec files to names to modes, as {"spec/dqn.yaml": {"dqn_cartpole": "train"}}. Each entry runs in a process
of its own, started by the command line, so that one that dies takes no other with it. The state is kept in
{data}/schedules/{file's stem}/: state.json, process.json, and the output of each entry that ran beside others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from longrein.errors import RunError, SpecError
from longrein.lab import benchmark
from longrein.lab import spec as specs
from longrein.lab.processes import process_of
from longrein.lab.records import record_end, record_process, write_json
from longrein.lab.session import stop_on_signal

State = Literal["waiting", "running", "finished", "failed", "interrupted"]
INTERRUPTED = 130
"""Exit status of a run that was ended by Ctrl-C or by `longrein stop`."""
_STATES: Mapping[int, State] = {0: "finished", INTERRUPTED: "interrupted", -signal.SIGINT: "interrupted"}
RESUMED = ("train", "search")
"""Modes whose runs go on where they were interrupted."""
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Entry:
    """One line of a schedule, and what came of it."""

    file: str
    """The spec's file, as the schedule names it."""
    name: str
    """The spec's name."""
    mode: str
    """The run mode."""
    fingerprint: str
    """Of the spec: a changed spec is run again."""
    state: State = "waiting"
    exit_status: int | None = None
    """Of its process; None before it ended."""
    seconds: float = 0.0
    """That its process took."""
    log: str = ""
    """File with its output; "" when it went to the terminal."""
    run: str = ""
    """Its run folder; "" when it made none."""
    pid: int = 0
    """Of its process; 0 before it began."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the schedule's other entries."""
        return self.file, self.name, self.mode

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.file} {self.name} {self.mode}"


Told = Callable[[Entry], None]


def read(path: Path, modes: Sequence[str]) -> list[Entry]:
    """The entries of a schedule, in order, each spec loaded and checked. Raises SpecError naming the line.

    Spec files are looked for in the current folder, then beside the schedule. modes: those that there are.
    """
    entries: list[Entry] = []
    for file, source in specs.read(path).items():
        found = next((one for one in (Path(file), path.parent / file) if one.is_file()), None)
        if found is None:
            line = specs.Source(source.file, source.name, {}, {"": source.lines[""]})
            raise line.error(file, "there is no such spec file", hint=f"looked in {Path.cwd()} and {path.parent}")
        known = specs.read(found)
        for name, mode in source.values.items():
            if name not in known:
                raise source.error(name, f"{found} has no such spec", hint=specs.nearest(str(name), known))
            if mode not in modes:
                raise source.error(name, f"there is no mode {mode!r}", hint=specs.nearest(str(mode), modes))
            load = benchmark.load if mode == "benchmark" else specs.load
            entries.append(Entry(str(found), str(name), str(mode), load(found, str(name)).fingerprint))
    if not entries:
        raise SpecError("file", "names no spec", file=str(path), hint='{"spec/dqn.yaml": {"dqn_cartpole": "train"}}')
    return entries


def state_folder(data: Path, path: Path) -> Path:
    """Where a schedule keeps its state."""
    return data / "schedules" / path.stem


def with_state(entries: Sequence[Entry], data: Path, folder: Path, *, again: bool = False) -> list[Entry]:
    """Entries with what the state file knows of them: finished ones stay so, all else waits, with its unfinished run.

    again: run all from the beginning. Raises RunError for a damaged file, and when an entry's run still goes on, though
    its schedule was killed.
    """
    path = folder / "state.json"
    try:
        kept = [Entry(**entry) for entry in json.loads(path.read_text())["entries"]] if path.exists() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no schedule's state: {error!r}", hint="remove it, to run all again") from None
    known = {} if again else {(one.key, one.fingerprint): one for one in kept}
    found = []
    for entry in entries:
        before = known.get((entry.key, entry.fingerprint), entry)
        run = run_of_process(data, before.pid) if before.state == "running" else before.run
        process = process_of(Path(run)) if before.state == "running" and run else None
        if process is not None and process.state == "running":
            raise RunError(f"{run} still goes on", hint=f"wait for it, or: longrein stop {Path(run).name}")
        going_on = before.state in ("running", "interrupted") and entry.mode in RESUMED
        found.append(before if before.state == "finished" else replace(entry, run=run if going_on else ""))
    return found


def run_schedule(
    entries: Sequence[Entry],
    data: Path,
    folder: Path,
    command: Callable[[Entry], Sequence[str]],
    *,
    side_by_side: int = 1,
    stop_on_failure: bool = False,
    on_change: Told | None = None,
) -> list[Entry]:
    """Run the entries that are not finished, so many at a time; all of them with what came of them.

    data: where the runs go. folder: keeps the state; written at each change. command: what to start for an entry.
    on_change: told of each entry that starts or ends. After Ctrl-C, which each run hears too, no further one is
    started, and those that run are waited for.
    Raises RunError when the same schedule runs already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = process_of(folder)
    if before is not None and before.state == "running" and before.pid != os.getpid():
        raise RunError(f"this schedule runs already, as process {before.pid}", hint="longrein stop ends it")
    record_process(folder)
    table = list(entries)
    running: dict[int, tuple[subprocess.Popen[bytes], float]] = {}

    def put(index: int, **changes: Any) -> None:
        table[index] = replace(table[index], **changes)
        write_json(folder / "state.json", {"entries": [asdict(entry) for entry in table]})
        if on_change is not None:
            on_change(table[index])

    waiting = [index for index, entry in enumerate(table) if entry.state != "finished"]
    with stop_on_signal() as stop:
        while running or (waiting and not stop.is_set()):
            while waiting and len(running) < side_by_side and not stop.is_set():
                index = waiting.pop(0)
                log = folder / f"{index + 1}_{table[index].name}_{table[index].mode}.log" if side_by_side > 1 else None
                running[index] = _start(command(table[index]), log), time.monotonic()
                put(index, state="running", log=str(log or ""), pid=running[index][0].pid)
            for index, (process, since) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[index]
                run = table[index].run or run_of_process(data, process.pid)
                seconds = round(time.monotonic() - since, 1)
                put(index, state=_STATES.get(status, "failed"), exit_status=status, seconds=seconds, run=run)
                if stop_on_failure and table[index].state == "failed":
                    stop.set()
            stop.wait(_LOOK_SECONDS)
    record_end(folder)
    return table


def run_of_process(data: Path, pid: int) -> str:
    """The run folder that a process of this machine made; "" when it made none."""
    for path in data.glob("*/process.json"):
        process = process_of(path.parent)
        if process is not None and process.here and process.pid == pid:
            return str(path.parent)
    return ""


def _start(command: Sequence[str], log: Path | None) -> subprocess.Popen[bytes]:
    if log is None:
        return subprocess.Popen(command)
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def run_command(entry: Entry, data: Path, processes: int | None) -> list[str]:
    """The command line that runs an entry."""
    command = [sys.executable, "-m", "longrein.cli", "run", entry.file, entry.name, entry.mode, "--data", str(data)]
    if entry.run and (Path(entry.run) / "settings.json").exists():
        command = [*command[:4], "--resume", entry.run]
    return command if processes is None else [*command, "--processes", str(processes)]
