"""What a course trains: learners, and where their experience comes from. Knows neither processes nor environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from longrein.lab.actor import Episode
from longrein.lab.learner import Learner
from longrein.learn.algorithms import Policy
from longrein.learn.batch import Batch


class Player(Protocol):
    """Somebody who acts, here or elsewhere."""

    @property
    def bodies(self) -> Sequence[str]:
        """Whose episodes these are, as "a.e.b"; one empty name where there is one body."""

    @property
    def restarts(self) -> int:
        """Environments that were lost and replaced."""

    def finished(self) -> list[Episode]:
        """Episodes that ended since the last call, in order."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes next, but for the policy and the environments."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""


class Scene(Protocol):
    """Where players act: an arena of this process, or a crew of others."""

    @property
    def actors(self) -> Sequence[Player]:
        """Who acts here."""

    @property
    def env_steps(self) -> int:
        """Steps of one environment so far, over all copies together."""

    @property
    def copies(self) -> int:
        """Env steps of one vector step, at most."""

    @property
    def saves(self) -> bool:
        """Whether there is no need of a cut before a checkpoint."""

    def begin(self, seed: int) -> None:
        """Begin new episodes, copy k with seed + k."""

    def save_state(self) -> Any:
        """The environments' state, or None."""

    def reset_to(self, state: Any) -> None:
        """Put a saved state back; the actors go on from what they hold."""


class Station(Protocol):
    """A scene, and a learner for each of its players."""

    @property
    def name(self) -> str:
        """Told by its first body; empty where there is one station."""

    @property
    def env(self) -> int:
        """Which environment it is."""

    @property
    def arena(self) -> Scene:
        """Where they act."""

    @property
    def learners(self) -> Sequence[Learner]:
        """Who learns there."""

    @property
    def chunk(self) -> int:
        """Vector steps between two looks at anything but learning."""

    def advance(self, cut: int | None, stopped: Callable[[], bool]) -> None:
        """Play a chunk, or less of it where it is stopped, and learn. cut: the seed of one after its last step."""

    def rest(self) -> None:
        """Let nobody learn until the next `advance`, and let the learners hold the newest weights."""


class Crew(Scene, Protocol):
    """Actors elsewhere, who act with the weights that were published last and send what came of it."""

    @property
    def published(self) -> bool:
        """Whether there are weights to act with."""

    def publish(self, policy: Policy, version: int) -> None:
        """Let the actors act with these weights from their next rollout on."""

    def collect(self, cut: int | None, stopped: Callable[[], bool]) -> tuple[Batch, Mapping[str, float]] | None:
        """The next batch [T, B, ...], good until the next call, and what was measured of it; None when stopped.

        cut: seed of one after it, for actors that take turns with the learner.
        """


@dataclass(frozen=True)
class Crewed:
    """A crew, and the learner that it acts for."""

    arena: Crew
    learners: tuple[Learner]
    name: str = ""
    env: int = 0

    @property
    def chunk(self) -> int:
        """Vector steps of a batch."""
        return self.learners[0].algorithm.rollout_steps

    def advance(self, cut: int | None, stopped: Callable[[], bool]) -> None:
        """Take a batch and learn from it, unless it is stopped before. cut: the seed of one after its last step."""
        (learner,) = self.learners
        if not self.arena.published:
            self.arena.publish(learner.algorithm.policy, learner.version)
        came = self.arena.collect(cut, stopped)
        if came is not None and learner.learn(came[0], self.arena.env_steps, came[1]):
            self.arena.publish(learner.algorithm.policy, learner.version)

    def rest(self) -> None:
        """Nobody learns in between."""
