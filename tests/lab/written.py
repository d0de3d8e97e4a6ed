"""Run folders written by hand, as sessions would leave them: for tests of what is made of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longrein.lab import records, spec
from longrein.lab.actor import Episode

SMALL = {
    "agent": {"algorithm": {"name": "ppo", "rollout_steps": 32}, "net": {"hidden": [16]}},
    "env": {"id": "CartPole-v1", "num_envs": 2},
    "meta": {"env_steps": 4000, "max_session": 2, "target": 50.0, "window": 10},
}


def write_run(data: Path, name: str = "small", **meta: Any) -> Path:
    """A run folder of a spec, without sessions."""
    made = spec.from_plain(name, SMALL | {"meta": SMALL["meta"] | meta})  # type: ignore[operator]
    return records.create_run(data, name, {"name": name, "spec": made.plain, "fingerprint": made.fingerprint})


def write_session(run: Path, seed: int, returns: list[float], length: int = 20, finished: bool = True) -> Path:
    """A session whose episodes take `length` env steps each, with a row of metrics every second episode."""
    with records.SessionRecords(run, seed) as session:
        for index, value in enumerate(returns):
            steps = (index + 1) * length
            session.add_episodes([Episode(index % 2, steps, length, value, False)])
            if index % 2:
                session.add_metrics(steps, {"updates": (index + 1) / 2, "value_loss": 5.0 / steps, "entropy": 0.5})
        if finished:
            session.add_evaluation(len(returns) * length, [(2**30, 7, 7.0), (2**30 + 1, 9, 9.0)])
            result = {"status": "budget spent", "env_steps": len(returns) * length, "seconds": 2.0,
                      "episodes": len(returns), "training_mean": sum(returns[-10:]) / 10, "evaluation": [7.0, 9.0],
                      "restarts": 0}  # fmt: skip
            session.finish(result)
        return session.folder
