"""Which processes take part in a session, and which algorithms may. Knows settings, starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longrein.errors import SpecError
from longrein.lab import ray_cluster
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
    inference_batch: int | None = None
    """Rows of a batch at most, at which it waits for no more; None: those of all actors. Requests are not parted."""
    inference_wait_ms: float | None = None
    """Milliseconds that a request waits for those of other actors at most; None: until all who act have asked."""
    evaluator: bool = True
    """Whether evaluation while training is done by a process of its own, and training goes on meanwhile."""
    engine: Literal["processes", "ray"] = "processes"
    """What runs them: processes of this machine, or Ray actors on a cluster."""
    address: str = ""
    """Of a Ray cluster that runs: HOST:PORT, ray://HOST:PORT or auto; empty: Ray is started here, and ended."""
    actor_cpus: float = 1.0
    """Processors that a Ray actor takes of those that its machine offers."""
    ahead: int = 1
    """Rollouts that an actor may act before the learner has taken its last one; 0: they take turns, and lag is 0."""
    first_ready: int = 0
    """Environments whose answer an actor waits for before it acts on, each of them on a clock of its own, so that a
    slow one delays nobody; 0: it steps all of its environments together. Takes environments that have an url."""
    max_lag: int | None = None
    """Updates that weights may be old when what they acted is learnt from; older rollouts are dropped. None: any."""

    def __post_init__(self) -> None:
        for name in ("actors", "hogwild", "ahead", "first_ready"):
            if getattr(self, name) < 0:
                raise SpecError(f"{KEY}.{name}", f"must not be negative, got {getattr(self, name)}")
        if self.actor_cpus <= 0:
            raise SpecError(f"{KEY}.actor_cpus", f"must be above 0, got {self.actor_cpus}")
        if self.max_lag is not None and self.max_lag < 0:
            raise SpecError(f"{KEY}.max_lag", f"must not be negative, got {self.max_lag}", hint="null takes any")
        if self.actors and self.hogwild:
            raise SpecError(f"{KEY}.hogwild", "a session has either actors or hogwild workers", hint="leave one out")
        if self.hogwild and self.inference == "central":
            raise SpecError(f"{KEY}.inference", "hogwild workers act with weights of their own",
                            hint="central inference goes with actors")  # fmt: skip
        if self.inference != "central":
            for name in ("inference_batch", "inference_wait_ms"):
                if getattr(self, name) is not None:
                    raise SpecError(f"{KEY}.{name}", "goes with central inference", hint="inference: central")
        if self.inference_batch is not None and self.inference_batch < 1:
            raise SpecError(f"{KEY}.inference_batch", f"must be at least 1, got {self.inference_batch}",
                            hint="null waits for all actors")  # fmt: skip
        if self.inference_wait_ms is not None and self.inference_wait_ms < 0:
            raise SpecError(f"{KEY}.inference_wait_ms", f"must not be negative, got {self.inference_wait_ms}",
                            hint="null waits for all actors")  # fmt: skip


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
                        hint="a3c, acer and async_q have; {actors: N} goes with every algorithm")  # fmt: skip
    if topology.actors and topology.ahead and not able.tolerates_lag:
        raise SpecError(f"{KEY}.ahead", f"{algorithm} learns only from what its newest weights acted",
                        hint="ahead: 0 lets actors and learner take turns")  # fmt: skip
    _check_ray(topology)
    if topology.first_ready:
        _check_first_ready(topology, num_envs)
    if num_envs % count:
        raise SpecError(f"{KEY}.{role}", f"{count} cannot share {num_envs} environments equally",
                        hint=f"env.num_envs: {-(-num_envs // count) * count}")  # fmt: skip
    if topology.inference_batch is not None and topology.inference_batch > num_envs:
        raise SpecError(f"{KEY}.inference_batch", f"{topology.inference_batch} rows of {num_envs} environments",
                        hint="env.num_envs at most")  # fmt: skip
    if bodies != 1:
        raise SpecError(f"{KEY}.{role}", f"goes with one agent in one environment, and there are {bodies} bodies",
                        hint="topology: serial")  # fmt: skip


def _check_ray(topology: Topology) -> None:
    if topology.engine != "ray":
        for name, default in (("address", Topology.address), ("actor_cpus", Topology.actor_cpus)):
            if getattr(topology, name) != default:
                raise SpecError(f"{KEY}.{name}", "goes with Ray actors", hint="engine: ray")
        return
    if topology.hogwild:
        raise SpecError(f"{KEY}.engine", "hogwild workers share memory, so they are processes of one machine",
                        hint="engine: processes, or {actors: N, engine: ray}")  # fmt: skip
    if topology.inference == "central":
        raise SpecError(f"{KEY}.engine", "Ray actors choose with a copy of the policy each",
                        hint="inference: local, or engine: processes")  # fmt: skip
    if topology.address:
        ray_cluster.check_address(f"{KEY}.address", topology.address)
    else:
        ray_cluster.check_room_here(f"{KEY}.actors", topology.actors, topology.actor_cpus)


def _check_first_ready(topology: Topology, num_envs: int) -> None:
    key = f"{KEY}.first_ready"
    if not topology.actors or topology.inference == "central":
        raise SpecError(key, "goes with actors that have a copy of the policy each", hint="{actors: 1, first_ready: 1}")
    if not topology.ahead:
        raise SpecError(key, "needs actors that run ahead: a column of it may be older than the newest weights",
                        hint="ahead: 1")  # fmt: skip
    if topology.first_ready > num_envs // topology.actors:
        raise SpecError(key, f"{topology.first_ready} answers of {num_envs // topology.actors} environments",
                        hint="an actor has env.num_envs / actors of them")  # fmt: skip


def check_environments(
    topology: Topology | None, url: str | tuple[str, ...], *, elastic: bool, evaluated: bool
) -> None:
    """Raise SpecError, with a key of `env` or `meta`, where environments cannot be what a topology asks of them.

    url: theirs, empty where they are made here. elastic: whether they may come and go. evaluated: whether the session
    evaluates.
    """
    urls = (url,) if isinstance(url, str) else url
    first_ready = topology is not None and topology.first_ready > 0
    if elastic and not first_ready:
        raise SpecError("env.elastic", "environments come and go only where each answers for itself",
                        hint="meta.topology: {actors: 1, first_ready: 1}")  # fmt: skip
    if first_ready and not all(urls):
        raise SpecError(f"{KEY}.first_ready", "takes environments elsewhere, and env.id makes them in the actor",
                        hint="longrein serve ENV, and env.url: ws://HOST:PORT/ENV")  # fmt: skip
    if topology is not None and any("+listen://" in one for one in urls):
        if topology.actors != 1:
            raise SpecError(f"{KEY}.actors", "one process can wait at an url for systems that dial in",
                            hint="actors: 1")  # fmt: skip
        if evaluated:
            raise SpecError("meta.eval.episodes", "the actor waits at the url, and the session, which evaluates, "
                            "cannot", hint="meta.eval.episodes: 0")  # fmt: skip
