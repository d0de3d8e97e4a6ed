"""SAC: soft actor-critic with twin critics and a learnt temperature, for bounded actions and for choices.

Haarnoja et al. 2018 (arXiv:1801.01290 and, for the temperature, 1812.05905); for choices Christodoulou 2019
(arXiv:1910.07207). docs/algorithms/sac.md says where we differ.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.bounded import BoundedForm, SquashedGaussian, bounded_form
from longrein.learn.chain import Chain, Pass, backward
from longrein.learn.critics import set_gradients
from longrein.learn.distributions import RULED_OUT, Categorical, action_form
from longrein.learn.eager import Adam
from longrein.learn.ensemble import Ensemble
from longrein.learn.inputs import Inputs
from longrein.learn.networks import orthogonal
from longrein.learn.off_policy import OffPolicy, temperature
from longrein.learn.replay import Memory, Replay, Sample
from longrein.learn.returns import expected_soft_value
from longrein.learn.schedules import Schedule, refuse_negative
from longrein.learn.torsos import Net, make_torso

ACTION_SPACES: tuple[type, ...] = (Box, Discrete)
METRICS = ("critic_loss", "policy_loss", "q", "entropy", "alpha")
TOLERATES_LAG = True  # it replays anyway


@dataclass(frozen=True)
class Config:
    """SAC's settings. A schedule is a function of env steps over all environments together."""

    net: Net = Net(hidden=(256, 256), activation="relu")
    """The networks of the policy and of each critic."""
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
    lr: Schedule = 3e-4
    """Adam's learning rate for the policy and the temperature, and for the critics unless they have their own."""
    critic_lr: Schedule | None = None
    """Adam's learning rate for the critics; None takes `lr`."""
    tau: float = 0.005
    """Share of the way that the target critics go to the critics in each gradient step."""
    alpha: Schedule | None = None
    """Temperature, in reward units per nat; None learns it."""
    initial_alpha: float = 1.0
    """Temperature from which learning it starts."""
    target_entropy: float | None = None
    """Nats of entropy that a learnt temperature holds; None takes minus one a number of a Box's action (whose density
    is that in [-1, 1]), or `target_entropy_ratio` for choices."""
    target_entropy_ratio: float = 0.3
    """For choices: the entropy to hold, as a share of that of a uniform policy."""
    backup_entropy: bool = True
    """Whether the critics count the entropy that is still to come; without, the policy alone is paid for its own."""

    def __post_init__(self) -> None:
        refuse_negative("sac", self)
        if self.rollout_steps < 1:
            raise SpecError("sac.rollout_steps", f"must be at least 1, got {self.rollout_steps}")
        for name in ("updates_per_step", "initial_alpha"):
            if getattr(self, name) <= 0:
                raise SpecError(f"sac.{name}", f"must be positive, got {getattr(self, name)}")
        for name in ("gamma", "tau", "target_entropy_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"sac.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise SpecError("sac.warmup_steps", f"must not be negative, got {self.warmup_steps}")
        if self.net.recurrent != "none":
            raise SpecError("net.recurrent", "sac has no recurrent policy", hint="recurrent: none, or take ppo")


class Policy(nn.Module):
    """A squashed Gaussian over a Box, or a distribution over choices; uniform as long as `warming` says so."""

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
        self.choices = int(action_space.n) if isinstance(action_space, Discrete) else 0  # 0: a Box
        self._first = int(action_space.start) if isinstance(action_space, Discrete) else 0
        self.form: BoundedForm | None = None if self.choices else bounded_form(action_space)
        self.torso = make_torso(self.inputs.space, config.net.behind_inputs, generator)
        outputs = 2 * self.form.size if self.form else self.choices
        self.head = orthogonal(self.torso.size, outputs, 0.01, generator)
        self.chain = Chain.of(self.torso, self.head)
        self.register_buffer("warming", torch.tensor(config.warmup_steps > 0))

    def encode(self, observation: Any) -> NDArray[np.generic]:
        """Observations of B environments, as the vector environment batches them -> [B, ...], masks included."""
        return self.inputs.encode(observation)

    @torch.no_grad()
    def act(
        self, observation: NDArray[np.generic], deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """Encoded observations [B, ...] -> actions, float32 [B, K] in [-1, 1] or int64 [B], and no extras."""
        seen, mask = self.inputs.split(torch.from_numpy(observation))
        if self.warming and not deterministic:
            if self.form:
                return (2.0 * torch.rand(len(seen), self.form.size, generator=generator) - 1.0).numpy(), {}
            return _categorical(torch.zeros(len(seen), self.choices), mask).sample(generator).numpy(), {}
        distribution = self.distribution(seen, mask)
        action = distribution.mode() if deterministic else distribution.sample(generator)
        return action.numpy(), {}

    def for_env(self, action: NDArray[np.generic]) -> NDArray[np.generic]:
        """Actions of `act` -> what the vector environment takes: scaled to its bounds, or counted from its start."""
        return self.form.for_env(action) if self.form else action + self._first

    def distribution(self, seen: Tensor, mask: Tensor | None = None) -> SquashedGaussian | Categorical:
        """What the network takes [N, ...], and the mask of choices [N, A] if any -> N distributions over actions."""
        if self.chain is not None and not torch.is_grad_enabled():
            return self.of(self.chain(seen), mask)
        return self.of(self.head(self.torso(seen)), mask)

    def apart(
        self, seen: Tensor, mask: Tensor | None = None
    ) -> tuple[SquashedGaussian | Categorical, tuple[Pass, ...]]:
        """As `distribution`, and the pass that is to go `back` when the loss has; none where autograd does that."""
        if self.chain is None:
            return self.distribution(seen, mask), ()
        there = self.chain.there(seen)
        return self.of(there.output, mask), (there,)

    def of(self, output: Tensor, mask: Tensor | None = None) -> SquashedGaussian | Categorical:
        """What the head gives [N, P] -> N distributions over actions."""
        if not self.form:
            return _categorical(output, mask)
        mean, log_std = output.chunk(2, -1)
        return SquashedGaussian(mean, log_std.clamp(-20.0, 2.0))


def _categorical(logits: Tensor, mask: Tensor | None) -> Categorical:
    return Categorical(logits if mask is None else torch.where(mask, logits, RULED_OUT))


class SAC(OffPolicy):
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
        choices = self.policy.choices
        self.critics = Ensemble(
            self.policy.inputs.space,
            config.net.behind_inputs,
            inputs=self.policy.form.size if self.policy.form else 0,
            outputs=choices or 1,
            generator=self.generator,
        )
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.tensor(math.log(config.initial_alpha), requires_grad=True)
        self.target_entropy = _target_entropy(config, self.policy)
        self.replay = Replay(config.memory, gamma=config.gamma)
        self.updates = 0  # gradient steps made
        self._policy_parameters: list[Tensor] = [*self.policy.parameters()]
        if config.alpha is None:
            self._policy_parameters.append(self.log_alpha)
        self._critic_parameters: list[Tensor] = list(self.critics.parameters())
        self._target_parameters: list[Tensor] = list(self.targets.parameters())
        lr, critic_lr = self._rates()
        self.policy_optimizer = Adam(self._policy_parameters, lr=lr, fused=True)  # and the temperature's
        self.critic_optimizer = Adam(self._critic_parameters, lr=critic_lr, fused=True)

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "critics": self.critics.state_dict(),
            "targets": self.targets.state_dict(),
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
        self.targets.load_state_dict(state["targets"])
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
        """One gradient step of everything; what was measured, as METRICS names it."""
        sample = self.replay.sample(self.config.memory.batch_size, self.generator)
        alpha = self.alpha
        critic_loss, q = self._learn_critics(sample, alpha)
        policy_loss, log_prob = self._learn_policy(sample.observation, alpha)
        with torch.no_grad():
            torch._foreach_lerp_(self._target_parameters, self._critic_parameters, self.config.tau)
        self.updates += 1
        return torch.stack([critic_loss, policy_loss, q.mean(), -log_prob.mean(), alpha]).detach()

    def _learn_critics(self, sample: Sample, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """One step towards r + discount V(s'); the loss, and the critics' values [2, N] before it."""
        paid = alpha if self.config.backup_entropy else torch.zeros_like(alpha)
        with torch.no_grad():
            seen, mask = self.policy.inputs.split(sample.next_observation)
            next_value, _ = self._soft_value(self.targets, seen, self.policy.distribution(seen, mask), paid)
            target = sample.reward + sample.discount * next_value
        seen, _ = self.policy.inputs.split(sample.observation)
        taken = {"action": sample.action} if self.policy.form else {"choice": sample.action}
        loss, q = set_gradients(self.critics, seen, target, sample.weight, **taken)
        self.critic_optimizer.step()
        if self.config.memory.prioritized:
            self.replay.update_priorities(sample.index, (q - target).abs().mean(0))
        return loss, q

    def _learn_policy(self, observation: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """One step up the soft value of the policy's own actions; the loss, and their log-probabilities [N].

        And one of the temperature.
        """
        seen, mask = self.policy.inputs.split(observation)
        if self.policy.form and self.policy.chain is not None and self.critics.chains:
            loss, log_prob = self._back_by_hand(self.policy.chain.there(seen), seen, alpha)
        else:
            distribution, passes = self.policy.apart(seen, mask)
            value, log_prob = self._soft_value(self.critics, seen, distribution, alpha)
            loss = -value.mean()
            self.policy_optimizer.zero_grad()
            # Of these alone: the critics get no gradient from here, and it costs none.
            backward(loss, passes, [one.output for one in passes] or list(self.policy.parameters()))
        if self.config.alpha is None:
            with torch.no_grad():  # its loss is a multiple of exp(log_alpha), and so its own derivative
                self.log_alpha.grad = losses.temperature_loss(self.log_alpha, log_prob, self.target_entropy)
        self.policy_optimizer.step()
        return loss.detach(), log_prob.detach()

    @torch.no_grad()
    def _back_by_hand(self, there: Pass, seen: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The policy's gradients of alpha log pi - min Q, from its pass; that loss, and the log-probabilities [N]."""
        distribution = self.policy.of(there.output)
        assert isinstance(distribution, SquashedGaussian)
        drawn = distribution.draw(self.generator)
        values = self.critics.there(seen, drawn.action)
        q, lower = values.output.squeeze(-1).min(0)
        slope = values.slope(lower, drawn.action.shape[1])
        by_mean, by_log_std = drawn.back(slope / -len(q), alpha / len(q))
        log_std = there.output[:, distribution.mean.shape[1] :]
        there.back(torch.cat([by_mean, by_log_std * (log_std == distribution.log_std)], 1))  # 0 where it was clamped
        return (alpha * drawn.log_prob - q).mean(), drawn.log_prob

    def _soft_value(
        self, critics: Ensemble, seen: Tensor, distribution: SquashedGaussian | Categorical, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """V(s) = E[min Q(s, a) - alpha log pi(a|s)], and E[log pi]: each [N], by one action or by all choices."""
        if isinstance(distribution, Categorical):
            with torch.no_grad():
                q = critics(seen).amin(0)
            return expected_soft_value(distribution.log_probs, q, alpha)
        action, log_prob = distribution.rsample(self.generator)
        return critics(seen, action).squeeze(-1).amin(0) - alpha * log_prob, log_prob


def _target_entropy(config: Config, policy: Policy) -> float:
    """Nats."""
    if config.target_entropy is not None:
        return config.target_entropy
    if policy.form:
        return -float(policy.form.size)
    return config.target_entropy_ratio * math.log(policy.choices)


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> SAC:
    """A SAC for one environment's spaces; `seed` decides its weights, its draws and its samples.

    Raises SpecError for an action space that is neither a bounded float Box nor Discrete.
    """
    return SAC(config, observation_space, action_space, seed)
