"""A3C: the worker rule of asynchronous advantage actor-critic (Mnih et al. 2016, arXiv:1602.01783, algorithm S3).

Knows one worker's turn; the memory that workers share is `learn.shared_weights`' business.

A turn, in `update`:
1. The loss of the rollout is computed with the local weights, the ones that acted, and its gradients are summed.
2. They are applied to the shared weights with statistics that are shared or the worker's own, and no lock. With
   `natural` the worker's own K-FAC makes a step of them, which is added to the shared weights.
3. The local weights become a copy of the shared ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import torch
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.actor_critic import ACTION_SPACES, ActorCriticPolicy
from longrein.learn.batch import Batch
from longrein.learn.natural import Natural, NaturalGradient, networks, section
from longrein.learn.optimizers import FlatParameters, set_lr
from longrein.learn.returns import n_step_returns
from longrein.learn.schedules import Schedule, refuse_negative, value_at
from longrein.learn.shared_weights import (
    Shared,
    SharingWorker,
    check_statistics,
    cloned,
)
from longrein.learn.torsos import Net

__all__ = ["A3C", "ACTION_SPACES", "Config", "Policy", "build"]

Policy = ActorCriticPolicy
SHARES_WEIGHTS = True


@dataclass(frozen=True)
class Config:
    """A3C's settings. A schedule is a function of env steps over all workers' environments together."""

    rollout_steps: int = 20
    """Vector steps between updates of one worker: the t_max of the paper, and the n of n-step returns."""
    gamma: float = 0.99
    """Discount per env step."""
    lr: Schedule = 1e-3
    """Learning rate, of summed gradients; the paper's falls to 0 at the end of training."""
    optimizer: str = "rmsprop_tf"
    """rmsprop_tf (the paper's), rmsprop, adam, adamw or sgd."""
    optimizer_settings: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's own keywords; those left out are as it has them."""
    statistics: str = "shared"
    """The optimizer's: shared by all workers, or own, where each worker has its own."""
    entropy_weight: Schedule = 0.01
    """Weight of the entropy bonus, in loss per nat."""
    value_weight: float = 1.0
    """Weight of half the squared value error; 1 is the usual coefficient 0.5 of the whole square."""
    max_grad_norm: float = 40.0
    """Global norm to which the gradients summed over a rollout are clipped."""
    shared: bool = False
    """Whether policy and value share one torso, rather than having one each."""
    natural: NaturalGradient | None = None
    """K-FAC in place of `lr`, `optimizer`, `optimizer_settings` and `max_grad_norm`, with its settings; None: not."""
    net: Net = Net()
    """What stands between observations and heads."""

    def __post_init__(self) -> None:
        refuse_negative("a3c", self)
        if self.rollout_steps < 1:
            raise SpecError("a3c.rollout_steps", f"must be at least 1, got {self.rollout_steps}")
        if not 0 <= self.gamma <= 1:
            raise SpecError("a3c.gamma", f"must lie between 0 and 1, got {self.gamma}")
        for name in ("value_weight", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise SpecError(f"a3c.{name}", f"must not be negative, got {getattr(self, name)}")
        check_statistics("a3c", self.optimizer, self.statistics)
        object.__setattr__(self, "natural", section(self.natural, self.net, "a3c"))


class A3C(SharingWorker):
    """One worker. The first is made by `build`, the others by `worker`."""

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        seed: int,
        shared: Shared | None = None,
        index: int = 0,
    ) -> None:
        """shared: of the workers that are there already; None begins anew, with weights drawn from `seed`.

        index: this worker's place among them.
        """
        self.config: Config = config
        self.generator = torch.Generator().manual_seed(seed)  # for the weights, and for what K-FAC draws
        self.policy: Policy = Policy(
            observation_space, action_space, config.net, shared=config.shared, recurrent=True, generator=self.generator
        )
        local = FlatParameters(self.policy.parameters())
        self.optimizer = self._join((observation_space, action_space), local, shared, index)
        self.natural: Natural | None = None  # in the optimizer's place; its statistics are this worker's
        if config.natural is not None:
            self.natural = Natural(config.natural, networks(self.policy), self.generator)
        self.refresh()

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """A worker's turn with one rollout [T, B, ...] that its policy acted out since the last turn.

        Raises ValueError when no row is valid.
        """
        rows = int(batch.valid.sum())
        if rows == 0:
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        lr, entropy_weight = (value_at(s, self.env_steps) for s in (self.config.lr, self.config.entropy_weight))
        if self.natural is not None:
            self.natural.schedule(self.env_steps)
            lr = self.natural.lr
        self._count(rows)
        measured = self._learn(batch, rows, lr, entropy_weight)
        if self.natural is not None:
            measured |= self.natural.measured()
        self.refresh()
        return measured | {"lr": lr, "entropy_weight": entropy_weight}

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future of the shared weights; other workers should rest meanwhile."""
        return {
            "policy": self._named(self.policy, self.shared.weights),
            "statistics": cloned(self._statistics),
            "env_steps": self.env_steps,
            "updates": self.updates,
            "natural": self._natural_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let all workers go on from a saved state; the others see it after their next turn, or `refresh`.

        Raises RuntimeError, from torch, when the networks differ.
        """
        self.policy.load_state_dict(state["policy"])
        self._begin_from(state["env_steps"], state["updates"])
        self._take(state["statistics"], state.get("natural"))

    def own_state(self) -> dict[str, Any]:
        """K-FAC's statistics and its draws; the optimizer's statistics, where each worker has its own."""
        return {"statistics": self._own_statistics(), "natural": self._natural_state()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what a worker alone had."""
        self._take(state["statistics"], state["natural"])

    def _natural_state(self) -> dict[str, Any] | None:
        if self.natural is None:
            return None
        return {"kfac": self.natural.state_dict(), "generator": self.generator.get_state()}

    def _take(self, statistics: Mapping[str, Tensor], natural: dict[str, Any] | None) -> None:
        self._take_statistics(statistics)
        if self.natural is not None and natural is not None:
            self.natural.load_state_dict(natural["kfac"])
            self.generator.set_state(natural["generator"])

    def _learn(self, batch: Batch, rows: int, lr: float, entropy_weight: float) -> dict[str, float]:
        valid = batch.valid
        if self.natural is not None:
            with self.natural.recording():
                self.natural.observe(*self.policy.evaluate(batch.observation[valid]))
        distribution, value, _, next_value = self.policy.rollout(batch)
        rows_of = (batch.reward, batch.terminated, batch.truncated, batch.valid)
        target = n_step_returns(*rows_of, next_value, gamma=self.config.gamma)[valid]
        advantage = target - value.detach()
        policy_loss = losses.policy_gradient(distribution.log_prob(batch.action[valid]), advantage)
        value_loss = losses.value_loss(value, target)
        entropy = distribution.entropy().mean()
        if self.natural is not None:
            value_weight = self.natural.value_weight(self.config.value_weight)
            norm = self._natural_step(policy_loss + value_weight * value_loss - entropy_weight * entropy)
        else:
            # Times the rows: means become the sums of the paper.
            loss = rows * (policy_loss + self.config.value_weight * value_loss - entropy_weight * entropy)
            self._local.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            norm = self._local.clip_(self.config.max_grad_norm)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            self._wrote()
        with torch.no_grad():
            numbers = (policy_loss, value_loss, entropy, norm, value.mean(), advantage.std(correction=0))
            names = ("policy_loss", "value_loss", "entropy", "grad_norm", "value", "advantage_std")
            return dict(zip(names, torch.stack(numbers).tolist(), strict=True))

    def _natural_step(self, loss: Tensor) -> Tensor:
        """The local weights take the step, momentum and Adam's part included; the shared ones move as far."""
        assert self.natural is not None
        before = self._local.whole.detach().clone()
        norm = self.natural.step(loss)
        self.shared.weights.add_(self._local.whole.detach() - before)
        self._wrote()
        return norm


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> A3C:
    """The first worker, for one environment's spaces; `seed` decides the weights."""
    return A3C(config, observation_space, action_space, seed)
