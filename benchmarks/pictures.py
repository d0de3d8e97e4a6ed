"""The look of the benchmarks' pictures: panels of lines with one legend below. Knows no benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter
from numpy.typing import NDArray

from longrein.lab import plots
from longrein.lab.plots import color

__all__ = ["Sheet", "color", "figure", "lines", "logarithmic", "save"]


@dataclass(frozen=True)
class Sheet:
    """A figure and its panels, row by row."""

    figure: Figure
    panels: list[Axes]


def figure(count: int, wide: int = 3) -> Sheet:
    """An empty sheet with so many panels."""
    wide = min(wide, count)
    high = -(-count // wide)
    whole = plots.new_figure(max(4.6 * wide, 7.5), 3.4 * high + 0.4)
    panels = list(whole.subplots(high, wide, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels:
        plots.tidy(axes)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return Sheet(whole, panels[:count])


def lines(
    axes: Axes, x: NDArray[Any], rows: NDArray[Any], paint: str, label: str, handles: dict[str, Any], **style: Any
) -> None:
    """The mean of rows [R, N] over x [N], within their lowest and highest; its handle, for the legend."""
    if len(rows) > 1:
        axes.fill_between(x, rows.min(0), rows.max(0), color=paint, alpha=0.12, linewidth=0)
    (handle,) = axes.plot(x, rows.mean(0), color=paint, **({"linewidth": 1.8} | style))
    handles.setdefault(label, handle)


def logarithmic(axes: Axes, x: Sequence[int], y: bool) -> None:
    """The first axis by its logarithm, with a tick at each x; the second too, or from 0 on."""
    axes.set_xscale("log")
    axes.set_xticks(x, [EngFormatter(sep="")(each) if each > 9_999 else f"{each:,}" for each in x])
    axes.set_xticks([], minor=True)
    if not y:
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(FuncFormatter(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "125" else ""))


def save(sheet: Sheet, path: Path, handles: dict[str, Any]) -> None:
    """Write the PNG, with one legend below."""
    sheet.figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=9, frameon=False
    )
    plots.save(sheet.figure, path)
