"""The fitness of a trial, made of its files and kept in its trial.json. Knows no process and no environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from longrein.lab import baseline, curves, fitness, records
from longrein.lab.baseline import Baseline
from longrein.lab.curves import Floats
from longrein.lab.fitness import Standard

CHECKPOINTS = 20
"""Equal parts of a session's env steps, of which slm5 takes the mean training returns."""
ONE_BODY = "0.0.0"


def write(run: Path) -> dict[str, Any]:
    """Compute a trial's fitness from its files, note it in its trial.json where it has one, and return it."""
    found = appraise(run)
    trial = records.read_json(run / "trial.json")
    if trial:
        records.write_json(run / "trial.json", trial | {"fitness": found})
    return found


def appraise(run: Path) -> dict[str, Any]:
    """A trial's fitness: `slm2018` and `slm5`, each null where it cannot be said, and `beside`.

    The same again under `bodies`, for each body, with the standard, the baseline and each session's numbers. What
    stands above the bodies is their mean.
    """
    about = records.read_about(run)
    baselines = baseline.kept(run)
    by_label: dict[str, dict[int, dict[str, Floats]]] = {}
    for folder in records.sessions_of(run):
        for label, columns in _bodies(folder).items():
            by_label.setdefault(label, {})[records.seed_in(folder)] = columns
    bodies = {label: _body(about, label, sessions, baselines) for label, sessions in sorted(by_label.items())}
    whole = {name: _mean_of([body[name] for body in bodies.values()]) for name in ("slm2018", "slm5", "beside")}
    return whole | {"bodies": bodies}


def standard_of(env_id: str, target: float | None, random: float | None, env_steps: float) -> Standard | None:
    """The standard that slm2018 measures against, or None where nothing says what solved means.

    Of the table where it has the environment. Else solved is the target, or what Gymnasium's registry asks for, random
    is the measured baseline, and the env steps are the session's budget.
    """
    if env_id in fitness.STANDARDS:
        return fitness.STANDARDS[env_id]
    if target is None and env_id in gymnasium.registry:
        target = gymnasium.registry[env_id].reward_threshold
    if target is None or random is None or target <= random:
        return None
    return Standard(random, target, env_steps)


def _bodies(folder: Path) -> dict[str, dict[str, Floats]]:
    """A session's episodes by body, each with the updates that were made when it ended."""
    table = records.read_columns(folder / "episodes.csv")
    if not len(table.get("return", ())):
        return {}
    metrics = records.read_columns(folder / "metrics.csv")
    labels = np.asarray(table.get("body", np.full(len(table["return"]), ONE_BODY))).astype(str)
    found = {}
    for label in sorted(set(labels.tolist())):
        columns: dict[str, Floats] = {name: table[name][labels == label] for name in ("env_steps", "seconds", "return")}
        found[label] = columns | {"updates": _updates(metrics, label, columns["env_steps"])}
    return found


def _updates(metrics: Mapping[str, Any], label: str, env_steps: Floats) -> Floats:
    """How many updates a body's agent had made at some env steps; without metrics, as many as env steps."""
    if not len(metrics.get("env_steps", ())):
        return env_steps
    rows: Any = slice(None)
    if "agent" in metrics:  # of several, or of one in several environments
        agent, env, _ = (float(part) for part in label.split("."))
        rows = (metrics["agent"] == agent) & (metrics["env"] == env)
    steps = metrics["env_steps"][rows]
    if not len(steps):
        return env_steps
    made = metrics["updates"][rows] if "updates" in metrics else np.arange(1.0, len(steps) + 1)
    found: Floats = np.interp(env_steps, steps, made)
    return found


def _body(
    about: records.About, label: str, sessions: Mapping[int, dict[str, Floats]], baselines: Mapping[str, Baseline]
) -> dict[str, Any]:
    env, budget = _env_of(about, label), _budget(about, sessions)
    random = baselines.get(env)
    standard = standard_of(env, about.target, random.mean if random else None, budget)
    threshold = about.target if about.target is not None else standard.solved if standard else None
    each: dict[int, dict[str, Any]] = {}
    strengths: list[list[float]] = []
    vectors: list[fitness.Session2018] = []
    for seed, columns in sessions.items():
        each[seed] = _beside(columns, about.window, threshold, budget)
        if standard is not None:
            vectors.append(fitness.session_2018(columns["return"], columns["env_steps"], standard))
            each[seed]["slm2018"] = {
                "strength": vectors[-1].strength, "speed": vectors[-1].speed, "stability": vectors[-1].stability,
                "fitness": vectors[-1].fitness,
            }  # fmt: skip
        if random is not None:
            points = checkpoints(columns, budget)
            strengths.append((points["return"] - random.mean).tolist())
            each[seed]["slm5"] = fitness.session_5(
                points["return"], points["env_steps"], points["updates"], random.mean
            )
    finals = [one["final_return"] for one in each.values()]
    interval = fitness.iqm_interval([finals])
    beside = {name: _mean([one[name] for one in each.values()]) for name in BESIDE} | {
        "iqm": fitness.iqm(finals), "iqm_low": interval[0] if interval else None,
        "iqm_high": interval[1] if interval else None,
        "solved": sum(one["steps_to_target"] is not None for one in each.values()), "sessions": len(each),
    }  # fmt: skip
    slm5 = None
    if strengths:
        slm5 = _mean_of([one["slm5"] for one in each.values()])
        slm5 = (slm5 or {}) | {"consistency": fitness.consistency_5(strengths)}
    return {
        "env": env, "standard": vars(standard) if standard else None, "baseline": vars(random) if random else None,
        "slm2018": fitness.trial_2018(vectors) if vectors else None, "slm5": slm5, "beside": beside, "sessions": each,
    }  # fmt: skip


BESIDE = ("final_return", "best_return", "area_under_curve", "steps_to_target", "seconds_to_target")


def _beside(columns: dict[str, Floats], window: int, threshold: float | None, budget: float) -> dict[str, Any]:
    returns, steps = columns["return"], columns["env_steps"]
    means = curves.moving_mean(returns, window)
    full = means[window - 1 :] if len(means) >= window else means[-1:]
    reached = None if threshold is None else fitness.steps_to(returns, steps, threshold, window)
    seconds = None if threshold is None else fitness.steps_to(returns, columns["seconds"], threshold, window)
    return {
        "final_return": float(means[-1]), "best_return": float(full.max()),
        "area_under_curve": fitness.area_under_curve(returns, steps, budget),
        "steps_to_target": reached, "seconds_to_target": seconds,
    }  # fmt: skip


def checkpoints(columns: dict[str, Floats], budget: float) -> dict[str, Floats]:
    """Mean returns of the budget's CHECKPOINTS parts as far as the session went, env steps and updates at their ends.

    A part in which no episode ended has the return of the part before it; parts before the first episode are left out.
    """
    steps = columns["env_steps"]
    ends = np.linspace(0.0, max(budget, float(steps[-1])), CHECKPOINTS + 1)[1:]
    part = np.searchsorted(ends, steps)  # an episode that ends at a part's end belongs to it
    last = int(part[-1])
    found: dict[str, list[float]] = {"return": [], "env_steps": [], "updates": []}
    for index in range(int(part[0]), last + 1):
        inside = part == index
        value = float(columns["return"][inside].mean()) if inside.any() else found["return"][-1]
        at = min(float(ends[index]), float(steps[-1])) if index == last else float(ends[index])
        found["return"].append(value)
        found["env_steps"].append(at)
        found["updates"].append(float(np.interp(at, steps, columns["updates"])))
    return {name: np.asarray(values, np.float64) for name, values in found.items()}


def _env_of(about: records.About, label: str) -> str:
    if not about.spec:
        return about.title
    envs = about.spec["env"] if isinstance(about.spec["env"], list) else [about.spec["env"]]
    return records.env_label(envs[int(label.split(".")[1])])


def _budget(about: records.About, sessions: Mapping[int, dict[str, Floats]]) -> float:
    asked = (about.spec.get("meta") or {}).get("env_steps")
    return float(asked or max(columns["env_steps"][-1] for columns in sessions.values()))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _mean_of(rows: Sequence[Mapping[str, Any] | None]) -> dict[str, float | None] | None:
    """The mean of each name over those rows that are there; None without any."""
    known = [row for row in rows if row is not None]
    return {name: _mean([row[name] for row in known]) for name in known[0]} if known else None
