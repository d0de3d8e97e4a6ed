"""PQN: Q-learning without replay and without a target network (Gallici et al. 2024, arXiv:2407.04811).

Many environments at once take the place of the memory, and layer normalisation that of the target network. With
lambda 1, one epoch and a target network it is the n-step Q-learning of Mnih et al. 2016 (arXiv:1602.01783), in step.
"""

from __future__ import annotations

import copy
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
from longrein.learn.exploration import allowed
from longrein.learn.optimizers import make_optimizer
from longrein.learn.returns import lambda_returns
from longrein.learn.schedules import Linear, Schedule, refuse_negative, value_at
from longrein.learn.torsos import Net

ACTION_SPACES: tuple[type, ...] = (Discrete,)
EPSILON = Linear(1.0, 0.05, 50_000)


@dataclass(frozen=True)
class Config:
    """PQN's settings. A schedule is a function of env steps over all environments together."""

    net: Net = Net(hidden=(128, 128), activation="relu", layer_norm=True)
    """The network between observations and action values; without layer_norm it may diverge."""
    rollout_steps: int = 32
    """Vector steps between updates; a batch has this many rows for each environment."""
    epochs: int = 2
    """Passes over each batch."""
    minibatch_size: int = 64
    """Rows of one optimizer step, at most; a batch is cut into minibatches of equal size."""
    gamma: float = 0.99
    """Discount per env step."""
    lambda_: float = 0.65
    """Weight of longer returns, from 0 (one step) to 1 (to the rollout's end)."""
    lr: Schedule = 5e-4
    """RAdam's learning rate."""
    epsilon: Schedule = EPSILON
    """Probability of any action, in epsilon-greedy."""
    max_grad_norm: float | None = 10.0
    """Global norm to which gradients are clipped; None leaves them."""
    target_every: int = 0
    """Env steps between copies to a target network, whose actions the online network chooses; 0: none, as in PQN."""

    def __post_init__(self) -> None:
        refuse_negative("pqn", self)
        for name in ("rollout_steps", "epochs", "minibatch_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"pqn.{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("gamma", "lambda_"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"pqn.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")
        if self.target_every < 0:
            raise SpecError("pqn.target_every", f"must not be negative, got {self.target_every}")


class PQN:
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
        epsilon = value_at(config.epsilon, 0)
        self.policy = ValuePolicy(
            observation_space, action_space, config.net, Head(), exploration=epsilon, generator=self.generator
        )
        self.target = copy.deepcopy(self.policy.net).requires_grad_(False) if config.target_every else None
        self.optimizer = make_optimizer("radam", self.policy.net.parameters(), value_at(config.lr, 0))
        self.env_steps = 0  # valid rows seen
        self.updates = 0  # gradient steps made

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from one rollout [T, B, ...]. Raises ValueError when no row is valid."""
        if not batch.valid.any():
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        config = self.config
        lr = value_at(config.lr, self.env_steps)
        self.optimizer.param_groups[0]["lr"] = lr
        target = lambda_returns(
            batch.reward,
            batch.terminated,
            batch.truncated,
            batch.valid,
            self._next_value(batch),
            gamma=config.gamma,
            lambda_=config.lambda_,
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
        before, self.env_steps = self.env_steps, self.env_steps + len(rows.target)
        if self.target is not None and self.env_steps // config.target_every > before // config.target_every:
            self.target.load_state_dict(self.policy.net.state_dict())
        epsilon = value_at(config.epsilon, self.env_steps)
        self.policy.exploration.fill_(epsilon)
        return losses.mean_measured(FITTED, measured) | {
            "target": float(rows.target.mean()),
            "exploration": epsilon,
            "lr": lr,
            "gradient_steps": float(len(measured)),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "target": None if self.target is None else self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "env_steps": self.env_steps,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        self.policy.load_state_dict(state["policy"])
        if self.target is not None:
            self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.env_steps = state["env_steps"]
        self.updates = state["updates"]

    @torch.no_grad()
    def _next_value(self, batch: Batch) -> Tensor:
        """The value of the best action in each successor, as it is now: [T, B]."""
        following = batch.next_observation.flatten(0, 1)
        value = self.policy.values(following)  # [N, A]
        if self.target is None:
            return value.amax(1).view(batch.reward.shape)
        seen, mask = self.policy.inputs.split(following)
        theirs = allowed(self.target.mean(self.target(seen)), mask)
        return theirs.gather(1, value.argmax(1, keepdim=True)).view(batch.reward.shape)


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> PQN:
    """A PQN for one environment's spaces; `seed` decides its weights and its shuffles.

    Raises SpecError for an action space that is not Discrete.
    """
    return PQN(config, observation_space, action_space, seed)
