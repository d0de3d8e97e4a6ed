"""The on-policy store: T steps of B environments, in memory taken once. Knows no algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longrein.learn.batch import FIELDS, Batch, Transition
from longrein.learn.columns import columns_of, extras_in


class Rollout:
    """Fill it with `add` until it is `full`, then `take` the batch, which empties it.

    Invalid rows keep their place, so that a column stays one environment's time line; the batch marks them.
    Raises ValueError when a transition does not look like the first one, or the store is full.
    """

    def __init__(self, length: int) -> None:
        if length < 1:
            raise ValueError(f"length: a rollout has at least one step, got {length}")
        self.length = length  # vector steps
        self._filled = 0
        self._columns: dict[str, NDArray[np.generic]] = {}  # name -> [T, B, ...]; extras as "extras.NAME"
        self._batch: Batch | None = None  # the view of them, made when it is needed

    def __len__(self) -> int:
        return self._filled

    @property
    def full(self) -> bool:
        """Whether `take` may be called."""
        return self._filled == self.length

    def add(self, transition: Transition) -> None:
        """Copy one vector step in."""
        if self.full:
            raise ValueError(f"the rollout holds its {self.length} steps already; take the batch first")
        row = columns_of(transition)
        if not self._columns:
            self.use({name: np.empty((self.length, *a.shape), kept(a.dtype)) for name, a in row.items()})
        if row.keys() != self._columns.keys():
            raise ValueError(f"extras: expected {sorted(self._columns)}, got {sorted(row)}")
        for name, array in row.items():
            column = self._columns[name]
            if array.shape != column.shape[1:]:
                raise ValueError(f"{name}: expected shape {column.shape[1:]}, got {array.shape}")
            column[self._filled] = array
        self._filled += 1

    def take(self) -> Batch:
        """The batch [T, B, ...], and an empty store. The batch is a view: it is good until the next `add`.

        Raises ValueError unless the store is full.
        """
        if not self.full:
            raise ValueError(f"the rollout holds {self._filled} of {self.length} steps; add the others first")
        self._filled = 0
        if self._batch is None:
            self._batch = batch_of(self._columns)
        return self._batch

    @property
    def columns(self) -> Mapping[str, NDArray[np.generic]]:
        """The memory, [T, B, ...] each; nothing before the first `add`."""
        return self._columns

    def use(self, columns: Mapping[str, NDArray[np.generic]]) -> None:
        """Fill this memory from now on, which looks like `columns`; the store must be empty."""
        if self._filled:
            raise ValueError(f"the rollout holds {self._filled} steps; take the batch first")
        self._columns, self._batch = dict(columns), None

    def state_dict(self) -> dict[str, Any]:
        """The steps that wait for the batch to be full."""
        waiting = {name: torch.from_numpy(column[: self._filled].copy()) for name, column in self._columns.items()}
        return {"filled": self._filled, "columns": waiting if self._filled else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, made with the same length."""
        self._filled, self._columns, self._batch = state["filled"], {}, None
        for name, waiting in state["columns"].items():
            rows = waiting.numpy()
            self._columns[name] = np.empty((self.length, *rows.shape[1:]), rows.dtype)
            self._columns[name][: self._filled] = rows


def batch_of(columns: Mapping[str, NDArray[np.generic]]) -> Batch:
    """Columns [T, B, ...] as a Rollout names them -> the batch, a view of them."""
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    return Batch(**{name: tensors[name] for name in FIELDS}, extras=extras_in(tensors))


def kept(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """float64 is kept as float32, which is what networks compute in; anything else as it is."""
    return np.dtype(np.float32) if dtype == np.float64 else dtype
