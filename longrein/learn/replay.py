"""A memory of past transitions that are drawn one by one, with n-step windows. Knows time, no algorithm.

What is kept is kept by stream: a row of environment b is followed by the next row of environment b.
Rules of `Replay`:
1. An invalid row keeps its place, so that a stream stays a time line; it is never drawn and ends a window before it.
2. `goes_on` says of each row whether the row after it in its stream is the next step of the same episode. A window
   follows `goes_on` and nothing else: ends of episodes, invalid rows and the write head are all written there.
3. The newest row does not go on until its successor comes: its window is shorter, and so is its discount.
4. Two batches join only where the first observation of the one is the last successor of the other: the learner leaves
   out a batch in which every environment was lost, and nothing may be summed across such a hole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn.batch import Batch
from longrein.learn.columns import Forms, alike, check, columns_of, extras_in, forms_of
from longrein.learn.priorities import Priorities
from longrein.learn.schedules import Schedule, refuse_negative, value_at


@dataclass(frozen=True)
class Memory:
    """What is remembered and how it is drawn; every algorithm with replay has one of these as its setting `memory`."""

    capacity: int = 100_000
    """Env steps kept, over all environments together."""
    batch_size: int = 64
    """Rows (or sequences) of one gradient step."""
    min_size: int = 1_000
    """Env steps to gather before learning begins."""
    n_steps: int = 1
    """Env steps of reward summed before the bootstrap, at most; a window ends with its episode."""
    prioritized: bool = False
    """Whether rows are drawn by their TD error rather than all alike."""
    alpha: float = 0.6
    """How much priorities count when rows are drawn: 0 not at all, 1 in proportion to the TD error."""
    beta: Schedule = 0.4
    """How much of the bias of prioritized drawing is corrected: 1 all of it; a schedule, by env steps."""
    epsilon: float = 1e-6
    """Added to every absolute TD error, in units of that error, so that no row is lost for good."""
    eviction: str = "oldest"
    """What a full memory forgets: oldest, or sampled (at random, and the rarer drawn the sooner if prioritized)."""
    combined: bool = False
    """Whether the newest rows are part of each batch, up to half of it (combined experience replay)."""

    def __post_init__(self) -> None:
        refuse_negative("memory", self)
        for name in ("capacity", "batch_size", "n_steps"):
            if getattr(self, name) < 1:
                raise SpecError(f"memory.{name}", f"must be at least 1, got {getattr(self, name)}")
        if self.min_size < 0:
            raise SpecError("memory.min_size", f"must not be negative, got {self.min_size}")
        if self.min_size > self.capacity:
            raise SpecError("memory.min_size", f"{self.min_size} rows never fit in a capacity of {self.capacity}")
        if self.alpha < 0:
            raise SpecError("memory.alpha", f"must not be negative, got {self.alpha}")
        if self.epsilon <= 0:
            raise SpecError("memory.epsilon", f"must be positive, got {self.epsilon}")
        if self.eviction not in ("oldest", "sampled"):
            raise SpecError("memory.eviction", f"{self.eviction!r} is neither oldest nor sampled")


@dataclass(frozen=True, slots=True)
class Sample:
    """N rows drawn, each with the window of at most n steps that begins there."""

    observation: Tensor  # [N, ...]
    action: Tensor  # [N, ...]
    reward: Tensor  # float32 [N], sum of gamma^i r_i over the window's m steps
    next_observation: Tensor  # [N, ...], the true successor of the window's last step
    discount: Tensor  # float32 [N], gamma^m, 0 where the window's last step terminated
    weight: Tensor  # float32 [N], importance weights with maximum 1; ones when all rows are drawn alike
    index: Tensor  # int64 [N], for `update_priorities`; good until the next `add`
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # [N, ...], of the window's first step


@dataclass(frozen=True, slots=True)
class Drawn:
    """A Sample as arrays, for those who learn from few rows in NumPy. Fields as there."""

    observation: NDArray[Any]
    action: NDArray[Any]
    reward: NDArray[np.float32]
    next_observation: NDArray[Any]
    discount: NDArray[np.float32]
    weight: NDArray[np.float32]
    index: NDArray[np.int64]
    extras: dict[str, NDArray[Any]]

    def tensors(self) -> Sample:
        """The same as tensors, over the same memory."""
        return Sample(
            torch.from_numpy(self.observation),
            torch.from_numpy(self.action),
            torch.from_numpy(self.reward),
            torch.from_numpy(self.next_observation),
            torch.from_numpy(self.discount),
            torch.from_numpy(self.weight),
            torch.from_numpy(self.index),
            {name: torch.from_numpy(extra) for name, extra in self.extras.items()},
        )


class _Arrays(NamedTuple):
    """The very memory of a Replay's tensors, for what comes in: a call of NumPy costs a tenth of one of torch."""

    columns: dict[str, NDArray[Any]]  # [S, B, ...] each
    rows: dict[str, NDArray[Any]]  # the same as [S * B, ...]
    goes_on: NDArray[np.bool_]  # [S, B]
    following: NDArray[np.int64]  # [S]
    preceding: NDArray[np.int64]  # [S]


class Replay:
    """The last `capacity` env steps as rings of S slots for each of B environments.

    gamma: discount per env step of the n-step sums.
    """

    def __init__(self, memory: Memory, *, gamma: float) -> None:
        self.memory = memory
        self.gamma = gamma
        self.env_steps = 0  # valid rows ever added
        self._streams = 0  # B, known from the first batch
        self._slots = 0  # S
        self._filled = 0  # slots in use
        self._head = 0  # slot to be written next, when the oldest is evicted
        self._newest = -1  # slot written last
        self._columns: dict[str, Tensor] = {}  # name -> [S * B, ...]; extras as "extras.NAME"
        self._goes_on = torch.zeros(0, dtype=torch.bool)  # [S * B]
        self._following = torch.zeros(0, dtype=torch.int64)  # [S], the slot of the next vector step, or -1
        self._preceding = torch.zeros(0, dtype=torch.int64)  # [S]
        self._num_valid = 0
        self._arrays: _Arrays | None = None  # made when they are needed
        self._batch: Batch | None = None  # the last one, and its arrays
        self._given: dict[str, NDArray[Any]] = {}
        self._fresh: NDArray[np.int64] = np.zeros(0, np.int64)  # rows of the last `add`, valid ones, oldest first
        self._priorities = Priorities(memory.alpha, memory.epsilon) if memory.prioritized else None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has memory of its own, and so views of its own."""
        return {**self.__dict__, "_arrays": None, "_batch": None, "_given": {}}

    def __len__(self) -> int:
        """Valid rows."""
        return self._num_valid

    @property
    def ready(self) -> bool:
        """Whether there is enough to learn from: `min_size` rows, or a full memory; and at least one."""
        full = 0 < self._slots == self._filled
        return self._num_valid >= max(self.memory.min_size, 1) or (full and self._num_valid > 0)

    def add(self, batch: Batch, generator: torch.Generator | None = None) -> None:
        """Copy a time-major batch [T, B, ...] in; it must follow on the last one.

        generator: needed when eviction is sampled. Raises ValueError when B or a field's form is not the first one's.
        """
        if batch is not self._batch:  # a rollout gives the same one again and again
            self._look(batch)
        arrays, columns = self._memory(), self._given
        steps, streams = columns["reward"].shape
        if steps > self._slots:  # only its end is remembered
            self.env_steps += int(batch.valid[: -self._slots].sum())
            columns = {name: column[-self._slots :] for name, column in columns.items()}
            steps = self._slots
        slots = self._take_slots(steps, generator)
        first, last = int(slots[0]), int(slots[-1])
        # A slice where they lie in one piece, oldest first: what it copies takes a third of the time.
        whole = last - first == steps - 1 and self.memory.eviction == "oldest"
        at = slice(first, last + 1) if whole else slots
        gone = first <= self._newest <= last if whole else self._newest in slots
        self._join(columns, slots, -1 if gone else self._newest)
        valid = columns["valid"]
        count = int(np.count_nonzero(valid))
        self._num_valid += count - int(np.count_nonzero(arrays.columns["valid"][at]))
        self.env_steps += count
        for name, column in columns.items():
            arrays.columns[name][at] = column
        if whole:
            rows = np.arange(first * streams, (last + 1) * streams)
        else:
            rows = (slots[:, None] * streams + np.arange(streams)).ravel()
        valid = valid.ravel()
        self._fresh = rows if count == len(rows) else rows[valid]
        self._newest = last
        if self._priorities is not None:
            self._priorities.add(rows, valid)

    def _look(self, batch: Batch) -> None:
        """Take a batch's arrays for `add`. Raises ValueError as it does."""
        given = columns_of(batch)
        streams = batch.reward.shape[1]
        if not self._columns:
            self._allocate(streams, forms_of(given, 2))
        columns = {name: column.numpy() for name, column in given.items()}
        if not alike(columns, self._memory().columns):
            check(given, streams, self._streams, forms_of(self._columns, 1))
        self._batch, self._given = batch, columns

    def sample(self, size: int, generator: torch.Generator) -> Sample:
        """Draw `size` rows, with replacement. Raises ValueError when there is none."""
        return self.draw(size, generator).tensors()

    def draw(self, size: int, generator: torch.Generator) -> Drawn:
        """As `sample`, as arrays."""
        if self._num_valid == 0:
            raise ValueError("the memory holds no valid row; add a batch first")
        fresh = self._fresh[-max(size // 2, 1) :] if self.memory.combined else None
        count = size if fresh is None else size - len(fresh)
        index = self._draw(count, generator) if self._priorities is None else self._priorities.draw(count, generator)
        if fresh is not None:
            index = torch.cat([index, torch.from_numpy(fresh)])
        if self._priorities is None:
            weight = np.ones(size, np.float32)
        else:
            beta = value_at(self.memory.beta, self.env_steps)
            weight = self._priorities.weight(index, self._num_valid, beta).numpy()
        return self._windows(index.numpy(), weight)

    def update_priorities(self, index: Tensor, td_error: Tensor) -> None:
        """Give rows [N] of a Sample the priority of their TD errors [N], unweighted, of any sign.

        Does nothing when rows are drawn all alike. Raises ValueError when an error is not finite.
        """
        if self._priorities is not None:
            self._priorities.set(index, td_error)

    def state_dict(self) -> dict[str, Any]:
        """All that decides later draws. The tensors of a full memory are its own, not copies."""
        return {
            "streams": self._streams,
            "slots": self._slots,
            "filled": self._filled,
            "head": self._head,
            "newest": self._newest,
            "num_valid": self._num_valid,
            "env_steps": self.env_steps,
            # Cut and cloned: torch would save all of the memory that a view is cut from.
            "columns": {name: self._saved(column) for name, column in self._columns.items()},
            "goes_on": self._saved(self._goes_on),
            "following": self._following.clone(),
            "preceding": self._preceding.clone(),
            "fresh": torch.from_numpy(self._fresh.copy()),
            "priorities": None if self._priorities is None else self._priorities.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises ValueError when its rows were drawn another way."""
        if (state["priorities"] is None) != (self._priorities is None):
            raise ValueError("memory.prioritized: not as it was saved")
        self._columns = {}
        if state["columns"]:
            self._allocate(state["streams"], forms_of(state["columns"], 1))
            if self._slots != state["slots"]:
                raise ValueError(f"memory.capacity: {self._slots} slots, {state['slots']} when it was saved")
            for name, column in state["columns"].items():
                self._columns[name][: len(column)] = column
            self._goes_on[: len(state["goes_on"])] = state["goes_on"]
            self._following.copy_(state["following"])
            self._preceding.copy_(state["preceding"])
        self._filled, self._head, self._newest = state["filled"], state["head"], state["newest"]
        self._num_valid, self.env_steps = state["num_valid"], state["env_steps"]
        self._fresh = state["fresh"].numpy().copy()
        if self._priorities is not None:
            self._priorities.load_state_dict(state["priorities"])

    def _saved(self, column: Tensor) -> Tensor:
        return column if self._filled == self._slots else column[: self._filled * self._streams].clone()

    def _allocate(self, streams: int, forms: Forms) -> None:
        self._streams = streams
        self._slots = max(self.memory.capacity // streams, 1)
        rows = self._slots * streams
        # Empty, so that pages never written cost nothing; `valid` decides, and must start False.
        self._columns = {name: torch.empty(rows, *shape, dtype=dtype) for name, (shape, dtype) in forms.items()}
        self._columns["valid"].zero_()
        self._goes_on = torch.zeros(rows, dtype=torch.bool)
        self._following = torch.full((self._slots,), -1)
        self._preceding = torch.full((self._slots,), -1)
        self._arrays = self._batch = None
        if self._priorities is not None:
            self._priorities.allocate(rows)

    def _take_slots(self, steps: int, generator: torch.Generator | None) -> NDArray[np.int64]:
        """The slots [T] for the next vector steps, freed and counted in."""
        _, _, goes_on, following, preceding = self._memory()
        free = min(self._slots - self._filled, steps)
        if self.memory.eviction == "oldest" or free == steps:
            slots = np.arange(self._head, self._head + steps)
            if slots[-1] >= self._slots:
                slots %= self._slots
            self._head = (self._head + steps) % self._slots
            outer = slots[:1], slots[-1:]  # slots are taken in turn: those between have neighbours among themselves
        else:
            slots = np.concatenate([self._filled + np.arange(free), self._evict(steps - free, generator)])
            outer = slots, slots
        self._filled += free
        for slot in preceding[outer[0]].tolist():
            if slot >= 0:
                goes_on[slot] = False
                following[slot] = -1
        for slot in following[outer[1]].tolist():
            if slot >= 0:
                preceding[slot] = -1
        return slots

    def _memory(self) -> _Arrays:
        if self._arrays is None:
            form = (self._slots, self._streams)
            rows = {name: column.numpy() for name, column in self._columns.items()}
            columns = {name: row.reshape(*form, *row.shape[1:]) for name, row in rows.items()}
            goes_on = self._goes_on.numpy().reshape(form)
            self._arrays = _Arrays(columns, rows, goes_on, self._following.numpy(), self._preceding.numpy())
        return self._arrays

    def _evict(self, count: int, generator: torch.Generator | None) -> NDArray[np.int64]:
        if generator is None:
            raise ValueError("generator: sampled eviction needs one")
        chance = torch.ones(self._filled, dtype=torch.float64)
        if self._priorities is not None:
            sums = self._priorities.of(torch.arange(self._filled * self._streams)).view(self._filled, -1).sum(1)
            chance = 1.0 / (sums + 1e-12)
        if count < self._filled:
            chance[self._newest] = 0.0  # the next vector step follows on it
        return torch.multinomial(chance, count, generator=generator).numpy()

    def _join(self, columns: Mapping[str, NDArray[Any]], slots: NDArray[np.int64], last: int) -> None:
        """Link the new slots to each other and to the last one, if it is not -1, and say where episodes go on."""
        held, _, goes_on, following, preceding = self._memory()
        valid = columns["valid"]
        following[slots[-1]] = -1
        preceding[slots[0]] = -1
        if last >= 0:
            same = (held["next_observation"][last] == columns["observation"][0]).reshape(self._streams, -1).all(1)
            ended = held["terminated"][last] | held["truncated"][last]
            goes_on[last] = same & ~ended & held["valid"][last] & valid[0]
            following[last] = slots[0]
            preceding[slots[0]] = last
        goes_on[slots] = False
        if len(slots) > 1:
            following[slots[:-1]] = slots[1:]
            preceding[slots[1:]] = slots[:-1]
            ended = columns["terminated"][:-1] | columns["truncated"][:-1]
            goes_on[slots[:-1]] = ~ended & valid[:-1] & valid[1:]

    def _draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Valid rows, all alike: int64 [size]."""
        rows = self._filled * self._streams
        index = torch.randint(rows, (size,), generator=generator)
        if self._num_valid == rows:
            return index
        valid = self._columns["valid"]
        for _ in range(4):
            wrong = (~valid[index]).nonzero().squeeze(1)
            if len(wrong) == 0:
                return index
            index[wrong] = torch.randint(rows, (len(wrong),), generator=generator)
        candidates = valid[:rows].nonzero().squeeze(1)  # few rows are valid: list them
        return candidates[torch.randint(len(candidates), (size,), generator=generator)]

    def _windows(self, index: NDArray[np.int64], weight: NDArray[np.float32]) -> Drawn:
        """The n-step windows that begin at rows [N]: R, D and s* of section "n-step" of docs/algorithms/dqn.md."""
        rows = self._memory().rows
        last = index
        reward = rows["reward"].take(index)
        discount: NDArray[np.float32] = np.full(len(index), self.gamma, np.float32)
        if self.memory.n_steps > 1:
            goes_on, following, gamma = self._goes_on.numpy(), self._following.numpy(), np.float32(self.gamma)
            stream = index % self._streams
            alive = np.ones(len(index), np.bool_)
            for _ in range(self.memory.n_steps - 1):
                alive &= goes_on.take(last)
                last = np.where(alive, following.take(last // self._streams) * self._streams + stream, last)
                reward = reward + alive * discount * rows["reward"].take(last)
                discount = np.where(alive, discount * gamma, discount)
        discount = discount * ~rows["terminated"].take(last)
        # By `take`: torch's column[index] takes three times as long, and of images twenty times.
        return Drawn(
            observation=rows["observation"].take(index, 0),
            action=rows["action"].take(index, 0),
            reward=reward,
            next_observation=rows["next_observation"].take(last, 0),
            discount=discount,
            weight=weight,
            index=index,
            extras={name: row.take(index, 0) for name, row in extras_in(rows).items()},
        )
