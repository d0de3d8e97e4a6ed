"""Batches of random numbers, and the same with nonsense in their invalid rows: what an update must see through."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from longrein.learn.batch import Batch


def batch(steps: int, envs: int, *, actions: int, seed: int = 0, size: int = 3, valid: float = 1.0) -> Batch:
    """Transitions [T, B] in random masks. actions: numbers of a bounded action, or less than 0: so many choices."""
    generator = torch.Generator().manual_seed(seed)

    def chance(share: float) -> Tensor:
        return torch.rand(steps, envs, generator=generator) < share

    observation = torch.randn(steps + 1, envs, size, generator=generator)
    if actions < 0:
        action = torch.randint(-actions, (steps, envs), generator=generator)
    else:
        action = 2 * torch.rand(steps, envs, actions, generator=generator) - 1
    return Batch(
        observation=observation[:-1].clone(),
        action=action,
        reward=torch.randn(steps, envs, generator=generator),
        next_observation=observation[1:].clone(),
        terminated=chance(0.1),
        truncated=chance(0.1),
        valid=chance(valid),
    )


def nonsense(clean: Batch) -> Batch:
    """The same batch with numbers in its invalid rows that would spoil whatever they touch."""
    wrong = ~clean.valid

    def spoilt(column: Tensor) -> Tensor:
        return torch.where(wrong.reshape(*wrong.shape, *[1] * (column.ndim - 2)), 1e9, column)

    return dataclasses.replace(
        clean,
        observation=spoilt(clean.observation),
        reward=spoilt(clean.reward),
        next_observation=spoilt(clean.next_observation),
    )
