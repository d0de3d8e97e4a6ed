"""SARSA: the values of the policy that acts, exploration included (Rummery & Niranjan 1994; Sutton & Barto 2018, 6.4).

On-policy: each rollout is learnt from once it is full, by n-step returns that end with the action really taken next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.action_values import FITTED, Head, Taken, ValuePolicy, fit
from longrein.learn.batch import Batch
from longrein.learn.eager import Adam
from longrein.learn.exploration import boltzmann_probs, epsilon_greedy_probs
from longrein.learn.returns import bounded_returns, continues
from longrein.learn.schedules import Linear, Schedule, least, refuse_negative, value_at
from longrein.learn.torsos import Net

ACTION_SPACES: tuple[type, ...] = (Discrete,)
EPSILON = Linear(1.0, 0.05, 50_000)


@dataclass(frozen=True)
class Config:
    """SARSA's settings. A schedule is a function of env steps over all environments together."""

    net: Net = Net(hidden=(128, 128), activation="relu", layer_norm=True)
    """The network between observations and action values."""
    rollout_steps: int = 32
    """Vector steps between updates; a batch has this many rows for each environment."""
    epochs: int = 2
    """Passes over each batch."""
    minibatch_size: int = 64
    """Rows of one optimizer step, at most; a batch is cut into minibatches of equal size."""
    gamma: float = 0.99
    """Discount per env step."""
    n_steps: int = 5
    """Env steps of reward summed before the bootstrap, at most; 0: to the rollout's end."""
    expected: bool = False
    """Whether the bootstrap is the policy's mean over all actions rather than the action taken (expected SARSA)."""
    lr: Schedule = 5e-4
    """Adam's learning rate."""
    exploration: str = "epsilon"
    """How it explores: epsilon (epsilon-greedy) or boltzmann."""
    epsilon: Schedule = EPSILON
    """Probability of any action, if epsilon."""
    temperature: Schedule = 1.0
    """Temperature, in reward units, if boltzmann."""
    max_grad_norm: float | None = 10.0
    """Global norm to which gradients are clipped; None leaves them."""

    def __post_init__(self) -> None:
        refuse_negative("sarsa", self)
        if self.exploration == "boltzmann" and least(self.temperature) <= 0:
            raise SpecError("sarsa.temperature", f"must stay over 0, got {self.temperature}")
        for name in ("rollout_steps", "epochs", "minibatch_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"sarsa.{name}", f"must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.gamma <= 1:
            raise SpecError("sarsa.gamma", f"must lie between 0 and 1, got {self.gamma}")
        if self.n_steps < 0:
            raise SpecError("sarsa.n_steps", f"must not be negative, got {self.n_steps}")
        if self.exploration not in ("epsilon", "boltzmann"):
            raise SpecError("sarsa.exploration", f"{self.exploration!r} is none", hint="one of epsilon, boltzmann")


class SARSA:
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
        self.policy = ValuePolicy(
            observation_space,
            action_space,
            config.net,
            Head(),
            exploration=self._exploration(0),
            softmax=config.exploration == "boltzmann",
            generator=self.generator,
        )
        self.optimizer = Adam(self.policy.net.parameters(), lr=value_at(config.lr, 0), fused=True)
        self.env_steps = 0  # valid rows seen
        self.updates = 0  # gradient steps made

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from one rollout [T, B, ...] that the policy acted out since the last update.

        Raises ValueError when no row is valid.
        """
        if not batch.valid.any():
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        config = self.config
        lr = value_at(config.lr, self.env_steps)
        self.optimizer.param_groups[0]["lr"] = lr
        target = bounded_returns(
            batch.reward,
            batch.terminated,
            batch.truncated,
            batch.valid,
            self._next_value(batch),
            gamma=config.gamma,
            steps=config.n_steps or config.rollout_steps,
        )
        rows = Taken(*(column[batch.valid] for column in (batch.observation, batch.action, target)))
        measured = fit(
            self.policy,
            self.optimizer,
            rows,
            epochs=config.epochs,
            minibatch_size=config.minibatch_size,
            max_grad_norm=config.max_grad_norm,
            generator=self.generator,
        )
        self.updates += len(measured)
        self.env_steps += len(rows.target)
        exploration = self._exploration(self.env_steps)
        self.policy.exploration.fill_(exploration)
        return losses.mean_measured(FITTED, measured) | {
            "target": float(rows.target.mean()),
            "exploration": exploration,
            "lr": lr,
            "gradient_steps": float(len(measured)),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "env_steps": self.env_steps,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.env_steps = state["env_steps"]
        self.updates = state["updates"]

    def _exploration(self, env_steps: int) -> float:
        config = self.config
        return value_at(config.temperature if config.exploration == "boltzmann" else config.epsilon, env_steps)

    @torch.no_grad()
    def _next_value(self, batch: Batch) -> Tensor:
        """Q(s', a') for the action taken next, or its mean over the policy where none was or will be: [T, B].

        The rollout's last row, and one that a time limit ended, have a successor in which nobody acted. The mean over
        the policy is what Q(s', a') would be on average: "A Theoretical and Empirical Analysis of Expected Sarsa",
        van Seijen et al. 2009.
        """
        value = self.policy.values(batch.next_observation.flatten(0, 1))  # [N, A]
        _, mask = self.policy.inputs.split(batch.next_observation.flatten(0, 1))
        probs = boltzmann_probs if self.policy.softmax else epsilon_greedy_probs
        mean = (probs(value, float(self.policy.exploration), mask) * value).sum(1).view(batch.reward.shape)
        if self.config.expected:
            return mean
        goes_on = continues(batch.done, batch.valid)
        following = batch.action.roll(-1, 0).flatten().unsqueeze(1)
        return torch.where(goes_on, value.gather(1, following).view(batch.reward.shape), mean)


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> SARSA:
    """A SARSA for one environment's spaces; `seed` decides its weights and its shuffles.

    Raises SpecError for an action space that is not Discrete.
    """
    return SARSA(config, observation_space, action_space, seed)
