"""SAC as one plain loop of PyTorch, without a library, in a case of `benchmarks/train.py`."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import environment
import numpy as np
import torch
from plain_dqn import WARMUP, Memory, relu_net
from stopwatch import Stopwatch
from torch import Tensor, nn

TAU = 0.005


def drawn(actor: nn.Module, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Actions in [-1, 1], [N, K], and their log-probabilities [N]."""
    mean, log_std = actor(seen).chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
    raw = normal.rsample()
    action = raw.tanh()
    return action, (normal.log_prob(raw) - (1 - action.square() + 1e-6).log()).sum(-1)


def main(case: dict[str, Any]) -> None:
    """Train as the case says."""
    torch.set_num_threads(1)
    torch.manual_seed(case["seed"])
    generator, watch = np.random.default_rng(case["seed"]), Stopwatch(case["env_steps"], case["last"])
    env = environment.make(case["env"])
    size, width = env.observation_space.shape[0], env.action_space.shape[0]  # type: ignore[index]
    scale = torch.from_numpy(env.action_space.high)  # type: ignore[attr-defined]  # symmetric, as Pendulum's are
    actor = relu_net([size, *case["hidden"], 2 * width])
    critics = nn.ModuleList(relu_net([size + width, *case["hidden"], 1]) for _ in range(2))
    targets = copy.deepcopy(critics)
    log_alpha = torch.zeros(1, requires_grad=True)
    actor_optimizer, critic_optimizer, alpha_optimizer = (
        torch.optim.Adam(parameters, lr=case["lr"])
        for parameters in (actor.parameters(), critics.parameters(), [log_alpha])
    )

    def q(nets: nn.ModuleList, seen: Tensor, action: Tensor) -> Tensor:
        both = torch.cat([seen, action], 1)
        return torch.cat([net(both) for net in nets], 1)  # [N, 2]

    memory = Memory(case["capacity"], size, np.zeros(width, np.float32))
    seen, total = env.reset(seed=1000 * case["seed"])[0], 0.0
    for env_steps in range(1, case["env_steps"] + 1):
        if env_steps <= WARMUP:
            action = torch.from_numpy(generator.uniform(-1, 1, width).astype(np.float32))
        else:
            with torch.no_grad():
                action = drawn(actor, torch.from_numpy(seen))[0]
        following, reward, terminated, truncated, _ = env.step((action * scale).numpy())
        memory.add(seen, action.numpy(), reward, following, terminated)
        seen, total = following, total + float(reward)
        if terminated or truncated:
            watch.episode(env_steps, total)
            seen, total = env.reset()[0], 0.0
        if env_steps >= WARMUP and env_steps % case["train_every"] == 0:
            o, a, r, after, end = memory.draw(case["batch_size"], generator)
            alpha = log_alpha.detach().exp()
            with torch.no_grad():
                next_action, next_log_prob = drawn(actor, after)
                value = q(targets, after, next_action).min(1).values - alpha * next_log_prob
                target = r + case["gamma"] * (1 - end) * value
            critic_loss = 0.5 * (q(critics, o, a) - target[:, None]).square().mean(0).sum()
            critic_optimizer.zero_grad()
            critic_loss.backward()  # type: ignore[no-untyped-call]
            critic_optimizer.step()
            chosen, log_prob = drawn(actor, o)
            actor_loss = (alpha * log_prob - q(critics, o, chosen).min(1).values).mean()
            actor_optimizer.zero_grad()
            actor_loss.backward()  # type: ignore[no-untyped-call]
            actor_optimizer.step()
            alpha_loss = -(log_alpha * (log_prob.detach() - width)).mean()
            alpha_optimizer.zero_grad()
            alpha_loss.backward()  # type: ignore[no-untyped-call]
            alpha_optimizer.step()
            with torch.no_grad():
                for kept, new in zip(targets.parameters(), critics.parameters(), strict=True):
                    kept.lerp_(new, TAU)
        watch.look(env_steps)
    watch.report(case["env_steps"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
