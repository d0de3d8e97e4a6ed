"""What one env step costs each role, in microseconds of one processor: the figures that docs/concepts/scale.md uses.

    python benchmarks/budget.py

act: choosing for so many environments at a time. learn: an update, for each of its env steps, with the settings of the
specs. Medians over rounds in turns, one thread. What the link costs is in benchmarks/link.py and latency.py, what the
channel and the collecting cost in scale.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete

from longrein.lab import spec as specs
from longrein.learn import algorithms
from longrein.learn.batch import Batch
from longrein.learn.torsos import Net

ROOT = Path(__file__).parent.parent
ROUNDS = 7
SMALL = Box(-1, 1, (8,), np.float32), Discrete(4)
FRAMES = Box(0, 255, (4, 84, 84), np.uint8), Discrete(6)


def microseconds(work: Callable[[], Any], steps: int, seconds: float = 0.3) -> float:
    """Processor time of `work` for each of its env steps."""
    work()
    count, begun = 0, time.process_time()
    while time.process_time() - begun < seconds:
        work()
        count += 1
    return (time.process_time() - begun) / count / steps * 1e6


def acting(space: tuple[Any, Any], net: Net, rows: int) -> Callable[[], Any]:
    """A policy that chooses for so many environments."""
    config_class, build = algorithms.load("impala")
    policy = build(config_class(net=net), *space, 0).policy
    observation = np.stack([space[0].sample() for _ in range(rows)])
    generator = torch.Generator()
    return lambda: policy.act(policy.encode(observation), generator=generator)


def learning(name: str, settings: dict[str, Any], space: tuple[Any, Any], envs: int) -> tuple[Callable[[], Any], int]:
    """An algorithm's update with a batch that its own policy acted, and the env steps of one."""
    config_class, build = algorithms.load(name)
    algorithm = build(algorithms.config_from(config_class, settings), *space, 0)
    steps, generator = algorithm.rollout_steps, torch.Generator()
    observation = np.stack([[space[0].sample() for _ in range(envs)] for _ in range(steps)])
    acted = [algorithm.policy.act(algorithm.policy.encode(row), generator=generator) for row in observation]
    extras = {key: torch.from_numpy(np.stack([extra[key] for _, extra in acted])) for key in acted[0][1]}
    never = torch.zeros(steps, envs, dtype=torch.bool)
    seen = torch.from_numpy(np.stack([algorithm.policy.encode(row) for row in observation]))
    action = torch.from_numpy(np.stack([one for one, _ in acted]))
    reward = torch.randn(steps, envs)
    batch = Batch(seen, action, reward, seen.roll(-1, 0), never, never, ~never, extras)
    return (lambda: algorithm.update(batch)), steps * envs


def main() -> None:
    """Measure, and print the table."""
    torch.set_num_threads(1)
    mlp, cnn = Net(hidden=(64, 64)), Net(hidden=(512,))  # images go through three convolutions first
    cases: dict[str, tuple[Callable[[], Any], int]] = {}
    for rows in (1, 8, 64, 1024):
        cases[f"act, 2 x 64, {rows} at a time"] = acting(SMALL, mlp, rows), rows
    for rows in (1, 64):
        cases[f"act, frames, {rows} at a time"] = acting(FRAMES, cnn, rows), rows
    for file in ("impala", "ppo", "appo", "a2c", "dqn"):
        plain = dict(specs.read(ROOT / "spec" / f"{file}.yaml")[f"{file}_cartpole"].values)
        agent = plain["agent"]
        settings = {key: value for key, value in agent["algorithm"].items() if key != "name"}
        settings |= {key: agent[key] for key in ("net", "memory") if key in agent}
        cases[f"learn, {file}, its CartPole settings"] = learning(file, settings, SMALL, plain["env"]["num_envs"])
    cases["learn, impala, frames"] = learning("impala", {"net": {"hidden": [512]}}, FRAMES, 8)
    took: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, (work, steps) in cases.items():
            took[name].append(microseconds(work, steps))
    print("| what | microseconds an env step | env steps/s of a processor |\n|---|---|---|")
    for name, values in took.items():
        value = statistics.median(values)
        print(f"| {name} | {value:,.1f} | {1e6 / value:,.0f} |")


if __name__ == "__main__":
    main()
