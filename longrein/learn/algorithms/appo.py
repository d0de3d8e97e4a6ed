"""APPO: PPO on what older policies did, corrected by V-trace, with a target network for its ratios.

The surrogate of "IMPACT", Luo et al. 2020 (arXiv:1912.00167), without its buffer of batches. Everything else is PPO's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import torch
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import policy_value
from longrein.learn.algorithms import ppo
from longrein.learn.algorithms.ppo import ACTION_SPACES, Memory, Policy
from longrein.learn.batch import Batch
from longrein.learn.returns import continues, vtrace

__all__ = ["ACTION_SPACES", "APPO", "Config", "build"]

TOLERATES_LAG = True  # corrected by V-trace


@dataclass(frozen=True)
class Config(ppo.Config):
    """PPO's settings, and these."""

    NAME: ClassVar[str] = "appo"

    target_every: int = 1
    """Batches after which the target network, to which the clipped ratio is, becomes a copy of the policy."""
    rho_clip: float = 1.0
    """Most that the ratio of the target to the policy that acted may weigh a TD error with."""
    c_clip: float = 1.0
    """Most that it may weigh what comes later with, at most rho_clip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_every < 1:
            raise SpecError("appo.target_every", f"must be at least 1, got {self.target_every}")
        for name in ("rho_clip", "c_clip"):
            if getattr(self, name) <= 0:
                raise SpecError(f"appo.{name}", f"must be positive, got {getattr(self, name)}")
        if self.c_clip > self.rho_clip:
            raise SpecError("appo.c_clip", f"must be at most rho_clip, {self.rho_clip}, got {self.c_clip}",
                            hint="the operator is a contraction only then")  # fmt: skip


class APPO(ppo.PPO):
    """PPO's update rule with other advantages, and ratios to a target network."""

    config: Config

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        seed: int,
    ) -> None:
        super().__init__(config, observation_space, action_space, seed)
        self.target: Policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.batches = 0  # learnt from
        self._measured: dict[str, float] = {}  # of the batch at hand

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from one rollout [T, B, ...] that some policy acted out whose log_prob it has.

        Raises ValueError when no row is valid, or extras lack `log_prob`.
        """
        if self.batches % self.config.target_every == 0:
            self.target.load_state_dict(self.policy.state_dict())
        measured = super().update(batch)
        self.batches += 1
        return measured | self._measured

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return super().state_dict() | {"target": self.target.state_dict(), "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        super().load_state_dict(state)
        self.target.load_state_dict(state["target"])
        self.batches = state["batches"]

    def _known(self, batch: Batch) -> Tensor | None:
        """None: the policy that acted may have been an older one."""
        return None

    def _credit(
        self, batch: Batch, reward: Tensor, value: Tensor, next_value: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The target network's log-probabilities, its clipped ratio to the policy that acted, advantages, and targets.

        Without lag the advantages are GAE's. The ratio of a row's own action is not in its advantage: where advantages
        are normalised, their mean would else pull towards the policy that acted.
        """
        valid, config = batch.valid, self.config
        log_prob = torch.zeros_like(batch.reward)
        log_prob[valid] = self._target_log_prob(batch, memory)
        log_ratio = torch.where(valid, log_prob - batch.extras["log_prob"], 0.0)
        ends = batch.terminated, batch.truncated, valid
        target, _ = vtrace(
            reward, *ends, value, next_value, log_ratio,
            gamma=config.gamma, lambda_=config.lambda_, rho_clip=config.rho_clip, c_clip=config.c_clip,
        )  # fmt: skip
        moved = (target - value).masked_fill(~valid, 0.0)
        goes_on = continues(batch.done, valid)
        later = torch.where(goes_on, moved.roll(-1, 0), 0.0)
        error = (reward + config.gamma * next_value * ~batch.terminated - value).masked_fill(~valid, 0.0)
        rho = log_ratio[valid].exp()
        self._measured = {
            "rho": float(rho.mean()), "rho_clipped": float((rho > config.rho_clip + 1e-3).float().mean()),
        }  # fmt: skip
        weight = log_ratio.exp().clamp(max=config.rho_clip)
        return log_prob, weight, error + config.gamma * config.lambda_ * later, target

    def _target_log_prob(self, batch: Batch, memory: Memory | None) -> Tensor:
        """Of the valid rows' actions: [N]."""
        valid = batch.valid
        if memory is None:
            inputs, mask = self.target.split(batch.observation[valid])
            numbers, _ = self.target.net.evaluate(inputs)
        else:
            assert isinstance(self.target.net, policy_value.PolicyValue)
            inputs, mask = self.target.split(batch.observation)
            numbers, _ = self.target.net.evaluate_sequences(inputs, memory.state, memory.begin)
            numbers, mask = numbers[valid], None if mask is None else mask[valid]
        return self.target.distribution(numbers, mask).log_prob(batch.action[valid])


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> APPO:
    """An APPO for one environment's spaces; `seed` decides its weights and its shuffles."""
    return APPO(config, observation_space, action_space, seed)
