"""What the graphs of a run show, as arrays made of its files. Knows no way of drawing, and no environment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longrein.lab import records

Floats = NDArray[np.float64]

LOSSES = ("loss", "critic_loss", "value_loss", "q_loss", "policy_loss")
"""Metrics that may stand for how learning goes; the first that a session has is drawn."""
EXPLORATION = ("exploration", "epsilon", "exploration_noise", "entropy", "alpha")
"""Metrics that may stand for how much is explored; the first that a session has is drawn."""
POINTS = 200
"""Places on the axis of env steps at which sessions are compared."""


@dataclass(frozen=True)
class Line:
    """Something measured along the env steps of a session."""

    label: str
    env_steps: Floats
    """[N], rising."""
    values: Floats
    """[N]"""


@dataclass(frozen=True)
class SessionCurves:
    """What a session's graph shows."""

    title: str
    returns: tuple[Line, ...]
    """Of training episodes; a line for each body."""
    losses: tuple[Line, ...]
    """A line for each agent and environment; empty for an algorithm without any of LOSSES."""
    exploration: tuple[Line, ...]
    evaluation: tuple[tuple[str, Floats], ...]
    """Returns of the last evaluation's episodes, with the label of the body in `returns`; perhaps none."""
    env_steps: float
    seconds: float | None
    """That training took; None while it goes on."""
    target: float | None
    window: int
    """Episodes of the moving mean."""

    @property
    def facts(self) -> str:
        """How much there was, in a line."""
        episodes = sum(len(line.values) for line in self.returns)
        text = f"{self.env_steps:,.0f} env steps · {episodes:,} episodes"
        if self.seconds:
            text += f" · {self.seconds:.0f} s · {self.env_steps / self.seconds:,.0f} env steps/s"
        return text


@dataclass(frozen=True)
class Band:
    """Several lines as one, with what lies around it."""

    label: str
    env_steps: Floats
    """[N]"""
    middle: Floats
    """[N]; NaN before every line has begun."""
    low: Floats
    high: Floats
    count: int
    """Of lines."""


@dataclass(frozen=True)
class TrialCurves:
    """What a trial's graph shows."""

    title: str
    bands: tuple[Band, ...]
    """Mean over sessions, lowest to highest; a band for each body."""
    sessions: tuple[Line, ...]
    """The moving mean of each session, and of each of its bodies."""
    target: float | None
    window: int


def read_session(folder: Path, about: records.About | None = None) -> SessionCurves:
    """The curves of a session's folder, whatever of it is there. about: of its run, where the caller has read it."""
    about = about or records.read_about(folder.parent)
    episodes = records.read_columns(folder / "episodes.csv")
    metrics = records.read_columns(folder / "metrics.csv")
    evaluation = records.read_columns(folder / "evaluation.csv")
    result = records.read_result(folder)
    returns = by_body(episodes, "return")
    last = [line.env_steps[-1] for line in returns] + list(metrics.get("env_steps", np.empty(0))[-1:])
    seconds = result.get("seconds")
    return SessionCurves(
        f"{about.title} · session {records.seed_in(folder)}", returns,
        first_of(metrics, LOSSES), first_of(metrics, EXPLORATION), last_evaluation(evaluation),
        float(result.get("env_steps") or max(last, default=0.0)),
        float(seconds) if seconds else None, about.target, about.window,
    )  # fmt: skip


def read_trial(run: Path) -> TrialCurves:
    """The curves of a run's sessions, whichever are there."""
    about = records.read_about(run)
    lines: list[Line] = []
    by_label: dict[str, list[Line]] = {}
    for folder in records.sessions_of(run):
        for line in by_body(records.read_columns(folder / "episodes.csv"), "return"):
            smooth = Line(line.label, line.env_steps, moving_mean(line.values, about.window))
            by_label.setdefault(line.label, []).append(smooth)
            name = f"session {records.seed_in(folder)}" + (f", {line.label}" if line.label else "")
            lines.append(thin(Line(name, smooth.env_steps, smooth.values)))
    bands = tuple(mean_band(label, group) for label, group in by_label.items())
    return TrialCurves(about.title, bands, tuple(lines), about.target, about.window)


def by_body(table: dict[str, Any], name: str) -> tuple[Line, ...]:
    """A column of a table over env steps: a line for each body, or one where the table names no bodies."""
    if name not in table or not len(table[name]):
        return ()
    if "body" not in table:
        return (Line("", table["env_steps"], table[name]),)
    bodies = np.asarray(table["body"]).astype(str)
    return tuple(
        Line(f"body {body}", table["env_steps"][bodies == body], table[name][bodies == body])
        for body in sorted(set(bodies.tolist()))
    )


def first_of(metrics: dict[str, Any], names: Sequence[str]) -> tuple[Line, ...]:
    """The first metric of `names` that was ever measured; where a table has several agents, a line for each."""
    for name in names:
        if name not in metrics:
            continue
        groups: list[tuple[str, Any]] = [(name, slice(None))]
        if "agent" in metrics:  # one of several, or in several environments
            places = list(zip(metrics["agent"].tolist(), metrics["env"].tolist(), strict=True))
            several = len({env for _, env in places}) > 1
            groups = [
                (f"{name}, agent {a:g}" + (f" in environment {e:g}" if several else ""),
                 np.array([place == (a, e) for place in places]))
                for a, e in sorted(set(places))
            ]  # fmt: skip
        lines = []
        for label, rows in groups:
            steps, values = metrics["env_steps"][rows], metrics[name][rows]
            finite = np.isfinite(values)
            if finite.any():
                lines.append(Line(label, steps[finite], values[finite]))
        if lines:
            return tuple(lines)
    return ()


def last_evaluation(table: dict[str, Any]) -> tuple[tuple[str, Floats], ...]:
    """The returns of the evaluation that was made last, by body."""
    if not len(table.get("return", ())):
        return ()
    if "env_steps" in table:
        last = table["env_steps"] == table["env_steps"].max()
        table = {name: column[last] for name, column in table.items()}
    lines = by_body({"env_steps": table["seed"], **table}, "return")
    return tuple((line.label, line.values) for line in lines)


def moving_mean(values: ArrayLike, window: int) -> Floats:
    """The mean of the last `window` values at each place, of fewer where fewer came before: [N] -> [N]."""
    array = np.asarray(values, np.float64)
    total = np.concatenate([[0.0], np.cumsum(array)])
    ends = np.arange(1, len(array) + 1)
    starts = np.maximum(ends - window, 0)
    mean: Floats = (total[ends] - total[starts]) / (ends - starts)
    return mean


def thin(line: Line, points: int = 1000) -> Line:
    """The line with at most so many of its points, its first and its last among them."""
    if len(line.values) <= points:
        return line
    at = np.linspace(0, len(line.values) - 1, points).astype(int)
    return Line(line.label, line.env_steps[at], line.values[at])


def on_grid(lines: Iterable[Line], grid: Floats) -> Floats:
    """Each line at the grid's env steps: [lines, grid]. NaN before its first point; its last value beyond its end."""
    rows = [np.interp(grid, line.env_steps, line.values, left=np.nan) for line in lines]
    matrix: Floats = np.asarray(rows, np.float64)
    return matrix


def grid_of(lines: Iterable[Line]) -> Floats:
    """POINTS env steps from 0 to the end of the longest line."""
    return np.linspace(0.0, max(line.env_steps[-1] for line in lines), POINTS)


def mean_band(label: str, lines: Sequence[Line]) -> Band:
    """The mean of some lines, and their lowest and highest; NaN until all have begun."""
    grid = grid_of(lines)
    matrix = on_grid(lines, grid)
    return Band(label, grid, matrix.mean(axis=0), matrix.min(axis=0), matrix.max(axis=0), len(lines))
