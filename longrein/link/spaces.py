"""What a space is on the wire: its description, its columns, its plain values. No message, no socket.

A *description* is plain data that rebuilds the space on the other side (`SCHEMA` is its JSON schema). A *layout* says
how elements of a space travel: leaves of fixed size as raw columns, all others as *plain values* in the head.

Letters for the Python types of scalars (`scalar_types`): - the usual type, I int, F float, B bool, A an array of no
dimensions; a b c d int8 to int64, e f g h uint8 to uint64, i j k float16 to float64, l bool of NumPy.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from gymnasium import Space, spaces
from gymnasium.spaces import GraphInstance
from gymnasium.vector.utils import concatenate, create_empty_array

from longrein.errors import SpaceError

Plain = Any
Buffer = bytes | bytearray | memoryview
Array = np.ndarray[Any, Any]
Key = str | int

SCHEMA_VERSION: Final = 1
MAX_DEPTH: Final = 32
MAX_BYTES: Final = 2**40  # of one element: a description of more is refused before memory is taken

# ------------------------------------------------------------------------------------------------------- description

_DTYPES: Final = frozenset(
    [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    ]
)


def describe(space: Space[Any]) -> dict[str, Plain]:
    """A space as plain data, fit for JSON. Raises SpaceError for a space that is not one of Gymnasium's own."""
    return _describe(space, "space")


def _describe(space: Space[Any], path: str) -> dict[str, Plain]:
    match space:
        case spaces.Box():
            name = _dtype(space).name
            if name not in _DTYPES:
                raise SpaceError(path, f"a Box of one of {', '.join(sorted(_DTYPES))}", name)
            low, high = _bounds(space.low, path), _bounds(space.high, path)
            return {"type": "Box", "dtype": name, "shape": list(space.shape), "low": low, "high": high}
        case spaces.Discrete():
            return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": _dtype(space).name}
        case spaces.MultiDiscrete():
            nvec, start = space.nvec.tolist(), space.start.tolist()
            return {"type": "MultiDiscrete", "nvec": nvec, "start": start, "dtype": _dtype(space).name}
        case spaces.MultiBinary():
            return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else [int(n) for n in space.n]}
        case spaces.Text():
            charset = "".join(space.character_list)
            limits = {"min_length": space.min_length, "max_length": space.max_length}
            return {"type": "Text", **limits, "charset": charset}
        case spaces.Dict():
            wrong = [key for key in space.spaces if not isinstance(key, str)]
            if wrong:
                raise SpaceError(path, "a Dict whose keys are text", repr(wrong[0]), hint="rename the key to a str")
            members = [[key, _describe(member, f"{path}[{key!r}]")] for key, member in space.spaces.items()]
            return {"type": "Dict", "spaces": members}
        case spaces.Tuple():
            return {"type": "Tuple", "spaces": _describe_each(space.spaces, path)}
        case spaces.Sequence():
            return {"type": "Sequence", "space": _describe(space.feature_space, f"{path}[]"), "stack": space.stack}
        case spaces.Graph():
            edge = None if space.edge_space is None else _describe(space.edge_space, f"{path}.edge")
            return {"type": "Graph", "node": _describe(space.node_space, f"{path}.node"), "edge": edge}
        case spaces.OneOf():
            return {"type": "OneOf", "spaces": _describe_each(space.spaces, path)}
    raise SpaceError(path, "one of Gymnasium's spaces", f"{type(space).__module__}.{type(space).__qualname__}",
                     hint="write it as a Dict or Tuple of Box, Discrete, Text, ...")  # fmt: skip


def _dtype(space: Space[Any]) -> np.dtype[Any]:
    return np.dtype(space.dtype)


def _describe_each(members: Sequence[Space[Any]], path: str) -> list[dict[str, Plain]]:
    return [_describe(member, f"{path}[{index}]") for index, member in enumerate(members)]


def _bounds(bound: Array, path: str) -> Plain:
    """One number where the bound is the same everywhere, else nested lists; infinities spelled out."""
    if bound.dtype.kind == "c":
        raise SpaceError(path, "bounds of real numbers", "complex bounds")
    if not bound.size:
        return _spelled(np.zeros((), bound.dtype).item())
    if bool((bound == bound.flat[0]).all()):
        return _spelled(bound.flat[0].item())
    return _spelled(bound.tolist())


def _spelled(value: Any) -> Plain:
    if isinstance(value, list):
        return [_spelled(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def space_from(description: Plain) -> Space[Any]:
    """The space of a description. What comes is hostile: SpaceError names the place, before memory is taken."""
    return _space_from(description, "space", 0)


def _space_from(plain: Plain, path: str, depth: int) -> Space[Any]:
    if depth > MAX_DEPTH:
        raise SpaceError(path, f"at most {MAX_DEPTH} spaces inside one another", "more")
    if not isinstance(plain, dict):
        raise SpaceError(path, "the description of a space", _shown(plain))
    kind = plain.get("type")
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise SpaceError(f"{path}.type", f"one of {', '.join(_READERS)}", _shown(kind))
    try:
        return reader(plain, path, depth + 1)
    except (AssertionError, OverflowError, ValueError, TypeError) as error:
        if isinstance(error, SpaceError):
            raise
        raise SpaceError(path, f"a {kind} that Gymnasium takes", f"{error}"[:200]) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _field(plain: dict[str, Plain], name: str, kind: type, path: str) -> Any:
    value = plain.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SpaceError(f"{path}.{name}", f"a {kind.__name__}", _shown(value))
    return value


def _dtype_field(plain: dict[str, Plain], path: str, kinds: str = "biufc") -> np.dtype[Any]:
    name = _field(plain, "dtype", str, path)
    if name not in _DTYPES or np.dtype(name).kind not in kinds:
        raise SpaceError(f"{path}.dtype", "a dtype that fits", _shown(name))
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


def _shape_field(value: Plain, itemsize: int, path: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value):
        raise SpaceError(path, "a list of sizes", _shown(value))
    if len(value) > MAX_DEPTH or math.prod(value) * itemsize > MAX_BYTES:
        raise SpaceError(path, f"an element of at most {MAX_BYTES} bytes", _shown(value))
    return tuple(value)


def _read_box(plain: dict[str, Plain], path: str, depth: int) -> Space[Any]:
    dtype = _dtype_field(plain, path)
    shape = _shape_field(plain.get("shape"), dtype.itemsize, f"{path}.shape")
    low, high = (_read_bound(plain.get(name), dtype, shape, f"{path}.{name}") for name in ("low", "high"))
    return spaces.Box(low, high, shape, dtype.type)


def _read_bound(plain: Plain, dtype: np.dtype[Any], shape: tuple[int, ...], path: str) -> Array:
    bound = _numbers(plain, dtype, path)
    if bound.shape != () and bound.shape != shape:
        raise SpaceError(path, f"one number, or numbers of shape {shape}", f"shape {bound.shape}")
    return np.broadcast_to(bound, shape)


def _read_discrete(plain: dict[str, Plain], path: str, depth: int) -> Space[Any]:
    n, start = _field(plain, "n", int, path), _field(plain, "start", int, path)
    return spaces.Discrete(n, start=start, dtype=_dtype_field(plain, path, "iu").type)


def _read_multi_discrete(plain: dict[str, Plain], path: str, depth: int) -> Space[Any]:
    dtype = _dtype_field(plain, path, "iu")
    nvec, start = (_numbers(_field(plain, name, list, path), dtype, f"{path}.{name}") for name in ("nvec", "start"))
    return spaces.MultiDiscrete(nvec, dtype=dtype.type, start=start)


def _read_multi_binary(plain: dict[str, Plain], path: str, depth: int) -> Space[Any]:
    n = plain.get("n")
    shape = _shape_field([n] if isinstance(n, int) else n, 1, f"{path}.n")
    return spaces.MultiBinary(int(n) if isinstance(n, int) else list(shape))


def _read_text(plain: dict[str, Plain], path: str, depth: int) -> Space[Any]:
    shortest, longest = _field(plain, "min_length", int, path), _field(plain, "max_length", int, path)
    return spaces.Text(longest, min_length=shortest, charset=_field(plain, "charset", str, path))


def _read_dict(plain: dict[str, Plain], path: str, depth: int) -> Space[Any]:
    members: dict[str, Space[Any]] = {}
    for pair in _field(plain, "spaces", list, path):
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or pair[0] in members:
            raise SpaceError(f"{path}.spaces", "pairs of a key, given once, and a space", _shown(pair))
        members[pair[0]] = _space_from(pair[1], f"{path}[{pair[0]!r}]", depth)
    return spaces.Dict(members)


def _read_each(plain: dict[str, Plain], path: str, depth: int) -> list[Space[Any]]:
    members = _field(plain, "spaces", list, path)
    return [_space_from(member, f"{path}[{index}]", depth) for index, member in enumerate(members)]


def _read_sequence(plain: dict[str, Plain], path: str, depth: int) -> Space[Any]:
    return spaces.Sequence(
        _space_from(plain.get("space"), f"{path}[]", depth), stack=_field(plain, "stack", bool, path)
    )


def _read_graph(plain: dict[str, Plain], path: str, depth: int) -> Space[Any]:
    node, edge = _space_from(plain.get("node"), f"{path}.node", depth), plain.get("edge")
    return spaces.Graph(node, None if edge is None else _space_from(edge, f"{path}.edge", depth))  # type: ignore[arg-type]  # Gymnasium itself demands Box or Discrete


_READERS: Final[dict[str, Callable[[dict[str, Plain], str, int], Space[Any]]]] = {
    "Box": _read_box,
    "Discrete": _read_discrete,
    "MultiDiscrete": _read_multi_discrete,
    "MultiBinary": _read_multi_binary,
    "Text": _read_text,
    "Dict": _read_dict,
    "Tuple": lambda plain, path, depth: spaces.Tuple(_read_each(plain, path, depth)),
    "Sequence": _read_sequence,
    "Graph": _read_graph,
    "OneOf": lambda plain, path, depth: spaces.OneOf(_read_each(plain, path, depth)),
}


def _schema() -> dict[str, Plain]:
    """The JSON schema of a description."""
    space = {"$ref": "#/$defs/space"}
    integers = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    number = {"anyOf": [{"type": "number"}, {"type": "boolean"}, {"enum": ["Infinity", "-Infinity"]}]}
    numbers = {"anyOf": [number, {"type": "array", "items": {"$ref": "#/$defs/numbers"}}]}
    dtype = {"enum": sorted(_DTYPES)}
    nested = {"$ref": "#/$defs/numbers"}
    kinds: dict[str, dict[str, Plain]] = {
        "Box": {"dtype": dtype, "shape": integers, "low": nested, "high": nested},
        "Discrete": {"n": {"type": "integer", "minimum": 1}, "start": {"type": "integer"}, "dtype": dtype},
        "MultiDiscrete": {"nvec": nested, "start": nested, "dtype": dtype},
        "MultiBinary": {"n": {"anyOf": [{"type": "integer", "minimum": 1}, integers]}},
        "Text": {"min_length": {"type": "integer"}, "max_length": {"type": "integer"}, "charset": {"type": "string"}},
        "Dict": {"spaces": {"type": "array", "items": {"prefixItems": [{"type": "string"}, space], "minItems": 2}}},
        "Tuple": {"spaces": {"type": "array", "items": space}},
        "Sequence": {"space": space, "stack": {"type": "boolean"}},
        "Graph": {"node": space, "edge": {"anyOf": [{"type": "null"}, space]}},
        "OneOf": {"spaces": {"type": "array", "items": space, "minItems": 1}},
    }
    forms = [
        {"type": "object", "properties": {"type": {"const": kind}, **fields}, "required": ["type", *fields],
         "additionalProperties": False}
        for kind, fields in kinds.items()
    ]  # fmt: skip
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A Gymnasium space, version {SCHEMA_VERSION}",
        **space,
        "$defs": {"space": {"oneOf": forms}, "numbers": numbers},
    }


SCHEMA: Final = _schema()

# ------------------------------------------------------------------------------------------------- checking a value


def check(space: Space[Any], value: Any, path: str = "action") -> None:
    """Raise SpaceError, naming the element, what was expected and what was met, unless `value` belongs to `space`.

    Numbers of another dtype pass where NumPy casts them within their kind and they lie inside the bounds.
    """
    checker = _CHECKERS.get(type(space))
    if checker is not None:
        checker(space, value, path)
    elif value not in space:
        raise SpaceError(path, str(space), _shown(value))


def _check_discrete(space: Any, value: Any, path: str) -> None:
    kind = type(value)
    if (
        kind is int
        or isinstance(value, np.integer)
        or (kind is np.ndarray and value.shape == () and value.dtype.kind in "iu")
        or (isinstance(value, int) and kind is not bool)
    ):
        number = int(value)
    else:
        raise SpaceError(path, f"an integer from {space.start} to {space.start + space.n - 1}", _shown(value))
    if not 0 <= number - int(space.start) < int(space.n):
        raise SpaceError(path, f"an integer from {space.start} to {space.start + space.n - 1}", _shown(value))


def _check_box(space: Any, value: Any, path: str) -> None:
    array = _cast(space, value, path)
    if bool((array >= space.low).all()) and bool((array <= space.high).all()):
        return
    inside = (array >= space.low) & (array <= space.high)  # False for NaN
    index = tuple(int(axis[0]) for axis in np.nonzero(~inside)) if array.shape else ()
    at = path + "".join(f"[{axis}]" for axis in index)
    raise SpaceError(at, f"a number from {space.low[index]} to {space.high[index]}", _shown(array[index].item()))


def _check_multi_discrete(space: Any, value: Any, path: str) -> None:
    array = _cast(space, value, path)
    inside = (array >= space.start) & (array < space.start + space.nvec)
    if not inside.all():
        index = tuple(int(axis[0]) for axis in np.nonzero(~inside))
        at = path + "".join(f"[{axis}]" for axis in index)
        first = space.start[index]
        raise SpaceError(at, f"an integer from {first} to {first + space.nvec[index] - 1}", _shown(array[index].item()))


def _check_multi_binary(space: Any, value: Any, path: str) -> None:
    array = _cast(space, value, path)
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        index = tuple(int(axis[0]) for axis in np.nonzero(wrong))
        raise SpaceError(path + "".join(f"[{axis}]" for axis in index), "0 or 1", _shown(array[index].item()))


def _check_text(space: Any, value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise SpaceError(path, "text", _shown(value))
    if not space.min_length <= len(value) <= space.max_length:
        raise SpaceError(path, f"{space.min_length} to {space.max_length} characters", f"{len(value)} characters")
    for index, character in enumerate(value):
        if character not in space.character_set:
            raise SpaceError(f"{path}[{index}]", "a character of the space's charset", repr(character))


def _check_dict(space: Any, value: Any, path: str) -> None:
    if not isinstance(value, dict) or value.keys() != space.spaces.keys():
        met = f"the keys {list(value)}" if isinstance(value, dict) else _shown(value)
        raise SpaceError(path, f"a dict with the keys {list(space.spaces)}", met)
    for key, member in space.spaces.items():
        check(member, value[key], f"{path}[{key!r}]")


def _check_tuple(space: Any, value: Any, path: str) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != len(space.spaces):
        raise SpaceError(path, f"a tuple of {len(space.spaces)}", _shown(value))
    for index, member in enumerate(space.spaces):
        check(member, value[index], f"{path}[{index}]")


def _check_sequence(space: Any, value: Any, path: str) -> None:
    if space.stack:
        for index, item in enumerate(_stacked_items(space, value, path)):
            check(space.feature_space, item, f"{path}[{index}]")
        return
    if not isinstance(value, (tuple, list)):
        raise SpaceError(path, "a tuple", _shown(value))
    for index, item in enumerate(value):
        check(space.feature_space, item, f"{path}[{index}]")


def _check_graph(space: Any, value: Any, path: str) -> None:
    if not isinstance(value, GraphInstance) or not isinstance(value.nodes, np.ndarray):
        raise SpaceError(path, "a GraphInstance", _shown(value))
    for index, node in enumerate(value.nodes):
        check(space.node_space, node, f"{path}.nodes[{index}]")
    if (value.edges is None) != (value.edge_links is None):
        raise SpaceError(path, "both edges and edge_links, or neither", _shown(value))
    if value.edges is None:
        return
    links = np.asarray(value.edge_links)
    if space.edge_space is None or links.dtype.kind not in "iu" or links.shape != (len(value.edges), 2):
        raise SpaceError(f"{path}.edge_links", f"integers of shape ({len(value.edges)}, 2)", _shown(value.edge_links))
    if links.size and not (links.min() >= 0 and links.max() < len(value.nodes)):
        raise SpaceError(
            f"{path}.edge_links", f"nodes from 0 to {len(value.nodes) - 1}", f"{links.min()} to {links.max()}"
        )
    for index, edge in enumerate(value.edges):
        check(space.edge_space, edge, f"{path}.edges[{index}]")


def _check_one_of(space: Any, value: Any, path: str) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise SpaceError(path, "a tuple of an index and an element", _shown(value))
    index, element = value
    if not isinstance(index, (int, np.integer)) or not 0 <= index < len(space.spaces):
        raise SpaceError(f"{path}[0]", f"an index from 0 to {len(space.spaces) - 1}", _shown(index))
    check(space.spaces[int(index)], element, f"{path}[1]")


_CHECKERS: Final[dict[type, Callable[[Any, Any, str], None]]] = {
    spaces.Discrete: _check_discrete,
    spaces.Box: _check_box,
    spaces.MultiDiscrete: _check_multi_discrete,
    spaces.MultiBinary: _check_multi_binary,
    spaces.Text: _check_text,
    spaces.Dict: _check_dict,
    spaces.Tuple: _check_tuple,
    spaces.Sequence: _check_sequence,
    spaces.Graph: _check_graph,
    spaces.OneOf: _check_one_of,
}


def _cast(space: Any, value: Any, path: str) -> Array:
    """The value as an array of the space's dtype and shape, where that loses nothing but precision."""
    dtype = space.dtype
    if type(value) is np.ndarray and value.dtype == dtype and value.shape == space.shape:
        return value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise SpaceError(path, f"{dtype.name} of shape {space.shape}", f"{error}"[:100]) from None
    return _to_dtype(_demand_shape(array, space.shape, value, dtype, path), dtype, value, path)


def _demand_shape(array: Array, shape: tuple[int, ...], value: Any, dtype: np.dtype[Any], path: str) -> Array:
    if array.shape != shape:
        met = f"shape {array.shape}" if array.dtype.kind in "biufc" else _shown(value)
        raise SpaceError(path, f"{dtype.name} of shape {shape}", met)
    return array


def _to_dtype(array: Array, dtype: np.dtype[Any], value: Any, path: str) -> Array:
    if array.dtype == dtype:
        return array
    if array.dtype.kind in "iu" and dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        if limits.min <= int(array.min()) and int(array.max()) <= limits.max:
            return array.astype(dtype)
    elif array.dtype.kind in "biufc" and (array.size == 0 or np.can_cast(array.dtype, dtype, "same_kind")):
        return array.astype(dtype)
    raise SpaceError(path, f"numbers that fit {dtype.name}", _shown(value))


# ------------------------------------------------------------------------------------------------------------ columns


@dataclass(frozen=True)
class Column:
    """One leaf of fixed size: raw little-endian elements, in C order, one environment after the other."""

    path: str
    keys: tuple[Key, ...]
    dtype: np.dtype[Any]  # little-endian
    shape: tuple[int, ...]
    nbytes: int  # of one element
    space: Space[Any]

    @property
    def count(self) -> int:
        """Numbers in one element."""
        return math.prod(self.shape)


_PADDING: Final = tuple(bytes(-length % 8) for length in range(8))
_INT64: Final = struct.Struct("<q")
_NATIVE: Final = sys.byteorder == "little"
_VIEW_BYTES: Final = 4096  # from here on a region is handed on as a view of its array


class Layout:
    """How elements of one space travel: fixed leaves as columns, each from a multiple of 8; else plain values."""

    def __init__(self, space: Space[Any], *, loose_only: bool = False) -> None:
        self.space = space
        columns: list[Column] = []
        loose: list[tuple[str, tuple[Key, ...], Space[Any]]] = []
        if loose_only:
            loose.append(("", (), space))
        else:
            for path, keys, leaf in _walk(space, "", ()):
                if isinstance(leaf, _FIXED):
                    dtype = _dtype(leaf).newbyteorder("<")
                    shape = tuple(leaf.shape or ())
                    columns.append(Column(path, keys, dtype, shape, math.prod(shape) * dtype.itemsize, leaf))
                else:
                    loose.append((path, keys, leaf))
        self.columns = tuple(columns)
        self.loose = tuple((path, leaf) for path, _, leaf in loose)
        self._loose = loose
        self._nested = isinstance(space, (spaces.Dict, spaces.Tuple)) and not loose_only
        self._single = columns[0] if len(columns) == 1 and not loose and not self._nested else None
        self._int64 = self._single is not None and isinstance(space, spaces.Discrete) and space.dtype == np.int64
        self._flat = columns[0].shape[0] if self._single is not None and len(columns[0].shape) == 1 and _NATIVE else 0
        self._scalars = [column for column in columns if isinstance(column.space, spaces.Discrete)]

    def describe(self) -> list[dict[str, Plain]]:
        """The columns as plain data: path, dtype, shape."""
        return [{"path": c.path, "dtype": c.dtype.str, "shape": list(c.shape)} for c in self.columns]

    def nbytes(self, n: int) -> int:
        """Bytes of the region that `n` elements take."""
        return sum((n * column.nbytes + 7) & ~7 for column in self.columns)

    # -- packing

    def pack(self, values: Sequence[Any]) -> tuple[Buffer, list[list[Plain]] | None]:
        """The region of `values`, and the plain values of the loose leaves, as [leaf][element]."""
        single = self._single
        if single is not None and len(values) == 1:
            return self._pack_one(single, values[0]), None
        parts = [_padded(_stack(column, [_at(v, column.keys, column.path) for v in values])) for column in self.columns]
        loose = [[to_plain(leaf, _at(v, keys, path)) for v in values] for path, keys, leaf in self._loose]
        return parts[0] if len(parts) == 1 else b"".join(parts), loose or None

    def parts(self, values: Sequence[Any]) -> tuple[list[Buffer], list[list[Plain]] | None]:
        """What `pack` gives, as pieces that follow one another: large elements are not copied together first."""
        single = self._single
        if single is not None and single.nbytes >= _VIEW_BYTES and not single.nbytes & 7:
            dtype, shape = single.dtype, single.shape
            if all(
                type(v) is np.ndarray and v.dtype == dtype and v.shape == shape and v.flags.c_contiguous for v in values
            ):
                return [value.data for value in values], None
        region, loose = self.pack(values)
        return [region], loose

    def _pack_one(self, column: Column, value: Any) -> Buffer:
        if self._int64:
            kind = type(value)
            if kind is int or kind is np.int64:
                try:
                    return _INT64.pack(value)
                except struct.error:
                    raise SpaceError("value", "an integer of 64 bits", _shown(value)) from None
        elif type(value) is np.ndarray and value.dtype == column.dtype and value.shape == column.shape:
            return _padded(value)
        return _padded(_stack(column, [value]))

    def pack_batch(self, batched: Any, n: int) -> tuple[Buffer, list[list[Plain]] | None]:
        """The same for `n` elements batched as Gymnasium's vector environments batch them."""
        parts = []
        for column in self.columns:
            array = np.asarray(_at(batched, column.keys, column.path))
            path = f"value{column.path}"
            _demand_shape(array, (n, *column.shape), array, column.dtype, path)
            parts.append(_padded(_to_dtype(array, column.dtype, array, path)))
        loose = []
        for path, keys, leaf in self._loose:
            each = iterate(leaf, _at(batched, keys, path), n)
            loose.append([to_plain(leaf, value) for value in each])
        return parts[0] if len(parts) == 1 else b"".join(parts), loose or None

    # -- unpacking

    def unpack_one(self, region: Buffer, offset: int, loose: Plain) -> Any:
        """The one element of a region that begins at `offset`. Arrays are views: writable where the region is."""
        column = self._single
        if column is None:
            return self.unpack_each(region, offset, 1, loose)[0]
        if self._int64:
            try:
                return np.int64(_INT64.unpack_from(region, offset)[0])
            except struct.error:
                raise SpaceError("message", "8 bytes of a number", f"{len(region) - offset} bytes") from None
        if self._flat:
            try:
                return np.frombuffer(region, column.dtype, self._flat, offset)
            except ValueError:
                pass  # too short: the long way says how
        array = _view(column, region, offset, 1)
        return array[0] if column.shape else _dtype(column.space).type(array[0]) if self._scalars else array.reshape(())

    def unpack_each(self, region: Buffer, offset: int, n: int, loose: Plain) -> list[Any]:
        """The `n` elements of a region, one by one."""
        if self._single is not None:
            return _elements(self._single.space, _view(self._single, region, offset, n), n)
        return iterate(self.space, self.unpack_batch(region, offset, n, loose), n)

    def unpack_batch(self, region: Buffer, offset: int, n: int, loose: Plain) -> Any:
        """The `n` elements of a region, batched as Gymnasium's vector environments batch them."""
        if self._single is not None:
            return _view(self._single, region, offset, n)
        found: dict[tuple[Key, ...], Any] = {}
        for column in self.columns:
            found[column.keys] = _view(column, region, offset, n)
            offset += (n * column.nbytes + 7) & ~7
        given = loose if isinstance(loose, list) else []
        if len(given) != len(self._loose) or any(not isinstance(leaf, list) or len(leaf) != n for leaf in given):
            raise SpaceError("message", f"{len(self._loose)} lists of {n} plain values", _shown(loose))
        for (path, keys, leaf), values in zip(self._loose, given, strict=True):
            found[keys] = tuple(_from_plain(leaf, value, f"message{path}") for value in values)
        return _build(self.space, (), found) if self._nested else found[()]


_FIXED = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def _walk(space: Space[Any], path: str, keys: tuple[Key, ...]) -> Iterator[tuple[str, tuple[Key, ...], Space[Any]]]:
    if isinstance(space, spaces.Dict):
        for key, member in space.spaces.items():
            yield from _walk(member, f"{path}[{key!r}]", (*keys, key))
    elif isinstance(space, spaces.Tuple):
        for index, member in enumerate(space.spaces):
            yield from _walk(member, f"{path}[{index}]", (*keys, index))
    else:
        yield path, keys, space


def _at(value: Any, keys: tuple[Key, ...], path: str) -> Any:
    try:
        for key in keys:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        raise SpaceError(f"value{path}", "an element here", "nothing") from None
    return value


def _build(space: Space[Any], keys: tuple[Key, ...], found: dict[tuple[Key, ...], Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _build(member, (*keys, key), found) for key, member in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_build(member, (*keys, index), found) for index, member in enumerate(space.spaces))
    return found[keys]


def _stack(column: Column, values: list[Any]) -> Array:
    """`[N, *shape]` of the column's dtype."""
    path = f"value{column.path}"
    if isinstance(column.space, spaces.Discrete):
        wrong = [v for v in values if isinstance(v, (float, np.floating, bool, str)) or v is None]
        if wrong:
            raise SpaceError(path, "an integer", _shown(wrong[0]))
    try:
        array = np.asarray(values)
    except (ValueError, TypeError):
        shapes = {np.shape(value) for value in values}
        raise SpaceError(path, f"{column.dtype.name} of shape {column.shape}", f"shapes {shapes}"[:120]) from None
    _demand_shape(array, (len(values), *column.shape), values[0] if values else values, column.dtype, path)
    return _to_dtype(array, column.dtype, values, path)


def _padded(array: Array) -> Buffer:
    """The array's bytes, up to a multiple of 8."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    if array.nbytes >= _VIEW_BYTES and not array.nbytes & 7 and array.flags.c_contiguous:
        return memoryview(array.view(np.uint8).reshape(-1).data) if array.ndim else array.tobytes()
    raw = array.tobytes()
    length = len(raw) & 7
    return raw + _PADDING[length] if length else raw


def _view(column: Column, region: Buffer, offset: int, n: int) -> Array:
    count = n * column.count
    if count == 0:
        return np.empty((n, *column.shape), column.space.dtype)
    try:
        array = np.frombuffer(region, column.dtype, count, offset)
    except ValueError:
        room = len(region) - offset
        raise SpaceError(
            "message", f"{count * column.dtype.itemsize} bytes of {column.path or 'a column'}", f"{room}"
        ) from None
    if column.dtype != column.space.dtype:  # on a big-endian machine
        array = array.astype(column.space.dtype)
    return array.reshape((n, *column.shape))


def _elements(space: Space[Any], array: Any, n: int) -> list[Any]:
    if isinstance(space, spaces.Box) and not space.shape:
        return [np.asarray(array[index]) for index in range(n)]
    return list(array)


def iterate(space: Space[Any], batched: Any, n: int) -> list[Any]:
    """The `n` elements of a batch."""
    if isinstance(space, spaces.Dict):
        columns = {key: iterate(member, batched[key], n) for key, member in space.spaces.items()}
        return [{key: column[index] for key, column in columns.items()} for index in range(n)]
    if isinstance(space, spaces.Tuple):
        each = [iterate(member, batched[index], n) for index, member in enumerate(space.spaces)]
        return [tuple(column[row] for column in each) for row in range(n)]
    if isinstance(batched, np.ndarray):
        return _elements(space, batched, n)
    return [batched[index] for index in range(n)]


def take(space: Space[Any], batched: Any, rows: Any) -> Any:
    """The batch of some rows of a batch."""
    if isinstance(space, spaces.Dict):
        return {key: take(member, batched[key], rows) for key, member in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(take(member, batched[index], rows) for index, member in enumerate(space.spaces))
    if isinstance(space, _FIXED):
        return np.asarray(batched)[rows]
    return tuple(batched[int(row)] for row in rows)


def concatenate_batches(space: Space[Any], batches: Sequence[tuple[Any, int]]) -> Any:
    """One batch of several, each given with its length."""
    if isinstance(space, spaces.Dict):
        return {
            key: concatenate_batches(member, [(batch[key], n) for batch, n in batches])
            for key, member in space.spaces.items()
        }
    if isinstance(space, spaces.Tuple):
        return tuple(
            concatenate_batches(member, [(batch[index], n) for batch, n in batches])
            for index, member in enumerate(space.spaces)
        )
    if isinstance(space, _FIXED):
        return np.concatenate([batch for batch, _ in batches])
    return tuple(value for batch, _ in batches for value in batch)


# -------------------------------------------------------------------------------------------------------- plain values


def to_plain(space: Space[Any], value: Any, *, arrays: str = "array") -> Plain:
    """An element as a plain value. arrays: "array" keeps NumPy arrays, "list" and "base64" are fit for JSON."""
    return _to_plain(space, value, arrays, "value")


def _to_plain(space: Space[Any], value: Any, arrays: str, path: str) -> Plain:
    match space:
        case spaces.Discrete():
            if isinstance(value, (bool, float, np.floating, str)) or np.shape(value) != ():
                raise SpaceError(path, "an integer", _shown(value))
            return int(value)
        case spaces.Box() | spaces.MultiDiscrete() | spaces.MultiBinary():
            return _plain_array(_cast(space, value, path), arrays)
        case spaces.Text():
            if not isinstance(value, str):
                raise SpaceError(path, "text", _shown(value))
            return str(value)
        case spaces.Dict():
            return {
                key: _to_plain(member, _at(value, (key,), path), arrays, f"{path}[{key!r}]")
                for key, member in space.spaces.items()
            }
        case spaces.Tuple():
            return [
                _to_plain(member, _at(value, (index,), path), arrays, f"{path}[{index}]")
                for index, member in enumerate(space.spaces)
            ]
        case spaces.Sequence():
            items = _stacked_items(space, value, path) if space.stack else value
            if not isinstance(items, (tuple, list)):
                raise SpaceError(path, "a tuple", _shown(value))
            return [_to_plain(space.feature_space, item, arrays, f"{path}[{i}]") for i, item in enumerate(items)]
        case spaces.Graph():
            if not isinstance(value, GraphInstance):
                raise SpaceError(path, "a GraphInstance", _shown(value))
            return {
                name: None if array is None else _plain_array(np.asarray(array), arrays)
                for name, array in value._asdict().items()
            }
        case spaces.OneOf():
            _check_one_of_index(space, value, path)
            return [int(value[0]), _to_plain(space.spaces[int(value[0])], value[1], arrays, f"{path}[1]")]
    raise SpaceError(path, "an element of one of Gymnasium's spaces", str(space))


def _check_one_of_index(space: spaces.OneOf, value: Any, path: str) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise SpaceError(path, "an index and an element", _shown(value))
    if not isinstance(value[0], (int, np.integer)) or not 0 <= value[0] < len(space.spaces):
        raise SpaceError(f"{path}[0]", f"an index from 0 to {len(space.spaces) - 1}", _shown(value[0]))


def _stacked_items(space: spaces.Sequence, value: Any, path: str) -> list[Any]:
    """The items of a stacked sequence: its length is that of any of its leaves."""
    leaf = value
    while isinstance(leaf, (dict, tuple)) and leaf:
        leaf = next(iter(leaf.values())) if isinstance(leaf, dict) else leaf[0]
        if isinstance(leaf, (int, str)):
            break
    try:
        return iterate(space.feature_space, value, len(leaf))
    except (TypeError, KeyError, IndexError):
        raise SpaceError(path, "a stacked sequence", _shown(value)) from None


def _plain_array(array: Array, arrays: str) -> Plain:
    if arrays == "array":
        return array
    if arrays == "base64":
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        text = base64.b64encode(little.tobytes()).decode()
        return {"dtype": little.dtype.str, "shape": list(array.shape), "base64": text}
    return _spelled(array.tolist())


def from_plain(space: Space[Any], plain: Plain, path: str = "action") -> Any:
    """The element that a plain value stands for, in any of its forms. Raises SpaceError naming the place."""
    return _from_plain(space, plain, path)


def _from_plain(space: Space[Any], plain: Plain, path: str) -> Any:
    match space:
        case spaces.Discrete():
            if isinstance(plain, bool) or not isinstance(plain, (int, np.integer)):
                raise SpaceError(path, "an integer", _shown(plain))
            try:
                return _dtype(space).type(plain)
            except OverflowError:
                raise SpaceError(path, f"an integer of {_dtype(space).name}", _shown(plain)) from None
        case spaces.Box() | spaces.MultiDiscrete() | spaces.MultiBinary():
            array = _numbers(plain, np.dtype(space.dtype), path)
            shape = tuple(space.shape or ())
            if array.size == 0 and math.prod(shape) == 0:
                return np.empty(shape, _dtype(space))  # nested lists do not say more than that they are empty
            return _demand_shape(array, shape, plain, array.dtype, path)
        case spaces.Text():
            if not isinstance(plain, str):
                raise SpaceError(path, "text", _shown(plain))
            return plain
        case spaces.Dict():
            if not isinstance(plain, dict) or plain.keys() != space.spaces.keys():
                raise SpaceError(path, f"an object with the keys {list(space.spaces)}", _shown(plain))
            return {k: _from_plain(member, plain[k], f"{path}[{k!r}]") for k, member in space.spaces.items()}
        case spaces.Tuple():
            if not isinstance(plain, (list, tuple)) or len(plain) != len(space.spaces):
                raise SpaceError(path, f"a list of {len(space.spaces)}", _shown(plain))
            return tuple(_from_plain(m, plain[i], f"{path}[{i}]") for i, m in enumerate(space.spaces))
        case spaces.Sequence():
            if not isinstance(plain, (list, tuple)):
                raise SpaceError(path, "a list", _shown(plain))
            feature = space.feature_space
            items = [_from_plain(feature, item, f"{path}[{i}]") for i, item in enumerate(plain)]
            if not space.stack:
                return tuple(items)
            empty = create_empty_array(feature, len(items))
            return concatenate(feature, items, empty) if items else empty
        case spaces.Graph():
            return _graph_from(space, plain, path)
        case spaces.OneOf():
            _check_one_of_index(space, plain, path)
            return np.int64(plain[0]), _from_plain(space.spaces[int(plain[0])], plain[1], f"{path}[1]")
    raise SpaceError(path, "an element of one of Gymnasium's spaces", str(space))


def _graph_from(space: spaces.Graph, plain: Plain, path: str) -> GraphInstance:
    if not isinstance(plain, dict) or not plain.keys() <= {"nodes", "edges", "edge_links"}:
        raise SpaceError(path, "an object with nodes, edges and edge_links", _shown(plain))
    nodes = _graph_array(space.node_space, plain.get("nodes"), f"{path}.nodes")
    if plain.get("edges") is None or space.edge_space is None:
        return GraphInstance(nodes, None, None)
    edges = _graph_array(space.edge_space, plain["edges"], f"{path}.edges")
    given = plain.get("edge_links")
    dtype = given.dtype if isinstance(given, np.ndarray) and given.dtype.kind in "iu" else np.dtype(np.int32)
    links = _numbers(given, dtype, f"{path}.edge_links")
    return GraphInstance(nodes, edges, links.reshape(-1, 2) if links.size == 0 else links)


def _graph_array(space: Space[Any], plain: Plain, path: str) -> Array:
    """`[K, *shape]`: as many elements of `space` as came."""
    array = _numbers(plain, np.dtype(space.dtype), path)
    shape = tuple(space.shape or ())
    if array.shape[1:] != shape and not (array.size == 0 and array.ndim == 1):
        raise SpaceError(path, f"numbers of shape (K, {', '.join(map(str, shape))})", f"shape {array.shape}")
    return array if array.shape[1:] == shape else array.reshape((0, *shape))


def _numbers(plain: Plain, dtype: np.dtype[Any], path: str) -> Array:
    """An array from any of the forms of one: an array, nested lists with spelled infinities, base64."""
    if isinstance(plain, dict):
        array = _from_base64(plain, path)
    elif isinstance(plain, np.ndarray):
        array = plain
    else:
        try:
            array = np.array(plain, dtype=dtype) if dtype.kind in "fc" and _has_text(plain) else np.array(plain)
            if isinstance(plain, (list, int)) and array.dtype.kind in "fO" and dtype.kind in "iu":
                array = _integers(plain, dtype, array)  # NumPy makes floats of large unsigned integers
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise SpaceError(path, f"numbers of {dtype.name}", _shown(plain)) from None
    if array.size == 0 and array.dtype != dtype:
        return np.empty(array.shape, dtype)
    return _to_dtype(array, dtype, plain, path)


def _integers(plain: Plain, dtype: np.dtype[Any], array: Array) -> Array:
    exact = np.array(plain, dtype=object)
    if all(isinstance(item, int) and not isinstance(item, bool) for item in exact.ravel()):
        return exact.astype(dtype)
    return array


def _has_text(plain: Plain) -> bool:
    return isinstance(plain, str) if not isinstance(plain, list) else any(_has_text(item) for item in plain)


def _from_base64(plain: dict[str, Plain], path: str) -> Array:
    try:
        dtype = np.dtype(str(plain["dtype"]))
        raw = base64.b64decode(plain["base64"], validate=True)
        shape = _shape_field(plain["shape"], max(dtype.itemsize, 1), f"{path}.shape")
        if dtype.kind not in "biufc" or math.prod(shape) * dtype.itemsize != len(raw):
            raise ValueError(f"{len(raw)} bytes for shape {shape} of {dtype}")
        return np.frombuffer(raw, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    except (KeyError, TypeError, ValueError, SyntaxError, binascii.Error) as error:
        if isinstance(error, SpaceError):
            raise
        raise SpaceError(path, 'an array as {"dtype", "shape", "base64"}', f"{error}"[:100]) from None


# ------------------------------------------------------------------------------------------------------------- scalars

_LETTERS: Final[dict[type, str]] = {
    int: "I", float: "F", bool: "B", np.ndarray: "A",
    np.int8: "a", np.int16: "b", np.int32: "c", np.int64: "d",
    np.uint8: "e", np.uint16: "f", np.uint32: "g", np.uint64: "h",
    np.float16: "i", np.float32: "j", np.float64: "k", np.bool_: "l",
}  # fmt: skip
_TYPES: Final[dict[str, Callable[[Any], Any]]] = {letter: kind for kind, letter in _LETTERS.items()} | {"A": np.asarray}


def scalar_types(layout: Layout, value: Any) -> str | None:
    """A letter for each Discrete column of one element; None when all have the space's own type."""
    if not layout._scalars:
        return None
    letters = ""
    for column in layout._scalars:
        kind = type(_at(value, column.keys, column.path))
        letters += "-" if kind is _dtype(column.space).type else _LETTERS.get(kind, "-")
    return None if letters.strip("-") == "" else letters


def restore_scalars(layout: Layout, value: Any, letters: str) -> Any:
    """The element with its scalars in the types that the letters say."""
    wanted = {column.keys: letter for column, letter in zip(layout._scalars, letters, strict=False) if letter in _TYPES}

    def restored(part: Any, keys: tuple[Key, ...]) -> Any:
        if isinstance(part, dict):
            return {key: restored(item, (*keys, key)) for key, item in part.items()}
        if isinstance(part, tuple):
            return tuple(restored(item, (*keys, index)) for index, item in enumerate(part))
        return _TYPES[wanted[keys]](part) if keys in wanted else part

    return restored(value, ())


def scalar_letter(value: Any) -> str:
    """The letter of a reward's type; "" for a float, and for what has no letter and arrives as a float."""
    return "" if type(value) is float else _LETTERS.get(type(value), "")


def scalar_as(value: float, letter: str) -> Any:
    """A reward in the type that the letter says."""
    kind = _TYPES.get(letter)
    return value if kind is None else kind(value)
