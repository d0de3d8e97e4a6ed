"""What workers of one algorithm write to at the same time, without a lock: tensors in shared memory, and a place each.

Knows weights, statistics and counts, no update rule. Which process or thread runs a worker is not known here.

1. A worker computes with a copy of its own, and writes to the shared weights. What it reads there may be half of
   another's step: that is what Hogwild means (Niu et al. 2011, arXiv:1106.5730).
2. Counts have a row for each worker, in which nobody else writes: none is lost.
3. A worker in a place whose worker is gone goes on counting where that one stopped.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import cloudpickle
import gymnasium
import torch
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn.batch import Batch
from longrein.learn.optimizers import FlatParameters, make_optimizer, state_tensors, views
from longrein.learn.schedules import value_at

MAX_WORKERS = 1024
OPTIMIZERS = ("rmsprop_tf", "rmsprop", "adam", "adamw", "sgd")
"""Those whose statistics can be shared: all of them in tensors that start at a number."""
STATISTICS = ("shared", "own")


@dataclass(frozen=True, slots=True)
class Shared:
    """Tensors in shared memory, so that they may go to another process."""

    weights: Tensor
    """All of them, one after the other: float32 [P]."""
    statistics: Mapping[str, Tensor]
    """The optimizer's, each [P] or one number; none where every worker has its own."""
    env_steps: Tensor
    """int64 [MAX_WORKERS], valid rows that each worker has learnt from."""
    updates: Tensor
    """int64 [MAX_WORKERS], times that each worker has written to the weights."""
    workers: Tensor
    """int64 [], places that were given away."""
    more: Mapping[str, Tensor] = field(default_factory=dict)
    """What else an algorithm's workers share."""


def begin(weights: Tensor, statistics: Mapping[str, Tensor], more: Mapping[str, Tensor] | None = None) -> Shared:
    """Shared memory with these numbers in it, and one worker that has counted nothing."""
    return Shared(
        _in_shared_memory(weights.detach().clone()),
        {name: _in_shared_memory(tensor.clone()) for name, tensor in statistics.items()},
        _in_shared_memory(torch.zeros(MAX_WORKERS, dtype=torch.int64)),
        _in_shared_memory(torch.zeros(MAX_WORKERS, dtype=torch.int64)),
        _in_shared_memory(torch.ones((), dtype=torch.int64)),
        {name: _in_shared_memory(tensor.clone()) for name, tensor in (more or {}).items()},
    )


def check_statistics(name: str, optimizer: str, statistics: str) -> None:
    """Raise SpecError, with a setting of the algorithm `name`, unless workers can have such statistics."""
    if statistics not in STATISTICS:
        raise SpecError(f"{name}.statistics", f"{statistics!r} is neither", hint="one of " + ", ".join(STATISTICS))
    if optimizer not in OPTIMIZERS:
        raise SpecError(f"{name}.optimizer", f"{optimizer!r} has no statistics that workers can share",
                        hint="one of " + ", ".join(OPTIMIZERS))  # fmt: skip


class SharingWorker:
    """One worker; an algorithm inherits from it. The first is made by `build`, the others by `worker`.

    Its `__init__` takes (config, observation_space, action_space, seed, shared=None, index=0), where `shared` is of the
    workers that are there already, and calls `_share`. What a worker alone has, it says in `own_state`.
    """

    config: Any
    policy: Any
    shared: Shared
    index: int
    _statistics: Mapping[str, Tensor]
    lags: list[int]
    """Of the last update's writes: how many others there were between its copy and it."""

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        raise NotImplementedError

    def update(self, batch: Batch) -> dict[str, float]:
        """A worker's turn."""
        raise NotImplementedError

    def _share(
        self,
        spaces: tuple[gymnasium.Space[Any], gymnasium.Space[Any]],
        local: FlatParameters,
        shared: Shared,
        index: int,
    ) -> nn.Parameter:
        """Take a place; the shared weights as a parameter, whose gradient is that of the local ones."""
        self._spaces = spaces
        self._local = local
        self.shared = shared
        self.index = index
        self.lags = []
        # A parameter of its own over the same memory: the gradient that waits beside it is this worker's.
        weights = nn.Parameter(shared.weights)
        weights.grad = local.gradient
        return weights

    def _join(
        self,
        spaces: tuple[gymnasium.Space[Any], gymnasium.Space[Any]],
        local: FlatParameters,
        shared: Shared | None,
        index: int,
        more: Mapping[str, Tensor] | None = None,
    ) -> torch.optim.Optimizer:
        """Take a place, of workers that begin here where `shared` is None; the optimizer of the shared weights.

        Its statistics are shared or this worker's, as the config's `statistics` says. more: what else they begin with.
        """
        begun = statistics_of(partial(optimizer_of, self.config), local.whole)
        both = self.config.statistics == "shared"
        if shared is None:
            shared = begin(local.whole, begun if both else {}, more)
        weights = self._share(spaces, local, shared, index)
        self._statistics = shared.statistics if both else begun
        optimizer = optimizer_of(self.config, weights)
        use_statistics(optimizer, weights, self._statistics)
        return optimizer

    def _own_statistics(self) -> dict[str, Tensor]:
        """Copies of the optimizer's statistics, where each worker has its own; else nothing."""
        return {} if self._statistics is self.shared.statistics else cloned(self._statistics)

    def _take_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        """Let the optimizer go on with saved ones."""
        for name, tensor in statistics.items():
            self._statistics[name].copy_(tensor)

    def worker(self, seed: int | None = None, place: int | None = None) -> Self:
        """Another worker over the same weights and statistics, to be run by another thread or process.

        seed: of what it draws; its place where it is left out. place: that of a worker which is gone.
        Call it where all of them are made: two at the same moment might take the same place. Raises ValueError when
        there are MAX_WORKERS.
        """
        index = int(self.shared.workers) if place is None else place
        if index >= MAX_WORKERS:
            raise ValueError(f"workers: {MAX_WORKERS} are there already")
        if place is None:
            self.shared.workers.add_(1)
        kind: Any = type(self)
        made: Self = kind(self.config, *self._spaces, index if seed is None else seed, self.shared, index)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process goes what is shared, and this worker's place; torch.multiprocessing sends handles."""
        # As bytes: tensors would be handles of memory that this process has let go of when the other one asks for it.
        torch.save(self.own_state(), own := io.BytesIO())
        settings = cloudpickle.dumps((type(self), self.config, self._spaces))  # a config may hold a user's function
        return _arrive, (settings, self.shared, self.index, own.getvalue())

    @property
    def env_steps(self) -> int:
        """Valid rows seen by all workers together."""
        return int(self.shared.env_steps.sum())

    @property
    def updates(self) -> int:
        """Times that all workers together have written to the weights."""
        return int(self.shared.updates.sum())

    def refresh(self) -> None:
        """Copy the shared weights into the local ones."""
        self._seen = self.updates
        self._local.whole.data.copy_(self.shared.weights)

    def own_state(self) -> dict[str, Any]:
        """What this worker alone has, as tensors and plain values."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what a worker alone had."""

    def _count(self, rows: int) -> None:
        """An update of so many valid rows begins."""
        self.lags = []
        self.shared.env_steps[self.index] += rows

    def _wrote(self) -> None:
        """The shared weights were written to: count that, and how many others wrote since the last copy."""
        self.lags.append(self.updates - self._seen)
        self.shared.updates[self.index] += 1

    def _begin_from(self, env_steps: int, updates: int) -> None:
        """The local weights are those of a saved state: share them, and its counts."""
        self.shared.weights.copy_(self._local.whole.data)
        for count, value in ((self.shared.env_steps, env_steps), (self.shared.updates, updates)):
            count.zero_()
            count[self.index] = value
        self._seen = updates

    def _named(self, policy: nn.Module, flat: Tensor) -> dict[str, Tensor]:
        """A policy's state with these numbers [P] as its weights."""
        learnt = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        return dict(policy.state_dict()) | dict(zip(learnt, views(flat.clone(), list(learnt.values())), strict=True))


def optimizer_of(config: Any, weights: Tensor) -> torch.optim.Optimizer:
    """Of these weights, as a Config's `optimizer`, `lr` and `optimizer_settings` say."""
    return make_optimizer(config.optimizer, [weights], value_at(config.lr, 0), **config.optimizer_settings)


def cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, by their names."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def statistics_of(make: Any, weights: Tensor) -> dict[str, Tensor]:
    """An optimizer's statistics as they are before the first step. make: (parameter) -> the optimizer."""
    (statistics,) = state_tensors(make(nn.Parameter(weights.detach().clone())))
    return statistics


def use_statistics(optimizer: torch.optim.Optimizer, weights: nn.Parameter, statistics: Mapping[str, Tensor]) -> None:
    """Let an optimizer's steps of these weights count in these tensors."""
    optimizer.state[weights] = dict(statistics)


def _in_shared_memory(tensor: Tensor) -> Tensor:
    return tensor.share_memory_()  # type: ignore[no-any-return, no-untyped-call]  # torch does not annotate it


def _arrive(settings: bytes, shared: Shared, index: int, own: bytes) -> SharingWorker:
    """A worker as it comes out in another process: the same place, with a local copy of its own."""
    kind, config, spaces = cloudpickle.loads(settings)
    worker: SharingWorker = kind(config, *spaces, 0, shared, index)
    worker.load_own_state(torch.load(io.BytesIO(own), weights_only=True))
    return worker
