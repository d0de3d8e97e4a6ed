"""A learner that 1,000 simulated actors feed: whether its queue stays bounded and its memory flat.

The learner's side is the real one: the crew, its pipes, a ring of shared memory for each actor, IMPALA with 2 layers of
16 units. Each producer process plays 500 actors: it answers on each one's pipe as an actor would, and copies ready-made
rollouts of CartPole's size into each slot that comes free, as fast as back-pressure lets it. So it asks more of the
learner than 1,000 actors that step environments would.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import selectors
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil

from longrein.lab.acting_role import Hello, Role
from longrein.lab.actor_process import Start
from longrein.lab.assembly import Played
from longrein.lab.channel import Arrays, Ring, Weights, form_of
from longrein.lab.course import seed_of
from longrein.lab.crew import ProcessCrew
from longrein.lab.topology import Topology
from longrein.learn import algorithms

ACTORS, EACH = 1000, 500
STEPS = 20
SAMPLE_SECONDS = 5.0
OBSERVATIONS = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
ACTIONS = gymnasium.spaces.Discrete(2)
SPAWN = multiprocessing.get_context("spawn")
RESULTS = Path(__file__).with_name("fleet_results.json")


def nothing(count: int) -> Any:
    """Nobody opens environments here."""
    raise AssertionError("simulated actors step nothing")


def ready_made(seed: int) -> Arrays:
    """A rollout of one environment, as IMPALA's policy leaves it."""
    rng = np.random.default_rng(seed)
    observation = rng.uniform(-1.0, 1.0, (STEPS + 1, 1, 4)).astype(np.float32)
    never = np.zeros((STEPS, 1), np.bool_)
    return {
        "observation": observation[:-1], "action": rng.integers(0, 2, (STEPS, 1)),
        "reward": np.ones((STEPS, 1), np.float32), "next_observation": observation[1:], "terminated": never,
        "truncated": never, "valid": ~never, "extras.log_prob": np.full((STEPS, 1), np.log(0.5), np.float32),
        "extras.version": np.zeros((STEPS, 1), np.int64),
    }  # fmt: skip


class Simulated:
    """One actor, as its pipe sees it."""

    def __init__(self, pipe: Connection, made: Arrays) -> None:
        self._pipe, self._made = pipe, made
        self._ring: Ring | None = None
        self._weights: Weights | None = None
        pipe.send(Hello(OBSERVATIONS, ACTIONS, 1))

    def hear(self) -> None:
        """Do what the learner said: begin, take the ring, or fill a slot."""
        said = self._pipe.recv()
        if isinstance(said, Start):
            self._weights = Weights(said.weights[1], said.weights[0])
            self._pipe.send(form_of(self._made))
        elif self._ring is None:
            self._ring = Ring(form_of(self._made), said[1], said[0])
        else:
            assert self._weights is not None
            slot, _ = said
            for name, array in self._made.items():
                self._ring.slots[slot][name][...] = array
            self._pipe.send((slot, Played(self._weights.version, (), 0, 0.1, 0.0, None)))


def produce(pipes: list[Connection]) -> None:
    """Play an actor at each pipe until the learner closes them."""
    made = [ready_made(seed) for seed in range(16)]
    with selectors.DefaultSelector() as selector:
        for index, pipe in enumerate(pipes):
            selector.register(pipe, selectors.EVENT_READ, Simulated(pipe, made[index % len(made)]))
        try:
            while True:
                for key, _ in selector.select():
                    key.data.hear()
        except (EOFError, OSError):
            os._exit(0)  # the learner is done


class Fleet(ProcessCrew):
    """A crew whose actors live in few processes."""

    def open(self) -> Hello:
        """Start the producers, and wait until each actor has said hello."""
        ends = [SPAWN.Pipe() for _ in self._members]
        self.producers = []
        for first in range(0, len(ends), EACH):
            theirs = [pair[1] for pair in ends[first : first + EACH]]
            process = SPAWN.Process(target=produce, args=(theirs,), daemon=True)
            process.start()
            self.producers.append(process)
            for member, (ours, end) in zip(self._members[first:], ends[first : first + EACH], strict=False):
                member.process, member.pipe, member.since = process, ours, time.monotonic()
                end.close()
        while any(member.hello is None for member in self._members):
            self._listen(lambda: False)
        first_hello = self._members[0].hello
        assert first_hello is not None
        return first_hello

    @property
    def queued(self) -> int:
        """Rollouts that the learner holds and has not learnt from."""
        return len(self._arrived)


def shared_bytes() -> int:
    """Of our segments in /dev/shm, as far as they are in memory."""
    return sum(path.stat().st_blocks * 512 for path in Path("/dev/shm").glob(f"longrein-{os.getpid()}-*"))


def feed(actors: int, seconds: float, sample_seconds: float) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Learn from so many simulated actors for so long: what it cost, and samples of memory and queue."""
    config_class, build = algorithms.load("impala")
    config = algorithms.config_from(config_class, {"net": {"hidden": [16, 16]}})
    algorithm = build(config, OBSERVATIONS, ACTIONS, 0)
    assert algorithm.rollout_steps == STEPS
    crew = Fleet(Role(nothing, 1, "impala", config), Topology(actors=actors), partial(seed_of, 0))
    samples: list[dict[str, float]] = []
    try:
        crew.open()
        here = psutil.Process()
        others = [psutil.Process(process.pid) for process in crew.producers]
        crew.publish(algorithm.policy, 0)
        version = rollouts = 0
        spent = waited = 0.0
        fullest, begun, sampled = 0, time.monotonic(), -sample_seconds
        while (now := time.monotonic() - begun) < seconds or version < 4:
            if version == 2:  # all have begun
                rollouts, spent, waited, first = 0, 0.0, 0.0, time.monotonic()
            before = time.thread_time()
            came = crew.collect(None, lambda: False)
            spent += time.thread_time() - before
            assert came is not None
            crew.finished()
            rollouts += actors
            waited += came[1]["learner_waiting"]
            fullest = max(fullest, crew.queued)
            algorithm.update(came[0])
            version += 1
            crew.publish(algorithm.policy, version)
            if now - sampled >= sample_seconds:
                sampled = now
                samples.append({
                    "seconds": round(now, 1), "learner_mib": here.memory_info().rss / 2**20,
                    "producers_mib": sum(one.memory_info().rss for one in others) / 2**20,
                    "shm_mib": shared_bytes() / 2**20, "queue": crew.queued, "rollouts": version * actors,
                })  # fmt: skip
        cost = {
            "rollouts/s": rollouts / (time.monotonic() - first), "us of collecting per rollout": spent / rollouts * 1e6,
            "learner waiting": waited / (version - 2), "largest queue": float(fullest),
            "most there can be": float(actors * (crew.topology.ahead + 1)),
        }  # fmt: skip
        return cost, samples
    finally:
        crew.close()


def slope(samples: list[dict[str, float]], name: str) -> float:
    """Per minute, over the last 80 % of the time."""
    late = samples[len(samples) // 5 :]
    if len(late) < 3:
        return float("nan")
    return float(np.polyfit([one["seconds"] / 60 for one in late], [one[name] for one in late], 1)[0])


def case_fleet(minutes: float) -> dict[str, float]:
    """Case (e) of the issue. The samples go to fleet_results.json."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8 * ACTORS)), hard))
    found: dict[str, float] = {}
    for actors in (10, 100):
        cost, _ = feed(actors, 3.0, 60.0)
        found[f"us per rollout, {actors} actors"] = cost["us of collecting per rollout"]
    cost, samples = feed(ACTORS, 60 * minutes, min(SAMPLE_SECONDS, 3 * minutes))
    found[f"us per rollout, {ACTORS} actors"] = cost.pop("us of collecting per rollout")
    found |= cost
    for name in ("learner_mib", "producers_mib", "shm_mib"):
        found[f"{name} at the end"] = samples[-1][name]
        found[f"{name} per minute"] = slope(samples, name)
    RESULTS.write_text(json.dumps({"minutes": minutes, "figures": found, "samples": samples}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    for figure, value in case_fleet(1.0).items():
        print(f"{figure:<32} {value:12.3f}")
