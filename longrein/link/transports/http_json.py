"""The paths for curl and browsers: a path and a few headers are the envelope, the body is the rest of the message.

It turns such a request into a message of the JSON twin, and a Fault into a status; it knows no field of a message but
those of the envelope, the type, and a Fault's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

Buffer = bytes | bytearray | memoryview

MESSAGE_PATH: Final = "/v1/message"
"""Where whole messages go, in either form."""

KINDS: Final = ("hello", "open", "resume", "reset", "step", "render", "call", "act", "close", "ping")
"""The types of message that have a path of their own, /v1/KIND."""

PATHS: Final[dict[bytes, str]] = {MESSAGE_PATH.encode(): "", **{f"/v1/{kind}".encode(): kind for kind in KINDS}}
"""Path to type of message; "" where the body is a whole message."""

ENVELOPE: Final[dict[bytes, tuple[str, str | int]]] = {
    b"longrein-lease": ("lease", ""),
    b"longrein-epoch": ("epoch", 1),
    b"longrein-number": ("n", 0),
}
"""Header to the field that it stands for, and the field's value where neither header nor body has one."""

FAULT_STATUS: Final[dict[str, int]] = {
    "unauthenticated": 401,
    "forbidden": 403,
    "not_found": 404,
    "gap": 409,
    "stale": 409,
    "fenced": 409,
    "out_of_turn": 409,
    "reset_needed": 409,
    "lease_lost": 410,
    "too_large": 413,
    "bad_message": 422,
    "version": 422,
    "invalid_action": 422,
    "invalid_observation": 422,
    "rate_limited": 429,
    "busy": 429,
    "capacity": 503,
    "draining": 503,
    "env_timeout": 504,
}
"""A Fault's code to the status on the paths for curl; any other code is 500."""


class BadBody(ValueError):
    """The body or the envelope's headers make no message."""


class _Reply(msgspec.Struct):
    type: str = ""
    code: str = ""


_reply_decoder = msgspec.json.Decoder(_Reply)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def to_message(kind: str, body: Buffer, headers: Mapping[bytes, bytes]) -> bytes:
    """The message of the JSON twin that a request on /v1/KIND stands for. Raises BadBody.

    headers: by lower-case name. What the body says goes before what a header says; the type is the path's.
    """
    try:
        fields = _fields_decoder.decode(body) if len(body) else {}
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadBody(f"the body must be one JSON object: {error}") from None
    whole: dict[str, msgspec.Raw | str | int] = {"type": kind}
    for header, (name, default) in ENVELOPE.items():
        if name in fields:
            continue
        if header not in headers:
            whole[name] = default
        elif isinstance(default, str):
            whole[name] = headers[header].decode("latin-1")
        elif headers[header].isdigit() and len(headers[header]) < 19:
            whole[name] = int(headers[header])
        else:
            raise BadBody(f"the header {header.decode().title()} is {headers[header][:40]!r}, not a whole number")
    fields.pop("type", None)
    return msgspec.json.encode(whole | fields)


def fault(code: str, text: str) -> bytes:
    """A Fault that answers what could not become a message."""
    return msgspec.json.encode({"type": "fault", "lease": "", "n": 0, "code": code, "message": text})


def status_of(reply: Buffer) -> int:
    """The status that goes with a reply: 200, or what a Fault's code asks for."""
    try:
        head = _reply_decoder.decode(reply)
    except msgspec.MsgspecError:
        return 200  # not of the JSON twin: whoever sent it knows what it is
    return FAULT_STATUS.get(head.code, 500) if head.type == "fault" else 200
