"""An actor on a Ray cluster: plays a rollout whenever it is asked to, with the newest weights. Knows no learner.

1. Each call returns what came of it, or the Error that ended the actor, as a value: Ray would wrap what is raised.
2. Calls run one after the other, in the order in which they were made. Newer weights come beside them (`renew`), so
   that a rollout which was asked for long ago begins with the newest ones nevertheless.
3. It begins with weights no older than those that came with the call.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import torch

from longrein.errors import Error, RunError
from longrein.lab.acting_role import ActingRole, Hello
from longrein.lab.assembly import Played
from longrein.lab.channel import Arrays

T = TypeVar("T")
Published = tuple[int, Arrays]
"""Weights with their version."""
BESIDE = "beside"
"""The group of calls that do not wait for a rollout to end."""


@dataclass(frozen=True)
class Place:
    """Where the session runs, for an actor that is to find the same files."""

    folder: str
    """Relative paths begin there, on machines that have it."""
    paths: tuple[str, ...]
    """Where modules are looked for."""

    @staticmethod
    def here() -> Place:
        """This process's."""
        return Place(os.getcwd(), tuple(str(Path(path).resolve()) for path in sys.path))

    def enter(self) -> None:
        """Look there in this process, too."""
        sys.path += [path for path in self.paths if path not in sys.path and Path(path).exists()]
        if Path(self.folder).is_dir():
            os.chdir(self.folder)


class RayActor:
    """One life of an actor. role: a Role, packed."""

    def __init__(self, role: bytes, place: Place) -> None:
        self._packed = role
        self._place = place
        self._given: Published | None = None  # with the last call
        self._renewed: Published | None = None  # beside the calls
        self._held = -1  # version of the weights that the policy has
        self._idle_since = time.monotonic()
        self._ended = False

    def open(self) -> Hello | Error:
        """Open the environments: what they are."""

        def opened() -> Hello:
            torch.set_num_threads(1)
            self._place.enter()
            self._acting = ActingRole(cloudpickle.loads(self._packed))
            return self._acting.hello

        return _told(opened)

    def begin(self, weights: Published, seed: int, draws: int | bytes) -> Error | None:
        """Make the policy, and reset the environments, copy k with seed + k. draws: as ActingRole has it."""
        self._given = weights

        def begun() -> None:
            self._acting.begin(seed, draws, self._newest)
            self._idle_since = time.monotonic()

        return _told(begun)

    def play(self, weights: Published, cut: int | None) -> tuple[Played, Arrays] | Error | None:
        """A rollout: what goes with it, and its columns [T, b, ...]; None where the actor is to end."""
        if self._ended:
            return None
        self._given = weights

        def played() -> tuple[Played, Arrays]:
            columns: Arrays = {}
            return self._acting.play(columns, cut, time.monotonic() - self._idle_since), columns

        try:
            return _told(played)
        finally:
            self._idle_since = time.monotonic()

    def renew(self, weights: Published) -> None:
        """Begin the next rollout with these, unless newer ones come."""
        self._renewed = weights

    def end(self) -> None:
        """Play nothing more."""
        self._ended = True

    def close(self) -> None:
        """Close the environments."""
        if hasattr(self, "_acting"):
            _told(self._acting.close)

    def _newest(self, arrays: Arrays) -> int:
        """Copy the newest weights to the policy's arrays, where it has others; their version."""
        known = [one for one in (self._given, self._renewed) if one is not None]
        version, newest = max(known, key=lambda one: one[0])
        if version != self._held:
            for name, array in arrays.items():
                array[...] = newest[name]
            self._held = version
        return version


def _told(call: Callable[[], T]) -> T | Error:
    """What a call gives, or the Error that it ends with."""
    try:
        return call()
    except Error as error:
        return error
    except Exception as error:  # the border of a process: whatever ended it is told, with its traceback
        return RunError("".join(traceback.format_exception(error)).rstrip())


def cost(cpus: float) -> dict[str, Any]:
    """What Ray is to know of an actor when it is made."""
    return {"num_cpus": cpus, "max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {BESIDE: 1}}
