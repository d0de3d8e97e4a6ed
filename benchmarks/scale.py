"""What sessions in several processes gain and cost.

    python benchmarks/scale.py --case channel

channel: experience from one process to another, rollouts of 20 steps of 8 environments with frames of 84x84x4 bytes
(observations and successors). The producer writes every byte of each, and the consumer copies every byte out, as a
learner with several actors does. Beside it, in turns: the same arrays pickled through a pipe, and the two copies alone,
one after the other in one process. Medians of GB/s over rounds.

actors: env steps a second of sessions that train IMPALA in 8 environments whose step takes 1 ms, in turns: in one
process, and with 2 actors; 1 ms of a processor (busy: it needs two that are idle), and 1 ms of waiting (asleep).
Measured from one row of metrics to the last, so that starting is not in it.
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
from gymnasium.vector import AutoresetMode, SyncVectorEnv

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


def session_rate(kind: type[Busy], topology: Topology | None, env_steps: int) -> float:
    """Env steps a second of one session."""
    config_class, _ = algorithms.load("impala")
    asked = SessionSettings("", "impala", config_class(), num_envs=8, max_env_steps=env_steps, evaluation_episodes=0,
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


CASES = {"channel": case_channel, "actors": case_actors}
UNITS = {"channel": "GB/s", "actors": "env steps/s"}


def main() -> None:
    """Run the cases asked for, and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="a file for the figures, beside the lines printed")
    asked = parser.parse_args()
    found = {name: CASES[name](asked.rounds) for name in asked.case or CASES}
    for name, figures in found.items():
        print(name)
        for way, figure in figures.items():
            print(f"  {way:<18} {figure:8.2f} {UNITS[name]}")
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
