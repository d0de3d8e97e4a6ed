"""longrein in one of the cases of `benchmarks/train.py`: prints env steps, seconds and memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from longrein.lab.actor import Actor
from longrein.learn import algorithms
from longrein.learn.rollout import Rollout

SHARED = ("gamma", "lr", "lambda_", "minibatch_size", "epochs", "rollout_steps")


def main(case: dict[str, Any]) -> None:
    """Train as the case says: the session's loop, without its files."""
    torch.set_num_threads(1)
    envs = SyncVectorEnv(
        [lambda: gymnasium.make(case["env"])] * case["num_envs"], autoreset_mode=AutoresetMode.SAME_STEP
    )
    config_class, build = algorithms.load(case["algorithm"])
    settings = {name: case[name] for name in SHARED if name in case}
    settings["net"] = {"hidden": case["hidden"], "activation": case["activation"]}
    if case["algorithm"] in ("dqn", "sac"):
        settings |= {
            "rollout_steps": case["train_every"], "updates_per_step": 1 / case["train_every"],
            "memory": {"capacity": case["capacity"], "batch_size": case["batch_size"], "min_size": 1000},
        }  # fmt: skip
    if case["algorithm"] == "sac":
        settings["warmup_steps"] = 1000
    if case["algorithm"] == "dqn":
        settings["double"] = False
    if case["algorithm"] == "a2c":
        rmsprop = {"optimizer": "rmsprop", "optimizer_settings": {"alpha": 0.99, "eps": 1e-5}}  # Stable-Baselines3's
        settings |= {"advantage": "gae", "entropy_weight": 0.0} | rmsprop
    config = algorithms.config_from(config_class, settings)
    algorithm = build(config, envs.single_observation_space, envs.single_action_space, 0)
    actor = Actor(envs, algorithm.policy, seed=1, generator=torch.Generator().manual_seed(2))
    rollout = Rollout(algorithm.rollout_steps)
    returns: list[float] = []
    began, at = 0.0, 0
    while actor.env_steps < case["env_steps"]:
        for transition in actor.collect(algorithm.rollout_steps):
            rollout.add(transition)
        algorithm.update(rollout.take())
        returns += [episode.return_ for episode in actor.finished()]
        if not at and actor.env_steps >= case["env_steps"] // 2:
            began, at = time.perf_counter(), actor.env_steps
    seconds = time.perf_counter() - began
    print(json.dumps({
        "env_steps": actor.env_steps - at, "seconds": seconds,
        "return": float(np.mean(returns[-100:])) if returns else None,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))  # fmt: skip


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
