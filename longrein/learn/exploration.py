"""How one acts on action values [B, A] without always taking the best: pure functions, each row by itself.

mask: bool [B, A], False where an action is not allowed; None where all are. In a row without any, all are again.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longrein.learn.distributions import RULED_OUT


def allowed(value: Tensor, mask: Tensor | None) -> Tensor:
    """Action values [..., A], those of actions that the mask rules out so low that none is ever the best."""
    return value if mask is None else torch.where(_options(mask), value, RULED_OUT)


def epsilon_greedy(
    value: Tensor, epsilon: float | Tensor, generator: torch.Generator | None = None, mask: Tensor | None = None
) -> Tensor:
    """The best action of each row, or with probability epsilon any action, the best included: int64 [B].

    value [B, A]; epsilon: one for all rows, or [B].
    """
    rows, choices = value.shape
    if mask is None:
        anything = torch.randint(choices, (rows,), generator=generator)
    else:
        anything = torch.multinomial(_options(mask).float(), 1, generator=generator).squeeze(-1)
    best = allowed(value, mask).argmax(-1)
    return torch.where(torch.rand(rows, generator=generator) < epsilon, anything, best)


def quick_epsilon_greedy(
    value: NDArray[np.float32], epsilon: float, generator: torch.Generator | None = None
) -> NDArray[np.int64]:
    """As `epsilon_greedy`, of few rows where all actions are allowed: in NumPy, with one call of torch, for its draws.

    With one environment torch's own costs are most of what choosing an action takes. value [B, A] -> int64 [B].
    """
    rows, choices = value.shape
    chances, others = torch.rand(2, rows, generator=generator, dtype=torch.float64).tolist()
    action: NDArray[np.int64] = value.argmax(-1)
    for row, chance in enumerate(chances):
        if chance < epsilon:
            action[row] = int(others[row] * choices)
    return action


def epsilon_greedy_probs(value: Tensor, epsilon: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """With what probability `epsilon_greedy` takes each action: [..., A] -> [..., A]; the first of equals is best.

    epsilon: one for all rows, or of shape [...].
    """
    chances = torch.ones_like(value) if mask is None else _options(mask).to(value.dtype)
    spread = chances / chances.sum(-1, keepdim=True)
    best = torch.nn.functional.one_hot(allowed(value, mask).argmax(-1), value.shape[-1]).to(value.dtype)
    return best + torch.as_tensor(epsilon, dtype=value.dtype).unsqueeze(-1) * (spread - best)


def boltzmann(
    value: Tensor, temperature: float | Tensor, generator: torch.Generator | None = None, mask: Tensor | None = None
) -> Tensor:
    """Actions drawn in proportion to exp(value / temperature): int64 [B].

    value [B, A]; temperature: above 0, in units of the value, one for all rows or [B].
    """
    return torch.multinomial(boltzmann_probs(value, temperature, mask), 1, generator=generator).squeeze(-1)


def boltzmann_probs(value: Tensor, temperature: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """With what probability `boltzmann` takes each action: value [..., A] -> [..., A]; temperature as there."""
    scale = torch.as_tensor(temperature, dtype=value.dtype).unsqueeze(-1)
    return allowed(value / scale, mask).softmax(-1)


def _options(mask: Tensor) -> Tensor:
    return mask | ~mask.any(-1, keepdim=True)
