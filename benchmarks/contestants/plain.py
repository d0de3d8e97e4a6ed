"""PPO as one plain loop of PyTorch, without a library, in a case of `benchmarks/train.py`."""

from __future__ import annotations

import json
import resource
import sys
import time
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn


def mlp(sizes: list[int], last: float) -> nn.Sequential:
    """Linear layers with tanh between them, orthogonal."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        layer = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(layer.weight, last if index == len(sizes) - 2 else 2**0.5)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def main(case: dict[str, Any]) -> None:
    """Train as the case says."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    count, steps = case["num_envs"], case["rollout_steps"]
    envs = SyncVectorEnv([lambda: gymnasium.make(case["env"])] * count, autoreset_mode=AutoresetMode.SAME_STEP)
    size, choices = envs.single_observation_space.shape[0], int(envs.single_action_space.n)  # type: ignore[index,attr-defined]
    actor, critic = mlp([size, *case["hidden"], choices], 0.01), mlp([size, *case["hidden"], 1], 1.0)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=case["lr"], eps=1e-5)
    observations = torch.zeros(steps, count, size)
    actions = torch.zeros(steps, count, dtype=torch.int64)
    log_probs, rewards, values, ended = (torch.zeros(steps, count) for _ in range(4))
    seen = torch.as_tensor(envs.reset(seed=1)[0])
    over = torch.zeros(count)
    totals, returns = np.zeros(count), []
    done_steps, began, at = 0, 0.0, 0
    while done_steps < case["env_steps"]:
        for t in range(steps):
            observations[t], ended[t] = seen, over
            with torch.no_grad():
                distribution = torch.distributions.Categorical(logits=actor(seen))
                action = distribution.sample()
                log_probs[t] = distribution.log_prob(action)
                values[t] = critic(seen).flatten()
            actions[t] = action
            following, reward, terminated, truncated, infos = envs.step(action.numpy())
            done = terminated | truncated
            rewards[t] = torch.as_tensor(reward, dtype=torch.float32)
            if truncated.any():  # a time limit is no end: what lies behind it counts
                rows = np.flatnonzero(truncated)
                final = torch.as_tensor(np.stack([infos["final_obs"][row] for row in rows]))
                with torch.no_grad():
                    rewards[t][rows] += case["gamma"] * critic(final).flatten()
            seen, over = torch.as_tensor(following), torch.as_tensor(done, dtype=torch.float32)
            totals += reward
            returns += totals[done].tolist()
            totals[done] = 0
        done_steps += steps * count
        with torch.no_grad():
            next_value, advantage, carried = critic(seen).flatten(), torch.zeros(steps, count), torch.zeros(count)
            for t in reversed(range(steps)):
                goes_on = 1 - (over if t == steps - 1 else ended[t + 1])
                after = next_value if t == steps - 1 else values[t + 1]
                delta = rewards[t] + case["gamma"] * after * goes_on - values[t]
                carried = delta + case["gamma"] * case["lambda_"] * goes_on * carried
                advantage[t] = carried
        flat = [part.flatten(0, 1) for part in (observations, actions, log_probs, advantage, advantage + values)]
        for _ in range(case["epochs"]):
            order = torch.randperm(steps * count)
            for start in range(0, steps * count, case["minibatch_size"]):
                o, a, old, adv, target = (part[order[start : start + case["minibatch_size"]]] for part in flat)
                distribution = torch.distributions.Categorical(logits=actor(o))
                ratio = (distribution.log_prob(a) - old).exp()
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                policy_loss = -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()
                loss = policy_loss + 0.5 * (critic(o).flatten() - target).square().mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
        if not at and done_steps >= case["env_steps"] // 2:
            at, began = done_steps, time.perf_counter()
    print(json.dumps({
        "env_steps": done_steps - at, "seconds": time.perf_counter() - began,
        "return": float(np.mean(returns[-100:])) if returns else None,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))  # fmt: skip


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
