"""Values as the JSON that older systems write and read. It knows spaces and JSON; no message, no socket.

An infinity is written 1e999: that is JSON, and readers of JSON in Python, JavaScript and Java take it for an infinity.
NaN, for which JSON has nothing, becomes null.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

import gymnasium
import msgspec
import numpy as np

from longrein.errors import RemoteProtocolError
from longrein.link import codec, spaces

_INFINITY: Final = "\x00longrein-infinity"  # no text of an environment looks like this
_MINUS: Final = "\x00longrein-minus-infinity"


def _default(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        return value.tolist()
    return codec.jsonable(value)


_SPACED: Final = json.JSONEncoder(default=_default, allow_nan=False)
_COMPACT: Final = json.JSONEncoder(default=_default, allow_nan=False, separators=(",", ":"))


def dumps(value: Any, *, compact: bool = False) -> str:
    """The text of a plain value that may hold arrays, with Python's own spacing or, `compact`, with none."""
    encoder = _COMPACT if compact else _SPACED
    try:
        return encoder.encode(value)
    except (ValueError, TypeError):  # a number that JSON has not, or a key that is no text
        text = encoder.encode(_spelled(value))
        return text.replace(encoder.encode(_INFINITY), "1e999").replace(encoder.encode(_MINUS), "-1e999")


def observation_text(space: gymnasium.Space[Any], value: Any) -> str:
    """The JSON of an observation, with Python's own spacing: the repr of a list of finite numbers is that already."""
    text = repr(value.tolist()) if type(value) is np.ndarray and value.dtype.kind in "fiu" else "n"
    return dumps(plain_of(space, value)) if "n" in text else text  # nan, inf


def _spelled(value: Any) -> Any:
    match value:
        case float() | np.floating():
            number = float(value)
            return (
                number if math.isfinite(number) else None if math.isnan(number) else _MINUS if number < 0 else _INFINITY
            )
        case np.ndarray() | np.generic():
            return _spelled(value.tolist())
        case dict():
            return {str(key): _spelled(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_spelled(item) for item in value]
        case None | bool() | int() | str():
            return value
        case _:
            return codec.jsonable(value)


def loads(text: str | bytes | bytearray, url: str) -> Any:
    """The value of a text from the other end. Raises RemoteProtocolError."""
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        shown = bytes(text[:80]) if not isinstance(text, str) else text[:80]
        raise RemoteProtocolError(f"what came is no JSON: {shown!r}: {error}", url=url) from None


def parse(text: str | bytes | bytearray) -> Any:
    """The value of a text. Python's own reader takes what strict JSON has not: NaN, Infinity, 1e999. ValueError."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return json.loads(text)


def quick(value: Any) -> bytes:
    """The bytes of a request of ours, in which no value is None; by `dumps` where a number is one that JSON has not."""
    try:
        data = msgspec.json.encode(value)
    except TypeError:
        return dumps(value).encode()
    return dumps(value).encode() if b"null" in data else data  # msgspec writes null for NaN and for infinities


def plain_of(space: gymnasium.Space[Any], value: Any) -> Any:
    """An element of a space as plain values: arrays as nested lists, tuples as lists."""
    return value.tolist() if type(value) is np.ndarray else spaces.to_plain(space, value)


def element_of(space: gymnasium.Space[Any], plain: Any) -> Any:
    """The element that plain values stand for. Numbers of an older system are kept even outside the bounds it gave."""
    if isinstance(space, gymnasium.spaces.Box):
        try:
            return np.array(plain, dtype=space.dtype).reshape(space.shape)
        except (ValueError, TypeError) as error:
            raise RemoteProtocolError(f"an observation that is no {space}: {error}") from None
    return spaces.from_plain(space, plain)


def info_of(terminated: bool, truncated: bool, info: dict[str, Any]) -> dict[str, Any]:
    """The info of an older system, which has one flag for both ends: a time limit shows as its wrapper showed it."""
    return {**info, "TimeLimit.truncated": True} if truncated and not terminated else info


def ends_of(done: Any, info: dict[str, Any]) -> tuple[bool, bool]:
    """`terminated` and `truncated` from the one flag and the info of an older system."""
    truncated = bool(done) and bool(info.get("TimeLimit.truncated", False))
    return bool(done) and not truncated, truncated
