"""What sessions in several processes gain and cost.

    python benchmarks/scale.py --case channel

channel: experience from one process to another, rollouts of 20 steps of 8 environments with frames of 84x84x4 bytes
(observations and successors). The producer writes every byte of each, and the consumer copies every byte out, as a
learner with several actors does. Beside it, in turns: the same arrays pickled through a pipe, and the two copies alone,
one after the other in one process. Medians of GB/s over rounds.

actors: env steps a second of sessions that train IMPALA in 8 environments whose step takes 1 ms, in turns: in one
process, and with 2 actors; 1 ms of a processor (busy: it needs two that are idle), and 1 ms of waiting (asleep).
Measured from one row of metrics to the last, so that starting is not in it.

ray: the same session with 2 actors as processes and as Ray actors on this machine, in turns: IMPALA in environments
that wait for 1 ms, and in those that cost nothing; a random policy in those that give frames of 84x84x4 bytes.

fleet: a learner fed by 1,000 simulated actors for --minutes; see fleet.py. Only where it is asked for.

inference: env steps a second in 64 environments, with one inference process in batches and with one inference for each
environment; see central.py.

latency: env steps a second of one actor in 64 remote environments, 25 ms a step; see latency.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from central import case_inference
from fleet import case_fleet
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from latency import case_latency

from longrein.lab.channel import Arrays, Field, Form, Inlet, Outlet, Ring, size_of
from longrein.lab.course import SessionSettings
from longrein.lab.records import read_table
from longrein.lab.session import run_session
from longrein.lab.topology import Topology
from longrein.learn import algorithms

STEPS, ENVS = 20, 8
FRAMES: Form = (
    Field("observation", (STEPS, ENVS, 84, 84, 4), "|u1"),
    Field("next_observation", (STEPS, ENVS, 84, 84, 4), "|u1"),
    Field("action", (STEPS, ENVS), "<i8"),
    Field("reward", (STEPS, ENVS), "<f4"),
    Field("log_prob", (STEPS, ENVS), "<f4"),
)
SLOTS = 4
SPAWN = multiprocessing.get_context("spawn")


def empty(form: Form) -> Arrays:
    """Arrays of a form, every page of them touched."""
    return {one.name: np.ones(one.shape, one.dtype) for one in form}


def copy(to: Arrays, of: Arrays) -> None:
    """Every byte."""
    for name, array in of.items():
        to[name][...] = array


def through_memory(pipe: Connection, name: str, count: int) -> None:
    """A producer of so many rollouts."""
    made, outlet = empty(FRAMES), Outlet(pipe, Ring(FRAMES, SLOTS, name))
    for number in range(count):
        slot, arrays, _ = outlet.take()
        copy(arrays, made)
        outlet.send(slot, number)
    pipe.recv()


def through_a_pipe(pipe: Connection, count: int) -> None:
    """The same, pickled."""
    made = empty(FRAMES)
    for _ in range(count):
        pipe.send(made)
    pipe.recv()


def channel(count: int) -> float:
    """GB/s through a ring."""
    ours, theirs = SPAWN.Pipe()
    ring = Ring(FRAMES, SLOTS)
    process = SPAWN.Process(target=through_memory, args=(theirs, ring.name, count))
    process.start()
    inlet, batch = Inlet(ours, ring), empty(FRAMES)
    for number in range(count):
        slot, arrays, said = inlet.receive()
        if number == SLOTS:
            begun = time.perf_counter()
        assert said == number
        copy(batch, arrays)
        inlet.free(slot)
    seconds = time.perf_counter() - begun
    ours.send(None)
    process.join()
    del arrays
    ring.close()
    return size_of(FRAMES) * (count - SLOTS - 1) / seconds / 1e9


def pickled(count: int) -> float:
    """GB/s through a pipe."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=through_a_pipe, args=(theirs, count))
    process.start()
    batch = empty(FRAMES)
    for number in range(count):
        copy(batch, ours.recv())
        if number == 1:
            begun = time.perf_counter()
    seconds = time.perf_counter() - begun
    ours.send(None)
    process.join()
    return size_of(FRAMES) * (count - 2) / seconds / 1e9


def copies(count: int) -> float:
    """GB/s of both copies, one after the other."""
    made, between, batch = empty(FRAMES), empty(FRAMES), empty(FRAMES)
    begun = time.perf_counter()
    for _ in range(count):
        copy(between, made)
        copy(batch, between)
    return size_of(FRAMES) * count / (time.perf_counter() - begun) / 1e9


class Busy(gymnasium.Env[Any, Any]):
    """A step takes 1 ms of a processor."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
    action_space: gymnasium.Space[Any] = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        """Always the same."""
        super().reset(seed=seed)
        return np.zeros(4, np.float32), {}

    def step(self, action: Any) -> Any:
        """Processor time, not time on the clock: another process must not take part of it."""
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        return np.zeros(4, np.float32), 0.0, False, False, {}


class Asleep(Busy):
    """A step takes 1 ms of waiting."""

    def step(self, action: Any) -> Any:
        """As an environment that is elsewhere."""
        time.sleep(0.001)
        return np.zeros(4, np.float32), 0.0, False, False, {}


def vector(kind: type[Busy], count: int) -> Any:
    """So many, one after the other."""
    return SyncVectorEnv([kind] * count, autoreset_mode=AutoresetMode.SAME_STEP)


class Still(Busy):
    """A step costs nothing."""

    def step(self, action: Any) -> Any:
        """What the link and the learner cost is all there is."""
        return np.zeros(4, np.float32), 0.0, False, False, {}


class Frames(Busy):
    """A step costs nothing, and shows a frame."""

    observation_space = gymnasium.spaces.Box(0, 255, (84, 84, 4), np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        """Always the same."""
        gymnasium.Env.reset(self, seed=seed)
        return np.zeros((84, 84, 4), np.uint8), {}

    def step(self, action: Any) -> Any:
        """Always the same."""
        return np.zeros((84, 84, 4), np.uint8), 0.0, False, False, {}


def session_rate(kind: type[Busy], topology: Topology | None, env_steps: int, algorithm: str = "impala") -> float:
    """Env steps a second of one session."""
    config_class, _ = algorithms.load(algorithm)
    asked = SessionSettings("", algorithm, config_class(), num_envs=8, max_env_steps=env_steps, evaluation_episodes=0,
                            checkpoint_every=10**9, topology=topology)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = read_table(run_session(asked, Path(folder), partial(vector, kind)).folder / "metrics.csv")
    steps, seconds = rows["env_steps"], rows["seconds"]
    return (steps[-1] - steps[1]) / (seconds[-1] - seconds[1])


def case_actors(rounds: int) -> dict[str, float]:
    """Case (c) of the issue."""
    ways = {
        f"{name}, {how}": (kind, topology)
        for how, kind in (("busy", Busy), ("asleep", Asleep))
        for name, topology in (("serial", None), ("two actors", Topology(actors=2)))
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (kind, topology) in ways.items():
            rates[name].append(session_rate(kind, topology, 3_000))
    return {name: statistics.median(found) for name, found in rates.items()}


def case_ray(rounds: int) -> dict[str, float]:
    """Case (f) of the issue."""
    ways: dict[str, tuple[type[Busy], int, str]] = {
        "asleep": (Asleep, 4_000, "impala"), "still": (Still, 30_000, "impala"), "frames": (Frames, 12_000, "random")
    }  # fmt: skip
    engines = {"processes": Topology(actors=2), "ray": Topology(actors=2, engine="ray")}
    rates: dict[str, list[float]] = {f"{name}, {engine}": [] for name in ways for engine in engines}
    for _ in range(rounds):
        for name, (kind, env_steps, algorithm) in ways.items():
            for engine, topology in engines.items():
                rates[f"{name}, {engine}"].append(session_rate(kind, topology, env_steps, algorithm))
    found = {name: statistics.median(figures) for name, figures in rates.items()}
    return found | {f"{name}, ratio": found[f"{name}, ray"] / found[f"{name}, processes"] for name in ways}


def case_channel(rounds: int) -> dict[str, float]:
    """Case (d) of the issue."""
    ways: dict[str, Callable[[], float]] = {
        "shared memory": lambda: channel(300), "pickled": lambda: pickled(40), "copies alone": lambda: copies(100)
    }  # fmt: skip
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(way())
    return {name: statistics.median(found) for name, found in rates.items()}


CASES = {
    "channel": case_channel,
    "actors": case_actors,
    "ray": case_ray,
    "fleet": case_fleet,
    "inference": case_inference,
    "latency": case_latency,
}
UNITS = {
    "channel": "GB/s",
    "actors": "env steps/s",
    "ray": "env steps/s",
    "fleet": "",
    "inference": "env steps/s",
    "latency": "env steps/s",
}


def main() -> None:
    """Run the cases asked for, and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the fleet")
    parser.add_argument("--json", help="a file for the figures, beside the lines printed")
    asked = parser.parse_args()
    cases = asked.case or [name for name in CASES if name != "fleet"]
    found = {name: CASES[name](asked.minutes if name == "fleet" else asked.rounds) for name in cases}
    for name, figures in found.items():
        print(name)
        for way, figure in figures.items():
            print(f"  {way:<18} {figure:8.2f} {'' if way.endswith('ratio') else UNITS[name]}".rstrip())
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
