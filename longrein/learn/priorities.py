"""Drawing in proportion to priorities: the sum tree, and prioritized replay's rules on it. Knows numbers, no rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FAN = 64  # children of each node of the sum tree: three levels hold 262,144 numbers


class SumTree:
    """Non-negative numbers that can be drawn in proportion: float64, each node the sum of its 64 children.

    Sums are always added up anew, never corrected by differences, so that nothing drifts.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._levels: list[NDArray[np.float64]] = []  # from the leaves to the root, each [nodes, FAN]
        count = size
        while True:
            nodes = -(-count // FAN)
            self._levels.append(np.zeros((nodes, FAN)))
            if nodes == 1:
                break
            count = nodes

    @property
    def total(self) -> float:
        """Sum of all numbers."""
        return float(self._levels[-1].sum())

    @property
    def values(self) -> NDArray[np.float64]:
        """The numbers [size]: a view, not to be written."""
        return self._levels[0].reshape(-1)[: self.size]

    def set(self, index: NDArray[np.int64], value: NDArray[np.float64]) -> None:
        """Set the numbers at index [N]; the last of equal indices wins."""
        self._levels[0].reshape(-1)[index] = value
        for level, above in zip(self._levels, self._levels[1:], strict=False):
            index = index // FAN
            above.reshape(-1)[index] = level[index].sum(1)

    def find(self, height: NDArray[np.float64]) -> NDArray[np.int64]:
        """Heights [N] in [0, total) -> the index of the number that each falls into, as on the numbers' cumulated sum.

        A number that is 0 is never found. The total must be positive.
        """
        node = np.zeros(len(height), np.int64)
        for level in reversed(self._levels):
            ends = level[node].cumsum(1)  # [N, FAN]
            # Rounding may leave a height at or above the last sum: it belongs to the last child that is not empty.
            below = np.nextafter(ends[:, -1], 0.0)
            height = np.minimum(height, below)
            child = (ends <= height[:, None]).sum(1)
            before = np.where(child > 0, ends[np.arange(len(node)), child - 1], 0.0)
            height = height - before
            node = node * FAN + child
        return node

    def load(self, values: NDArray[np.float64]) -> None:
        """Take all numbers [size] and build the sums anew."""
        self._levels[0].reshape(-1)[: self.size] = values
        for level, above in zip(self._levels, self._levels[1:], strict=False):
            above.reshape(-1)[: len(level)] = level.sum(1)


class Priorities:
    """Prioritized drawing: "Prioritized Experience Replay", Schaul et al. 2016, section 3.3 (arXiv:1511.05952).

    p = (|delta| + epsilon)^alpha, P = p / sum p, and weights (N P)^-beta over the largest of the batch (the paper
    takes the largest of the memory). Rows never drawn have the largest priority met so far.
    """

    def __init__(self, alpha: float, epsilon: float) -> None:
        self._alpha, self._epsilon = alpha, epsilon
        self._largest = 1.0  # of p, met so far
        self._tree = SumTree(1)

    def allocate(self, size: int) -> None:
        """Room for `size` rows, none of which can be drawn yet."""
        self._tree = SumTree(size)

    def add(self, rows: NDArray[np.int64], valid: NDArray[np.bool_]) -> None:
        """New rows [N], of which the valid ones [N] may be drawn."""
        self._tree.set(rows, np.where(valid, self._largest, 0.0))

    def set(self, index: Tensor, td_error: Tensor) -> None:
        """The TD errors [N] of rows [N]. Raises ValueError when one is not finite."""
        p = (td_error.detach().double().abs().numpy() + self._epsilon) ** self._alpha
        largest = float(p.max(initial=0.0))
        if not np.isfinite(largest):
            raise ValueError("td_error: not all of it is finite; training has diverged")
        self._largest = max(self._largest, largest)
        rows = index.numpy()
        # What was invalid stays so: a row may have been overwritten since it was drawn.
        self._tree.set(rows, np.where(self._tree.values[rows] > 0.0, p, 0.0))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Stratified: one row from each of `count` equal parts of the sum."""
        if count == 0:
            return torch.zeros(0, dtype=torch.int64)
        place = torch.rand(count, dtype=torch.float64, generator=generator).numpy() + np.arange(count)
        height = (place * (self._tree.total / count)).astype(np.float64, copy=False)
        return torch.from_numpy(self._tree.find(height))

    def of(self, index: Tensor) -> Tensor:
        """Their priorities, float64."""
        return torch.from_numpy(self._tree.values[index.numpy()])

    def weight(self, index: Tensor, count: int, beta: float) -> Tensor:
        """Importance weights [N], float32, of rows among `count`."""
        share = self._tree.values[index.numpy()] / self._tree.total
        weight = (count * share) ** -beta
        return torch.from_numpy((weight / weight.max()).astype(np.float32))

    def state_dict(self) -> dict[str, Any]:
        """All that decides later draws."""
        return {"largest": self._largest, "values": torch.from_numpy(self._tree.values.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; the sums are built anew."""
        self._largest = state["largest"]
        self._tree = SumTree(len(state["values"]))
        self._tree.load(state["values"].numpy())
