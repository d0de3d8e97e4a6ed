"""Graphs of runs, drawn from recorded numbers alone. Knows no environment and no algorithm."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from longrein.lab.actor import Episode

# Okabe and Ito's colours: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B7280"


def session_graph(
    path: Path,
    episodes: Sequence[Episode],
    metrics: Sequence[Mapping[str, float]],
    *,
    title: str,
    target: float | None = None,
    evaluation: Sequence[float] = (),
    seconds: float | None = None,
    window: int = 100,
) -> None:
    """Write a PNG: training returns with their moving average over `window` episodes, value loss and entropy.

    metrics: rows with env_steps, and value_loss and entropy where the algorithm has them.
    The file appears whole or not at all.
    """
    # Figure and canvas by hand: pyplot keeps figures in global state, and asks for a screen.
    figure = Figure(figsize=(9, 6.4), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    _returns(top, episodes, target, evaluation, window)
    _losses(bottom, metrics)
    steps = episodes[-1].env_steps if episodes else 0
    if metrics:
        steps = max(steps, int(metrics[-1]["env_steps"]))
    facts = f"{steps:,} env steps · {len(episodes):,} episodes"
    if seconds:
        facts += f" · {seconds:.0f} s · {steps / seconds:,.0f} steps/s"
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.02, ha="left")
    top.set_title(facts, fontsize=10, color=GREY, loc="left", pad=8)
    bottom.set_xlabel("env steps, all environments together")
    bottom.xaxis.set_major_formatter(EngFormatter(sep=""))
    bottom.set_xlim(0, max(steps, 1))
    beside = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(beside)
    beside.replace(path)


def moving_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of the last `window` values at each place, of fewer where fewer came before: [N] -> [N]."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    mean: NDArray[np.float64] = (total[ends] - total[starts]) / (ends - starts)
    return mean


def _returns(
    axes: Axes, episodes: Sequence[Episode], target: float | None, evaluation: Sequence[float], window: int
) -> None:
    _plain(axes)
    axes.set_ylabel("return")
    if target is not None:
        axes.axhline(target, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label=f"target {target:g}")
    if episodes:
        steps = np.array([episode.env_steps for episode in episodes])
        returns = np.array([episode.return_ for episode in episodes])
        axes.scatter(steps, returns, s=7, color=BLUE, alpha=0.25, linewidths=0, label="training episode")
        mean = moving_mean(returns, window)
        axes.plot(steps, mean, color=BLUE, linewidth=2.2, label=f"mean of the last {window}: {mean[-1]:.1f}")
    if evaluation:
        mean_return, deviation = float(np.mean(evaluation)), float(np.std(evaluation))
        end = episodes[-1].env_steps if episodes else 0
        axes.errorbar(
            [end], [mean_return], yerr=[deviation], fmt="D", markersize=7, color=ORANGE, capsize=4, zorder=5,
            clip_on=False, label=f"evaluation, {len(evaluation)} seeds: {mean_return:.1f} ± {deviation:.1f}",
        )  # fmt: skip
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=9, frameon=True, framealpha=0.9, edgecolor="none")


def _losses(axes: Axes, metrics: Sequence[Mapping[str, float]]) -> None:
    _plain(axes)
    axes.set_yscale("log")  # a value loss falls by a thousand and jumps by a hundred
    axes.set_ylabel("value loss", color=ORANGE)
    axes.tick_params(axis="y", colors=ORANGE)
    twin = axes.twinx()
    twin.spines[["top", "left", "bottom"]].set_visible(False)
    twin.tick_params(axis="y", colors=GREEN, labelsize=9)
    twin.set_ylabel("entropy, nats", color=GREEN)
    for where, name, color in ((axes, "value_loss", ORANGE), (twin, "entropy", GREEN)):
        rows = [row for row in metrics if name in row]
        if rows:
            steps = np.array([row["env_steps"] for row in rows])
            values = np.array([row[name] for row in rows])
            # Faint as measured, strong over a twentieth of the run's updates: single updates are mostly noise.
            where.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
            where.plot(steps, moving_mean(values, max(len(values) // 20, 1)), color=color, linewidth=1.6)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E7EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
