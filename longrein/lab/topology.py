"""Which processes take part in a session, and which algorithms may. Knows settings, starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longrein.errors import SpecError
from longrein.learn import algorithms

KEY = "meta.topology"


@dataclass(frozen=True)
class Topology:
    """A session in several processes; exactly one of `actors` and `hogwild` is not 0."""

    actors: int = 0
    """Processes that step environments, an equal part of `env.num_envs` each; one learner takes what they send."""
    hogwild: int = 0
    """Workers that each step environments and learn, and write to the same weights without a lock."""
    inference: Literal["local", "central"] = "local"
    """Who chooses actions: each actor with a copy of the policy, or one process for all of them, in batches."""
    engine: Literal["processes", "ray"] = "processes"
    """What runs them: processes of this machine, or Ray actors on a cluster."""
    ahead: int = 1
    """Rollouts that an actor may act before the learner has taken its last one; 0: they take turns, and lag is 0."""
    max_lag: int | None = None
    """Updates that weights may be old when what they acted is learnt from; older rollouts are dropped. None: any."""

    def __post_init__(self) -> None:
        for name in ("actors", "hogwild", "ahead"):
            if getattr(self, name) < 0:
                raise SpecError(f"{KEY}.{name}", f"must not be negative, got {getattr(self, name)}")
        if self.max_lag is not None and self.max_lag < 0:
            raise SpecError(f"{KEY}.max_lag", f"must not be negative, got {self.max_lag}", hint="null takes any")
        if self.actors and self.hogwild:
            raise SpecError(f"{KEY}.hogwild", "a session has either actors or hogwild workers", hint="leave one out")
        if self.hogwild and self.inference == "central":
            raise SpecError(f"{KEY}.inference", "hogwild workers act with weights of their own",
                            hint="central inference goes with actors")  # fmt: skip


def check(topology: Topology, algorithm: str, num_envs: int, bodies: int) -> None:
    """Raise SpecError where a topology asks for what it, or the algorithm, cannot do.

    num_envs: copies of the environment, over all processes. bodies: in the session.
    """
    count = topology.actors or topology.hogwild
    if not count:
        raise SpecError(KEY, "asks for no process", hint="{actors: 2}, {hogwild: 2}, or serial")
    role = "actors" if topology.actors else "hogwild"
    able = algorithms.abilities(algorithm)
    if topology.hogwild and not able.shares_weights:
        raise SpecError(f"{KEY}.hogwild", f"{algorithm} has no rule for workers that share weights",
                        hint="a3c has; {actors: N} goes with every algorithm")  # fmt: skip
    if topology.actors and topology.ahead and not able.tolerates_lag:
        raise SpecError(f"{KEY}.ahead", f"{algorithm} learns only from what its newest weights acted",
                        hint="ahead: 0 lets actors and learner take turns")  # fmt: skip
    if num_envs % count:
        raise SpecError(f"{KEY}.{role}", f"{count} cannot share {num_envs} environments equally",
                        hint=f"env.num_envs: {-(-num_envs // count) * count}")  # fmt: skip
    if bodies != 1:
        raise SpecError(f"{KEY}.{role}", f"goes with one agent in one environment, and there are {bodies} bodies",
                        hint="topology: serial")  # fmt: skip
    for missing, key in (
        (topology.hogwild > 0, "hogwild"),
        (topology.inference == "central", "inference"),
        (topology.engine == "ray", "engine"),
    ):
        if missing:
            raise SpecError(f"{KEY}.{key}", f"{getattr(topology, key)} is not built yet",
                            hint="{actors: N} on one machine is")  # fmt: skip
