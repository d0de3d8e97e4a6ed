"""Pictures of runs (PNG), drawn from their curves. Knows no file but the picture it writes, and no algorithm."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrein.lab import curves
from longrein.lab.benchmark_results import Aggregate, Panel
from longrein.lab.curves import Line, SessionCurves, TrialCurves, moving_mean
from longrein.lab.search_space import Drawn, encoded
from longrein.lab.search_table import Experiment

if TYPE_CHECKING:  # matplotlib takes a second and 20 MB: only whoever draws imports it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#000000")
BLUE, ORANGE, GREEN, GREY = *COLORS[:3], "#6B7280"
UNITS = {"entropy": "entropy, nats"}


def color(index: int) -> str:
    """The colour of the index-th of several; they repeat after eight."""
    return COLORS[index % len(COLORS)]


def draw_session(
    folder: Path,
    *,
    title: str = "",
    target: float | None = None,
    window: int | None = None,
    seconds: float | None = None,
) -> Path:
    """Draw a session's folder into its graph.png, from its files alone. What is given goes before what they say."""
    found = curves.read_session(folder)
    found = replace(
        found, title=title or found.title, target=found.target if target is None else target,
        window=window or found.window, seconds=seconds or found.seconds,
    )  # fmt: skip
    session_graph(folder / "graph.png", found)
    return folder / "graph.png"


def draw_trial(run: Path) -> Path:
    """Draw a run's sessions into its graph.png, from their files alone."""
    trial_graph(run / "graph.png", curves.read_trial(run))
    return run / "graph.png"


def session_graph(path: Path, shown: SessionCurves) -> None:
    """Write a PNG: training returns with their moving mean, and below them a loss and how much was explored.

    The file appears whole or not at all.
    """
    figure = new_figure(9, 6.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    _target(top, shown.target)
    for index, line in enumerate(shown.returns):
        label = f"{line.label}: " if line.label else ""
        points = curves.thin(line, 20_000)
        top.scatter(points.env_steps, points.values, s=7, color=color(index), alpha=0.25, linewidths=0)
        mean = moving_mean(line.values, shown.window)
        says = f"{label}mean of the last {shown.window} training episodes: {mean[-1]:.1f}"
        top.plot(line.env_steps, mean, color=color(index), linewidth=2.2, label=says)
    labels = [line.label for line in shown.returns]
    for label, returns in shown.evaluation:
        mean_return, deviation = float(returns.mean()), float(returns.std())
        says = f"evaluation, {len(returns)} seeds: {mean_return:.1f} ± {deviation:.1f}"
        paint = color(labels.index(label)) if label in labels and len(shown.evaluation) > 1 else ORANGE
        top.errorbar(
            [shown.env_steps], [mean_return], yerr=[deviation], fmt="D", markersize=7, color=paint, capsize=4,
            zorder=5, clip_on=False, label=f"{label}: {says}" if label else says,
        )  # fmt: skip
    _plain(top, "return")
    _legend(top)
    _plain(bottom, "")
    _measure(bottom, shown.losses, ORANGE)
    twin = bottom.twinx()
    twin.spines[["top", "left", "bottom"]].set_visible(False)
    twin.tick_params(labelsize=9)
    _measure(twin, shown.exploration, GREEN)
    _steps_axis(bottom, shown.env_steps)
    _head(figure, top, shown.title, shown.facts)
    save(figure, path)


def trial_graph(path: Path, shown: TrialCurves) -> None:
    """Write a PNG: the mean over sessions of the moving mean of training returns, within its lowest and highest."""
    figure = new_figure(9, 4.6)
    axes = figure.subplots()
    _target(axes, shown.target)
    for line in shown.sessions:
        axes.plot(line.env_steps, line.values, color=GREY, linewidth=0.6, alpha=0.6)
    for index, band in enumerate(shown.bands):
        what = f"{band.label}: " if band.label else ""
        says = f"{what}mean of {band.count} sessions, lowest to highest"
        axes.fill_between(band.env_steps, band.low, band.high, color=color(index), alpha=0.18, linewidth=0)
        axes.plot(band.env_steps, band.middle, color=color(index), linewidth=2.2, label=says)
    _plain(axes, f"return, mean of the last {shown.window}")
    _legend(axes)
    _steps_axis(axes, max((band.env_steps[-1] for band in shown.bands), default=1.0))
    _head(figure, axes, shown.title, f"{len(shown.sessions)} training curves")
    save(figure, path)


def benchmark_graph(path: Path, panels: Sequence[Panel]) -> None:
    """Write a PNG: a panel for each environment, a curve with its interval for each spec."""
    wide = min(len(panels), 3)
    high = -(-len(panels) // wide)
    figure = new_figure(max(6.0 * wide, 7.5), 3.9 * high + 0.4)
    grid = figure.subplots(high, wide, squeeze=False)
    names = list(dict.fromkeys(band.label for panel in panels for band in panel.bands))
    for axes, panel in zip(grid.flat, panels, strict=False):
        _target(axes, panel.solved, "solved")
        for band in panel.bands:
            paint = color(names.index(band.label))
            axes.fill_between(band.env_steps, band.low, band.high, color=paint, alpha=0.15, linewidth=0)
            axes.plot(band.env_steps, band.middle, color=paint, linewidth=1.8, label=band.label)
        axes.set_title(panel.env, fontsize=11, fontweight="bold", loc="left")
        _plain(axes, f"return, mean of the last {panel.window}")
        _steps_axis(axes, max(band.env_steps[-1] for band in panel.bands))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    save(figure, path)


def aggregate_graph(path: Path, rows: Sequence[Aggregate], names: Sequence[str]) -> None:
    """Write a PNG: for each spec the IQM of its scores over environments and seeds, with its 95 % interval.

    names: of all specs, so that each has the colour of its curve.
    """
    figure = new_figure(7.5, 0.9 + 0.42 * max(len(rows), 2))
    axes = figure.subplots()
    for index, row in enumerate(rows):
        place, paint = len(rows) - 1 - index, color(names.index(row.spec))
        if row.interval is not None:
            low, high = row.interval
            axes.barh(place, high - low, left=low, height=0.55, color=paint, alpha=0.3)
        axes.plot([row.iqm] * 2, [place - 0.275, place + 0.275], color=paint, linewidth=2.5)
    axes.set_yticks(range(len(rows)), [row.spec for row in reversed(rows)])
    axes.set_xlabel("score: 0 is a random policy, 1 is solved; IQM and 95 % interval", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#E5E7EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    save(figure, path)


def experiment_graph(path: Path, found: Experiment) -> None:
    """Write a PNG: each searched setting against the fitness and its parts, a point for each trial.

    A column for each setting, its axis logarithmic where it was drawn by its logarithm; a row for each number. Finished
    trials are coloured by their fitness and the best is ringed; a cross is a trial that was stopped early, as far as it
    came.
    """
    metric = found.space.method.metric
    others = [name for name in found.parts if name != metric]
    slm2018 = [name for name in others if name.startswith("slm2018.")]
    told = [name for name in slm2018 if len({row.parts.get(name) for row in found.rows if row.parts}) > 1]
    names = [metric, *(told or [name for name in others if "." not in name])[:5]]
    keys = list(found.space.drawn)
    figure = new_figure(max(3.4 * len(keys) + 1.0, 6.4), 2.1 * len(names) + 1.0)
    grid = figure.subplots(len(names), len(keys), squeeze=False, sharey="row", sharex="col")
    done = [row for row in found.rows if row.status == "finished" and row.fitness is not None]
    early = [row for row in found.rows if row.status == "stopped early" and row.fitness is not None]
    best = done.index(found.best) if found.best is not None else None
    paint = [row.fitness for row in done]
    for column, key in enumerate(keys):
        x = [_place(found, key, row.drawn[key]) for row in done]
        for axes, name in zip(grid[:, column], names, strict=True):
            y = [row.fitness if name == metric else row.parts.get(name, float("nan")) for row in done]
            points = axes.scatter(x, y, c=paint, cmap="viridis", s=34, linewidths=0, zorder=3)
            if best is not None:
                axes.scatter(x[best], y[best], s=110, facecolors="none", edgecolors=ORANGE, linewidths=1.8, zorder=4)
            if name == metric:
                crosses = [_place(found, key, row.drawn[key]) for row in early]
                axes.scatter(crosses, [row.fitness for row in early], marker="x", s=26, color=GREY, zorder=2)
            _plain(axes, "" if column else name.replace(".", "\n").replace("_", " "))
        _drawn_axis(grid[-1, column], key, found.space.drawn[key])
    if len(done) > 1:
        figure.colorbar(points, ax=grid, label=metric.replace("_", " "), aspect=40, pad=0.01)
    facts = f"{len(done)} trials finished, the best is ringed"
    if early:
        facts += f"; {len(early)} stopped early, crosses as far as they came"
    _head(figure, grid[0, 0], f"{found.name}: {found.title}", facts)
    save(figure, path)


def _place(found: Experiment, key: str, value: Any) -> float:
    """Where a drawn value is on its axis."""
    drawn = found.space.drawn[key]
    return [encoded(one) for one in drawn.values].index(encoded(value)) if drawn.listed else float(value)


def _drawn_axis(axes: Axes, key: str, drawn: Drawn) -> None:
    axes.set_xlabel(key, fontsize=9)
    if drawn.log:
        low, high = drawn.values[:2]
        axes.set_xlim(low * (low / high) ** 0.04, high * (high / low) ** 0.04)  # before the scale: it needs a range
        axes.set_xscale("log")
    if drawn.listed:
        axes.set_xticks(range(len(drawn.values)), [encoded(value).strip('"') for value in drawn.values])
        axes.set_xlim(-0.5, len(drawn.values) - 0.5)


def new_figure(width: float, height: float) -> Figure:
    """An empty one, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas by hand: pyplot keeps figures in global state, and asks for a screen.
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the PNG, whole or not at all."""
    beside = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(beside)
    beside.replace(path)


def _head(figure: Figure, axes: Axes, title: str, facts: str) -> None:
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.02, ha="left")
    axes.set_title(facts, fontsize=10, color=GREY, loc="left", pad=8)


def _target(axes: Axes, target: float | None, label: str = "") -> None:
    if target is not None:
        label = label or f"target {target:g}"
        axes.axhline(target, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label=label)


def _measure(axes: Axes, lines: Sequence[Line], paint: str) -> None:
    if not lines:
        axes.set_yticks([])
        return
    name = lines[0].label.partition(",")[0]
    axes.set_ylabel(UNITS.get(name, name.replace("_", " ")), color=paint)
    axes.tick_params(axis="y", which="both", colors=paint, labelsize=8)
    if "loss" in name and all((line.values > 0).all() for line in lines):
        axes.set_yscale("log")  # a value loss falls by a thousand and jumps by a hundred
    for index, line in enumerate(lines):
        # Faint as measured, strong over a twentieth of the run's updates: single updates are mostly noise.
        style = ("-", "--", ":", "-.")[index % 4]
        axes.plot(line.env_steps, line.values, color=paint, linewidth=0.6, alpha=0.3)
        smooth = moving_mean(line.values, max(len(line.values) // 20, 1))
        axes.plot(line.env_steps, smooth, color=paint, linewidth=1.6, linestyle=style)


def _steps_axis(axes: Axes, end: float) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("env steps, all environments together", fontsize=9)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(0, max(end, 1))


def _plain(axes: Axes, name: str) -> None:
    axes.set_ylabel(name)
    tidy(axes)


def tidy(axes: Axes) -> None:
    """The look of all panels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E7EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=9, frameon=True, framealpha=0.9, edgecolor="none")
