"""Self-imitation: an add-on that lets an actor-critic repeat what turned out better than it expected.

Knows no algorithm: it asks for log-probabilities and values, and hands back losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.actor_critic import successor_values
from longrein.learn.batch import Batch
from longrein.learn.episodes import EpisodeStore
from longrein.learn.priorities import Priorities
from longrein.learn.returns import n_step_returns

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Observations [N, ...] and actions [N, ...] -> log pi(a|s) [N] and V(s) [N], both with gradients."""
Step = Callable[[Tensor], Tensor]
"""A loss -> one optimizer step along its gradient, and that gradient's norm."""


@dataclass(frozen=True)
class SelfImitation:
    """What is remembered of past episodes and how it is learnt from. The defaults are the paper's for Atari."""

    capacity: int = 100_000
    """Env steps remembered, over all environments together; the oldest are forgotten first."""
    batch_size: int = 512
    """Rows of one optimizer step."""
    min_size: int = 512
    """Env steps to remember before learning begins."""
    updates_per_step: float = 0.05
    """Optimizer steps for each env step: the paper's 4 for each 16 x 5."""
    policy_weight: float = 1.0
    """Weight of the imitation's policy loss."""
    value_weight: float = 0.01
    """Weight of its value loss."""
    alpha: float = 0.6
    """How much (R - V)_+ counts when rows are drawn: 0 not at all, 1 in proportion."""
    beta: float = 0.1
    """How much of the bias of that is corrected: 1 all of it."""
    epsilon: float = 1e-6
    """Added to every (R - V)_+ when rows are drawn, in reward units, so that no row is lost for good."""
    max_episode_steps: int = 10_000
    """Env steps after which an episode that does not end is cut, and bootstrapped."""

    def __post_init__(self) -> None:
        for name in ("capacity", "batch_size", "min_size", "max_episode_steps"):
            if getattr(self, name) < 1:
                raise SpecError(f"imitation.{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("updates_per_step", "policy_weight", "value_weight", "alpha", "beta"):
            if getattr(self, name) < 0:
                raise SpecError(f"imitation.{name}", f"must not be negative, got {getattr(self, name)}")
        if self.epsilon <= 0:
            raise SpecError("imitation.epsilon", f"must be positive, got {self.epsilon}")
        if self.min_size > self.capacity:
            raise SpecError("imitation.min_size", f"{self.min_size} rows never fit in a capacity of {self.capacity}")


METRICS = ("imitation_policy_loss", "imitation_value_loss", "imitation_better", "imitation_return")


class Imitator:
    """Past (s, a, R), drawn by (R - V)_+. `add` what happens, then `learn`.

    See "Self-Imitation Learning", Oh et al. 2018, algorithm 1 (arXiv:1806.05635).
    """

    def __init__(self, settings: SelfImitation, *, gamma: float) -> None:
        self.settings = settings
        self.gamma = gamma
        self._episodes = EpisodeStore(settings.max_episode_steps)
        self._columns: dict[str, Tensor] = {}  # observation, action, return_: [capacity, ...]
        self._priorities = Priorities(settings.alpha, settings.epsilon)
        self._priorities.allocate(settings.capacity)
        self._filled = 0
        self._head = 0  # row to be written next
        self._due = 0.0  # optimizer steps not yet taken

    def __len__(self) -> int:
        return self._filled

    def add(self, batch: Batch, value_of: Callable[[Tensor], Tensor]) -> None:
        """Take in new transitions [T, B, ...]; those of episodes that have ended can be drawn from now on.

        value_of: observations [N, ...] -> V [N], which a truncated episode's return is bootstrapped by.
        """
        if self._filled >= self.settings.min_size:
            self._due += int(batch.valid.sum()) * self.settings.updates_per_step
        self._episodes.add(batch)
        if self._episodes.ended == 0:
            return
        rows = self._episodes.take()
        return_ = n_step_returns(
            rows.reward,
            rows.terminated,
            rows.truncated,
            rows.valid,
            successor_values(value_of, rows, torch.zeros_like(rows.reward)),
            gamma=self.gamma,
        )
        columns = {"observation": rows.observation, "action": rows.action, "return_": return_}
        self._remember({name: column[rows.valid] for name, column in columns.items()})

    def learn(self, evaluate: Evaluate, step: Step, generator: torch.Generator) -> dict[str, float]:
        """As many optimizer steps as are due; means of what was measured, NaN where there was none.

        imitation_better is the share of rows drawn with R > V, imitation_return the mean of R among them all.
        """
        measured: list[Tensor] = []
        while self._due >= 1.0:
            self._due -= 1.0
            measured.append(self._step(evaluate, step, generator))
        if not measured:
            return dict.fromkeys(METRICS, float("nan"))
        return dict(zip(METRICS, torch.stack(measured).mean(0).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """All that decides later draws."""
        return {
            "columns": {name: column[: self._filled].clone() for name, column in self._columns.items()},
            "priorities": self._priorities.state_dict(),
            "filled": self._filled,
            "head": self._head,
            "due": self._due,
            "episodes": self._episodes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises ValueError when the capacity was another."""
        saved = len(state["priorities"]["values"])
        if saved != self.settings.capacity:
            raise ValueError(f"imitation.capacity: {self.settings.capacity}, but {saved} when it was saved")
        self._filled, self._head, self._due = state["filled"], state["head"], state["due"]
        self._columns = {}
        if self._filled:
            self._allocate(state["columns"])
            for name, column in state["columns"].items():
                self._columns[name][: self._filled] = column
        self._priorities.load_state_dict(state["priorities"])
        self._episodes.load_state_dict(state["episodes"])

    def _allocate(self, like: dict[str, Tensor]) -> None:
        # Empty, so that pages never written cost nothing.
        self._columns = {
            name: torch.empty(self.settings.capacity, *column.shape[1:], dtype=column.dtype)
            for name, column in like.items()
        }

    def _remember(self, rows: dict[str, Tensor]) -> None:
        capacity = self.settings.capacity
        rows = {name: column[-capacity:] for name, column in rows.items()}
        count = len(rows["return_"])
        if not self._columns:
            self._allocate(rows)
        index = (self._head + torch.arange(count)) % capacity
        for name, column in rows.items():
            self._columns[name][index] = column
        self._priorities.add(index.numpy(), np.ones(count, np.bool_))
        self._head = (self._head + count) % capacity
        self._filled = min(self._filled + count, capacity)

    def _step(self, evaluate: Evaluate, step: Step, generator: torch.Generator) -> Tensor:
        index = self._priorities.draw(self.settings.batch_size, generator)
        weight = self._priorities.weight(index, self._filled, self.settings.beta)
        observation, action, return_ = (self._columns[name][index] for name in ("observation", "action", "return_"))
        log_prob, value = evaluate(observation, action)
        policy_loss, value_loss = losses.self_imitation(log_prob, value, return_, weight)
        step(self.settings.policy_weight * policy_loss + self.settings.value_weight * value_loss)
        better = (return_ - value.detach()).clamp(min=0.0)
        self._priorities.set(index, better)
        share = (better > 0).float().mean()
        return torch.stack([policy_loss.detach(), value_loss.detach(), share, return_.mean()])
