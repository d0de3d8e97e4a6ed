"""What a policy is shown: one observation or many, checked and batched. Knows spaces, no policy and no wire.

Stricter and milder than `spaces.check`: NaN never passes, since whatever came of it would look like an action; numbers
of a Box outside its bounds do, since environments stray there, and a network takes them.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray

from longrein.errors import SpaceError
from longrein.link.spaces import check, iterate

_HINT = "an observation as the environment gives it that the policy was trained in"


def as_batch(space: gymnasium.Space[Any], value: Any, rows: int | None = None, path: str = "observation") -> Any:
    """One observation (`rows` None), or `rows` of them as Gymnasium batches them -> a batch of the space's dtypes.

    Raises SpaceError, which names the place, what was expected there and what was met.
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(value, dict) or value.keys() != space.spaces.keys():
            met = f"the keys {list(value)}" if isinstance(value, dict) else _shown(value)
            raise SpaceError(path, f"a mapping with the keys {list(space.spaces)}", met, hint=_HINT)
        return {k: as_batch(member, value[k], rows, f"{path}[{k!r}]") for k, member in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        if not isinstance(value, (tuple, list)) or len(value) != len(space.spaces):
            raise SpaceError(path, f"{len(space.spaces)} parts", _shown(value), hint=_HINT)
        return tuple(as_batch(member, value[i], rows, f"{path}[{i}]") for i, member in enumerate(space.spaces))
    if isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return _leaf(space, value, rows, path)
    each = [value] if rows is None else iterate(space, value, rows)
    for index, one in enumerate(each):
        check(space, one, path if rows is None else f"{path}[{index}]")
    return concatenate(space, each, create_empty_array(space, len(each)))


def rows_of(space: gymnasium.Space[Any], value: Any) -> int:
    """How many observations a batch holds. Raises SpaceError for what is no batch."""
    if isinstance(space, spaces.Dict) and isinstance(value, dict) and value:
        key = next(iter(space.spaces))
        return rows_of(space[key], value.get(key))
    if isinstance(space, spaces.Tuple) and isinstance(value, (tuple, list)) and value:
        return rows_of(space[0], value[0])
    try:
        return len(value)
    except TypeError:
        raise SpaceError("observations", f"a batch of {space}", _shown(value), hint="act() takes one") from None


def _leaf(space: Any, value: Any, rows: int | None, path: str) -> NDArray[Any]:
    dtype = np.dtype(space.dtype)
    shape = tuple(space.shape or ()) if rows is None else (rows, *(space.shape or ()))
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise SpaceError(path, f"{dtype.name} of shape {shape}", f"{error}"[:100], hint=_HINT) from None
    if array.dtype.kind not in "biuf":
        raise SpaceError(path, f"{dtype.name} of shape {shape}", _shown(value), hint=_HINT)
    if array.shape != shape:
        raise SpaceError(path, f"{dtype.name} of shape {shape}", f"shape {array.shape}", hint=_HINT)
    if array.dtype != dtype:
        whole = dtype.kind in "iu" and array.dtype.kind in "iu"
        if array.size and whole and not _fits(array, dtype):
            raise SpaceError(path, f"numbers that fit {dtype.name}", _shown(value), hint=_HINT)
        if not whole and not np.can_cast(array.dtype, dtype, "same_kind"):
            raise SpaceError(path, f"numbers of {dtype.name}", f"numbers of {array.dtype.name}", hint=_HINT)
        array = array.astype(dtype)
    wrong, expected = _wrong(space, array)
    if wrong is not None and bool(wrong.any()):
        index = tuple(int(axis[0]) for axis in np.nonzero(np.atleast_1d(wrong)))
        at = path + "".join(f"[{axis}]" for axis in index) if array.shape else path
        raise SpaceError(at, expected, str(np.atleast_1d(array)[index]), hint=_HINT)
    return array[None] if rows is None else array


def _fits(array: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return limits.min <= int(array.min()) and int(array.max()) <= limits.max


def _wrong(space: Any, array: NDArray[Any]) -> tuple[NDArray[Any] | None, str]:
    """Which numbers cannot be, and what was expected in their place."""
    if isinstance(space, spaces.Box):
        return (np.isnan(array), "a number") if array.dtype.kind == "f" else (None, "")
    if isinstance(space, spaces.Discrete):
        first = int(space.start)
        last = first + int(space.n) - 1
        return (array < first) | (array > last), f"an integer from {first} to {last}"
    if isinstance(space, spaces.MultiDiscrete):
        end = np.asarray(space.start, np.int64) + np.asarray(space.nvec, np.int64)
        return (array < space.start) | (array >= end), f"an integer below {end.tolist()}"
    return (array != 0) & (array != 1), "0 or 1"


def _shown(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 80 else text[:77] + "..."
