"""REINFORCE: Monte-Carlo policy gradient with a learned baseline (Williams 1992, Machine Learning 8).

docs/algorithms/reinforce.md lists where we differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium
import torch

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.actor_critic import ACTION_SPACES, ActorCriticPolicy
from longrein.learn.batch import Batch
from longrein.learn.episodes import EpisodeStore
from longrein.learn.optimizers import FlatParameters, make_optimizer, set_lr
from longrein.learn.returns import discounted_returns, n_step_returns
from longrein.learn.schedules import Schedule, refuse_negative, value_at
from longrein.learn.torsos import Net

__all__ = ["ACTION_SPACES", "Config", "Policy", "Reinforce", "build"]

Policy = ActorCriticPolicy


@dataclass(frozen=True)
class Config:
    """REINFORCE's settings. A schedule is a function of env steps over all environments together."""

    rollout_steps: int = 16
    """Vector steps of one batch: how often it is asked whether enough episodes are whole."""
    episodes_per_update: int = 8
    """Whole episodes, at least, of one update."""
    max_episode_steps: int = 10_000
    """Env steps after which an episode that does not end is cut: bootstrapped by the baseline, or left out."""
    gamma: float = 0.99
    """Discount per env step."""
    lr: Schedule = 2e-3
    """Learning rate."""
    optimizer: str = "adam"
    """adam, rmsprop_tf (epsilon inside the root), sgd or any other of torch.optim."""
    optimizer_settings: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's own keywords; those left out are as it has them."""
    entropy_weight: Schedule = 0.0
    """Weight of the entropy bonus, in loss per nat."""
    baseline: bool = True
    """Whether a value learnt beside the policy is taken off the returns."""
    value_weight: float = 1.0
    """Weight of half the squared error of the baseline."""
    normalise_returns: bool = False
    """Whether what is left of the returns is brought to mean 0 and deviation 1 in each update: a moving baseline."""
    max_grad_norm: float = 0.5
    """Global norm to which gradients are clipped."""
    shared: bool = False
    """Whether policy and baseline share one torso, rather than having one each."""
    net: Net = Net()
    """What stands between observations and heads."""

    def __post_init__(self) -> None:
        refuse_negative("reinforce", self)
        for name in ("rollout_steps", "episodes_per_update", "max_episode_steps"):
            if getattr(self, name) < 1:
                raise SpecError(f"reinforce.{name}", f"must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.gamma <= 1:
            raise SpecError("reinforce.gamma", f"must lie between 0 and 1, got {self.gamma}")
        for name in ("value_weight", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise SpecError(f"reinforce.{name}", f"must not be negative, got {getattr(self, name)}")


MEASURED = ("policy_loss", "value_loss", "entropy", "grad_norm", "return", "advantage_std", "episodes")


class Reinforce:
    """The update rule, around a policy that others may act with in between."""

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        seed: int,
    ) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(seed)  # for the weights; nothing is drawn later
        self.policy = Policy(
            observation_space, action_space, config.net,
            shared=config.shared, critic=config.baseline, recurrent=True, generator=generator,
        )  # fmt: skip
        self._flat = FlatParameters(self.policy.parameters())
        self.optimizer = make_optimizer(
            config.optimizer, [self._flat.whole], value_at(config.lr, 0), **config.optimizer_settings
        )
        self.episodes = EpisodeStore(config.max_episode_steps)
        self.env_steps = 0  # valid rows seen
        self.updates = 0  # optimizer steps taken

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """Keep [T, B, ...]; when enough episodes are whole, learn from them. Metrics are NaN until then.

        Raises ValueError when no row is valid.
        """
        rows = int(batch.valid.sum())
        if rows == 0:
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        lr, entropy_weight = (value_at(s, self.env_steps) for s in (self.config.lr, self.config.entropy_weight))
        set_lr(self.optimizer, lr)
        self.env_steps += rows
        self.episodes.add(batch)
        measured = dict.fromkeys(MEASURED, float("nan"))
        if self.episodes.ended >= self.config.episodes_per_update:
            measured |= self._learn(self._learnable(self.episodes.take()), entropy_weight)
        return measured | {"lr": lr, "entropy_weight": entropy_weight}

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "episodes": self.episodes.state_dict(),
            "env_steps": self.env_steps,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.episodes.load_state_dict(state["episodes"])
        self.env_steps = state["env_steps"]
        self.updates = state["updates"]

    def _learnable(self, batch: Batch) -> Batch:
        """Without a baseline nobody knows what an episode that was cut would have been worth: its rows are left out."""
        if self.config.baseline:
            return batch
        cut = discounted_returns(batch.extras["cut"].float(), batch.done | ~batch.valid, gamma=1.0) > 0
        return replace(batch, valid=batch.valid & ~cut)

    def _learn(self, batch: Batch, entropy_weight: float) -> dict[str, float]:
        """One optimizer step on the valid rows of [T, B, ...]; what was measured before it."""
        valid = batch.valid
        if not valid.any():
            return {}
        distribution, value, _, next_value = self.policy.rollout(batch)
        rows = (batch.reward, batch.terminated, batch.truncated, batch.valid)
        # Beyond a truncation the baseline stands for the rest of the return, or nothing does.
        return_ = n_step_returns(*rows, next_value, gamma=self.config.gamma)[valid]
        left = return_ - value.detach()
        advantage = losses.normalised(left) if self.config.normalise_returns else left
        policy_loss = losses.policy_gradient(distribution.log_prob(batch.action[valid]), advantage)
        value_loss = losses.value_loss(value, return_)
        entropy = distribution.entropy().mean()
        loss = policy_loss - entropy_weight * entropy
        if self.config.baseline:
            loss = loss + self.config.value_weight * value_loss
        self._flat.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        norm = self._flat.clip_(self.config.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        with torch.no_grad():
            ends = (batch.done & valid).sum().float()
            numbers = (policy_loss, value_loss, entropy, norm, return_.mean(), left.std(correction=0), ends)
            return dict(zip(MEASURED, torch.stack(numbers).tolist(), strict=True))


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> Reinforce:
    """A REINFORCE for one environment's spaces; `seed` decides its weights."""
    return Reinforce(config, observation_space, action_space, seed)
