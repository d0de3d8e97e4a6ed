"""Asynchronous n-step Q-learning: one worker's turn (Mnih et al. 2016, arXiv:1602.01783, algorithm S2).

A turn, in `update`:
1. The targets are n-step returns that end with the best value of the shared target network.
2. The gradients of the local weights, the ones that acted, are summed over the rollout and applied to the shared
   weights without a lock. The local weights become a copy of the shared ones.
3. Each `target_every` env steps of all workers together, whoever comes by copies the shared weights to the target.
Workers explore with epsilons of their own: each draws the one that it ends with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.action_values import Head, ValuePolicy
from longrein.learn.actor_critic import successor_values
from longrein.learn.batch import Batch
from longrein.learn.optimizers import FlatParameters, look_at, set_lr
from longrein.learn.returns import n_step_returns
from longrein.learn.schedules import Linear, Schedule, refuse_negative, value_at
from longrein.learn.shared_weights import (
    Shared,
    SharingWorker,
    check_statistics,
    cloned,
)
from longrein.learn.torsos import Net

ACTION_SPACES: tuple[type, ...] = (Discrete,)
SHARES_WEIGHTS = True


@dataclass(frozen=True)
class Config:
    """Its settings. A schedule is a function of env steps over all workers' environments together."""

    rollout_steps: int = 5
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
    target_every: int = 10_000
    """Env steps, over all workers' environments together, between copies to the target network."""
    epsilon: Schedule | None = None
    """Probability of any action, of every worker; None lets each draw the epsilon that it ends with."""
    epsilon_start: float = 1.0
    """Where a drawn epsilon begins."""
    epsilon_ends: tuple[float, ...] = (0.1, 0.01, 0.5)
    """Those that are drawn from."""
    epsilon_probs: tuple[float, ...] = (0.4, 0.3, 0.3)
    """How likely each of them is drawn."""
    epsilon_steps: int = 50_000
    """Env steps, over all workers' environments together, after which a drawn epsilon is at its end."""
    max_grad_norm: float = 40.0
    """Global norm to which the gradients summed over a rollout are clipped."""
    net: Net = Net(activation="relu")
    """The network between observations and action values."""

    def __post_init__(self) -> None:
        refuse_negative("async_q", self)
        for name in ("rollout_steps", "target_every", "epsilon_steps"):
            if getattr(self, name) < 1:
                raise SpecError(f"async_q.{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("gamma", "epsilon_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"async_q.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")
        if self.max_grad_norm < 0:
            raise SpecError("async_q.max_grad_norm", f"must not be negative, got {self.max_grad_norm}")
        if not self.epsilon_ends or any(not 0 <= end <= 1 for end in self.epsilon_ends):
            raise SpecError("async_q.epsilon_ends", f"must lie between 0 and 1, got {list(self.epsilon_ends)}")
        if (
            len(self.epsilon_probs) != len(self.epsilon_ends)
            or min(self.epsilon_probs) < 0
            or not any(self.epsilon_probs)
        ):
            raise SpecError("async_q.epsilon_probs", f"{list(self.epsilon_probs)} does not say how likely each of "
                            f"{list(self.epsilon_ends)} is", hint="a number for each, none negative")  # fmt: skip
        check_statistics("async_q", self.optimizer, self.statistics)


class AsyncQ(SharingWorker):
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
        generator = torch.Generator().manual_seed(seed)
        self.policy: ValuePolicy = ValuePolicy(
            observation_space, action_space, config.net, Head(), exploration=1.0, generator=generator
        )
        drawn = torch.multinomial(torch.tensor(config.epsilon_probs), 1, generator=generator)
        self.epsilon_end = config.epsilon_ends[int(drawn)]
        self._mirror = copy.deepcopy(self.policy)  # the target network
        local = FlatParameters(self.policy.net.parameters())
        more = {"target": local.whole.detach(), "copies": torch.zeros((), dtype=torch.int64)}
        self.optimizer = self._join((observation_space, action_space), local, shared, index, more)
        look_at(list(self._mirror.net.requires_grad_(False).parameters()), self.shared.more["target"])
        self.refresh()
        self._explore()

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """A worker's turn with one rollout [T, B, ...] that its policy acted out since the last turn.

        Raises ValueError when no row is valid.
        """
        config, valid = self.config, batch.valid
        rows = int(valid.sum())
        if rows == 0:
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        lr = value_at(config.lr, self.env_steps)
        self._count(rows)
        following = successor_values(self._best, batch, torch.zeros_like(batch.reward))
        rows_of = (batch.reward, batch.terminated, batch.truncated, batch.valid)
        target = n_step_returns(*rows_of, following, gamma=config.gamma)[valid]
        q = self.policy.values(batch.observation[valid]).gather(1, batch.action[valid].unsqueeze(1)).squeeze(1)
        loss = losses.value_loss(q, target)
        self._local.zero_grad()
        (rows * loss).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        norm = self._local.clip_(config.max_grad_norm)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self._wrote()
        self.refresh()
        copies = self.env_steps // config.target_every
        if copies > int(self.shared.more["copies"]):
            self.shared.more["copies"].fill_(copies)
            self.shared.more["target"].copy_(self.shared.weights)
        self._explore()
        with torch.no_grad():
            numbers = torch.stack([loss, (target - q).abs().mean(), q.mean(), target.mean(), norm]).tolist()
        return dict(zip(("loss", "td_error", "q", "target", "grad_norm"), numbers, strict=True)) | {
            "exploration": float(self.policy.exploration), "lr": lr, "target_copies": float(copies),
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future of the shared weights; other workers should rest meanwhile."""
        return {
            "policy": self._named(self.policy, self.shared.weights),
            "target": cloned(self._mirror.net.state_dict()),
            "copies": int(self.shared.more["copies"]),
            "statistics": cloned(self._statistics),
            "env_steps": self.env_steps,
            "updates": self.updates,
            "epsilon_end": self.epsilon_end,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let all workers go on from a saved state; the others see it after their next turn, or `refresh`.

        Raises RuntimeError, from torch, when the networks differ.
        """
        self.policy.load_state_dict(state["policy"])
        self._mirror.net.load_state_dict(state["target"])
        self.shared.more["copies"].fill_(state["copies"])
        self._begin_from(state["env_steps"], state["updates"])
        self.load_own_state(state)

    def own_state(self) -> dict[str, Any]:
        """The epsilon that it ends with; the optimizer's statistics, where each worker has its own."""
        return {"statistics": self._own_statistics(), "epsilon_end": self.epsilon_end}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what a worker alone had."""
        self._take_statistics(state["statistics"])
        self.epsilon_end = state["epsilon_end"]
        self._explore()

    def _best(self, observation: Tensor) -> Tensor:
        """The target network's best value: [N, ...] -> [N]."""
        return self._mirror.values(observation).max(1).values

    def _explore(self) -> None:
        """Set epsilon as its schedule has it now."""
        config = self.config
        end = Linear(config.epsilon_start, self.epsilon_end, config.epsilon_steps)
        self.policy.exploration.fill_(value_at(end if config.epsilon is None else config.epsilon, self.env_steps))


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> AsyncQ:
    """The first worker, for one environment's spaces; `seed` decides the weights, and the epsilon it ends with.

    Raises SpecError for an action space that is not Discrete.
    """
    return AsyncQ(config, observation_space, action_space, seed)
