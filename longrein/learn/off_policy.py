"""What an actor-critic with a memory does with a batch, around its gradient step. Knows rates and counts, no loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from longrein.learn.batch import Batch
from longrein.learn.losses import mean_measured
from longrein.learn.optimizers import set_lr
from longrein.learn.replay import Replay
from longrein.learn.schedules import Schedule, gradient_steps_due, value_at


def temperature(given: Schedule | None, log_alpha: Tensor, env_steps: int) -> Tensor:
    """What entropy is worth now, without gradient, a scalar: as a spec gives it, or else as it was learned."""
    if given is None:
        return log_alpha.detach().exp()
    return torch.tensor(float(value_at(given, env_steps)))


class OffPolicy:
    """The parent of SAC and its kin: they say what a gradient step is, and set all that stands here."""

    measures: ClassVar[Sequence[str]]  # names of what `_step` gives
    config: Any  # with memory, rollout_steps, updates_per_step, warmup_steps, lr and critic_lr, as SAC's Config says
    generator: torch.Generator
    policy: Any  # with a buffer `warming`
    policy_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    replay: Replay
    updates: int  # gradient steps made

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return int(self.config.rollout_steps)

    def update(self, batch: Batch) -> dict[str, float]:
        """Remember new transitions [T, B, ...], then make the gradient steps that they pay for.

        Raises ValueError when no row is valid.
        """
        if not batch.valid.any():
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        config = self.config
        lr, critic_lr = self._rates()
        set_lr(self.policy_optimizer, lr)
        set_lr(self.critic_optimizer, critic_lr)
        self.replay.add(batch, self.generator)
        env_steps = self.replay.env_steps
        due = gradient_steps_due(env_steps, config.memory.min_size, config.updates_per_step, self.updates)
        measured = [self._step() for _ in range(due if self.replay.ready else 0)]
        self.policy.warming.fill_(env_steps < config.warmup_steps)
        return mean_measured(self.measures, measured) | {
            "lr": lr,
            "gradient_steps": float(len(measured)),
            "memory_size": float(len(self.replay)),
        }

    def _rates(self) -> tuple[float, float]:
        """Learning rates of the policy and of the critics, at the env steps so far."""
        lr = value_at(self.config.lr, self.replay.env_steps)
        critic_lr = self.config.critic_lr
        return lr, lr if critic_lr is None else value_at(critic_lr, self.replay.env_steps)

    def _step(self) -> Tensor:
        """One gradient step; what was measured, as `measures` names it."""
        raise NotImplementedError
