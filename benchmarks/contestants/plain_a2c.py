"""A2C as one plain loop of PyTorch, without a library, in a case of `benchmarks/train.py`."""

from __future__ import annotations

import json
import sys
from typing import Any

import environment
import numpy as np
import torch
from plain_ppo import Separate
from stopwatch import Stopwatch
from torch import nn


def main(case: dict[str, Any]) -> None:
    """Train as the case says."""
    torch.set_num_threads(1)
    torch.manual_seed(case["seed"])
    watch = Stopwatch(case["env_steps"], case["last"])
    count, steps, gamma = case["num_envs"], case["rollout_steps"], case["gamma"]
    envs = environment.make_vec(case["env"], count)
    size, choices = envs.single_observation_space.shape[0], int(envs.single_action_space.n)  # type: ignore[index,attr-defined]
    net = Separate(size, case["hidden"], choices)
    parameters = list(net.parameters())
    optimizer = torch.optim.RMSprop(parameters, lr=case["lr"], alpha=0.99, eps=1e-5)
    seen = torch.as_tensor(envs.reset(seed=1000 * case["seed"])[0])
    totals, env_steps = np.zeros(count), 0
    while env_steps < case["env_steps"]:
        observations, actions, rewards, ends = [], [], [], []
        for _ in range(steps):
            with torch.no_grad():
                action = torch.distributions.Categorical(logits=net.actor(seen)).sample()
            following, reward, terminated, truncated, infos = envs.step(action.numpy())
            done = terminated | truncated
            observations.append(seen)
            actions.append(action)
            rewards.append(torch.as_tensor(reward, dtype=torch.float32))
            ends.append(torch.as_tensor(done))
            if truncated.any():  # a time limit is no end: what lies behind it counts
                rows = np.flatnonzero(truncated)
                final = torch.as_tensor(np.stack([infos["final_obs"][row] for row in rows]))
                with torch.no_grad():
                    rewards[-1][rows] += gamma * net.value(final)
            seen = torch.as_tensor(following)
            env_steps += count
            totals += reward
            for total in totals[done]:
                watch.episode(env_steps, total)
            totals[done] = 0
        with torch.no_grad():
            return_, returns = net.value(seen), []
            for reward, end in zip(reversed(rewards), reversed(ends), strict=True):
                return_ = reward + gamma * return_ * ~end
                returns.append(return_)
        target = torch.cat(returns[::-1])
        logits, value = net(torch.cat(observations))
        log_prob = torch.distributions.Categorical(logits=logits).log_prob(torch.cat(actions))
        loss = -((target - value.detach()) * log_prob).mean() + 0.5 * (value - target).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        watch.look(env_steps)
    watch.report(env_steps)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
