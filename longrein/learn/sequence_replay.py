"""A memory of past sequences: whole rollouts, or what a recurrent network is unrolled over. Knows no algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longrein.learn.batch import EXTRAS, FIELDS, Batch
from longrein.learn.columns import Forms, check, columns_of, extras_in, forms_of
from longrein.learn.priorities import Priorities
from longrein.learn.replay import Memory
from longrein.learn.schedules import value_at


@dataclass(frozen=True, slots=True)
class Sequences:
    """K sequences drawn, each L steps of one environment."""

    batch: Batch  # time-major [L, K, ...]; its first extras are those of the moment the sequence began
    learn: Tensor  # bool [L, K]: valid, and behind the burn-in
    weight: Tensor  # float32 [K], importance weights with maximum 1; ones when all sequences are drawn alike
    index: Tensor  # int64 [K], for `update_priorities`; good until the next `add`


class SequenceReplay:
    """Sequences of `length` steps of one environment, a new one every `stride` steps, the oldest forgotten first.

    length == stride == the steps of a batch keeps whole rollouts, as ACER and IMPALA replay them. R2D2 has length 80,
    stride 40 and burn_in 40: the first `burn_in` steps only bring the recurrent state up to date. That state, and all
    else in extras, is kept as the policy gave it when it acted; extras named in `first_only` are kept of a sequence's
    first step alone, since a recurrent state is large. A sequence may hold the end of an episode: heed `done`.
    """

    def __init__(
        self,
        memory: Memory,
        length: int,
        *,
        stride: int | None = None,
        burn_in: int = 0,
        first_only: tuple[str, ...] = (),
    ) -> None:
        stride = length if stride is None else stride
        if not 1 <= stride <= length or not 0 <= burn_in < length:
            raise ValueError(f"1 <= stride <= length and 0 <= burn_in < length, got {stride}, {burn_in} and {length}")
        self.memory = memory
        self.length, self.stride, self.burn_in = length, stride, burn_in
        self.env_steps = 0  # valid rows ever added
        self._first_only = {EXTRAS + name for name in first_only}
        self._capacity = max(memory.capacity // length, 1)  # sequences
        self._filled = 0
        self._head = 0
        self._columns: dict[str, Tensor] = {}  # name -> [F, L, ...]
        self._learn = torch.zeros(0, dtype=torch.int64)  # [F], rows to learn from in each sequence
        self._pending: dict[str, Tensor] = {}  # name -> [less than L, B, ...]
        self._fresh = torch.zeros(0, dtype=torch.int64)  # the sequences stored last, one for each environment
        self._priorities = Priorities(memory.alpha, memory.epsilon) if memory.prioritized else None

    def __len__(self) -> int:
        """Valid rows kept behind the burn-in, over all sequences."""
        return int(self._learn[: self._filled].sum())

    @property
    def ready(self) -> bool:
        """Whether there is enough to learn from: `min_size` rows, or a full memory; and at least one."""
        full = self._filled == self._capacity
        return full or len(self) >= max(self.memory.min_size, 1)

    @property
    def num_sequences(self) -> int:
        """Sequences kept."""
        return self._filled

    def add(self, batch: Batch, generator: torch.Generator | None = None) -> None:
        """Copy a time-major batch [T, B, ...] in; it must follow on the last one.

        generator: needed when eviction is sampled. Raises ValueError when B or a field's form is not the first one's.
        """
        columns = columns_of(batch)
        if not self._pending:
            self._pending = {name: column[:0].clone() for name, column in columns.items()}
        check(columns, batch.reward.shape[1], self._pending["reward"].shape[1], forms_of(self._pending, 2))
        self.env_steps += int(batch.valid.sum())
        pending = {name: torch.cat([self._pending[name], column]) for name, column in columns.items()}
        border = len(self._pending["reward"])
        if border:
            # A hole between two batches: what was pending was stopped from outside.
            last, first = pending["next_observation"][border - 1], pending["observation"][border]
            pending["truncated"][border - 1] |= ~(last == first).flatten(1).all(1)
        start = 0
        while len(pending["reward"]) - start >= self.length:
            self._store({name: column[start : start + self.length] for name, column in pending.items()}, generator)
            start += self.stride
        self._pending = {name: column[start:].clone() for name, column in pending.items()}

    def sample(self, count: int, generator: torch.Generator) -> Sequences:
        """Draw `count` sequences, with replacement. Raises ValueError when there is none."""
        if self._filled == 0:
            raise ValueError("the memory holds no sequence yet; add more batches first")
        fresh = self._fresh[-max(count // 2, 1) :] if self.memory.combined else self._fresh[:0]
        others = count - len(fresh)
        if self._priorities is not None:
            index = torch.cat([self._priorities.draw(others, generator), fresh])
            weight = self._priorities.weight(index, self._filled, value_at(self.memory.beta, self.env_steps))
        else:
            index = torch.cat([torch.randint(self._filled, (others,), generator=generator), fresh])
            weight = torch.ones(count)
        drawn = {}
        for name, column in self._columns.items():
            rows = column.index_select(0, index).transpose(0, 1)  # [L, K, ...]; of images [index] takes twenty times
            drawn[name] = rows.expand(self.length, *rows.shape[1:]) if name in self._first_only else rows
        batch = Batch(**{name: drawn[name] for name in FIELDS}, extras=extras_in(drawn))
        learn = batch.valid.clone()
        learn[: self.burn_in] = False
        return Sequences(batch, learn, weight, index)

    def update_priorities(self, index: Tensor, td_error: Tensor) -> None:
        """Give sequences [K] the priority of their errors [K]: R2D2 takes 0.9 max + 0.1 mean of |TD| over a sequence.

        Does nothing when sequences are drawn all alike. Raises ValueError when an error is not finite.
        """
        if self._priorities is not None:
            self._priorities.set(index, td_error)

    def state_dict(self) -> dict[str, Any]:
        """All that decides later draws. The tensors of a full memory are its own, not copies."""
        return {
            "filled": self._filled,
            "head": self._head,
            "env_steps": self.env_steps,
            "columns": {
                name: column if self._filled == self._capacity else column[: self._filled].clone()
                for name, column in self._columns.items()
            },
            "learn": self._learn.clone(),
            "pending": dict(self._pending),
            "fresh": self._fresh.clone(),
            "priorities": None if self._priorities is None else self._priorities.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises ValueError when its sequences were drawn another way."""
        if (state["priorities"] is None) != (self._priorities is None):
            raise ValueError("memory.prioritized: not as it was saved")
        self._columns = {}
        if state["columns"]:
            self._allocate(forms_of(state["columns"], 1))
            if len(self._learn) != len(state["learn"]):
                raise ValueError(f"memory.capacity: {self._capacity} sequences, {len(state['learn'])} when saved")
            for name, column in state["columns"].items():
                self._columns[name][: len(column)] = column
            self._learn.copy_(state["learn"])
        self._filled, self._head, self.env_steps = state["filled"], state["head"], state["env_steps"]
        self._pending = {name: column.clone() for name, column in state["pending"].items()}
        self._fresh = state["fresh"].clone()
        if self._priorities is not None:
            self._priorities.load_state_dict(state["priorities"])

    def _allocate(self, forms: Forms) -> None:
        self._columns = {
            name: torch.empty(self._capacity, *shape, dtype=dtype) for name, (shape, dtype) in forms.items()
        }
        self._learn = torch.zeros(self._capacity, dtype=torch.int64)
        if self._priorities is not None:
            self._priorities.allocate(self._capacity)

    def _store(self, window: Mapping[str, Tensor], generator: torch.Generator | None) -> None:
        """One sequence for each environment that has something to learn from: columns [L, B, ...]."""
        learn = window["valid"][self.burn_in :].sum(0)
        kept = learn.nonzero().squeeze(1)[-self._capacity :]
        rows = {
            name: column[: 1 if name in self._first_only else None, kept].transpose(0, 1)
            for name, column in window.items()
        }
        if not self._columns:
            self._allocate(forms_of(rows, 1))
        free = min(self._capacity - self._filled, len(kept))
        if self.memory.eviction == "oldest" or free == len(kept):
            index = (self._head + torch.arange(len(kept))) % self._capacity
            self._head = (self._head + len(kept)) % self._capacity
        else:
            if generator is None:
                raise ValueError("generator: sampled eviction needs one")
            chance = torch.ones(self._filled, dtype=torch.float64)
            if self._priorities is not None:
                chance = 1.0 / (self._priorities.of(torch.arange(self._filled)) + 1e-12)
            evicted = torch.multinomial(chance, len(kept) - free, generator=generator)
            index = torch.cat([self._filled + torch.arange(free), evicted])
        self._filled += free
        for name, column in rows.items():
            self._columns[name][index] = column
        self._learn[index] = learn[kept]
        self._fresh = index
        if self._priorities is not None:
            self._priorities.add(index.numpy(), np.ones(len(index), np.bool_))
