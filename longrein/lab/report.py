"""A page and its pictures, made again from the files of a run: a session, a trial, a search or a benchmark.

Knows no process and no environment. What it makes can be deleted; of what it reads, nothing is changed but the fitness
in a trial's trial.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrein.errors import RunError
from longrein.lab import benchmark_results, curves, interactive, plots, records, search_table, trial_fitness
from longrein.lab.benchmark_results import number
from longrein.lab.search_space import encoded
from longrein.lab.spec import as_yaml

SESSIONS_DRAWN = 12
"""Sessions of a trial that have a graph of their own in its page; the others have theirs as a picture."""


@dataclass(frozen=True)
class Part:
    """One section of the page: a graph, a table, a text, or several of them."""

    title: str
    graph: Any = None
    """A plotly figure."""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: str = ""
    said: Sequence[str] = ()
    """Lines of explanation below."""
    folded: bool = False
    bad: bool = False


@dataclass(frozen=True)
class Page:
    """What a page shows."""

    title: str
    under: str
    folder: str
    parts: Sequence[Part]


def write(folder: Path) -> Path:
    """Draw a run's pictures again, compute its fitness, and write its report.html. Returns the page's path.

    folder: of a run, of one of its sessions, of a search or of a benchmark. Raises RunError for what is none of them.
    """
    for made, draw in KINDS:
        if made(folder):
            page = folder / "report.html"
            records.write_text(page, as_html(draw(folder)))
            return page
    raise RunError(f"{folder} is no run", hint="longrein runs lists what is there")


def as_html(page: Page) -> str:
    """The page as one file, with plotly.js inside: it loads nothing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("longrein.lab"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    graphs = [
        Markup(interactive.as_html(part.graph, f"graph-{index}")) if part.graph is not None else ""
        for index, part in enumerate(page.parts)
    ]
    drawn = any(part.graph is not None for part in page.parts)
    library = Markup(interactive.library()) if drawn else ""
    made = time.strftime("%Y-%m-%d %H:%M")
    return environment.get_template("report.html.j2").render(page=page, graphs=graphs, library=library, made=made)


# ------------------------------------------------------------------------------------------------------------ sessions


def session_page(folder: Path) -> Page:
    """One session; its graph.png is drawn again too."""
    run = folder.parent
    about = records.read_about(run)
    plots.draw_session(folder)
    found = trial_fitness.appraise(run)
    seed = records.seed_in(folder)
    mine = {label: {**body, "sessions": {seed: body["sessions"][seed]}} for label, body in found["bodies"].items()
            if seed in body["sessions"]}  # fmt: skip
    shown = curves.read_session(folder, about)
    parts = [
        Part(shown.facts, graph=interactive.session_figure(shown)),
        _sessions_table(run, [folder]),
        *_fitness_parts({**found, "bodies": mine}, with_trial=False),
        *_failures([folder]),
        *_settings(about),
    ]
    return Page(f"{about.name}, session {seed}", _under(about), f"{run.name}/{folder.name}", parts)


def trial_page(run: Path) -> Page:
    """All sessions of a run; its pictures are drawn again, and its fitness is computed."""
    about = records.read_about(run)
    sessions = records.sessions_of(run)
    found = trial_fitness.write(run)
    parts: list[Part] = []
    if len(sessions) > 1 or not sessions:
        plots.draw_trial(run)
        parts.append(Part("Trial", graph=interactive.trial_figure(curves.read_trial(run))))
    drawn: list[Part] = []
    for folder in sessions:
        plots.draw_session(folder)
        if len(drawn) < SESSIONS_DRAWN:
            shown = curves.read_session(folder, about)
            title = f"Session {records.seed_in(folder)}: {shown.facts}"
            drawn.append(Part(title, graph=interactive.session_figure(shown)))
    parts += [_sessions_table(run, sessions), *_failures(sessions), *_fitness_parts(found), *drawn, *_settings(about)]
    return Page(about.name, _under(about), run.name, parts)


SESSION_COLUMNS = ("session", "ended", "env steps", "episodes", "mean return", "evaluation", "seconds", "env steps/s")


def _sessions_table(run: Path, sessions: Sequence[Path]) -> Part:
    rows = []
    for folder in sessions:
        result = records.read_result(folder)
        evaluation = [value for value in result.get("evaluation") or () if value is not None]
        seconds, steps = result.get("seconds"), result.get("env_steps")
        rows.append((
            str(records.seed_in(folder)), str(result.get("status", "goes on, or was killed")), number(steps),
            number(result.get("episodes")), number(result.get("training_mean")),
            number(sum(evaluation) / len(evaluation) if evaluation else None), number(seconds),
            number(steps / seconds if steps and seconds else None),
        ))  # fmt: skip
    said = () if rows else (f"{run.name} has no session yet.",)
    return Part("Sessions", columns=SESSION_COLUMNS if rows else (), rows=rows, said=said)


def _failures(sessions: Sequence[Path]) -> list[Part]:
    parts = []
    for folder in sessions:
        result = records.read_result(folder)
        said = folder / "failure.txt"
        text = said.read_text(errors="replace") if said.exists() else str(result.get("error", ""))
        if text:
            parts.append(Part(f"Session {records.seed_in(folder)} died", text=text, bad=True))
    return parts


NAMES_2018 = ("strength", "speed", "stability", "consistency", "fitness")
NAMES_5 = ("strength", "max_strength", "final_strength", "sample_efficiency", "training_efficiency", "stability",
           "consistency")  # fmt: skip
NAMES_BESIDE = ("final_return", "best_return", "area_under_curve", "steps_to_target", "seconds_to_target")


def _fitness_parts(found: Mapping[str, Any], with_trial: bool = True) -> list[Part]:
    parts = []
    bodies = found["bodies"]
    for label, body in bodies.items():
        where = f", body {label} in {body['env']}" if len(bodies) > 1 else ""
        for name, names in (("slm2018", NAMES_2018), ("slm5", NAMES_5)):
            if body[name] is None:
                continue
            rows = [_fitness_row(f"session {seed}", one[name], names) for seed, one in body["sessions"].items()]
            rows += [_fitness_row("trial", body[name], names)] if with_trial else []
            said = _measured_against(name, body)
            parts.append(Part(f"Fitness: {name}{where}", columns=("", *map(_said, names)), rows=rows, said=[said]))
        rows = [_fitness_row(f"session {seed}", one, NAMES_BESIDE) for seed, one in body["sessions"].items()]
        rows += [_fitness_row("mean", body["beside"], NAMES_BESIDE)] if with_trial else []
        said = f"IQM of the final returns: {number(body['beside']['iqm'])}"
        if body["beside"]["iqm_low"] is not None:
            said += f", 95 % interval {number(body['beside']['iqm_low'])} to {number(body['beside']['iqm_high'])}"
        parts.append(Part(f"Returns{where}", columns=("", *map(_said, NAMES_BESIDE)), rows=rows,
                          said=[f"{said}."] if with_trial else []))  # fmt: skip
    return parts


def _measured_against(name: str, body: Mapping[str, Any]) -> str:
    if name == "slm2018":
        standard = body["standard"]
        return (f"Against the standard of {body['env']}: random {number(standard['random'])}, "
                f"solved {number(standard['solved'])}, {standard['env_steps']:,.0f} env steps.")  # fmt: skip
    random = body["baseline"]
    return f"Above a random policy: {number(random['mean'])}, measured over {random['episodes']} episodes."


def _fitness_row(label: str, values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [label, *(number(values[name]) if name in values else "" for name in names)]


def _said(name: str) -> str:
    return name.replace("_", " ")


def _under(about: records.About) -> str:
    return " · ".join(text for text in (about.title, about.started.replace("T", " "), about.fingerprint) if text)


def _settings(about: records.About) -> list[Part]:
    known = {**{name: text for name, text in about.versions.items() if text}, **about.machine}
    return [
        Part("Spec", text=as_yaml({about.name: about.spec}) if about.spec else "", folded=True,
             said=() if about.spec else ("This run was made without a spec.",)),
        Part("Versions and machine", rows=[(name, str(text)) for name, text in known.items()], folded=True),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ searches


def search_page(folder: Path) -> Page:
    """A search: its trials, the best first, and each searched setting against what was maximised."""
    about, found = records.read_about(folder), search_table.read(folder)
    metric, keys = found.space.method.metric, list(found.space.drawn)
    rows = [
        [str(row.number), row.status, *(encoded(row.drawn[key]).strip('"') for key in keys), number(row.fitness),
         number(row.mean_return), number(row.evaluation), number(row.env_steps), row.run]
        for row in sorted(found.rows, key=lambda row: -np.inf if row.fitness is None else row.fitness, reverse=True)
    ]  # fmt: skip
    parts: list[Part] = []
    if any(row.fitness is not None for row in found.rows):
        plots.experiment_graph(folder / "experiment.png", found)
        parts.append(Part("Search", graph=interactive.experiment_figure(found)))
    columns = ("trial", "ended", *keys, _said(metric), "mean return", "evaluation", "env steps", "folder")
    said = [f"Maximised: {_said(metric)}; {found.space.method.name}, {len(rows)} of {found.planned} trials."]
    parts.append(Part("Trials", columns=columns, rows=rows, said=said))
    if (folder / "best.yaml").exists():
        parts.append(Part("The best spec", text=(folder / "best.yaml").read_text(), folded=True))
    failures = sorted((folder / "failures").glob("*.txt"))
    parts += [Part(f"{path.stem.replace('_', ' ')} died", text=path.read_text(), bad=True) for path in failures]
    return Page(f"{about.name}, a search", _under(about), folder.name, [*parts, *_settings(about)])


# ---------------------------------------------------------------------------------------------------------- benchmarks


def benchmark_page(folder: Path) -> Page:
    """A benchmark; its tables and pictures are made again too."""
    found = benchmark_results.read(folder)
    benchmark_results.write_tables(folder)
    names = list(dict.fromkeys(entry.spec for entry in found.entries))
    panels, aggregates = benchmark_results.panels(found), benchmark_results.aggregates(found)
    if panels:
        plots.benchmark_graph(folder / "curves.png", panels)
    if aggregates:
        plots.aggregate_graph(folder / "aggregate.png", aggregates, names)
    rows = [benchmark_results.cells(row) for row in benchmark_results.rows(found)]
    said = [line.removeprefix("- ") for line in benchmark_results.EXPLAINED]
    parts = [Part("Results", columns=benchmark_results.COLUMNS, rows=rows, said=said)]
    if aggregates:
        scores = [(one.spec, benchmark_results.score(one)) for one in aggregates]
        parts.append(Part("All environments together", graph=interactive.aggregate_figure(aggregates, names),
                          columns=("spec", "score, IQM [95 %]"), rows=scores))  # fmt: skip
    parts += [Part(panel.env, graph=interactive.panel_figure(panel, names),
                   said=["IQM over seeds of the moving mean of training returns, with its 95 % interval."])
              for panel in panels]  # fmt: skip
    parts += [Part(f"{spec} in {env}, seed {seed}: died", text=text, bad=True)
              for (spec, env, seed), text in found.failures.items()]  # fmt: skip
    baselines = [(env, number(one.mean), number(one.deviation), str(one.episodes))
                 for env, one in found.baselines.items()]  # fmt: skip
    if baselines:
        columns = ("environment", "mean return", "deviation", "episodes")
        parts.append(Part("A random policy", columns=columns, rows=baselines))
    parts += [Part(f"Spec: {entry.spec} in {entry.env}, {entry.fingerprint}", text=as_yaml({entry.spec: entry.plain}),
                   folded=True) for entry in found.entries]  # fmt: skip
    parts.append(Part("Versions", rows=_versions_of(found), folded=True))
    under = f"{len(names)} specs, {len(panels)} environments, {len(found.seeds)} seeds"
    return Page(found.name, under, folder.name, parts)


def _versions_of(found: benchmark_results.Benchmark) -> list[tuple[str, str]]:
    """Every version that any session ran with."""
    seen: dict[str, list[str]] = {}
    for results in found.results.values():
        for result in results.values():
            for name, text in result["versions"].items():
                if text and text not in seen.setdefault(name, []):
                    seen[name].append(text)
    return [(name, ", ".join(texts)) for name, texts in seen.items()]


KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Page]], ...] = (
    (lambda folder: (folder / "benchmark.json").exists(), benchmark_page),
    (lambda folder: (folder / "experiment.json").exists(), search_page),
    (lambda folder: (folder / "settings.json").exists(), trial_page),
    (lambda folder: folder.name.startswith("session_") and (folder.parent / "settings.json").exists(), session_page),
)
