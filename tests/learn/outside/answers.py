"""What other packages compute from the same numbers. longrein is in none of their virtual environments.

.venv-peers/PACKAGE/bin/python answers.py PACKAGE QUESTIONS.npz ANSWERS.npz
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]


def advantages(ask: Arrays) -> Arrays:
    """Stable-Baselines3's GAE, which knows the ends of episodes and no time limits."""
    import torch
    from gymnasium.spaces import Box, Discrete
    from stable_baselines3.common.buffers import RolloutBuffer

    steps, envs = ask["reward"].shape
    buffer = RolloutBuffer(steps, Box(-1, 1, (1,)), Discrete(2), gae_lambda=0.9, gamma=0.97, n_envs=envs)
    buffer.reset()
    done = ask["terminated"]
    starts = np.concatenate([np.zeros((1, envs), bool), done[:-1]])
    for t in range(steps):
        value = torch.tensor(ask["value"][t])
        zero = np.zeros((envs, 1), np.float32)
        buffer.add(zero, zero, ask["reward"][t], starts[t], value, torch.zeros(envs))
    buffer.compute_returns_and_advantage(torch.tensor(ask["last_value"]), done[-1])
    return {"gae": buffer.advantages}


def off_policy(ask: Arrays) -> Arrays:
    """RLax's V-trace and Retrace, a column at a time."""
    import jax.numpy as jnp
    import rlax

    envs = ask["reward"].shape[1]
    discount = 0.97 * ~ask["terminated"]
    following = np.concatenate([ask["value"][1:], ask["last_value"][None]])
    found: dict[str, list[Any]] = {"vtrace_error": [], "vtrace_advantage": [], "retrace_error": []}
    for b in range(envs):
        traced = rlax.vtrace_td_error_and_advantage(
            jnp.array(ask["value"][:, b]), jnp.array(following[:, b]), jnp.array(ask["reward"][:, b]),
            jnp.array(discount[:, b]), jnp.exp(jnp.array(ask["log_ratio"][:, b])), 0.9,
        )  # fmt: skip
        found["vtrace_error"].append(traced.errors)
        found["vtrace_advantage"].append(traced.q_estimate - ask["value"][:, b])
        # q_t and log_rhos are those of steps 1 to T - 1; v_t of 1 to T.
        error = rlax.retrace_continuous(
            jnp.array(ask["action_value"][:, b]), jnp.array(ask["action_value"][1:, b]), jnp.array(following[:, b]),
            jnp.array(ask["reward"][:, b]), jnp.array(discount[:, b]), jnp.array(ask["log_ratio"][1:, b]), 0.9,
        )  # fmt: skip
        found["retrace_error"].append(error)
    return {name: np.stack(columns, 1) for name, columns in found.items()}


def projected(ask: Arrays) -> Arrays:
    """RLax's C51 projection."""
    import jax.numpy as jnp
    import rlax

    support = jnp.array(ask["support"])
    rows = [
        rlax.categorical_l2_project(reward + discount * support, jnp.array(probs), support)
        for reward, discount, probs in zip(ask["r"], ask["discount"], ask["probs"], strict=True)
    ]
    return {"c51": np.stack(rows)}


def quantiles(ask: Arrays) -> Arrays:
    """SB3-Contrib's quantile loss."""
    import torch
    from sb3_contrib.common.utils import quantile_huber_loss

    quantile, target = torch.tensor(ask["quantile"]), torch.tensor(ask["target"])
    return {"quantile": quantile_huber_loss(quantile, target).numpy()}


def drawing(ask: Arrays) -> Arrays:
    """Tianshou's segment tree."""
    from tianshou.data import SegmentTree

    tree = SegmentTree(len(ask["priority"]))
    tree[np.arange(len(ask["priority"]))] = ask["priority"]
    return {"found": tree.get_prefix_sum_idx(ask["height"])}


def renormalised(ask: Arrays) -> Arrays:
    """SB3-Contrib's batch renormalisation, once its running statistics are those of the first batch."""
    import torch
    from sb3_contrib.common.torch_layers import BatchRenorm1d

    layer = BatchRenorm1d(ask["features"].shape[2], warmup_steps=2)
    layer.train()
    first, second = torch.tensor(ask["features"])
    for _ in range(2000):
        layer(first)
    trained = layer(second)
    layer.eval()
    return {"renorm_trained": trained.detach().numpy(), "renorm_acting": layer(second).detach().numpy()}


PARTS = {"sb3": (advantages, quantiles, renormalised), "sbx": (off_policy, projected), "tianshou": (drawing,)}

if __name__ == "__main__":
    package, asked, told = sys.argv[1:]
    questions = dict(np.load(asked))
    answers: Arrays = {}
    for part in PARTS[package]:
        answers |= part(questions)
    np.savez(told, **answers)  # type: ignore[arg-type]  # its stub takes the names for flags
