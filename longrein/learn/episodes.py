"""The store of whole episodes: rows go in as they come, and out when their episode has ended. Knows no algorithm.

An episode of one environment ends for the store
1. in a row that is done;
2. before a row that is not valid: what came of the step was lost with its environment;
3. before a row that does not begin where it ended: the environment was reset from outside, as after a resumed run;
4. in the batch in which it reaches `max_steps`.
In 2 to 4 it was *cut*: its last row comes out as truncated, and is marked in extras["cut"].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longrein.learn.batch import FIELDS, Batch


class EpisodeStore:
    """`add` batches [T, B, ...]; `ended` says how many episodes are whole; `take` gives them.

    max_steps: env steps, about, after which an episode that does not end is cut.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.ended = 0  # whole episodes in the store
        self._chunks: list[Batch] = []
        self._running: Tensor | None = None  # [B], env steps of each unfinished episode

    def add(self, batch: Batch) -> None:
        """Copy in the next T steps of the same B environments. Raises ValueError when B is another."""
        steps, envs = batch.reward.shape
        if self._running is None:
            self._running = torch.zeros(envs, dtype=torch.int64)
        if len(self._running) != envs:
            raise ValueError(f"reward: expected {len(self._running)} environments as before, got {envs}")
        chunk = Batch(
            **{name: getattr(batch, name).clone() for name in FIELDS},
            extras={"cut": torch.zeros(steps, envs, dtype=torch.bool)},
        )
        cut, open_ = chunk.extras["cut"], batch.valid & ~batch.done
        cut[:-1] = open_[:-1] & ~batch.valid[1:]
        if self._chunks:
            self._join(self._chunks[-1], chunk)
        self._chunks.append(chunk)
        end = batch.valid & (batch.done | cut)
        since = (end.flip(0).cumsum(0) == 0) & batch.valid.flip(0)  # rows after the last end, counted from the back
        self._running = torch.where(end.any(0), 0, self._running) + since.sum(0)
        cut[-1] = (self._running >= self.max_steps) & open_[-1]
        self._running = self._running.masked_fill(cut[-1], 0)
        self.ended += int(end.sum()) + int(cut[-1].sum())

    def take(self) -> Batch:
        """All whole episodes, [T, B, ...]: `valid` marks their rows, extras["cut"] what cut them. They are gone then.

        Raises ValueError when no episode has ended.
        """
        if self.ended == 0:
            raise ValueError("the store has no whole episode")
        store = _joined(self._chunks)
        end = store.valid & (store.done | store.extras["cut"])
        whole = end.flip(0).cumsum(0).flip(0) > 0
        rest = store.valid & ~whole
        first = int(rest.any(1).int().argmax())
        self._chunks = [_from(replace(store, valid=rest), first)] if rest.any() else []
        self.ended = 0
        return replace(store, valid=store.valid & whole, truncated=store.truncated | store.extras["cut"])

    def state_dict(self) -> dict[str, Any]:
        """All that is in the store."""
        rows = _joined(self._chunks) if self._chunks else None
        return {
            "ended": self.ended,
            "running": self._running,
            "rows": None if rows is None else {name: getattr(rows, name) for name in FIELDS} | dict(rows.extras),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.ended = state["ended"]
        self._running = state["running"]
        self._chunks = []
        if state["rows"] is not None:
            columns = {name: column.clone() for name, column in state["rows"].items()}
            cut = columns.pop("cut")
            self._chunks = [Batch(**columns, extras={"cut": cut})]

    def _join(self, last: Batch, chunk: Batch) -> None:
        """Cut the episodes that do not go on in the new rows."""
        assert self._running is not None
        same = (last.next_observation[-1] == chunk.observation[0]).flatten(1).all(1)
        broken = last.valid[-1] & ~last.done[-1] & ~last.extras["cut"][-1] & ~(same & chunk.valid[0])
        last.extras["cut"][-1] |= broken
        self._running = self._running.masked_fill(broken, 0)
        self.ended += int(broken.sum())


def _joined(chunks: list[Batch]) -> Batch:
    columns = {name: torch.cat([getattr(chunk, name) for chunk in chunks]) for name in FIELDS}
    return Batch(**columns, extras={"cut": torch.cat([chunk.extras["cut"] for chunk in chunks])})


def _from(store: Batch, first: int) -> Batch:
    """The rows from `first` on, in memory of their own."""
    columns = {name: getattr(store, name)[first:].clone() for name in FIELDS}
    return Batch(**columns, extras={"cut": store.extras["cut"][first:].clone()})
