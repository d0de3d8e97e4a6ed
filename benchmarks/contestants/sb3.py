"""Stable-Baselines3, or SBX, in one of the cases of `benchmarks/train.py`."""

from __future__ import annotations

import json
import sys
from typing import Any

import environment
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stopwatch import Stopwatch


class Clock(BaseCallback):
    """Tells the stopwatch what happens."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self.watch = watch

    def _on_rollout_start(self) -> None:
        self.watch.look(self.num_timesteps)

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.watch.episode(self.num_timesteps, info["episode"]["r"])
        return True


def build(package: str, case: dict[str, Any]) -> Any:
    """The case in their words."""
    if package == "sbx":
        import flax.linen as nn
        import sbx as library

        activations: dict[str, Any] = {"tanh": nn.tanh, "relu": nn.relu}
    else:
        import stable_baselines3 as library

        activations = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}
    envs = make_vec_env(lambda: environment.make(case["env"]), n_envs=case["num_envs"], seed=1000 * case["seed"])
    same = {"gamma": case["gamma"], "learning_rate": case["lr"], "seed": case["seed"], "device": "cpu"}
    if case["algorithm"] in ("ppo", "a2c"):
        kind = library.PPO if case["algorithm"] == "ppo" else library.A2C
        more = {"batch_size": case["minibatch_size"], "n_epochs": case["epochs"]} if kind is library.PPO else {}
        frames = case["env"] == environment.PONG  # whose policy has these convolutions and a layer of 512
        net = {"net_arch": list(case["hidden"]), "activation_fn": activations[case["activation"]]}
        return kind(
            "CnnPolicy" if frames else "MlpPolicy", envs, n_steps=case["rollout_steps"], gae_lambda=case["lambda_"],
            ent_coef=0.0, policy_kwargs={} if frames else net, **more, **same,
        )  # fmt: skip
    kind, own = library.SAC, {}
    if case["algorithm"] == "dqn":
        kind = library.DQN
        own = {
            "target_update_interval": case["target_every"],
            "exploration_fraction": case["explore_steps"] / case["env_steps"],
        }
    return kind(
        "MlpPolicy", envs, buffer_size=case["capacity"], learning_starts=1000, batch_size=case["batch_size"],
        train_freq=case["train_every"], gradient_steps=1, policy_kwargs={"net_arch": list(case["hidden"])}, **own,
        **same,
    )  # fmt: skip


def main(package: str, case: dict[str, Any]) -> None:
    """Train as the case says."""
    torch.set_num_threads(1)
    model = build(package, case)
    watch = Stopwatch(case["env_steps"], case["last"])
    model.learn(case["env_steps"], callback=Clock(watch))
    watch.report(model.num_timesteps)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
