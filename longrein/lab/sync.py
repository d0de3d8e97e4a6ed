"""Copying run files to another folder or to any fsspec URL: what is new or changed, and only that. Knows no run.

1. Only files are copied; links, and names that begin with a dot (files being written), are left out.
2. A file is copied as long as it was when it was opened; a table (.csv, .jsonl) up to its last whole line.
3. It is written beside its place at the other end, and renamed when it is whole.
4. What was copied stands in a list in the data folder, one line a file, so that a copy that was cut off goes on.
5. A file is skipped when the list has its size and time of change, and the other end has a file of the copied size.
6. Nothing is ever removed at the other end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from longrein.errors import RunError

_BLOCK = 4 * 2**20
_TABLES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Synced:
    """What one pass did."""

    copied: int
    """Files."""
    bytes: int
    """Their sizes together."""
    skipped: int
    """Files that the other end had."""


class Destination:
    """The other end, open for several passes. Raises RunError for an address that cannot be used."""

    def __init__(self, data: Path, to: str) -> None:
        import fsspec

        self.data = data
        self.to = to
        if not data.is_dir():
            raise RunError(f"there is no folder {data}", hint="--data FOLDER says where runs are")
        try:
            self.files, root = fsspec.core.url_to_fs(to)
        except (ValueError, ImportError, OSError) as error:
            hint = "a folder, or a URL that fsspec knows, as s3://bucket/runs (pip install s3fs)"
            raise RunError(f"{to} cannot be used: {error}", hint=hint) from error
        self.root = str(root).rstrip("/")
        if "file" in _protocols(self.files) and Path(self.root).resolve().is_relative_to(data.resolve()):
            raise RunError(f"{to} lies within {data}", hint="give a folder elsewhere: it would copy itself")
        digest = hashlib.sha256(f"{_protocols(self.files)} {self.root}".encode()).hexdigest()[:12]
        self._list = data / f".sync.{digest}.jsonl"

    def sync(self) -> Synced:
        """Copy what is new or changed. Raises RunError, after which another call goes on from there."""
        there = self._there()
        done = self._read_list()
        copied = size = skipped = 0
        with self._list.open("a") as noted:
            for name in run_files(self.data):
                source = self.data / name
                try:
                    with source.open("rb") as file:
                        about = os.fstat(file.fileno())
                        mark = [about.st_size, about.st_mtime_ns, _length(file, name, about.st_size)]
                        if done.get(name) == mark and there.get(name) == mark[2]:
                            skipped += 1
                            continue
                        self._copy(file, name, mark[2])
                except FileNotFoundError:
                    if source.exists():
                        raise self._failed(name, "its folder could not be made") from None
                    continue  # the run was removed, or a file replaced by none, while we looked
                except OSError as error:
                    raise self._failed(name, str(error)) from error
                noted.write(json.dumps([name, mark]) + "\n")
                noted.flush()
                copied, size = copied + 1, size + mark[2]
        return Synced(copied, size, skipped)

    def _copy(self, file: BinaryIO, name: str, length: int) -> None:
        folder, _, last = f"{self.root}/{name}".rpartition("/")
        beside = f"{folder}/.{last}.part"
        self.files.makedirs(folder, exist_ok=True)
        left = length
        with self.files.open(beside, "wb") as copy:
            while left > 0 and (block := file.read(min(_BLOCK, left))):
                copy.write(block)
                left -= len(block)
        self.files.mv(beside, f"{folder}/{last}")

    def _there(self) -> dict[str, int]:
        """The files at the other end, with their sizes."""
        self.files.invalidate_cache()  # what it remembers of the last pass may be wrong by now
        try:
            found: dict[str, Any] = self.files.find(self.root, detail=True)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(f"{self.to} cannot be read: {error}", hint="is it there, and may you?") from error
        prefix = self.root + "/"
        return {path[len(prefix) :]: int(about.get("size") or 0) for path, about in found.items()
                if path.startswith(prefix)}  # fmt: skip

    def _read_list(self) -> dict[str, list[int]]:
        """What was copied before; a line that a kill cut off is no line."""
        found: dict[str, list[int]] = {}
        try:
            text = self._list.read_text()
        except FileNotFoundError:
            return found
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._list.write_text(whole)  # else the next line would be glued to half a line
        for line in whole.splitlines():
            name, mark = json.loads(line)
            found[name] = mark
        return found

    def _failed(self, name: str, problem: str) -> RunError:
        return RunError(f"{name} could not be copied to {self.to}: {problem}", hint="sync again goes on from there")


def run_files(data: Path) -> Iterator[str]:
    """Files below a folder, as paths within it, without links and without names that begin with a dot."""
    for folder, below, names in os.walk(data):
        below[:] = sorted(one for one in below if not one.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path.relative_to(data).as_posix()


def _length(file: BinaryIO, name: str, size: int) -> int:
    """How much of a file is whole: all of it, or of a table what stands before its last line break."""
    if not name.endswith(_TABLES):
        return size
    end = size
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    file.seek(0)
    return end


def _protocols(files: Any) -> tuple[str, ...]:
    protocol = files.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
