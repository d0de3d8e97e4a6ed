"""Tianshou in one of the cases of `benchmarks/train.py`, by its own trainers and nets."""

from __future__ import annotations

import json
import sys
from typing import Any

import environment
import numpy as np
import torch
from stopwatch import Stopwatch
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.policy import A2CPolicy, DQNPolicy, PPOPolicy, SACPolicy
from tianshou.trainer import OffpolicyTrainer, OnpolicyTrainer
from tianshou.utils import LazyLogger
from tianshou.utils.net import continuous
from tianshou.utils.net.common import ActorCritic, Net
from tianshou.utils.net.discrete import Actor, Critic
from torch import nn
from torch.distributions import Categorical

WARMUP = 1000  # env steps of random actions before learning, off policy


class Returns(LazyLogger):  # type: ignore[misc]  # Tianshou is not typed
    """Tells the stopwatch of each episode."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self.watch = watch
        self.before = 0  # env steps ahead of the trainer's

    def log_train_data(self, collect_result: dict[str, Any], step: int) -> None:
        for return_ in collect_result["rews"]:
            self.watch.episode(self.before + step, return_)


class Nature(nn.Module):
    """The convolutions of Mnih et al. 2015 and a layer of 512, which the package leaves to its users."""

    output_dim = 512

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(),
        )  # fmt: skip

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[torch.Tensor, Any]:
        return self.net(torch.as_tensor(obs).float() / 255), state


def on_policy(case: dict[str, Any], envs: Any) -> Any:
    """PPO or A2C."""
    choices = int(envs.action_space[0].n)
    if case["env"] == environment.PONG:
        shared = Nature()
        actor, critic = Actor(shared, choices, softmax_output=False), Critic(shared)
    else:
        shape, hidden = envs.observation_space[0].shape, case["hidden"]
        nets = [Net(shape, hidden_sizes=hidden, activation=nn.Tanh) for _ in range(2)]
        actor, critic = Actor(nets[0], choices, softmax_output=False), Critic(nets[1])
    both = ActorCritic(actor, critic)
    for layer in both.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(layer.weight, 2**0.5)
            nn.init.zeros_(layer.bias)
    nn.init.orthogonal_(actor.last.model[0].weight, 0.01)
    nn.init.orthogonal_(critic.last.model[0].weight, 1.0)
    same = {
        "dist_fn": lambda logits: Categorical(logits=logits), "discount_factor": case["gamma"], "vf_coef": 0.5,
        "ent_coef": 0.0, "max_grad_norm": 0.5, "gae_lambda": case["lambda_"], "action_space": envs.action_space[0],
        "action_scaling": False, "max_batchsize": case.get("minibatch_size", 256),
    }  # fmt: skip
    if case["algorithm"] == "ppo":
        return PPOPolicy(actor, critic, torch.optim.Adam(both.parameters(), lr=case["lr"], eps=1e-5), **same)
    return A2CPolicy(actor, critic, torch.optim.RMSprop(both.parameters(), lr=case["lr"], alpha=0.99, eps=1e-5), **same)


def dqn(case: dict[str, Any], envs: Any) -> Any:
    """DQN without its double."""
    net = Net(envs.observation_space[0].shape, int(envs.action_space[0].n), case["hidden"])
    return DQNPolicy(
        net, torch.optim.Adam(net.parameters(), lr=case["lr"]), discount_factor=case["gamma"], is_double=False,
        target_update_freq=case["target_every"] // case["train_every"], clip_loss_grad=True,
        action_space=envs.action_space[0],
    )  # fmt: skip


def sac(case: dict[str, Any], envs: Any) -> Any:
    """SAC with a learnt temperature."""
    space, shape = envs.action_space[0], envs.observation_space[0].shape
    actor = continuous.ActorProb(
        Net(shape, hidden_sizes=case["hidden"]), space.shape, unbounded=True, conditioned_sigma=True
    )
    critics = [continuous.Critic(Net(shape, space.shape, hidden_sizes=case["hidden"], concat=True)) for _ in range(2)]
    log_alpha = torch.zeros(1, requires_grad=True)
    optimizers = [torch.optim.Adam(part.parameters(), lr=case["lr"]) for part in (actor, *critics)]
    return SACPolicy(
        actor, optimizers[0], critics[0], optimizers[1], critics[1], optimizers[2], tau=0.005, gamma=case["gamma"],
        alpha=(-float(np.prod(space.shape)), log_alpha, torch.optim.Adam([log_alpha], lr=case["lr"])),
        action_space=space,
    )  # fmt: skip


def main(case: dict[str, Any]) -> None:
    """Train as the case says."""
    torch.set_num_threads(1)
    torch.manual_seed(case["seed"])
    np.random.seed(case["seed"])  # theirs draw from the global generator
    count, watch = case["num_envs"], Stopwatch(case["env_steps"], case["last"])
    envs = DummyVectorEnv([lambda: environment.make(case["env"])] * count)
    envs.seed([1000 * case["seed"] + row for row in range(count)])
    logger = Returns(watch)
    same = {
        "max_epoch": 1, "episode_per_test": 1, "test_collector": None, "logger": logger, "verbose": False,
        "show_progress": False,
    }  # fmt: skip
    if case["algorithm"] in ("ppo", "a2c"):
        rows = case["rollout_steps"] * count
        policy = on_policy(case, envs)
        trainer = OnpolicyTrainer(
            policy, train_collector=Collector(policy, envs, VectorReplayBuffer(rows, count)),
            step_per_epoch=case["env_steps"], repeat_per_collect=case.get("epochs", 1),
            batch_size=case.get("minibatch_size", rows), step_per_collect=rows,
            train_fn=lambda epoch, env_steps: watch.look(env_steps), **same,
        )  # fmt: skip
    else:
        policy = dqn(case, envs) if case["algorithm"] == "dqn" else sac(case, envs)
        explores = case["algorithm"] == "dqn"

        def before(epoch: int, env_steps: int) -> None:
            watch.look(WARMUP + env_steps)
            if explores:
                policy.set_eps(max(1 - 0.95 * (WARMUP + env_steps) / case["explore_steps"], 0.05))

        collector = Collector(policy, envs, VectorReplayBuffer(case["capacity"], count), exploration_noise=explores)
        logger.log_train_data(collector.collect(n_step=WARMUP, random=True), WARMUP)
        logger.before = WARMUP
        trainer = OffpolicyTrainer(
            policy, train_collector=collector, step_per_epoch=case["env_steps"] - WARMUP,
            batch_size=case["batch_size"], step_per_collect=case["train_every"],
            update_per_step=1 / case["train_every"], train_fn=before, **same,
        )  # fmt: skip
    trainer.run()
    watch.report(logger.before + trainer.env_step)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
