"""A3C: the worker rule of asynchronous advantage actor-critic (Mnih et al. 2016, arXiv:1602.01783, algorithm S3).

Knows one worker's turn and the memory that workers share. Which process or thread runs a worker is not known here.

A turn, in `update`:
1. The loss of the rollout is computed with the local weights, the ones that acted, and its gradients are summed.
2. They are applied to the shared weights with shared statistics, and no lock. With `natural` the worker's own K-FAC
   makes a step of them, which is added to the shared weights.
3. The local weights become a copy of the shared ones.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.actor_critic import ACTION_SPACES, ActorCriticPolicy
from longrein.learn.batch import Batch
from longrein.learn.natural import Natural, NaturalGradient, networks, section
from longrein.learn.optimizers import FlatParameters, make_optimizer, set_lr, state_tensors
from longrein.learn.returns import n_step_returns
from longrein.learn.schedules import Schedule, value_at
from longrein.learn.torsos import Net

__all__ = ["A3C", "ACTION_SPACES", "Config", "Policy", "build"]

Policy = ActorCriticPolicy
SHARES_WEIGHTS = True
MAX_WORKERS = 1024
OPTIMIZERS = ("rmsprop_tf", "rmsprop", "adam", "adamw", "sgd")
"""Those whose statistics can be shared: all of them in tensors that start at a number."""


@dataclass(frozen=True)
class Config:
    """A3C's settings. A schedule is a function of env steps over all workers' environments together."""

    rollout_steps: int = 20
    """Vector steps between updates of one worker: the t_max of the paper, and the n of n-step returns."""
    gamma: float = 0.99
    """Discount per env step."""
    lr: Schedule = 1e-3
    """Learning rate, of summed gradients; the paper's falls to 0 at the end of training."""
    optimizer: str = "rmsprop_tf"
    """rmsprop_tf (the paper's), rmsprop, adam, adamw or sgd; its statistics are shared too."""
    optimizer_settings: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's own keywords; those left out are as it has them."""
    entropy_weight: Schedule = 0.01
    """Weight of the entropy bonus, in loss per nat."""
    value_weight: float = 1.0
    """Weight of half the squared value error; 1 is the usual coefficient 0.5 of the whole square."""
    max_grad_norm: float = 40.0
    """Global norm to which the gradients summed over a rollout are clipped."""
    shared: bool = False
    """Whether policy and value share one torso, rather than having one each."""
    natural: NaturalGradient | None = None
    """K-FAC in place of `lr`, `optimizer`, `optimizer_settings` and `max_grad_norm`, with its settings; None: not."""
    net: Net = Net()
    """What stands between observations and heads."""

    def __post_init__(self) -> None:
        if self.rollout_steps < 1:
            raise SpecError("a3c.rollout_steps", f"must be at least 1, got {self.rollout_steps}")
        if not 0 <= self.gamma <= 1:
            raise SpecError("a3c.gamma", f"must lie between 0 and 1, got {self.gamma}")
        for name in ("value_weight", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise SpecError(f"a3c.{name}", f"must not be negative, got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise SpecError("a3c.optimizer", f"{self.optimizer!r} has no statistics that workers can share",
                            hint="one of " + ", ".join(OPTIMIZERS))  # fmt: skip
        object.__setattr__(self, "natural", section(self.natural, self.net, "a3c"))


@dataclass(frozen=True, slots=True)
class Shared:
    """What all workers write to: tensors in shared memory, so that it may go to another process."""

    weights: Tensor
    """All of them, one after the other: float32 [P]."""
    statistics: dict[str, Tensor]
    """The optimizer's, each [P] or one number."""
    env_steps: Tensor
    """int64 [MAX_WORKERS], valid rows that each worker has seen: nobody else writes there, so that none is lost."""
    workers: Tensor
    """int64 [], how many there are."""


class A3C:
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
        self.config = config
        self._spaces = (observation_space, action_space)
        self.generator = torch.Generator().manual_seed(seed)  # for the weights, and for what K-FAC draws
        self.policy = Policy(
            observation_space, action_space, config.net, shared=config.shared, recurrent=True, generator=self.generator
        )
        self._local = FlatParameters(self.policy.parameters())
        self.shared = _begin(config, self._local.whole) if shared is None else shared
        self.index = index
        # A parameter of its own over the same memory: the gradient that waits beside it is this worker's.
        self._weights = nn.Parameter(self.shared.weights)
        self._weights.grad = self._local.gradient
        self.optimizer = _optimizer(config, self._weights)
        self.optimizer.state[self._weights] = dict(self.shared.statistics)
        self.natural: Natural | None = None  # in the optimizer's place; its statistics are this worker's
        if config.natural is not None:
            self.natural = Natural(config.natural, networks(self.policy), self.generator)
        self.updates = 0  # turns taken by this worker
        self.refresh()

    def worker(self) -> A3C:
        """Another worker over the same weights and statistics, to be run by another thread or process.

        Call it where all of them are made: two at the same moment might take the same place. Raises ValueError when
        there are MAX_WORKERS.
        """
        index = int(self.shared.workers)
        if index == MAX_WORKERS:
            raise ValueError(f"workers: {MAX_WORKERS} are there already")
        self.shared.workers.add_(1)
        return A3C(self.config, *self._spaces, index, self.shared, index)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process goes what is shared, and this worker's place; torch.multiprocessing sends handles."""
        # As bytes: tensors would be handles of memory that this process has let go of when the other one asks for it.
        torch.save(self._own(), own := io.BytesIO())
        return _arrive, (self.config, *self._spaces, self.shared, self.index, self.updates, own.getvalue())

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    @property
    def env_steps(self) -> int:
        """Valid rows seen by all workers together."""
        return int(self.shared.env_steps.sum())

    def refresh(self) -> None:
        """Copy the shared weights into the local ones."""
        self._local.whole.data.copy_(self.shared.weights)

    def update(self, batch: Batch) -> dict[str, float]:
        """A worker's turn with one rollout [T, B, ...] that its policy acted out since the last turn.

        Raises ValueError when no row is valid.
        """
        rows = int(batch.valid.sum())
        if rows == 0:
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        lr, entropy_weight = (value_at(s, self.env_steps) for s in (self.config.lr, self.config.entropy_weight))
        if self.natural is not None:
            self.natural.schedule(self.env_steps)
            lr = self.natural.lr
        self.shared.env_steps[self.index] += rows
        measured = self._learn(batch, rows, lr, entropy_weight)
        if self.natural is not None:
            measured |= self.natural.measured()
        self.refresh()
        self.updates += 1
        return measured | {"lr": lr, "entropy_weight": entropy_weight}

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future of the shared weights; other workers should rest meanwhile."""
        learnt = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        pieces = torch.split(self.shared.weights.clone(), [p.numel() for p in learnt.values()])
        return {
            "policy": dict(self.policy.state_dict())
            | {name: piece.view_as(p) for (name, p), piece in zip(learnt.items(), pieces, strict=True)},
            "statistics": {name: tensor.clone() for name, tensor in self.shared.statistics.items()},
            "env_steps": self.env_steps,
            "updates": self.updates,
            "natural": self._own(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let all workers go on from a saved state; the others see it after their next turn, or `refresh`.

        Raises RuntimeError, from torch, when the networks differ.
        """
        self.policy.load_state_dict(state["policy"])
        self.shared.weights.copy_(self._local.whole.data)
        for name, tensor in self.shared.statistics.items():
            tensor.copy_(state["statistics"][name])
        self.shared.env_steps.zero_()
        self.shared.env_steps[self.index] = state["env_steps"]
        self.updates = state["updates"]
        self._take(state.get("natural"))

    def _own(self) -> dict[str, Any] | None:
        """What this worker alone has: K-FAC's statistics and its draws. None without K-FAC."""
        if self.natural is None:
            return None
        return {"kfac": self.natural.state_dict(), "generator": self.generator.get_state()}

    def _take(self, own: dict[str, Any] | None) -> None:
        """Go on with what a worker alone had, where K-FAC is on."""
        if self.natural is not None and own is not None:
            self.natural.load_state_dict(own["kfac"])
            self.generator.set_state(own["generator"])

    def _learn(self, batch: Batch, rows: int, lr: float, entropy_weight: float) -> dict[str, float]:
        valid = batch.valid
        if self.natural is not None:
            with self.natural.recording():
                self.natural.observe(*self.policy.evaluate(batch.observation[valid]))
        distribution, value, _, next_value = self.policy.rollout(batch)
        rows_of = (batch.reward, batch.terminated, batch.truncated, batch.valid)
        target = n_step_returns(*rows_of, next_value, gamma=self.config.gamma)[valid]
        advantage = target - value.detach()
        policy_loss = losses.policy_gradient(distribution.log_prob(batch.action[valid]), advantage)
        value_loss = losses.value_loss(value, target)
        entropy = distribution.entropy().mean()
        if self.natural is not None:
            value_weight = self.natural.value_weight(self.config.value_weight)
            norm = self._natural_step(policy_loss + value_weight * value_loss - entropy_weight * entropy)
        else:
            # Times the rows: means become the sums of the paper.
            loss = rows * (policy_loss + self.config.value_weight * value_loss - entropy_weight * entropy)
            self._local.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            norm = self._local.clip_(self.config.max_grad_norm)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        with torch.no_grad():
            numbers = (policy_loss, value_loss, entropy, norm, value.mean(), advantage.std(correction=0))
            names = ("policy_loss", "value_loss", "entropy", "grad_norm", "value", "advantage_std")
            return dict(zip(names, torch.stack(numbers).tolist(), strict=True))

    def _natural_step(self, loss: Tensor) -> Tensor:
        """The local weights take the step, momentum and Adam's part included; the shared ones move as far."""
        assert self.natural is not None
        before = self._local.whole.detach().clone()
        norm = self.natural.step(loss)
        self.shared.weights.add_(self._local.whole.detach() - before)
        return norm


def _optimizer(config: Config, weights: nn.Parameter) -> torch.optim.Optimizer:
    return make_optimizer(config.optimizer, [weights], value_at(config.lr, 0), **config.optimizer_settings)


def _begin(config: Config, local: Tensor) -> Shared:
    """Shared memory with these weights in it, and statistics as they are before the first step."""
    weights = nn.Parameter(local.detach().clone())
    (statistics,) = state_tensors(_optimizer(config, weights))
    return Shared(
        _in_shared_memory(weights.detach()),
        {name: _in_shared_memory(tensor) for name, tensor in statistics.items()},
        _in_shared_memory(torch.zeros(MAX_WORKERS, dtype=torch.int64)),
        _in_shared_memory(torch.ones((), dtype=torch.int64)),
    )


def _in_shared_memory(tensor: Tensor) -> Tensor:
    return tensor.share_memory_()  # type: ignore[no-any-return, no-untyped-call]  # torch does not annotate it


def _arrive(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    shared: Shared,
    index: int,
    updates: int,
    own: bytes,
) -> A3C:
    """A worker as it comes out in another process: the same place, with a local copy of its own."""
    worker = A3C(config, observation_space, action_space, 0, shared, index)
    worker.updates = updates
    worker._take(torch.load(io.BytesIO(own), weights_only=True))
    return worker


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> A3C:
    """The first worker, for one environment's spaces; `seed` decides the weights."""
    return A3C(config, observation_space, action_space, seed)
