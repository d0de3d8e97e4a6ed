"""Tensors as NumPy arrays over the same memory. Knows where they lie, not what they are for.

For a few hundred numbers an operation of torch takes longer to begin than to compute, and NumPy begins five times
sooner. What is looked at again and again is looked at through one `Views`.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from torch import Tensor


class Views:
    """Tensors as arrays over the same memory, which are made anew only when a tensor has moved."""

    def __init__(self) -> None:
        self._at: list[int] = []
        self._arrays: list[NDArray[Any]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and those in other processes, have tensors of their own to look at."""
        return Views, ()

    def of(self, tensors: list[Tensor]) -> list[NDArray[Any]]:
        """The arrays."""
        # An optimizer changes weights where they lie; whoever shares or flattens them moves them.
        at = [tensor.data_ptr() for tensor in tensors]
        if at != self._at:
            arrays = [tensor.detach().numpy() for tensor in tensors]
            self._arrays, self._at = arrays, at  # in this order: another thread may look in between
            return arrays
        return self._arrays
