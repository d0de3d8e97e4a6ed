"""What a contestant tells of its run: rate, returns, time of a call, memory. Knows no learning package."""

from __future__ import annotations

import json
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

POINTS = 10


class Stopwatch:
    """Times the second half of `env_steps`: imports, compilation and first calls are behind it then.

    It starts between an update and the next env step, so that as many updates as rollouts are in it. last: training
    returns that a point of the curve is the mean of.
    """

    def __init__(self, env_steps: int, last: int) -> None:
        self.env_steps = env_steps
        self.last = last
        self._began = self._began_busy = 0.0
        self._at = 0
        self._returns: list[tuple[int, float]] = []  # env steps at the end of an episode, and its return

    def look(self, env_steps: int) -> None:
        """So many env steps are behind us, and their updates too."""
        if not self._at and env_steps >= self.env_steps // 2:
            self._at, self._began, self._began_busy = env_steps, time.perf_counter(), time.process_time()

    def episode(self, env_steps: int, return_: float) -> None:
        """An episode ended, after so many env steps of all environments together."""
        self._returns.append((env_steps, float(return_)))

    def report(self, env_steps: int) -> None:
        """Print it, as one line of JSON, at the end of the training."""
        seconds, busy = time.perf_counter() - self._began, time.process_time() - self._began_busy
        told = {
            "env_steps": env_steps - self._at,
            "seconds": round(seconds, 3),
            "busy": round(busy, 3),  # seconds of a processor, of all threads together
            "megabytes": megabytes_at_most(),
            "curve": [self._point(self.env_steps * point // POINTS) for point in range(1, POINTS + 1)],
        }
        print(json.dumps(told))

    def _point(self, env_steps: int) -> tuple[int, float | None]:
        """The mean of the last training returns then; None before the first."""
        last = [return_ for at, return_ in self._returns if at <= env_steps][-self.last :]
        return env_steps, round(sum(last) / len(last), 2) if last else None


def microseconds(function: Callable[[Any], Any], arguments: Iterable[Any]) -> float:
    """Of a call, the median over these arguments, the first tenth left out."""
    taken = []
    for argument in arguments:
        began = time.perf_counter()
        function(argument)
        taken.append(time.perf_counter() - began)
    return round(statistics.median(taken[len(taken) // 10 :]) * 1e6, 2)


def megabytes_at_most() -> int:
    """The most resident memory of this process so far; ru_maxrss would count that of whoever started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) // 1024


def megabytes_now() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 2)
