"""longrein's parts by themselves, for `benchmarks/growth.py`: an update, or a replay memory."""

from __future__ import annotations

import json
import sys
from typing import Any

import environment
import torch
from stopwatch import megabytes_now, microseconds

from longrein.lab.actor import Actor
from longrein.learn import algorithms
from longrein.learn.batch import Batch
from longrein.learn.replay import Memory, Replay
from longrein.learn.rollout import Rollout


def updates(case: dict[str, Any]) -> dict[str, float]:
    """Microseconds of one update: PPO's of 8 x 128 rows in 4 epochs of 256; DQN's of 64 rows, with 4 rows added."""
    ppo = case["part"] == "ppo"
    net = {"hidden": [case["units"]] * 2, "activation": "tanh" if ppo else "relu"}
    own = {} if ppo else {"double": False, "memory": {"capacity": 50_000, "batch_size": 64, "min_size": 1_000}}
    envs = environment.make_vec("CartPole-v1", 8 if ppo else 1)
    config_class, build = algorithms.load(case["part"])
    config = algorithms.config_from(config_class, {"net": net} | own)
    algorithm = build(config, envs.single_observation_space, envs.single_action_space, 1)
    actor = Actor(envs, algorithm.policy, seed=1, generator=torch.Generator().manual_seed(1))
    rollout = Rollout(algorithm.rollout_steps)

    def prepare() -> Batch:
        for transition in actor.collect(algorithm.rollout_steps):
            rollout.add(transition)
        return rollout.take()

    while not ppo and actor.env_steps < 1_100:
        algorithm.update(prepare())
    batches = [prepare() for _ in range(case["repeat"])]
    return {"update": microseconds(algorithm.update, batches)}


def rows(steps: int, first: int) -> Batch:
    """So many transitions of CartPole's size, of one environment."""
    observation = torch.arange(first, first + steps + 1, dtype=torch.float32)[:, None, None].expand(-1, 1, 4).clone()
    no = torch.zeros(steps, 1, dtype=torch.bool)
    return Batch(
        observation=observation[:-1], action=torch.zeros(steps, 1, dtype=torch.int64), reward=torch.ones(steps, 1),
        next_observation=observation[1:], terminated=no, truncated=no.clone(), valid=~no, extras={},
    )  # fmt: skip


def replay(case: dict[str, Any]) -> dict[str, float]:
    """A full memory of so many rows: microseconds to draw 128, to add one and to say 128 priorities; its megabytes."""
    before = megabytes_now()
    capacity, chunk = case["rows"], 10_000
    memory = Replay(Memory(capacity=capacity, prioritized=case["prioritized"], min_size=0), gamma=0.99)
    generator = torch.Generator().manual_seed(1)
    for first in range(0, capacity, chunk):
        memory.add(rows(chunk, first), generator)
    held = megabytes_now() - before
    if case["prioritized"]:  # priorities of their own, or each way through the tree would be alike
        drawn = torch.arange(capacity)
        memory.update_priorities(drawn, torch.rand(capacity, generator=generator))
    sampled = [128] * case["repeat"]
    found = {"megabytes": held, "sample": microseconds(lambda size: memory.sample(size, generator), sampled)}
    singles = [rows(1, capacity + index) for index in range(case["repeat"])]
    found["add"] = microseconds(lambda row: memory.add(row, generator), singles)
    if case["prioritized"]:
        told = [(memory.sample(128, generator).index, torch.rand(128)) for _ in range(case["repeat"])]
        found["update_priorities"] = microseconds(lambda pair: memory.update_priorities(*pair), told)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    print(json.dumps(replay(asked) if asked["part"] == "replay" else updates(asked)))
