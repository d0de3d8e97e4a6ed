"""Stable-Baselines3, or SBX, in one of the cases of `benchmarks/train.py`: prints env steps, seconds and memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env


class Clock(BaseCallback):
    """Seconds of the second half of training: compilation and first calls are behind it then. Returns, too."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.half = half
        self.began = 0.0
        self.at = 0
        self.returns: list[float] = []

    def _on_step(self) -> bool:
        self.returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        if not self.at and self.num_timesteps >= self.half:
            self.at, self.began = self.num_timesteps, time.perf_counter()
        return True


def main(package: str, case: dict[str, Any]) -> None:
    """Train as the case says."""
    torch.set_num_threads(1)
    if package == "sbx":
        import flax.linen as nn
        import sbx as library

        activations: dict[str, Any] = {"tanh": nn.tanh, "relu": nn.relu}
    else:
        import stable_baselines3 as library

        activations = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}
    envs = make_vec_env(lambda: gym.make(case["env"]), n_envs=case["num_envs"], seed=1)
    net, same = list(case["hidden"]), {"gamma": case["gamma"], "learning_rate": case["lr"], "seed": 0, "device": "cpu"}
    if case["algorithm"] in ("ppo", "a2c"):
        kind = library.PPO if case["algorithm"] == "ppo" else library.A2C
        more = {"batch_size": case["minibatch_size"], "n_epochs": case["epochs"]} if kind is library.PPO else {}
        model = kind(
            "MlpPolicy", envs, n_steps=case["rollout_steps"], gae_lambda=case["lambda_"], ent_coef=0.0,
            policy_kwargs={"net_arch": net, "activation_fn": activations["tanh"]}, **more, **same,
        )  # fmt: skip
    else:
        kind = library.DQN if case["algorithm"] == "dqn" else library.SAC
        model = kind(
            "MlpPolicy", envs, buffer_size=case["capacity"], learning_starts=1000, batch_size=case["batch_size"],
            train_freq=case["train_every"], gradient_steps=1, policy_kwargs={"net_arch": net}, **same,
        )  # fmt: skip
    clock = Clock(case["env_steps"] // 2)
    model.learn(case["env_steps"], callback=clock)
    seconds = time.perf_counter() - clock.began
    print(json.dumps({
        "env_steps": model.num_timesteps - clock.at, "seconds": seconds,
        "return": float(np.mean(clock.returns[-100:])) if clock.returns else None,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
