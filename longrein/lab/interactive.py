"""Graphs to move about in, for a page: the same curves as the pictures, as plotly figures. Knows no file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from longrein.lab.benchmark_results import Aggregate, Panel
from longrein.lab.curves import Band, Floats, Line, SessionCurves, TrialCurves, moving_mean, thin
from longrein.lab.plots import GREEN, GREY, ORANGE, UNITS, color
from longrein.lab.search_space import encoded
from longrein.lab.search_table import Experiment, Row

STEPS = "env steps, all environments together"
LAYOUT = {
    "template": "plotly_white",
    "margin": {"l": 60, "r": 60, "t": 20, "b": 50},
    "height": 420,
    "hovermode": "closest",
    "separators": ".,",
    "legend": {"orientation": "h", "y": -0.2},
    "font": {"family": "system-ui, sans-serif", "size": 13},
}


def library() -> str:
    """plotly.js, to stand once in a page; nothing is loaded from elsewhere then."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def as_html(figure: Any, name: str) -> str:
    """A figure as a piece of HTML, for a page that has the library. name: an id, once in the page."""
    # plotly's own text for scripts escapes nothing that could end one.
    spec = json.dumps({"data": _plain(figure.data), "layout": figure.layout.to_plotly_json()}, default=_plain)
    spec = spec.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return (
        f'<div id="{name}" class="graph"></div>\n<script>(function () {{ var f = {spec}; '
        f'Plotly.newPlot("{name}", f.data, f.layout, {{responsive: true, displaylogo: false}}); }})();</script>'
    )


def session_figure(shown: SessionCurves) -> Any:
    """Training returns with their moving mean; below them a loss, and on a second axis how much was explored."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.68, 0.32], vertical_spacing=0.06,
        specs=[[{}], [{"secondary_y": True}]],
    )  # fmt: skip
    for index, line in enumerate(shown.returns):
        what = f"{line.label}: " if line.label else ""
        points, mean = thin(line), thin(Line("", line.env_steps, moving_mean(line.values, shown.window)))
        _points(figure, points, f"{what}training episode", color(index))
        _line(figure, mean, f"{what}mean of the last {shown.window}", color(index), row=1, col=1)
    labels = [line.label for line in shown.returns]
    for label, returns in shown.evaluation:
        says = (f"{label}: " if label else "") + f"evaluation, {len(returns)} seeds"
        paint = color(labels.index(label)) if label in labels and len(shown.evaluation) > 1 else ORANGE
        figure.add_scatter(
            x=[shown.env_steps], y=[float(returns.mean())], mode="markers", name=says,
            error_y={"type": "data", "array": [float(returns.std())]},
            marker={"color": paint, "size": 10, "symbol": "diamond"}, row=1, col=1,
        )  # fmt: skip
    _target(figure, shown.target, row=1, col=1)
    for lines, paint, second in ((shown.losses, ORANGE, False), (shown.exploration, GREEN, True)):
        for line in lines:
            smooth = Line("", line.env_steps, moving_mean(line.values, max(len(line.values) // 20, 1)))
            label = line.label.replace("_", " ")
            _line(figure, thin(smooth), label, paint, row=2, col=1, secondary_y=second)
        if lines:
            name = lines[0].label.partition(",")[0]
            figure.update_yaxes(
                title_text=UNITS.get(name, name.replace("_", " ")), title_font_color=paint, tickfont_color=paint,
                showgrid=not second, row=2, col=1, secondary_y=second,
            )  # fmt: skip
    if shown.losses and "loss" in shown.losses[0].label and all((line.values > 0).all() for line in shown.losses):
        figure.update_yaxes(type="log", row=2, col=1, secondary_y=False)
    figure.update_layout(**LAYOUT | {"height": 560})
    figure.update_yaxes(title_text="return", row=1, col=1)
    figure.update_xaxes(title_text=STEPS, row=2, col=1)
    return figure


def trial_figure(shown: TrialCurves) -> Any:
    """The mean over sessions with its band; each session's own curve can be clicked away."""
    from plotly.graph_objects import Figure

    figure = Figure()
    for index, band in enumerate(shown.bands):
        what = f"{band.label}: " if band.label else ""
        _band(figure, band, f"{what}mean of {band.count} sessions, lowest to highest", color(index))
    for line in shown.sessions:
        _line(figure, thin(line, 400), line.label, GREY, width=1)
    _target(figure, shown.target)
    figure.update_layout(**LAYOUT)
    figure.update_yaxes(title_text=f"return, mean of the last {shown.window}")
    figure.update_xaxes(title_text=STEPS)
    return figure


def panel_figure(panel: Panel, names: Sequence[str]) -> Any:
    """One environment of a benchmark. names: of all specs, so that each has its colour in every panel."""
    from plotly.graph_objects import Figure

    figure = Figure()
    for band in panel.bands:
        _band(figure, band, band.label, color(names.index(band.label)))
    _target(figure, panel.solved)
    figure.update_layout(**LAYOUT)
    figure.update_yaxes(title_text=f"return, mean of the last {panel.window}")
    figure.update_xaxes(title_text=STEPS)
    return figure


def aggregate_figure(rows: Sequence[Aggregate], names: Sequence[str]) -> Any:
    """The IQM of each spec's scores, with its interval. names: as of `panel_figure`."""
    from plotly.graph_objects import Figure

    figure = Figure()
    for row in rows:
        paint = color(names.index(row.spec))
        low, high = row.interval or (row.iqm, row.iqm)
        figure.add_scatter(
            x=[row.iqm], y=[row.spec], mode="markers", name=row.spec, showlegend=False,
            error_x={"type": "data", "symmetric": False, "array": [high - row.iqm], "arrayminus": [row.iqm - low]},
            marker={"color": paint, "size": 12, "symbol": "line-ns-open", "line": {"width": 3}},
        )  # fmt: skip
    figure.update_layout(**LAYOUT | {"height": 140 + 32 * len(rows)})
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    figure.update_xaxes(title_text="score: 0 is a random policy, 1 is solved; IQM and 95 % interval")
    return figure


def experiment_figure(found: Experiment) -> Any:
    """Each searched setting against what the search maximises; a point says all that its trial drew."""
    from plotly.subplots import make_subplots

    keys, metric = list(found.space.drawn), found.space.method.metric
    figure = make_subplots(rows=1, cols=len(keys), shared_yaxes=True, horizontal_spacing=0.03)
    for column, (key, drawn) in enumerate(found.space.drawn.items(), 1):
        for status, symbol in (("finished", "circle"), ("stopped early", "x")):
            rows = [row for row in found.rows if row.status == status and row.fitness is not None]
            values = [row.drawn[key] for row in rows]
            figure.add_scatter(
                x=[encoded(value).strip('"') if drawn.listed else value for value in values],
                y=[row.fitness for row in rows], mode="markers", name=status, legendgroup=status,
                showlegend=column == 1 and bool(rows), text=[_trial(row) for row in rows],
                hovertemplate="%{text}<extra></extra>",
                marker={"symbol": symbol, "size": 10, "color": [row.fitness for row in rows], "colorscale": "Viridis"},
                row=1, col=column,
            )  # fmt: skip
        kind = "category" if drawn.listed else "log" if drawn.log else "linear"
        figure.update_xaxes(title_text=key, type=kind, row=1, col=column)
    figure.update_layout(**LAYOUT)
    figure.update_yaxes(title_text=metric.replace("_", " "), row=1, col=1)
    return figure


def _trial(row: Row) -> str:
    # plotly reads a text as HTML
    said = [f"trial {row.number}: {row.fitness:.4g}", *(f"{key} {encoded(value)}" for key, value in row.drawn.items())]
    return "<br>".join(escape(line) for line in said)


def _points(figure: Any, line: Line, name: str, paint: str) -> None:
    figure.add_scatter(
        x=_numbers(line.env_steps), y=_numbers(line.values), mode="markers", name=name,
        marker={"color": paint, "size": 4, "opacity": 0.3}, row=1, col=1,
    )  # fmt: skip


def _line(figure: Any, line: Line, name: str, paint: str, width: float = 2, **place: Any) -> None:
    figure.add_scatter(
        x=_numbers(line.env_steps), y=_numbers(line.values), mode="lines", name=name,
        line={"color": paint, "width": width}, **place,
    )  # fmt: skip


def _band(figure: Any, band: Band, name: str, paint: str) -> None:
    known = np.isfinite(band.middle)
    steps = band.env_steps[known]
    figure.add_scatter(
        x=_numbers(np.concatenate([steps, steps[::-1]])),
        y=_numbers(np.concatenate([band.high[known], band.low[known][::-1]])),
        fill="toself", fillcolor=_faint(paint), line={"width": 0}, hoverinfo="skip", showlegend=False,
        legendgroup=name, mode="lines",
    )  # fmt: skip
    figure.add_scatter(
        x=_numbers(steps), y=_numbers(band.middle[known]), mode="lines", name=name, legendgroup=name,
        line={"color": paint, "width": 2.5},
    )  # fmt: skip


def _target(figure: Any, target: float | None, **place: Any) -> None:
    if target is not None:
        figure.add_hline(y=target, line={"color": GREY, "dash": "dash", "width": 1}, **place)


def _faint(paint: str) -> str:
    red, green, blue = (int(paint[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _numbers(values: Floats) -> list[float | None]:
    """Seven digits are enough for a screen; JSON has no NaN."""
    return [float(f"{value:.7g}") if np.isfinite(value) else None for value in values.tolist()]


def _plain(value: Any) -> Any:
    """What plotly keeps as tuples and arrays, as lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [part.to_plotly_json() if hasattr(part, "to_plotly_json") else part for part in value]
