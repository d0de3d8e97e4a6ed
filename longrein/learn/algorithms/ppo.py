"""PPO: proximal policy optimization with a clipped surrogate (Schulman et al. 2017, arXiv:1707.06347).

With the details of "The 37 Implementation Details of PPO" (Huang et al. 2022) that apply to vector observations;
docs/algorithms/ppo.md lists them and where we differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.batch import Batch
from longrein.learn.distributions import ActionForm, Distribution, action_form
from longrein.learn.networks import ActorCritic, flat_observation, observation_size
from longrein.learn.normalise import ObservationNormaliser, RewardScale
from longrein.learn.returns import gae
from longrein.learn.schedules import Schedule, value_at

ACTION_SPACES = (Discrete, MultiDiscrete, MultiBinary, Box)


@dataclass(frozen=True)
class Config:
    """PPO's settings. A schedule is a function of env steps over all environments together."""

    rollout_steps: int = 128
    """Vector steps between updates; a batch has this many rows for each environment."""
    epochs: int = 4
    """Passes over each batch."""
    minibatch_size: int = 256
    """Rows of one optimizer step, at most; a batch is cut into minibatches of equal size."""
    gamma: float = 0.99
    """Discount per env step."""
    lambda_: float = 0.95
    """GAE's weight of longer sums, from 0 (one-step TD error) to 1 (whole return)."""
    lr: Schedule = 3e-4
    """Adam's learning rate; the paper's is Linear(lr, 0, all env steps)."""
    clip: Schedule = 0.2
    """How far the probability ratio may move from 1 before its gradient ends."""
    entropy_weight: Schedule = 0.0
    """Weight of the entropy bonus, in loss per nat."""
    value_weight: float = 0.5
    """Weight of the value loss."""
    value_clip: float | None = None
    """How far a value may move in one update, in reward units; None leaves it free."""
    max_grad_norm: float = 0.5
    """Global norm to which gradients are clipped."""
    target_kl: float | None = None
    """Nats of approximate KL beyond which the update's other epochs are left out; None runs them all."""
    normalise_advantage: bool = True
    """Whether the advantages of each minibatch are brought to mean 0 and deviation 1."""
    normalise_observation: bool = False
    """Whether observations are brought to mean 0 and deviation 1, by running statistics inside the policy."""
    scale_reward: bool = False
    """Whether rewards are divided by the running deviation of the discounted return."""
    normal_clip: float = 10.0
    """Deviations to which normalised observations and scaled rewards are clipped."""
    hidden: tuple[int, ...] = (64, 64)
    """Units of each hidden layer, in the policy's and in the value's network."""
    activation: str = "tanh"
    """Of the hidden layers: tanh, relu, elu or silu."""

    def __post_init__(self) -> None:
        for name in ("rollout_steps", "epochs", "minibatch_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"ppo.{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("gamma", "lambda_"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"ppo.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")


class Policy(nn.Module):
    """PPO's policy and its value network, with the statistics that normalise their input."""

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.form: ActionForm = action_form(action_space)
        size = observation_size(observation_space)
        self.normaliser = ObservationNormaliser(size, config.normal_clip) if config.normalise_observation else None
        self.net = ActorCritic(
            size,
            self.form.num_parameters,
            self.form.num_deviations,
            hidden=config.hidden,
            activation=config.activation,
            generator=generator,
        )

    def encode(self, observation: Any) -> NDArray[np.float32]:
        """Observations of B environments, as the vector environment batches them -> float32 [B, size]."""
        return flat_observation(self.observation_space, observation)

    @torch.no_grad()
    def act(
        self, observation: NDArray[np.generic], deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """Encoded observations [B, size] -> actions [B, ...] and {"log_prob": [B]} of the policy that acted."""
        distribution = self.distribution(self.normalise(torch.from_numpy(observation)))
        action = distribution.mode() if deterministic else distribution.sample(generator)
        return action.numpy(), {"log_prob": distribution.log_prob(action).numpy()}

    def for_env(self, action: NDArray[np.generic]) -> NDArray[np.generic]:
        """Actions of `act` -> what the vector environment takes: shaped, and clipped to its bounds."""
        return self.form.for_env(action)

    def normalise(self, observation: Tensor) -> Tensor:
        """Encoded observations [..., size] -> the networks' input."""
        return observation if self.normaliser is None else self.normaliser(observation)

    def distribution(self, inputs: Tensor) -> Distribution:
        """Normalised observations [N, size] -> N distributions over actions."""
        return self.form.distribution(self.net.actor(inputs), self.net.log_std)

    def value(self, inputs: Tensor) -> Tensor:
        """Normalised observations [N, size] -> values [N], in units of the (scaled) reward."""
        return self.net.value(inputs)


class PPO:
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
        self.policy = Policy(config, observation_space, action_space, self.generator)
        self.reward_scale = RewardScale(config.gamma, config.normal_clip) if config.scale_reward else None
        # 1e-5, not 1e-8: what PPO's authors run; it bounds the step where a gradient is nearly 0.
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=value_at(config.lr, 0), eps=1e-5, fused=True)
        self.env_steps = 0  # valid rows seen
        self.updates = 0  # optimizer steps taken

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from one rollout [T, B, ...] that the policy acted out since the last update.

        Raises ValueError when no row is valid, or extras lack `log_prob`.
        """
        if "log_prob" not in batch.extras:
            raise ValueError("extras: PPO needs the log_prob that `act` gave")
        if not batch.valid.any():
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        lr, clip, entropy_weight = (
            value_at(schedule, self.env_steps)
            for schedule in (self.config.lr, self.config.clip, self.config.entropy_weight)
        )
        rows = self._rows(batch)
        measured: dict[str, float] = {
            "explained_variance": losses.explained_variance(rows.value, rows.target),
            "value": float(rows.value.mean()),
            "advantage_std": float(rows.advantage.std(correction=0)),
        }
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        measured |= self._epochs(rows, clip, entropy_weight)
        measured |= {"lr": lr, "clip": clip}
        self.env_steps += len(rows.value)
        if self.policy.normaliser is not None:
            # After the epochs: the log_prob of the next rollout is then made with the statistics it is trained with.
            self.policy.normaliser.moments.update(batch.observation[batch.valid])
        return measured

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "reward_scale": self.reward_scale.state_dict() if self.reward_scale is not None else None,
            "env_steps": self.env_steps,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        if self.reward_scale is not None:
            self.reward_scale.load_state_dict(state["reward_scale"])
        self.env_steps = state["env_steps"]
        self.updates = state["updates"]

    @torch.no_grad()
    def _rows(self, batch: Batch) -> _Rows:
        """Values, advantages and targets of the whole rollout; then only its valid rows, flat."""
        steps, envs = batch.reward.shape
        reward = batch.reward
        if self.reward_scale is not None:
            reward = self.reward_scale.scale(reward, batch.done, batch.valid)
        # Both ends of every step in one pass: twice the rows, but no special case for ends of episodes and rollouts.
        inputs = self.policy.normalise(torch.stack([batch.observation, batch.next_observation]).flatten(0, 2))
        value, next_value = self.policy.value(inputs).view(2, steps, envs)
        advantage = gae(
            reward,
            batch.terminated,
            batch.truncated,
            batch.valid,
            value,
            next_value,
            gamma=self.config.gamma,
            lambda_=self.config.lambda_,
        )
        observation = inputs.view(2, steps, envs, -1)[0]
        columns = (observation, batch.action, batch.extras["log_prob"], value, advantage, advantage + value)
        return _Rows(*(column[batch.valid] for column in columns))

    def _epochs(self, rows: _Rows, clip: float, entropy_weight: float) -> dict[str, float]:
        count = len(rows.value)
        pieces = -(-count // self.config.minibatch_size)
        measured: list[Tensor] = []
        stopped = False
        for _ in range(self.config.epochs):
            order = torch.randperm(count, generator=self.generator)
            # tensor_split makes equal pieces: a remainder of a few rows would be an update of mostly noise.
            for index in order.tensor_split(pieces):
                numbers = self._step(rows.at(index), clip, entropy_weight)
                measured.append(numbers)
                stopped = self.config.target_kl is not None and float(numbers[3]) > self.config.target_kl
                if stopped:
                    break
            if stopped:
                break
        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm")
        means = dict(zip(names, torch.stack(measured).mean(0).tolist(), strict=True))
        return means | {"last_kl": float(measured[-1][3]), "minibatches": float(len(measured))}

    def _step(self, rows: _Rows, clip: float, entropy_weight: float) -> Tensor:
        """One optimizer step on one minibatch; what was measured before it."""
        distribution = self.policy.distribution(rows.inputs)
        value = self.policy.value(rows.inputs)
        log_ratio = distribution.log_prob(rows.action) - rows.log_prob
        advantage = losses.normalised(rows.advantage) if self.config.normalise_advantage else rows.advantage
        policy_loss = losses.clipped_surrogate(log_ratio, advantage, clip)
        if self.config.value_clip is None:
            value_loss = losses.value_loss(value, rows.target)
        else:
            value_loss = losses.clipped_value_loss(value, rows.target, rows.value, self.config.value_clip)
        entropy = distribution.entropy().mean()
        loss = policy_loss + self.config.value_weight * value_loss - entropy_weight * entropy
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        with torch.no_grad():
            kl, clipped = losses.approx_kl(log_ratio), losses.clip_fraction(log_ratio, clip)
        return torch.stack([policy_loss.detach(), value_loss.detach(), entropy.detach(), kl, clipped, norm])


@dataclass(frozen=True, slots=True)
class _Rows:
    """The valid rows of a rollout, flat: [N, ...]."""

    inputs: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    target: Tensor

    def at(self, index: Tensor) -> _Rows:
        return _Rows(
            self.inputs[index],
            self.action[index],
            self.log_prob[index],
            self.value[index],
            self.advantage[index],
            self.target[index],
        )


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> PPO:
    """A PPO for one environment's spaces; `seed` decides its weights and its shuffles."""
    return PPO(config, observation_space, action_space, seed)
