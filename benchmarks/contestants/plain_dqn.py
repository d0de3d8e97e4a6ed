"""DQN as one plain loop of PyTorch, without a library, in a case of `benchmarks/train.py`."""

from __future__ import annotations

import copy
import json
import sys
from itertools import pairwise
from typing import Any

import environment
import numpy as np
import torch
from stopwatch import Stopwatch
from torch import nn

WARMUP = 1000  # env steps before learning


def relu_net(sizes: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    return nn.Sequential(*[part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())][:-1])


class Memory:
    """The last transitions, drawn all alike."""

    def __init__(self, capacity: int, size: int, action: np.ndarray[Any, Any]) -> None:
        self.columns = [
            np.zeros((capacity, size), np.float32), np.zeros((capacity, *action.shape), action.dtype),
            np.zeros(capacity, np.float32), np.zeros((capacity, size), np.float32), np.zeros(capacity, np.float32),
        ]  # fmt: skip
        self.count = 0

    def add(self, *row: Any) -> None:
        """Observation, action, reward, next observation, whether it terminated."""
        for column, value in zip(self.columns, row, strict=True):
            column[self.count % len(column)] = value
        self.count += 1

    def draw(self, size: int, generator: np.random.Generator) -> list[torch.Tensor]:
        """So many rows, with replacement."""
        rows = generator.integers(min(self.count, len(self.columns[0])), size=size)
        return [torch.from_numpy(column[rows]) for column in self.columns]


def main(case: dict[str, Any]) -> None:
    """Train as the case says."""
    torch.set_num_threads(1)
    torch.manual_seed(case["seed"])
    generator, watch = np.random.default_rng(case["seed"]), Stopwatch(case["env_steps"], case["last"])
    env = environment.make(case["env"])
    size, choices = env.observation_space.shape[0], int(env.action_space.n)  # type: ignore[index,attr-defined]
    net = relu_net([size, *case["hidden"], choices])
    target_net = copy.deepcopy(net)
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=case["lr"])
    memory = Memory(case["capacity"], size, np.zeros((), np.int64))
    seen, total = env.reset(seed=1000 * case["seed"])[0], 0.0
    for env_steps in range(1, case["env_steps"] + 1):
        if generator.random() < max(1 - 0.95 * env_steps / case["explore_steps"], 0.05):
            action = int(generator.integers(choices))
        else:
            with torch.no_grad():
                action = int(net(torch.from_numpy(seen)).argmax())
        following, reward, terminated, truncated, _ = env.step(action)
        memory.add(seen, action, reward, following, terminated)
        seen, total = following, total + float(reward)
        if terminated or truncated:
            watch.episode(env_steps, total)
            seen, total = env.reset()[0], 0.0
        if env_steps >= WARMUP and env_steps % case["train_every"] == 0:
            o, a, r, after, end = memory.draw(case["batch_size"], generator)
            with torch.no_grad():
                target = r + case["gamma"] * (1 - end) * target_net(after).max(1).values
            loss = nn.functional.smooth_l1_loss(net(o).gather(1, a[:, None]).squeeze(1), target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizer.step()
        if env_steps % case["target_every"] == 0:
            target_net.load_state_dict(net.state_dict())
        watch.look(env_steps)
    watch.report(case["env_steps"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
