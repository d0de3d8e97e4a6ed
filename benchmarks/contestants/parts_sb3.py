"""Stable-Baselines3's parts by themselves, for `benchmarks/growth.py`: an update, or a replay memory."""

from __future__ import annotations

import json
import sys
from typing import Any

import environment
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stopwatch import megabytes_now, microseconds


def updates(case: dict[str, Any]) -> dict[str, float]:
    """Microseconds of one update: PPO's of 8 x 128 rows in 4 epochs of 256; DQN's of 64 rows, with 4 rows added."""
    ppo = case["part"] == "ppo"
    envs = make_vec_env(lambda: environment.make("CartPole-v1"), n_envs=8 if ppo else 1, seed=1)
    net = {"net_arch": [case["units"]] * 2}
    if ppo:
        model: Any = PPO("MlpPolicy", envs, n_steps=128, batch_size=256, n_epochs=4, policy_kwargs=net, device="cpu")
        model.learn(1_024)
        return {"update": microseconds(lambda _: model.train(), range(case["repeat"]))}
    model = DQN(
        "MlpPolicy", envs, buffer_size=50_000, learning_starts=1_000, batch_size=64, policy_kwargs=net, device="cpu"
    )
    model.learn(1_100)
    row = np.zeros((1, 4), np.float32)

    def update(_: int) -> None:
        for _ in range(4):
            model.replay_buffer.add(row, row, np.zeros(1, np.int64), np.ones(1), np.zeros(1, bool), [{}])
        model.train(gradient_steps=1, batch_size=64)

    return {"update": microseconds(update, range(case["repeat"]))}


def replay(case: dict[str, Any]) -> dict[str, float]:
    """A full memory of so many rows: microseconds to draw 128 and to add one; its megabytes."""
    before = megabytes_now()
    capacity = case["rows"]
    buffer = ReplayBuffer(capacity, Box(-1, 1, (4,)), Discrete(2), handle_timeout_termination=True)
    numbers = np.arange(capacity, dtype=np.float32)[:, None, None]
    buffer.observations[:], buffer.next_observations[:] = numbers, numbers + 1
    buffer.actions[:], buffer.rewards[:], buffer.dones[:], buffer.timeouts[:] = 0, 1, 0, 0
    del numbers
    buffer.full = True
    held = megabytes_now() - before
    row, flag = np.zeros((1, 4), np.float32), np.zeros(1, bool)
    return {
        "megabytes": held,
        "sample": microseconds(buffer.sample, [128] * case["repeat"]),
        "add": microseconds(
            lambda _: buffer.add(row, row, np.zeros(1, np.int64), np.ones(1), flag, [{}]), range(case["repeat"])
        ),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    print(json.dumps(replay(asked) if asked["part"] == "replay" else updates(asked)))
