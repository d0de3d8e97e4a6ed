"""PPO as one plain loop of PyTorch, without a library, in a case of `benchmarks/train.py`."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from typing import Any

import environment
import numpy as np
import torch
from stopwatch import Stopwatch
from torch import Tensor, nn


def orthogonal(layer: Any, gain: float = 2**0.5) -> Any:
    """The layer, with orthogonal weights and biases 0."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Separate(nn.Module):
    """A net of tanh layers for the policy, and one for the value."""

    def __init__(self, size: int, hidden: list[int], choices: int) -> None:
        super().__init__()
        self.actor, self.critic = self.layers([size, *hidden], choices, 0.01), self.layers([size, *hidden], 1, 1.0)

    def layers(self, sizes: list[int], outputs: int, gain: float) -> nn.Sequential:
        hidden = [part for pair in pairwise(sizes) for part in (orthogonal(nn.Linear(*pair)), nn.Tanh())]
        return nn.Sequential(*hidden, orthogonal(nn.Linear(sizes[-1], outputs), gain))

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(seen), self.critic(seen).flatten()

    def value(self, seen: Tensor) -> Tensor:
        return self.critic(seen).flatten()


class Frames(nn.Module):
    """The convolutions of Mnih et al. 2015 and a layer, for both."""

    def __init__(self, hidden: int, choices: int) -> None:
        super().__init__()
        layers = (nn.Conv2d(4, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1))
        seeing = [part for layer in layers for part in (orthogonal(layer), nn.ReLU())]
        self.torso = nn.Sequential(*seeing, nn.Flatten(), orthogonal(nn.Linear(64 * 7 * 7, hidden)), nn.ReLU())
        self.actor, self.critic = orthogonal(nn.Linear(hidden, choices), 0.01), orthogonal(nn.Linear(hidden, 1), 1.0)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        features = self.torso(seen.float() / 255)
        return self.actor(features), self.critic(features).flatten()

    def value(self, seen: Tensor) -> Tensor:
        return self(seen)[1]


def main(case: dict[str, Any]) -> None:
    """Train as the case says."""
    torch.set_num_threads(1)
    torch.manual_seed(case["seed"])
    count, steps, watch = case["num_envs"], case["rollout_steps"], Stopwatch(case["env_steps"], case["last"])
    envs = environment.make_vec(case["env"], count)
    shape, choices = envs.single_observation_space.shape, int(envs.single_action_space.n)  # type: ignore[attr-defined]
    frames = case["env"] == environment.PONG
    net = Frames(case["hidden"][0], choices) if frames else Separate(shape[0], case["hidden"], choices)
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=case["lr"], eps=1e-5)
    seen = torch.as_tensor(envs.reset(seed=1000 * case["seed"])[0])
    observations = torch.zeros(steps, count, *shape, dtype=seen.dtype)
    actions = torch.zeros(steps, count, dtype=torch.int64)
    log_probs, rewards, values, ended = (torch.zeros(steps, count) for _ in range(4))
    over, totals = torch.zeros(count), np.zeros(count)
    env_steps = 0
    while env_steps < case["env_steps"]:
        for t in range(steps):
            observations[t], ended[t] = seen, over
            with torch.no_grad():
                logits, values[t] = net(seen)
                distribution = torch.distributions.Categorical(logits=logits)
                action = distribution.sample()
                log_probs[t] = distribution.log_prob(action)
            actions[t] = action
            following, reward, terminated, truncated, infos = envs.step(action.numpy())
            done = terminated | truncated
            rewards[t] = torch.as_tensor(reward, dtype=torch.float32)
            if truncated.any():  # a time limit is no end: what lies behind it counts
                rows = np.flatnonzero(truncated)
                final = torch.as_tensor(np.stack([infos["final_obs"][row] for row in rows]))
                with torch.no_grad():
                    rewards[t][rows] += case["gamma"] * net.value(final)
            seen, over = torch.as_tensor(following), torch.as_tensor(done, dtype=torch.float32)
            env_steps += count
            totals += reward
            for total in totals[done]:
                watch.episode(env_steps, total)
            totals[done] = 0
        with torch.no_grad():
            next_value, advantage, carried = net.value(seen), torch.zeros(steps, count), torch.zeros(count)
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
                logits, value = net(o)
                ratio = (torch.distributions.Categorical(logits=logits).log_prob(a) - old).exp()
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                policy_loss = -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()
                loss = policy_loss + 0.5 * (value - target).square().mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
        watch.look(env_steps)
    watch.report(env_steps)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
