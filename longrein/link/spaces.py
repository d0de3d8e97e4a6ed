"""What a space is on the wire: its description, its columns, its plain values. No message, no socket."""

from __future__ import annotations

import base64
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium.spaces as gs
import numpy as np
from gymnasium import Space
from gymnasium.spaces import GraphInstance
from gymnasium.vector.utils import concatenate, create_empty_array

from longrein.errors import SpaceError

Plain = Any
SCHEMA_VERSION = 1
MAX_DEPTH = 32
MAX_BYTES = 2**40


def _le(dtype):
    return dtype.newbyteorder("<")


def describe(space):
    t = type(space)
    if t is gs.Box:
        return {"type": "Box", "dtype": space.dtype.name, "shape": list(space.shape), "low": _bound(space.low), "high": _bound(space.high)}
    if t is gs.Discrete:
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": space.dtype.name}
    if t is gs.MultiDiscrete:
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist(), "dtype": space.dtype.name}
    if t is gs.MultiBinary:
        return {"type": "MultiBinary", "n": list(space.shape) if not isinstance(space.n, int) else space.n}
    if t is gs.Text:
        return {"type": "Text", "min_length": space.min_length, "max_length": space.max_length, "charset": "".join(space.character_list)}
    if t is gs.Dict:
        return {"type": "Dict", "spaces": [[k, describe(v)] for k, v in space.spaces.items()]}
    if t is gs.Tuple:
        return {"type": "Tuple", "spaces": [describe(v) for v in space.spaces]}
    if t is gs.Sequence:
        return {"type": "Sequence", "space": describe(space.feature_space), "stack": space.stack}
    if t is gs.Graph:
        return {"type": "Graph", "node": describe(space.node_space), "edge": None if space.edge_space is None else describe(space.edge_space)}
    if t is gs.OneOf:
        return {"type": "OneOf", "spaces": [describe(v) for v in space.spaces]}
    raise SpaceError("space", "a Gymnasium space", str(t))


def _bound(a):
    if a.size and (a == a.flat[0]).all():
        return _num(a.flat[0])
    return _nested(a.tolist())


def _nested(x):
    return [_nested(y) for y in x] if isinstance(x, list) else _num(x)


def _num(x):
    x = x.item() if isinstance(x, np.generic) else x
    return ("Infinity" if x > 0 else "-Infinity") if isinstance(x, float) and math.isinf(x) else x


def space_from(d):
    t = d["type"]
    if t == "Box":
        dt = np.dtype(d["dtype"])
        return gs.Box(np.broadcast_to(np.array(_un(d["low"]), dt), d["shape"]), np.broadcast_to(np.array(_un(d["high"]), dt), d["shape"]), tuple(d["shape"]), dt)
    if t == "Discrete":
        return gs.Discrete(d["n"], start=d["start"], dtype=np.dtype(d["dtype"]))
    if t == "MultiDiscrete":
        return gs.MultiDiscrete(np.array(d["nvec"]), start=np.array(d["start"]), dtype=np.dtype(d["dtype"]))
    if t == "MultiBinary":
        return gs.MultiBinary(d["n"])
    if t == "Text":
        return gs.Text(d["max_length"], min_length=d["min_length"], charset=d["charset"])
    if t == "Dict":
        return gs.Dict({k: space_from(v) for k, v in d["spaces"]})
    if t == "Tuple":
        return gs.Tuple([space_from(v) for v in d["spaces"]])
    if t == "Sequence":
        return gs.Sequence(space_from(d["space"]), stack=d["stack"])
    if t == "Graph":
        return gs.Graph(space_from(d["node"]), None if d["edge"] is None else space_from(d["edge"]))
    if t == "OneOf":
        return gs.OneOf([space_from(v) for v in d["spaces"]])


def _un(x):
    return [_un(y) for y in x] if isinstance(x, list) else float(x.replace("Infinity", "inf")) if isinstance(x, str) else x


def check(space, value, path="action"):
    if isinstance(space, gs.Discrete):
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and space.start <= value < space.start + space.n:
            return
        raise SpaceError(path, f"an integer in [{space.start}, {space.start + space.n})", repr(value))
    if isinstance(space, gs.Box):
        value = np.asarray(value)
        if value.shape == space.shape and np.can_cast(value.dtype, space.dtype, "same_kind") and (value >= space.low).all() and (value <= space.high).all():
            return
        raise SpaceError(path, str(space), repr(value))
    if value not in space:
        raise SpaceError(path, str(space), repr(value))


class Layout:
    def __init__(self, space, *, loose_only=False):
        self.space = space
        self.cols = []
        self.loose = []
        self._walk(space, "")

    def _walk(self, s, path):
        if isinstance(s, gs.Dict):
            for k, v in s.spaces.items():
                self._walk(v, path + f".{k}")
        elif isinstance(s, gs.Tuple):
            for i, v in enumerate(s.spaces):
                self._walk(v, path + f"[{i}]")
        elif isinstance(s, (gs.Box, gs.Discrete, gs.MultiDiscrete, gs.MultiBinary)):
            self.cols.append(s)
        else:
            self.loose.append((path, s))

    def pack(self, values):
        parts, loose = [], []
        self._pack(self.space, list(values), parts, loose)
        return b"".join(parts), loose or None

    def _pack(self, s, values, parts, loose):
        if isinstance(s, gs.Dict):
            for k, v in s.spaces.items():
                self._pack(v, [x[k] for x in values], parts, loose)
        elif isinstance(s, gs.Tuple):
            for i, v in enumerate(s.spaces):
                self._pack(v, [x[i] for x in values], parts, loose)
        elif isinstance(s, (gs.Box, gs.Discrete, gs.MultiDiscrete, gs.MultiBinary)):
            try:
                b = np.asarray(values, _le(s.dtype))
            except (ValueError, TypeError) as e:
                raise SpaceError("value", str(s), repr(values)[:80]) from e
            if b.shape[1:] != s.shape:
                raise SpaceError("value", str(s), repr(values)[:80])
            b = b.tobytes()
            parts.append(b + bytes(-len(b) % 8))
        else:
            loose.append([to_plain(s, v) for v in values])

    def pack_batch(self, batched, n):
        return self.pack(iterate(self.space, batched, n))

    def unpack_one(self, region, offset, loose):
        return self.unpack_each(region, offset, 1, loose)[0]

    def unpack_each(self, region, offset, n, loose):
        return iterate(self.space, self.unpack_batch(region, offset, n, loose), n)

    def unpack_batch(self, region, offset, n, loose):
        state = [offset, 0]

        def walk(s):
            if isinstance(s, gs.Dict):
                return {k: walk(v) for k, v in s.spaces.items()}
            if isinstance(s, gs.Tuple):
                return tuple(walk(v) for v in s.spaces)
            if isinstance(s, (gs.Box, gs.Discrete, gs.MultiDiscrete, gs.MultiBinary)):
                count = n * int(np.prod(s.shape or ()))
                try:
                    a = np.frombuffer(region, s.dtype, count, state[0]).reshape(n, *(s.shape or ()))
                except ValueError as e:
                    raise SpaceError("message", "more bytes", str(e)) from e
                state[0] += (a.nbytes + 7) & ~7
                return a
            if loose is None or len(loose) <= state[1]:
                raise SpaceError("message", "loose", "none")
            vs = tuple(from_plain(s, v) for v in loose[state[1]])
            state[1] += 1
            return vs

        return walk(self.space)


def iterate(space, batched, n):
    if isinstance(space, gs.Dict):
        parts = {k: iterate(v, batched[k], n) for k, v in space.spaces.items()}
        return [{k: parts[k][i] for k in parts} for i in range(n)]
    if isinstance(space, gs.Tuple):
        parts = [iterate(v, batched[j], n) for j, v in enumerate(space.spaces)]
        return [tuple(p[i] for p in parts) for i in range(n)]
    return [batched[i] for i in range(n)]


def take(space, batched, idx):
    if isinstance(space, gs.Dict):
        return {k: take(v, batched[k], idx) for k, v in space.spaces.items()}
    if isinstance(space, gs.Tuple):
        return tuple(take(v, batched[j], idx) for j, v in enumerate(space.spaces))
    return np.asarray(batched)[idx] if isinstance(batched, np.ndarray) else tuple(batched[i] for i in idx)


def concatenate_batches(space, parts):
    if isinstance(space, gs.Dict):
        return {k: concatenate_batches(v, [(b[k], n) for b, n in parts]) for k, v in space.spaces.items()}
    if isinstance(space, gs.Tuple):
        return tuple(concatenate_batches(v, [(b[j], n) for b, n in parts]) for j, v in enumerate(space.spaces))
    if isinstance(parts[0][0], np.ndarray):
        return np.concatenate([b for b, _ in parts])
    return tuple(x for b, _ in parts for x in b)


def to_plain(space, value, *, arrays="array"):
    if isinstance(space, gs.Dict):
        return {k: to_plain(v, value[k], arrays=arrays) for k, v in space.spaces.items()}
    if isinstance(space, gs.Tuple):
        return [to_plain(v, value[i], arrays=arrays) for i, v in enumerate(space.spaces)]
    if isinstance(space, gs.Sequence):
        vs = list(value) if not space.stack else iterate(space.feature_space, value, len(value))
        return [to_plain(space.feature_space, v, arrays=arrays) for v in vs]
    if isinstance(space, gs.OneOf):
        return [int(value[0]), to_plain(space.spaces[int(value[0])], value[1], arrays=arrays)]
    if isinstance(space, gs.Graph):
        f = lambda a: None if a is None else _arr(np.asarray(a), arrays)
        return {"nodes": f(value.nodes), "edges": f(value.edges), "edge_links": f(value.edge_links)}
    if isinstance(space, gs.Text):
        return str(value)
    if isinstance(space, gs.Discrete):
        return int(value)
    return _arr(np.asarray(value), arrays)


def _arr(a, arrays):
    return a if arrays == "array" else a.tolist()


def from_plain(space, p):
    if isinstance(space, gs.Dict):
        return {k: from_plain(v, p[k]) for k, v in space.spaces.items()}
    if isinstance(space, gs.Tuple):
        return tuple(from_plain(v, x) for v, x in zip(space.spaces, p))
    if isinstance(space, gs.Sequence):
        vs = [from_plain(space.feature_space, x) for x in p]
        return tuple(vs) if not space.stack else concatenate(space.feature_space, vs, create_empty_array(space.feature_space, len(vs)))
    if isinstance(space, gs.OneOf):
        return np.int64(p[0]), from_plain(space.spaces[p[0]], p[1])
    if isinstance(space, gs.Graph):
        def f(a, s):
            return None if a is None else np.asarray(a, s.dtype if s is not None else None)
        return GraphInstance(f(p["nodes"], space.node_space), f(p["edges"], space.edge_space), None if p["edge_links"] is None else np.asarray(p["edge_links"], np.int32))
    if isinstance(space, gs.Text):
        return p
    if isinstance(space, gs.Discrete):
        if not isinstance(p, (int, np.integer)):
            raise SpaceError("action", str(space), repr(p))
        return space.dtype.type(p)
    try:
        return np.asarray(p, space.dtype).reshape(space.shape)
    except (ValueError, TypeError) as e:
        raise SpaceError("action", str(space), repr(p)[:80]) from e


_L = {np.int64: "q", np.int32: "l", np.float64: "d", np.float32: "e", np.bool_: "?", int: "I", float: "F", bool: "B"}
_R = {v: k for k, v in _L.items()}


def scalar_types(layout, value):
    letters = []

    def walk(s, v):
        if isinstance(s, gs.Dict):
            [walk(x, v[k]) for k, x in s.spaces.items()]
        elif isinstance(s, gs.Tuple):
            [walk(x, v[i]) for i, x in enumerate(s.spaces)]
        elif isinstance(s, gs.Discrete):
            letters.append("" if type(v) is s.dtype.type else _L.get(type(v), ""))

    walk(layout.space, value)
    if not any(letters):
        return None
    return "".join(x or "q" for x in letters)


def restore_scalars(layout, value, letters):
    it = iter(letters)

    def walk(s, v):
        if isinstance(s, gs.Dict):
            return {k: walk(x, v[k]) for k, x in s.spaces.items()}
        if isinstance(s, gs.Tuple):
            return tuple(walk(x, v[i]) for i, x in enumerate(s.spaces))
        if isinstance(s, gs.Discrete):
            return _R[next(it)](v)
        return v

    return walk(layout.space, value)


def scalar_letter(x):
    return _L.get(type(x), "")


def scalar_as(x, letter):
    return _R[letter](x)
