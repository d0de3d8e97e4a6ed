"""CrossQ: soft actor-critic without target networks, by batch renormalization over both ends of each transition.

Bhatt et al. 2024 (arXiv:1902.05605v4). docs/algorithms/crossq.md says where we differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.bounded import SquashedGaussian, bounded_form
from longrein.learn.distributions import action_form
from longrein.learn.eager import Adam
from longrein.learn.ensemble import Ensemble, Renorm
from longrein.learn.inputs import Inputs
from longrein.learn.off_policy import OffPolicy, temperature
from longrein.learn.replay import Memory, Replay, Sample
from longrein.learn.schedules import Schedule, refuse_negative
from longrein.learn.torsos import Net

ACTION_SPACES: tuple[type, ...] = (Box,)
METRICS = ("critic_loss", "policy_loss", "q", "entropy", "alpha")
TOLERATES_LAG = True  # it replays anyway


@dataclass(frozen=True)
class Config:
    """CrossQ's settings. A schedule is a function of env steps over all environments together."""

    net: Net = Net(hidden=(256, 256), activation="relu")
    """The policy's network, and each critic's but for its hidden layers."""
    critic_hidden: tuple[int, ...] = (256, 256)
    """Units of each hidden layer of a critic."""
    memory: Memory = Memory(capacity=1_000_000, batch_size=256, min_size=1_000)
    """What is remembered; learning begins when it holds `min_size` env steps."""
    rollout_steps: int = 1
    """Vector steps between updates; how many gradient steps are made does not depend on it."""
    updates_per_step: float = 1.0
    """Gradient steps for each env step."""
    warmup_steps: int = 1_000
    """Env steps at the beginning in which actions are drawn uniformly."""
    gamma: float = 0.99
    """Discount per env step."""
    lr: Schedule = 1e-3
    """Adam's learning rate for the policy and the temperature, and for the critics unless they have their own."""
    critic_lr: Schedule | None = None
    """Adam's learning rate for the critics; None takes `lr`."""
    adam_beta1: float = 0.5
    """Adam's decay of the mean gradient, for the policy and for the critics."""
    policy_delay: int = 3
    """The critics' gradient steps for each of the policy's and of the temperature's."""
    renorm_momentum: float = 0.99
    """Share of the running statistics that one gradient step keeps."""
    renorm_warmup: int = 100_000
    """Gradient steps of plain batch normalization before renormalization begins."""
    alpha: Schedule | None = None
    """Temperature, in reward units per nat; None learns it."""
    initial_alpha: float = 1.0
    """Temperature from which learning it starts."""
    target_entropy: float | None = None
    """Nats of entropy (of the density in [-1, 1]) that a learnt temperature holds; None takes minus one a number of
    the action."""
    backup_entropy: bool = True
    """Whether the critics count the entropy that is still to come; without, the policy alone is paid for its own."""

    def __post_init__(self) -> None:
        refuse_negative("crossq", self)
        for name in ("rollout_steps", "policy_delay"):
            if getattr(self, name) < 1:
                raise SpecError(f"crossq.{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("updates_per_step", "initial_alpha"):
            if getattr(self, name) <= 0:
                raise SpecError(f"crossq.{name}", f"must be positive, got {getattr(self, name)}")
        for name in ("gamma", "renorm_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"crossq.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.adam_beta1 < 1:
            raise SpecError("crossq.adam_beta1", f"must be from 0 to below 1, got {self.adam_beta1}")
        for name in ("warmup_steps", "renorm_warmup"):
            if getattr(self, name) < 0:
                raise SpecError(f"crossq.{name}", f"must not be negative, got {getattr(self, name)}")
        if self.net.recurrent != "none":
            raise SpecError("net.recurrent", "crossq has no recurrent policy", hint="recurrent: none, or take ppo")

    @property
    def renorm(self) -> Renorm:
        """As the networks take it."""
        return Renorm(self.renorm_momentum, self.renorm_warmup)


class Policy(nn.Module):
    """A squashed Gaussian over a Box, by a renormalised network; uniform as long as `warming` says so."""

    warming: Tensor

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.inputs = Inputs(observation_space, config.net, action_form(action_space))
        self.form = bounded_form(action_space)
        self.net = Ensemble(
            self.inputs.space,
            config.net.behind_inputs,
            outputs=2 * self.form.size,
            copies=1,
            last_gain=0.01,
            renorm=config.renorm,
            generator=generator,
        )
        self.register_buffer("warming", torch.tensor(config.warmup_steps > 0))

    def encode(self, observation: Any) -> NDArray[np.generic]:
        """Observations of B environments, as the vector environment batches them -> [B, ...]."""
        return self.inputs.encode(observation)

    @torch.no_grad()
    def act(
        self, observation: NDArray[np.generic], deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """Encoded observations [B, ...] -> actions float32 [B, K] in [-1, 1], and no extras."""
        if self.warming and not deterministic:
            return (2.0 * torch.rand(len(observation), self.form.size, generator=generator) - 1.0).numpy(), {}
        distribution = self.distribution(torch.from_numpy(observation))
        action = distribution.mode() if deterministic else distribution.sample(generator)
        return action.numpy(), {}

    def for_env(self, action: NDArray[np.generic]) -> NDArray[np.generic]:
        """Actions of `act` -> what the vector environment takes: scaled to its bounds."""
        return self.form.for_env(action)

    def distribution(self, observation: Tensor, train: bool = False) -> SquashedGaussian:
        """Encoded observations [N, ...] -> N distributions over actions; with `train` by the statistics of these N."""
        mean, log_std = self.net(observation, train=train)[0].chunk(2, -1)
        return SquashedGaussian(mean, log_std.clamp(-20.0, 2.0))


class CrossQ(OffPolicy):
    """The update rule, around a policy that others may act with in between."""

    measures = METRICS
    config: Config
    policy: Policy

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        seed: int,
    ) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        self.policy = Policy(config, observation_space, action_space, self.generator)
        self.critics = Ensemble(
            self.policy.inputs.space,
            replace(config.net.behind_inputs, hidden=config.critic_hidden),
            inputs=self.policy.form.size,
            renorm=config.renorm,
            generator=self.generator,
        )
        self.log_alpha = torch.tensor(math.log(config.initial_alpha), requires_grad=True)
        size = float(self.policy.form.size)
        self.target_entropy = -size if config.target_entropy is None else config.target_entropy  # nats
        self.replay = Replay(config.memory, gamma=config.gamma)
        self.updates = 0  # gradient steps of the critics made
        self._policy_parameters: list[Tensor] = [*self.policy.parameters()]
        if config.alpha is None:
            self._policy_parameters.append(self.log_alpha)
        lr, critic_lr = self._rates()
        betas = (config.adam_beta1, 0.999)
        self.policy_optimizer = Adam(self.policy.parameters(), lr=lr, betas=betas, fused=True)
        self.critic_optimizer = Adam(self.critics.parameters(), lr=critic_lr, betas=betas, fused=True)
        if config.alpha is None:
            self.policy_optimizer.add_param_group({"params": [self.log_alpha], "betas": (0.9, 0.999)})

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "critics": self.critics.state_dict(),
            "log_alpha": self.log_alpha.detach().clone(),
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "replay": self.replay.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        self.policy.load_state_dict(state["policy"])
        self.critics.load_state_dict(state["critics"])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.generator.set_state(state["generator"])
        self.replay.load_state_dict(state["replay"])
        self.updates = state["updates"]

    @property
    def alpha(self) -> Tensor:
        """The temperature now, without gradient: a scalar."""
        return temperature(self.config.alpha, self.log_alpha, self.replay.env_steps)

    def _step(self) -> Tensor:
        """One gradient step of the critics, and every so often of the rest; what was measured, as METRICS names it."""
        sample = self.replay.sample(self.config.memory.batch_size, self.generator)
        alpha = self.alpha
        critic_loss, q = self._learn_critics(sample, alpha)
        self.updates += 1
        policy_loss = entropy = torch.tensor(torch.nan)
        if self.updates % self.config.policy_delay == 0:
            policy_loss, log_prob = self._learn_policy(sample.observation, alpha)
            entropy = -log_prob.mean()
        return torch.stack([critic_loss, policy_loss, q.mean(), entropy, alpha])

    def _learn_critics(self, sample: Sample, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """One step towards r + discount V(s'); the loss, and the critics' values [2, N] before it."""
        paid = alpha if self.config.backup_entropy else torch.zeros_like(alpha)
        with torch.no_grad():
            next_action, log_prob = self.policy.distribution(sample.next_observation).rsample(self.generator)
        # Both ends in one batch: its statistics are those of the mixture, so that neither end is out of distribution.
        both = self.critics(
            torch.cat([sample.observation, sample.next_observation]),
            torch.cat([sample.action, next_action]),
            train=True,
        )
        q, next_q = both.squeeze(-1).chunk(2, 1)
        target = sample.reward + sample.discount * (next_q.detach().amin(0) - paid * log_prob)
        loss = losses.ensemble_value_loss(q, target, sample.weight)
        self.critic_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.critic_optimizer.step()
        if self.config.memory.prioritized:
            self.replay.update_priorities(sample.index, (q.detach() - target).abs().mean(0))
        return loss.detach(), q.detach()

    def _learn_policy(self, observation: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """One step up the soft value of the policy's own actions; the loss, and their log-probabilities [N].

        And one of the temperature, whose loss shares no weight with the policy's: one pass back does for both.
        """
        action, log_prob = self.policy.distribution(observation, train=True).rsample(self.generator)
        q: Tensor = self.critics(observation, action).squeeze(-1).amin(0)  # by the running statistics
        loss = (alpha * log_prob - q).mean()
        both = loss
        if self.config.alpha is None:
            both = loss + losses.temperature_loss(self.log_alpha, log_prob, self.target_entropy)
        self.policy_optimizer.zero_grad()
        # Of these weights alone: the critics get no gradient from here, and it costs none.
        both.backward(inputs=self._policy_parameters)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.policy_optimizer.step()
        return loss.detach(), log_prob.detach()


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> CrossQ:
    """A CrossQ for one environment's spaces; `seed` decides its weights, its draws and its samples.

    Raises SpecError for an action space that is not a bounded float Box.
    """
    return CrossQ(config, observation_space, action_space, seed)
