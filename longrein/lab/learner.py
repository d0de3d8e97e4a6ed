"""Experience -> algorithm.update -> metrics and checkpoints. Knows no environment."""

from __future__ import annotations

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


class Learner:
    """Gathers transitions into rollouts, and learns from each. `version` counts the weights that were published."""

    def __init__(self, algorithm: Algorithm, identity: Identity, records: SessionRecords) -> None:
        self.algorithm = algorithm
        self.identity = identity
        self.records = records
        self.version = 0
        self._rollout = Rollout(algorithm.rollout_steps)

    def take(self, transition: Transition, env_steps: int) -> bool:
        """Take in one vector step; True when it made an update. env_steps: of the session so far, for the records."""
        self._rollout.add(transition)
        if not self._rollout.full:
            return False
        batch = self._rollout.take()
        if not batch.valid.any():
            return False  # every environment was lost at once, for a whole rollout
        metrics = self.algorithm.update(batch)
        self.version += 1
        self.records.add_metrics(env_steps, metrics)
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
