"""Removing run folders: which may go, and how they go. It deletes nothing that is no run of the data folder itself."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longrein.errors import RunError, SpecError
from longrein.lab.overview import Overview, overview, overviews

UNITS = {"m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}


@dataclass(frozen=True)
class Candidate:
    """A run that may be removed."""

    run: Overview
    size: int
    """Bytes of its files."""
    changed: float
    """When its newest file was written, in seconds since 1970."""


def seconds_of(text: str) -> float:
    """A time span such as 30m, 12h, 7d or 2w, in seconds. Raises SpecError."""
    number, unit = text[:-1], text[-1:]
    try:
        return float(number) * UNITS[unit]
    except (KeyError, ValueError):
        raise SpecError("older-than", f"{text!r} is no time span", hint="as in 30m, 12h, 7d or 2w") from None


def candidates(
    data: Path, names: Sequence[str] = (), *, older_than: float | None = None, unfinished: bool = False
) -> list[Candidate]:
    """The runs below `data` that fit all that is asked; without names, of all runs there.

    older_than: seconds since a run's newest file was written. unfinished: only runs that did not come to their end.
    A run that is named must be one, and must not run; without names, running ones are left out.
    Raises RunError.
    """
    runs = [_named(data, name) for name in names] if names else [r for r in overviews(data) if _movable(r)]
    found = [Candidate(run, *_size_and_age(run.folder)) for run in runs]
    now = time.time()
    return [
        one
        for one in found
        if (older_than is None or now - one.changed >= older_than)
        and (not unfinished or one.run.status in ("interrupted", "failed"))
    ]


def remove(data: Path, run: Path) -> None:
    """Remove one run folder, links in it but not what they lead to. Raises RunError.

    It first gets a hidden name, so that nobody meets half a run.
    """
    _named(data, str(run))  # once more: since it was looked at, it may have been taken up again
    hidden = data / f".clearing.{run.name}.{os.getpid()}"
    try:
        (data / run.name).rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise RunError(f"{run} cannot be removed: {error}", hint=f"what is left of it is in {hidden}") from error


def _named(data: Path, name: str) -> Overview:
    """A run of the data folder by its name, checked. Raises RunError for whatever must not be removed."""
    run = data / Path(name).name
    if Path(name) != Path(run.name) and Path(name).absolute() != run.absolute():
        raise RunError(f"{name} is not a folder of {data}", hint="give --data, and the run's name")
    if run.name in ("", "..") or run.resolve().parent != data.resolve():
        if not run.is_symlink():
            raise RunError(f"{name} is not a folder of {data}", hint="give --data, and the run's name")
        raise RunError(f"{run} is a link to {run.readlink()}", hint="remove the link, or what it leads to, by hand")
    if not run.is_dir():
        raise RunError(f"there is no run {name!r} in {data}", hint=f"longrein runs --data {data} lists what is there")
    found = overview(run)
    if found.status == "running":
        raise RunError(f"{run} is running", hint=f"longrein stop {run.name} --data {data}")
    if found.status == "elsewhere":
        raise RunError(f"{run} may be running on another machine", hint="clear it there")
    return found


def _movable(run: Overview) -> bool:
    return run.status not in ("running", "elsewhere") and not run.folder.is_symlink()


def _size_and_age(folder: Path) -> tuple[int, float]:
    size, newest = 0, folder.stat().st_mtime
    for path, _, names in os.walk(folder):  # does not follow links
        for name in names:
            about = os.lstat(os.path.join(path, name))
            size, newest = size + about.st_size, max(newest, about.st_mtime)
    return size, newest


def show(found: Sequence[Candidate]) -> None:
    """Print what may be removed."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("run", no_wrap=True, min_width=max((len(one.run.folder.name) for one in found), default=0)),
                  "status", "changed", "MB")  # fmt: skip
    for one in found:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.changed))
        table.add_row(one.run.folder.name, one.run.status, changed, f"{one.size / 1e6:.1f}")
    Console().print(table if found else "no run fits")
