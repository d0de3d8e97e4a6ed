"""Message to bytes and back, in the binary form and in the JSON twin. No space, no socket, no lease.

A binary message is

    offset 0   2 bytes   "LR"
           2   1 byte    the protocol's version, 1
           3   1 byte    0
           4   4 bytes   H, the head's length, little-endian
           8   H bytes   the head: the message's fields as one MessagePack array, its type's name first
               0-7 bytes zeros, up to a multiple of 8
               ...       the columns, raw little-endian arrays, each from a multiple of 8

and a JSON message is one object whose key "type" holds the type's name. The first byte tells them apart.

Plain values that MessagePack lacks travel as its extensions (numbers below), so that an info arrives with the types it
had: arrays, NumPy scalars, tuples, sets, large integers, complex numbers. What nobody can rebuild arrives as an
`Opaque` with its type's name and its repr. Nothing here ever runs or imports what a message names.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec.structs import replace

from longrein.errors import RemoteProtocolError, SpaceError
from longrein.link import messages as m
from longrein.link.messages import PROTOCOL_VERSION, AnyReply, AnyRequest, Plain, Reply, Request

Buffer = bytes | bytearray | memoryview

NDARRAY, SCALAR, TUPLE, BIGINT, COMPLEX, OPAQUE, SET, OBJECTS, PAIRS = range(1, 10)
"""The numbers of the MessagePack extensions."""

_PREFIX = struct.Struct("<2sBBI")
_MAGIC = b"LR"
_PADDING = tuple(b"\0" * (-length % 8) for length in range(8))
_DTYPE = re.compile(r"[<>|][biufcmMSU]\d{1,9}(\[\d{0,6}[a-zA-Z]{1,2}\])?")
_MAX_DIMS = 32


@dataclass(frozen=True)
class Opaque:
    """A value that could not cross: only its type's name and its repr did."""

    type: str
    text: str


# --------------------------------------------------------------------------------------------------- binary form


def encode(message: Request | Reply, *regions: Buffer) -> bytes:
    """The binary form: the message as the head, and regions of columns behind it, each of a multiple of 8 bytes."""
    head = _encoder.encode(message)
    length = len(head)
    if not regions:
        return _PREFIX.pack(_MAGIC, PROTOCOL_VERSION, 0, length) + head
    return b"".join((_PREFIX.pack(_MAGIC, PROTOCOL_VERSION, 0, length), head, _PADDING[length & 7], *regions))


def decode_request(data: Buffer) -> tuple[AnyRequest, int]:
    """A request in either form, and the offset at which its columns begin. Raises RemoteProtocolError."""
    return _decode(data, _request_decoder, _REQUESTS)


def decode_reply(data: Buffer) -> tuple[AnyReply, int]:
    """A reply in either form, and the offset at which its columns begin. Raises RemoteProtocolError."""
    return _decode(data, _reply_decoder, _REPLIES)


class Bare:
    """A message with nothing in its head but lease, epoch and number: most steps and most of their answers.

    Such a head never changes but for the number, which is written in MessagePack's width of four bytes: the message is
    `front`, the number as four big-endian bytes, `back` and the columns. So it is put together and recognised without a
    parser, yet it is a message like any other: whoever parses it finds the same.
    """

    __slots__ = ("at", "back", "front", "length")

    def __init__(self, message: m.Step | m.Stepped) -> None:
        whole = encode(replace(message, n=_WIDE), b" ")
        self.at = whole.index(_WIDE.to_bytes(4, "big"), 8)
        self.front = whole[: self.at]
        self.back = whole[self.at + 4 : -1]
        self.length = len(whole) - 1  # where the columns begin

    def encode(self, n: int, region: Buffer) -> bytes:
        """The message with this number and these columns."""
        return b"".join((self.front, n.to_bytes(4, "big"), self.back, region))

    def number(self, data: bytes | bytearray) -> int:
        """The number of such a message; -1 for any other."""
        at = self.at
        if data.startswith(self.front) and data.startswith(self.back, at + 4):
            return int.from_bytes(data[at : at + 4], "big")
        return -1


_WIDE = 2**32 - 1


def is_json(data: Buffer) -> bool:
    """Whether a message is of the JSON twin."""
    return len(data) > 0 and data[0] == 0x7B


Message = TypeVar("Message")


def _decode(
    data: Buffer, decoder: msgspec.msgpack.Decoder[Message], types: dict[str, type[Request | Reply]]
) -> tuple[Message, int]:
    try:
        if is_json(data):
            return _from_json(data, types), len(data)  # type: ignore[return-value]  # the table holds the union's types
        magic, version, _, length = _PREFIX.unpack_from(data)
        if magic != _MAGIC:
            raise RemoteProtocolError("these bytes are no message: they begin with neither 'LR' nor '{'")
        if version != PROTOCOL_VERSION:
            raise RemoteProtocolError(f"a message of version {version}; this end speaks version {PROTOCOL_VERSION}")
        if length > len(data) - 8:
            raise RemoteProtocolError(f"a message cut short: its head has {length} bytes, {len(data) - 8} came")
        return decoder.decode(memoryview(data)[8 : 8 + length]), 8 + (length + 7 & ~7)
    except (struct.error, msgspec.MsgspecError, UnicodeDecodeError, OverflowError, ValueError, TypeError) as error:
        raise RemoteProtocolError(f"these bytes are no message: {error}") from None
    except (RecursionError, MemoryError) as error:
        raise RemoteProtocolError(f"a message nested too deep or too large: {type(error).__name__}") from None


def pack_signals(rewards: Any, terminated: Any, truncated: Any, reward_shape: tuple[int, ...]) -> bytes:
    """The columns before the observation: rewards float64 `[N, *reward_shape]`, then the two flags, a byte each `[N]`.

    Raises SpaceError when a reward has another shape than was declared.
    """
    reward = np.array(rewards, dtype="<f8")
    if reward.shape[1:] != reward_shape:
        raise SpaceError("reward", f"shape {reward_shape}", f"shape {reward.shape[1:]}")
    n = len(reward)
    if not any(terminated) and not any(truncated):
        return reward.tobytes() + bytes(2 * n + 7 & ~7)
    flags = np.array(terminated, dtype=bool).tobytes() + np.array(truncated, dtype=bool).tobytes()
    return reward.tobytes() + flags + bytes(-len(flags) % 8)


def unpack_signals(data: Buffer, offset: int, n: int, reward_shape: tuple[int, ...]) -> tuple[Any, Any, Any, int]:
    """Rewards, terminated and truncated as views, and the offset at which the observations begin."""
    count = n * math.prod(reward_shape)
    try:
        rewards = np.frombuffer(data, "<f8", count, offset).reshape(n, *reward_shape)
        terminated = np.frombuffer(data, np.bool_, n, offset + 8 * count)
        truncated = np.frombuffer(data, np.bool_, n, offset + 8 * count + n)
    except ValueError as error:
        raise RemoteProtocolError(f"a message too short for {n} environments: {error}") from None
    return rewards, terminated, truncated, offset + 8 * count + (2 * n + 7 & ~7)


# ------------------------------------------------------------------------------------------------------ JSON twin


def encode_json(message: Request | Reply) -> bytes:
    """The JSON form. Its plain values must already be free of arrays: `jsonable` makes them so."""
    fields = {"type": type(message).__struct_config__.tag}
    defaults = _defaults(type(message))
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if value is not None or name not in defaults:
            fields[name] = value
    return json.dumps(fields, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def _defaults(type_: type[msgspec.Struct]) -> dict[str, Any]:
    found = {}
    for info in msgspec.structs.fields(type_):
        if info.default is not msgspec.NODEFAULT:
            found[info.name] = info.default
        elif info.default_factory is not msgspec.NODEFAULT:
            found[info.name] = info.default_factory()
    return found


def _from_json(data: Buffer, types: dict[str, type[Request | Reply]]) -> Request | Reply:
    fields = msgspec.json.decode(data)
    kind = fields.pop("type", None)
    if not isinstance(kind, str) or kind not in types:
        raise RemoteProtocolError(f"the key 'type' is {kind!r}; known here: {', '.join(types)}")
    type_ = types[kind]
    defaults = _defaults(type_)
    unknown = fields.keys() - set(type_.__struct_fields__)
    if unknown:
        raise RemoteProtocolError(
            f"a {kind} has no {sorted(unknown)[0]!r}; it has {', '.join(type_.__struct_fields__)}"
        )
    values = []
    for name in type_.__struct_fields__:
        if name not in fields and name not in defaults:
            raise RemoteProtocolError(f"a {kind} needs {name!r}")
        values.append(fields.get(name, defaults.get(name)))
    return msgspec.convert([kind, *values], type_)


def jsonable(value: Any, arrays: str = "list") -> Any:
    """A plain value for JSON: arrays as nested lists or base64, NaN and infinities spelled out, tuples as lists."""
    match value:
        case None | bool() | str():
            return value if type(value) in (bool, str, type(None)) else str(value)
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else _spell(float(value))
        case np.ndarray() if value.dtype != object and arrays == "base64":
            little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
            return {
                "dtype": little.dtype.str,
                "shape": list(value.shape),
                "base64": base64.b64encode(little.tobytes()).decode(),
            }
        case np.ndarray() | np.generic():
            return jsonable(value.tolist(), arrays)
        case dict():
            return {str(key): jsonable(item, arrays) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [jsonable(item, arrays) for item in value]
        case bytes():
            return {"base64": base64.b64encode(value).decode()}
        case complex():
            return [jsonable(value.real), jsonable(value.imag)]
        case Opaque():
            return {"opaque": value.type, "text": value.text}
        case _:
            return jsonable(_opaque(value))


def _spell(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


# --------------------------------------------------------------------------------------------------- plain values


def wrap(value: Any) -> Plain:
    """Make a value one that the binary form carries with its type; see `Opaque` for what cannot cross."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else msgspec.msgpack.Ext(BIGINT, hex(value).encode())
    if isinstance(value, dict):
        if all(type(key) is str for key in value):
            return {key: wrap(item) for key, item in value.items()} if value else {}
        return _nest(PAIRS, [[wrap(key), wrap(item)] for key, item in value.items()])
    if isinstance(value, list):
        return [wrap(item) for item in value]
    if isinstance(value, tuple):
        return _nest(TUPLE, [wrap(item) for item in value])
    if isinstance(value, (np.ndarray, np.generic, msgspec.msgpack.Ext)):
        return _extend(value)
    if isinstance(value, (set, frozenset)):
        return _nest(SET, [wrap(item) for item in value])
    if isinstance(value, int):
        return wrap(int(value))
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return bytes(value)
    return _extend(value)


def encode_plain(value: Any) -> bytes:
    """A plain value alone, as MessagePack."""
    return _encoder.encode(wrap(value))


def decode_plain(data: Buffer) -> Plain:
    """The other half of `encode_plain`."""
    return _plain_decoder.decode(data)


_ATOMS = {type(None), bool, float, str, bytes}


def _nest(code: int, items: list[Any]) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, _encoder.encode(items))


def _opaque(value: Any) -> Opaque:
    return Opaque(f"{type(value).__module__}.{type(value).__qualname__}", repr(value)[:1000])


def _extend(value: Any) -> msgspec.msgpack.Ext:
    """The encoder's hook: what MessagePack has no form for."""
    if isinstance(value, msgspec.msgpack.Ext):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return _nest(OBJECTS, [list(value.shape), [wrap(item) for item in value.ravel()]])
        if value.dtype.kind in "biufcmMSU":
            return msgspec.msgpack.Ext(NDARRAY, _array_bytes(value))
    if isinstance(value, np.generic) and value.dtype.kind in "biufcmMSU":
        return msgspec.msgpack.Ext(SCALAR, _array_bytes(np.asarray(value)))
    if isinstance(value, complex):
        return msgspec.msgpack.Ext(COMPLEX, struct.pack("<2d", value.real, value.imag))
    opaque = value if isinstance(value, Opaque) else _opaque(value)
    return _nest(OPAQUE, [opaque.type, opaque.text])


def _array_bytes(value: np.ndarray[Any, Any]) -> bytes:
    """1 byte: the length of the dtype's name; the name; 1 byte: dimensions; 8 bytes each; the raw elements."""
    dtype = value.dtype.newbyteorder("<")
    name = dtype.str.encode()
    head = struct.pack(f"<B{len(name)}sB{value.ndim}Q", len(name), name, value.ndim, *value.shape)
    return head + value.astype(dtype, copy=False).tobytes()


def _restore(code: int, data: memoryview) -> Any:
    """The decoder's hook. The bytes are hostile: sizes are compared before memory is taken."""
    if code in (NDARRAY, SCALAR):
        return _array_from(data, scalar=code == SCALAR)
    if code == TUPLE:
        return tuple(_items(data))
    if code == SET:
        return set(_items(data))
    if code == PAIRS:
        return dict(_items(data))
    if code == BIGINT:
        return int(bytes(data), 16)
    if code == COMPLEX:
        return complex(*struct.unpack("<2d", data))
    if code == OPAQUE:
        kind, text = _items(data)
        return Opaque(str(kind), str(text))
    if code == OBJECTS:
        shape, items = _items(data)
        if len(shape) > _MAX_DIMS or math.prod(shape) != len(items):
            raise ValueError(f"an object array of shape {shape} with {len(items)} elements")
        array = np.empty(len(items), dtype=object)
        for index, item in enumerate(items):
            array[index] = item
        return array.reshape(shape)
    raise ValueError(f"an extension of number {code}, which this version does not know")


def _array_from(data: memoryview, scalar: bool) -> Any:
    length = data[0] if data else 0
    if len(data) < 2 + length:
        raise ValueError(f"an array cut short: {len(data)} bytes")
    name = bytes(data[1 : 1 + length]).decode("ascii")
    if not _DTYPE.fullmatch(name):
        raise ValueError(f"an array of dtype {name!r}")
    dtype, dims = np.dtype(name), data[1 + length]
    if dims > _MAX_DIMS:
        raise ValueError(f"an array of {dims} dimensions")
    shape = struct.unpack_from(f"<{dims}Q", data, 2 + length)
    raw = data[2 + length + 8 * dims :]
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"an array of shape {shape} and dtype {name} with {len(raw)} bytes")
    if dtype.itemsize == 0 or not len(raw):
        return np.empty(shape, dtype.newbyteorder("="))
    array = np.frombuffer(raw, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    return array[()] if scalar else array


def _items(data: memoryview) -> list[Any]:
    return _list_decoder.decode(data)


_encoder = msgspec.msgpack.Encoder(enc_hook=_extend)
_list_decoder: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(list[Any], ext_hook=_restore)
_plain_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ext_hook=_restore)
_request_decoder: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest, ext_hook=_restore)
_reply_decoder: msgspec.msgpack.Decoder[AnyReply] = msgspec.msgpack.Decoder(AnyReply, ext_hook=_restore)
_REQUESTS: dict[str, type[Request | Reply]] = {t.__struct_config__.tag: t for t in AnyRequest.__args__}
_REPLIES: dict[str, type[Request | Reply]] = {t.__struct_config__.tag: t for t in AnyReply.__args__}
