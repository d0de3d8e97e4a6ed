"""longrein in one of the cases of `benchmarks/train.py`."""

from __future__ import annotations

import json
import sys
from typing import Any

import environment
import torch
from gymnasium.vector import VectorEnv
from stopwatch import Stopwatch

from longrein.lab.actor import Actor, make_envs
from longrein.learn import algorithms
from longrein.learn.rollout import Rollout
from longrein.learn.schedules import Linear

NATIVE: dict[str, tuple[str, dict[str, Any]]] = {"Pong frames": ("atari:pong", {"sticky": 0.0, "threads": 1})}
SHARED = ("gamma", "lr", "lambda_", "minibatch_size", "epochs", "rollout_steps")


def environments(case: dict[str, Any]) -> VectorEnv[Any, Any, Any]:
    """The case's, one by one; or, where it is `native`, as longrein itself makes them."""
    if case.get("native"):
        name, options = NATIVE.get(case["env"], (case["env"], {"vectorization": "native"}))
        return make_envs(name, case["num_envs"], options)
    return environment.make_vec(case["env"], case["num_envs"])


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    """The case in longrein's words."""
    settings = {name: case[name] for name in SHARED if name in case}
    settings["net"] = {"hidden": case["hidden"], "activation": case["activation"]}
    if "shared" in case:
        settings["shared"] = case["shared"]
    if case["algorithm"] in ("dqn", "sac"):
        settings |= {
            "rollout_steps": case["train_every"], "updates_per_step": 1 / case["train_every"],
            "memory": {"capacity": case["capacity"], "batch_size": case["batch_size"], "min_size": 1000},
        }  # fmt: skip
    if case["algorithm"] == "sac":
        settings["warmup_steps"] = 1000
    if case["algorithm"] == "dqn":
        epsilon = Linear(1.0, 0.05, case["explore_steps"])
        settings |= {"double": False, "target_every": case["target_every"], "epsilon": epsilon}
    if case["algorithm"] == "a2c":
        rmsprop = {"optimizer": "rmsprop", "optimizer_settings": {"alpha": 0.99, "eps": 1e-5}}  # Stable-Baselines3's
        settings |= {"advantage": "gae", "entropy_weight": 0.0} | rmsprop
    return settings


def main(case: dict[str, Any]) -> None:
    """Train as the case says: the session's loop, without its files."""
    torch.set_num_threads(1)
    seed, envs = case["seed"], environments(case)
    config_class, build = algorithms.load(case["algorithm"])
    config = algorithms.config_from(config_class, settings_of(case))
    algorithm = build(config, envs.single_observation_space, envs.single_action_space, seed)
    actor = Actor(envs, algorithm.policy, seed=1000 * seed, generator=torch.Generator().manual_seed(seed))
    rollout = Rollout(algorithm.rollout_steps)
    watch = Stopwatch(case["env_steps"], case["last"])
    while actor.env_steps < case["env_steps"]:
        for transition in actor.collect(algorithm.rollout_steps):
            rollout.add(transition)
        algorithm.update(rollout.take())
        for episode in actor.finished():
            watch.episode(episode.env_steps, episode.return_)
        watch.look(actor.env_steps)
    watch.report(actor.env_steps)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
