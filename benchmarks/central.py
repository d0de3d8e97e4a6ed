"""Who chooses actions for 64 environments: one inference process in batches, or one inference for each environment.

Case (b) of scale.py. 64 environments whose step takes 2 ms of waiting, a thread each, in two processes; PPO's policy
with two layers of 256. Three ways, in turns:

- batches: every thread asks the inference process, which answers together what is asked within 1 ms.
- one by one: the same processes and the same wires, but each request is answered alone.
- copies: no inference process; each thread acts for its environment with its process' copy of the policy.

Env steps a second over some seconds, after the first; nothing is learnt.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np
import torch

from longrein.lab.acting_role import policy_arrays
from longrein.lab.channel import Weights, form_of
from longrein.lab.inference import Asking, Desk, Place
from longrein.lab.inference_keeper import InferenceKeeper
from longrein.lab.role_process import context_for, enact
from longrein.lab.topology import Topology
from longrein.learn import algorithms
from longrein.learn.algorithms import Policy

ENVIRONMENTS, PROCESSES, SECONDS = 64, 2, 4.0
OBSERVATIONS = gymnasium.spaces.Box(-1.0, 1.0, (64,), np.float32)
ACTIONS: gymnasium.Space[Any] = gymnasium.spaces.Discrete(8)
STEP_SECONDS = 0.002


def config() -> Any:
    """PPO's, with the net."""
    config_class, _ = algorithms.load("ppo")
    return algorithms.config_from(config_class, {"net": {"hidden": [256, 256]}})


def new_policy() -> Policy:
    """The policy, with the same weights everywhere."""
    return algorithms.load("ppo")[1](config(), OBSERVATIONS, ACTIONS, 0).policy


def explore(pipe: Connection, places: Sequence[Place], bells: Sequence[socket.socket]) -> None:
    """A process of so many threads; without places each acts by itself."""
    enact(pipe, lambda: _explore(pipe, places, bells))


def _explore(pipe: Connection, places: Sequence[Place], bells: Sequence[socket.socket]) -> None:
    policy, steps, over = new_policy(), [0] * (ENVIRONMENTS // PROCESSES), threading.Event()
    generator = torch.Generator().manual_seed(0)
    desk = Desk(places[0].actors, places[0].asks, places[0].answers, places[0].name) if places else None

    def step(index: int) -> None:
        who = policy
        if desk is not None:
            bell = bells[index]
            who = Asking(policy, desk, places[index].actor, lambda: _ring(bell), lambda: _wait(bell))
        observation = np.random.default_rng(index).normal(size=(1, 64)).astype(np.float32)
        with suppress(EOFError):
            while not over.is_set():
                action, _ = who.act(observation, generator=generator)
                time.sleep(STEP_SECONDS)
                observation = np.roll(observation, int(action[0]), 1)
                steps[index] += 1

    threads = [threading.Thread(target=step, args=(index,), daemon=True) for index in range(len(steps))]
    for thread in threads:
        thread.start()
    while pipe.recv() == "count":
        pipe.send(sum(steps))
    over.set()


def _ring(bell: socket.socket) -> None:
    bell.send(b"\0")


def _wait(bell: socket.socket) -> None:
    bell.recv(4096)


def rate(way: str) -> float:
    """Env steps a second."""
    context = context_for("ppo")
    topology = Topology(actors=ENVIRONMENTS, inference="central", inference_batch=1 if way == "one by one" else None,
                        inference_wait_ms=None if way == "one by one" else 1.0)  # fmt: skip
    keeper = InferenceKeeper("ppo", config(), 1, topology, context)
    arrays = policy_arrays(new_policy())
    weights = Weights(form_of(arrays))
    weights.publish(arrays, 1)
    share, pipes, processes = ENVIRONMENTS // PROCESSES, [], []
    try:
        if way != "copies":
            keeper.open(OBSERVATIONS, ACTIONS)
            while not keeper.ready:
                keeper.hear()
                time.sleep(0.05)
            keeper.begin(weights, 0)
        for number in range(PROCESSES):
            own = range(number * share, (number + 1) * share)
            places = [] if way == "copies" else [keeper.place(actor) for actor in own]
            ours, theirs = context.Pipe()
            process = context.Process(target=explore, args=(theirs, places, [keeper.bells[actor] for actor in own]))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        while min(_counts(pipes)) < share:
            time.sleep(0.1)
        time.sleep(1.0)
        before, begun = sum(_counts(pipes)), time.perf_counter()
        time.sleep(SECONDS)
        after, took = sum(_counts(pipes)), time.perf_counter() - begun
        for pipe in pipes:
            pipe.send("over")
        keeper.shut()
        for process in processes:
            process.join()
    finally:
        for pipe in pipes:
            pipe.close()
        keeper.close()
        weights.close()
    return (after - before) / took


def _counts(pipes: Sequence[Connection]) -> list[int]:
    for pipe in pipes:
        pipe.send("count")
    return [pipe.recv() for pipe in pipes]


def case_inference(rounds: int) -> dict[str, float]:
    """Case (b) of the issue."""
    ways = ("batches", "one by one", "copies")
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            found[way].append(rate(way))
    return {way: statistics.median(rates) for way, rates in found.items()}
