"""ACKTR: actor-critic by natural gradients within a trust region (Wu et al. 2017, arXiv:1708.05144).

A2C's rollouts and losses; the steps are those of longrein/learn/natural.py. docs/algorithms/acktr.md lists where we
differ from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import torch
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.actor_critic import ACTION_SPACES, ActorCriticPolicy, successor_values
from longrein.learn.batch import Batch
from longrein.learn.kfac import KFAC
from longrein.learn.natural import Natural, check, networks, settings_of
from longrein.learn.normalise import RewardScale
from longrein.learn.returns import gae
from longrein.learn.schedules import Schedule, value_at
from longrein.learn.torsos import Net

__all__ = ["ACKTR", "ACTION_SPACES", "Config", "Policy", "build"]

Policy = ActorCriticPolicy


@dataclass(frozen=True)
class Config:
    """ACKTR's settings. A schedule is a function of env steps over all environments together."""

    rollout_steps: int = 20
    """Vector steps between updates; a batch has this many rows for each environment, and is used once."""
    gamma: float = 0.99
    """Discount per env step."""
    lambda_: float = 1.0
    """GAE's weight of longer sums: 1 is the paper's, returns to the end of the rollout; 0 the one-step TD error."""
    lr: Schedule = 0.25
    """eta, the share of a natural gradient that is gone where the trust region allows; the paper's falls to 0."""
    kl_clip: Schedule = 0.002
    """kappa, twice the quadratic KL in nats that one update of the policy may have; of both networks if shared."""
    value_kl_clip: Schedule = 0.1
    """The same for a critic of its own: the mean squared change of a value, in units of value_noise squared."""
    value_noise: float = 1.0
    """Standard deviation of the Gaussian for which the critic's value is taken, in (scaled) reward units."""
    damping: float = 0.01
    """Added to the Fisher matrix's eigenvalues."""
    statistics_decay: float = 0.99
    """How much of the running averages of statistics is left after an update."""
    inverse_every: int = 10
    """Updates between decompositions of the statistics."""
    cold_updates: int = 10
    """First updates, by plain gradients while statistics gather."""
    max_grad_norm: float = 0.5
    """Norm to which gradients of the cold updates are clipped, for each network."""
    momentum: float = 0.9
    """Of the steps."""
    fallback_lr: float = 3e-3
    """Adam's learning rate, for parameters of no Linear or Conv2d, as log_std; it falls in proportion with `lr`."""
    entropy_weight: Schedule = 0.01
    """Weight of the entropy bonus, in loss per nat."""
    value_weight: float = 0.5
    """Weight of the value loss."""
    value_updates: int = 1
    """Steps that a critic of its own takes on each rollout, of which the policy goes along with the first."""
    shared: bool = False
    """Whether policy and critic share their torso, and so one trust region; the paper's do on Atari."""
    normalise_advantage: bool = False
    """Whether the advantages of each batch are brought to mean 0 and deviation 1."""
    scale_reward: bool = False
    """Whether rewards are divided by the running deviation of the discounted return."""
    normal_clip: float = 10.0
    """Deviations to which scaled rewards are clipped."""
    net: Net = Net()
    """Torso of the policy, and of the critic."""

    def __post_init__(self) -> None:
        check(self, "acktr")
        for name in ("rollout_steps", "value_updates"):
            if getattr(self, name) < 1:
                raise SpecError(f"acktr.{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("gamma", "lambda_"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"acktr.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")
        if self.normal_clip <= 0:
            raise SpecError("acktr.normal_clip", f"must be over 0, got {self.normal_clip}")
        if self.value_weight < 0:
            raise SpecError("acktr.value_weight", f"must not be negative, got {self.value_weight}")


class ACKTR:
    """The update rule, around a policy that others may act with in between."""

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        seed: int,
    ) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        self.policy = Policy(
            observation_space, action_space, config.net, shared=config.shared, generator=self.generator
        )
        self.reward_scale = RewardScale(config.gamma, config.normal_clip) if config.scale_reward else None
        self.natural = Natural(settings_of(config), networks(self.policy), self.generator)
        if config.value_updates > 1 and len(self.natural.kfacs) == 1:
            raise SpecError("acktr.value_updates", f"must be 1 where policy and critic are one network, got "
                            f"{config.value_updates}", hint="shared: false, or value_updates: 1")  # fmt: skip
        self.env_steps = 0  # valid rows seen
        self.updates = 0

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    @property
    def optimizers(self) -> list[KFAC]:
        """One for what shares weights, with one trust region; the policy's is the first."""
        return self.natural.kfacs

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from one rollout [T, B, ...] that this very policy acted out since the last update.

        Raises ValueError when no row is valid.
        """
        if not batch.valid.any():
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        config = self.config
        kl_clip, entropy_weight = (value_at(s, self.env_steps) for s in (config.kl_clip, config.entropy_weight))
        self.natural.schedule(self.env_steps)

        observation = batch.observation[batch.valid]
        action = batch.action[batch.valid]
        with self.natural.recording():
            distribution, value = self.policy.evaluate(observation)
            # The rollout's actions are this policy's own draws, so the Fisher matrix is that of log pi(a|s) itself.
            self.natural.observe(distribution, value, action)

        advantage, target = self._targets(batch, value.detach())
        weight = losses.normalised(advantage) if config.normalise_advantage else advantage
        log_pi = distribution.log_prob(action)
        policy_loss = -(log_pi * weight).mean()
        value_loss = losses.value_loss(value, target)
        entropy = distribution.entropy().mean()
        value_weight = self.natural.value_weight(config.value_weight)
        self.natural.step(policy_loss + value_weight * value_loss - entropy_weight * entropy)
        for _ in range(config.value_updates - 1):
            again = value_weight * losses.value_loss(self.policy.value(observation), target)
            self.natural.step(again, self.natural.kfacs[1:])
        self.updates += 1
        self.env_steps += len(action)

        with torch.no_grad():
            moved = self.policy.distribution(observation)
            approx_kl = losses.approx_kl(moved.log_prob(action) - log_pi)
            numbers = torch.stack([
                policy_loss, value_loss, entropy, approx_kl, value.mean(), advantage.std(correction=0),
            ])  # fmt: skip
        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "value", "advantage_std")
        return dict(zip(names, numbers.tolist(), strict=True)) | self.natural.measured() | {
            "explained_variance": losses.explained_variance(value.detach(), target),
            "lr": self.natural.lr,
            "kl_clip": kl_clip,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "natural": self.natural.state_dict(),
            "generator": self.generator.get_state(),
            "reward_scale": self.reward_scale.state_dict() if self.reward_scale is not None else None,
            "env_steps": self.env_steps,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        self.policy.load_state_dict(state["policy"])
        self.natural.load_state_dict(state["natural"])
        self.generator.set_state(state["generator"])
        if self.reward_scale is not None:
            self.reward_scale.load_state_dict(state["reward_scale"])
        self.env_steps = state["env_steps"]
        self.updates = state["updates"]

    @torch.no_grad()
    def _targets(self, batch: Batch, value: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and value targets [N] of the valid rows, whose values [N] are known."""
        reward = batch.reward
        if self.reward_scale is not None:
            reward = self.reward_scale.scale(reward, batch.done, batch.valid)
        values = torch.zeros_like(reward)
        values[batch.valid] = value
        advantage = gae(
            reward,
            batch.terminated,
            batch.truncated,
            batch.valid,
            values,
            successor_values(self.policy.value, batch, values),
            gamma=self.config.gamma,
            lambda_=self.config.lambda_,
        )[batch.valid]
        return advantage, advantage + value


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> ACKTR:
    """An ACKTR for one environment's spaces; `seed` decides its weights and the draws of its statistics."""
    return ACKTR(config, observation_space, action_space, seed)
