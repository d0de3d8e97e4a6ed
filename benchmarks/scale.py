"""What sessions in several processes gain and cost.

    python benchmarks/scale.py --case channel

channel: experience from one process to another, rollouts of 20 steps of 8 environments with frames of 84x84x4 bytes
(observations and successors). The producer writes every byte of each, and the consumer copies every byte out, as a
learner with several actors does. Beside it, in turns: the same arrays pickled through a pipe, and the two copies alone,
one after the other in one process. Medians of GB/s over rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

from longrein.lab.channel import Arrays, Field, Form, Inlet, Outlet, Ring, size_of

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


CASES = {"channel": case_channel}


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
            print(f"  {way:<16} {figure:8.2f} GB/s")
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
