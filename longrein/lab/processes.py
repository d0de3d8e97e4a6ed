"""Which process runs a run folder, and whether it still does; how to end it. Knows no session and no algorithm.

A run folder's process.json names its process by id, machine and start. An id alone proves nothing: ids are given again,
so a process counts as the run's only when it also started when the run's did.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from longrein.errors import RunError

SAME_SECONDS = 2.0
"""How far two readings of one process' start may lie apart: the kernel's start of time moves when clocks are set."""

_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Process:
    """The process that runs a run, or ran it last."""

    pid: int
    host: str
    """Name of its machine."""
    started: float
    """Seconds since 1970."""
    done: bool = False
    """Whether it said that it is done with the run: it may live on, and do something else."""

    @property
    def here(self) -> bool:
        """Whether it is, or was, on this machine."""
        return self.host == platform.node()

    @property
    def state(self) -> Literal["running", "ended", "elsewhere"]:
        """Whether it still runs; elsewhere: on another machine, where nobody can look from here."""
        if self.done:
            return "ended"
        if not self.here:
            return "elsewhere"
        return "running" if self.handle() is not None else "ended"

    def handle(self) -> psutil.Process | None:
        """The live process; None when it has ended, or when its id is another process' by now."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.started) < SAME_SECONDS
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


@dataclass(frozen=True)
class Stopped:
    """What came of asking a run to end."""

    folder: Path
    ended: bool
    """Whether its process is gone."""
    says: str
    """What happened, in words."""


def process_of(folder: Path) -> Process | None:
    """The process that a folder's process.json names; None without such a file. Raises RunError for a damaged one."""
    path = folder / "process.json"
    try:
        about = json.loads(path.read_text())
        return Process(int(about["pid"]), str(about["host"]), float(about["started"]), "ended" in about)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} names no process: {error!r}", hint="end the run by hand, and remove the file") from None


def refuse_running(folder: Path) -> None:
    """Raise RunError when another process of this machine runs the folder: two would remove each other's work."""
    by = process_of(folder)
    if by is not None and by.state == "running" and by.pid != os.getpid():
        raise RunError(f"{folder} still runs, in process {by.pid}", hint=f"longrein stop {folder}")


def running(data: Path) -> list[Path]:
    """Folders below `data` whose process is alive on this machine: schedules, then runs, searches and benchmarks."""
    marks = [*sorted(data.glob("schedules/*/process.json")), *sorted(data.glob("*/process.json"))]
    found = [(path.parent, process_of(path.parent)) for path in marks]
    return [folder for folder, process in found if process is not None and process.state == "running"]


def stop(folders: Sequence[Path], *, wait: float = 60.0) -> list[Stopped]:
    """Ask the processes of some folders to end, as Ctrl-C does, and wait until they have; what came of each.

    wait: seconds in all. A process that is another one by now is sent nothing. Never kills.
    """
    told: list[Stopped] = []
    asked: dict[Path, psutil.Process] = {}
    signalled: set[int] = set()  # a process below two of the folders, or a second SIGINT, would end it hard
    for folder in folders:
        process = process_of(folder)
        found = process.handle() if process is not None and process.state == "running" else None
        if process is None or found is None:
            told.append(Stopped(folder, process is not None and process.state == "ended", _why_not(process)))
            continue
        asked[folder] = found
        for one in _as_the_terminal_would(found):
            if one.pid not in signalled:
                signalled.add(one.pid)
                _interrupt(one)
    deadline = time.monotonic() + wait
    for folder, found in asked.items():
        while not (gone := _gone(found)) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        says = "ended" if gone else f"process {found.pid} was asked to end {wait:g} s ago, and still runs"
        told.append(Stopped(folder, gone, says))
    return told


def _why_not(process: Process | None) -> str:
    if process is None:
        return "names no process"
    if process.done:
        return "has ended before"
    if not process.here:
        return f"runs on {process.host}; stop it there"
    try:
        other = psutil.Process(process.pid)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(other.create_time()))
        if abs(other.create_time() - process.started) >= SAME_SECONDS:
            return f"has ended; process {process.pid} is another one, started {since}, and was sent nothing"
    except psutil.NoSuchProcess:
        pass
    return "has ended before"


def _as_the_terminal_would(process: psutil.Process) -> list[psutil.Process]:
    """The process and those of its descendants that a terminal's Ctrl-C would reach: those in its own group.

    The descendants first: whoever waits for a child should find it ending.
    """
    try:
        group = os.getpgid(process.pid)
        below = [child for child in process.children(recursive=True) if os.getpgid(child.pid) == group]
    except (psutil.NoSuchProcess, ProcessLookupError):
        below = []
    return [*below, process]


def _interrupt(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGINT)  # psutil looks at the start again before it sends
    except psutil.NoSuchProcess:
        pass
    except psutil.AccessDenied:
        hint = "ask its owner, or stop it as root"
        raise RunError(f"process {process.pid} is {process.username()}'s, and not ours to end", hint=hint) from None


def _gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
