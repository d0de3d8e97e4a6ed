"""Experience -> algorithm.update -> metrics, and what a checkpoint says of it. Knows no environment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longrein.lab.records import SessionRecords
from longrein.learn.algorithms import Algorithm
from longrein.learn.batch import Batch, Transition
from longrein.learn.rollout import Rollout
from longrein.learn.sharing import Shared


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
    bodies: tuple[str, ...] = ("0.0.0",)
    """Whose weights these are: "a.e.b" each."""
    spaces: tuple[dict[str, Any] | None, dict[str, Any] | None] = (None, None)
    """Both, as data that they can be made from again; None for what cannot be said so."""


METRICS_EVERY = 200
"""Env steps that one row of metrics covers at least: an algorithm that updates at every step would drown in rows."""


class Learner:
    """Gathers transitions into rollouts, and learns from each. `version` counts the weights that were published.

    where: the agent and the environment, in a session with several. shared: the weights that others have, too.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        identity: Identity,
        records: SessionRecords,
        *,
        where: tuple[int, int] | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.identity = identity
        self.records = records
        self.where = where
        self.version = 0
        self.beside: dict[str, float] = {}  # what was recorded beside the last update's own measures
        self._shared = shared
        self._rollout = Rollout(algorithm.rollout_steps)
        self._measured: list[dict[str, float]] = []  # since the last row
        self._row_at = -METRICS_EVERY

    def take(self, transition: Transition, env_steps: int) -> bool:
        """Take in one vector step; True when it made an update. env_steps: of the session so far, for the records."""
        self._rollout.add(transition)
        return self._rollout.full and self.learn(self._rollout.take(), env_steps)

    def learn(self, batch: Batch, env_steps: int, beside: Mapping[str, float] | None = None) -> bool:
        """Learn from a whole rollout; True when it made an update. beside: what else is to be recorded of it."""
        if not batch.valid.any():
            return False  # every environment was lost at once, for a whole rollout
        measured = self.algorithm.update(batch)
        if self._shared is not None:
            self._shared.spread(self.algorithm)
        self.note(measured, env_steps, beside)
        return True

    def note(
        self,
        measured: Mapping[str, float],
        env_steps: int,
        beside: Mapping[str, float] | None = None,
        updates: int = 1,
    ) -> None:
        """Record what was measured of updates, made here or elsewhere; several as their mean."""
        self.beside = dict(beside or {})
        self._measured.append({**measured, **self.beside})
        self.version += updates
        if env_steps - self._row_at >= METRICS_EVERY:
            row = {"updates": float(self.version), **means(self._measured)}
            self.records.add_metrics(env_steps, row, self.where)
            self._measured, self._row_at = [], env_steps

    def published(self) -> dict[str, Any]:
        """What a checkpoint says of the algorithm."""
        return {"identity": vars(self.identity), "version": self.version, "state": self.algorithm.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """All else that decides what comes next, and what is recorded next."""
        return {"rollout": self._rollout.state_dict(), "measured": self._measured, "row_at": self._row_at}

    def load(self, published: dict[str, Any], state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same identity."""
        self.version = published["version"]
        self.algorithm.load_state_dict(published["state"])
        self._rollout.load_state_dict(state["rollout"])
        self._measured, self._row_at = state["measured"], state["row_at"]


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each name over several updates; NaN, which says that nothing was measured, does not count."""
    if len(rows) == 1:
        return rows[0]
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows if not math.isnan(row[name])]
        found[name] = sum(values) / len(values) if values else float("nan")
    return found
