"""Tensors as NumPy arrays over the same memory. Knows where they lie, not what they are for.

For a few hundred numbers an operation of torch takes longer to begin than to compute, and NumPy begins five times
sooner. What is looked at again and again is looked at through one `Views`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
Arrays = list[NDArray[Any]]


class Views(Generic[T]):
    """What is made of tensors where they lie, and made anew only when one has moved."""

    def __init__(self, make: Callable[[list[Tensor]], T]) -> None:
        self._make = make
        self._last: tuple[list[int], T] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and those in other processes, have tensors of their own to look at."""
        return Views, (self._make,)

    def of(self, tensors: list[Tensor]) -> T:
        """What is made of these; of as many each time."""
        # An optimizer changes weights where they lie; whoever shares or flattens them moves them.
        at = [tensor.data_ptr() for tensor in tensors]
        last = self._last
        if last is None or last[0] != at:
            self._last = last = (at, self._make(tensors))  # at once: another thread may look in between
        return last[1]


def as_arrays(tensors: list[Tensor]) -> Arrays:
    """Each over its tensor's memory."""
    return [tensor.detach().numpy() for tensor in tensors]
