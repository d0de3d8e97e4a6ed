"""Experience -> algorithm.update -> metrics and checkpoints. Knows no environment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from longrein.lab import checkpoint
from longrein.lab.records import SessionRecords
from longrein.learn.algorithms import Algorithm
from longrein.learn.batch import Transition
from longrein.learn.rollout import Rollout


@dataclass(frozen=True)
class Identity:
    """What a checkpoint says of itself, so that it is not loaded into something else."""

    algorithm: str
    """Name in the table of algorithms."""
    config: dict[str, Any]
    """The algorithm's settings, plain."""
    observation_space: str
    """As Gymnasium prints it."""
    action_space: str
    """As Gymnasium prints it."""


METRICS_EVERY = 200
"""Env steps that one row of metrics covers at least: an algorithm that updates at every step would drown in rows."""


class Learner:
    """Gathers transitions into rollouts, and learns from each. `version` counts the weights that were published."""

    def __init__(self, algorithm: Algorithm, identity: Identity, records: SessionRecords) -> None:
        self.algorithm = algorithm
        self.identity = identity
        self.records = records
        self.version = 0
        self._rollout = Rollout(algorithm.rollout_steps)
        self._measured: list[dict[str, float]] = []  # since the last row
        self._row_at = -METRICS_EVERY

    def take(self, transition: Transition, env_steps: int) -> bool:
        """Take in one vector step; True when it made an update. env_steps: of the session so far, for the records."""
        self._rollout.add(transition)
        if not self._rollout.full:
            return False
        batch = self._rollout.take()
        if not batch.valid.any():
            return False  # every environment was lost at once, for a whole rollout
        self._measured.append(self.algorithm.update(batch))
        self.version += 1
        if env_steps - self._row_at >= METRICS_EVERY:
            self.records.add_metrics(env_steps, means(self._measured))
            self._measured, self._row_at = [], env_steps
        return True

    def save(self, env_steps: int) -> None:
        """Write the checkpoint. Raises CheckpointError."""
        state = {
            "identity": vars(self.identity),
            "version": self.version,
            "env_steps": env_steps,
            "state": self.algorithm.state_dict(),
        }
        checkpoint.save(self.records.checkpoint, state)


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each name over several updates; NaN, which says that nothing was measured, does not count."""
    if len(rows) == 1:
        return rows[0]
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows if not math.isnan(row[name])]
        found[name] = sum(values) / len(values) if values else float("nan")
    return found
