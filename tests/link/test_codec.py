"""The two forms of a message, and the plain values in them."""

import math

import msgspec
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longrein.errors import RemoteProtocolError
from longrein.link import codec
from longrein.link import messages as m

LEASE = "l" * 22


def test_the_binary_form_is_as_documented() -> None:
    data = codec.encode(m.Step("abcdefghijklmnop", 1, 7), b"\x01" + bytes(7))
    # An array of the tag and six fields: 97; the tag: a4 "step"; the lease: b0 and 16 characters; epoch, number, nil,
    # nil, repeat: five bytes. 1 + 5 + 17 + 5 = 28 bytes, so the columns begin at 8 + 32 = 40.
    assert data[:8] == b"LR\x01\x00" + (28).to_bytes(4, "little")
    assert data[8:14] == b"\x97\xa4step"
    assert data[14:31] == b"\xb0abcdefghijklmnop"
    assert data[31:36] == bytes([1, 7, 0xC0, 0xC0, 1])
    assert data[36:40] == bytes(4)
    assert data[40:] == b"\x01" + bytes(7)
    request, offset = codec.decode_request(data)
    assert request == m.Step("abcdefghijklmnop", 1, 7)
    assert offset == 40


@pytest.mark.parametrize("length", range(16, 32))
def test_columns_begin_at_a_multiple_of_eight(length: int) -> None:
    data = codec.encode(m.Stepped("x" * length, 3), b"columns!")
    reply, offset = codec.decode_reply(data)
    assert offset % 8 == 0
    assert data[offset:] == b"columns!"
    assert reply == m.Stepped("x" * length, 3)


VALUES = [
    None, True, 0, -1, 2**63 - 1, -(2**63), 2**64, -(2**70), 1.5, math.inf, "text", b"bytes",
    [], {}, (), (1, (2, "x")), [1, (2,)], {"a": {"b": (1,)}}, {1: "x", (2, 3): None}, {1, 2}, 1 + 2j,
    np.float32(0.1), np.int64(7), np.bool_(True), np.str_("x"), np.uint8(255), np.float16(1.5),
    np.zeros((0, 3)), np.array(1.5), np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.ones((2, 3))),
    np.array(["ab", "c"]), np.array([True, False]), np.array([1 + 1j]), np.array([None, {"k": (1,)}], dtype=object),
    np.array(["2026-11-21"], dtype="M8[D]"), np.arange(10)[::2],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}:{value!r}"[:40])
def test_a_plain_value_keeps_its_type(value: object) -> None:
    again = codec.decode_plain(codec.encode_plain(value))
    assert data_equivalence(value, again, exact=True) or (type(value) is type(again) and np.array_equal(value, again))  # type: ignore[arg-type]


def test_nan_keeps_its_bits() -> None:
    again = codec.decode_plain(codec.encode_plain([math.nan, np.array([math.nan], np.float32)]))
    assert math.isnan(again[0])
    assert again[1].tobytes() == np.array([math.nan], np.float32).tobytes()


def test_what_cannot_cross_says_what_it_was() -> None:
    class Robot:
        def __repr__(self) -> str:
            return "Robot(7)"

    again = codec.decode_plain(codec.encode_plain({"robot": Robot()}))["robot"]
    assert isinstance(again, codec.Opaque)
    assert again.text == "Robot(7)"
    assert again.type.endswith("Robot")


def test_json_spells_what_json_lacks() -> None:
    value = {"nan": math.nan, "inf": [math.inf, -math.inf], "array": np.arange(3), "tuple": (1, 2), 5: b"\0"}
    assert codec.jsonable(value) == {
        "nan": "NaN", "inf": ["Infinity", "-Infinity"], "array": [0, 1, 2], "tuple": [1, 2], "5": {"base64": "AA=="},
    }  # fmt: skip


def test_json_arrays_as_base64_when_asked() -> None:
    assert codec.jsonable(np.array([1, 2], np.int16), "base64") == {"dtype": "<i2", "shape": [2], "base64": "AQACAA=="}


def test_the_json_twin_carries_every_message() -> None:
    for kind in (*codec._REQUESTS.values(), *codec._REPLIES.values()):
        fields = {info.name: _any_value(info) for info in msgspec.structs.fields(kind)}
        message = kind(**fields)
        decode = codec.decode_request if kind in codec._REQUESTS.values() else codec.decode_reply
        assert decode(codec.encode_json(message))[0] == message
        assert decode(codec.encode(message))[0] == message


def _any_value(info: msgspec.structs.FieldInfo) -> object:
    if info.default is not msgspec.NODEFAULT:
        return info.default
    if info.default_factory is not msgspec.NODEFAULT:
        return info.default_factory()
    return {str: "x", int: 3, float: 1.5}.get(info.type, [] if "list" in str(info.type) else {})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no message"),
        (b"XX\1\0\0\0\0\0", "neither"),
        (b"LR\2\0\0\0\0\0", "version 2"),
        (b"LR\1\0\xff\0\0\0", "cut short"),
        (b"{", "no message"),
        (b'{"type":"fly"}', "'type' is 'fly'"),
        (b'{"type":"step","lease":"a","epoch":1,"n":2,"speed":3}', "no 'speed'"),
        (b'{"type":"step","lease":"a","epoch":1}', "needs 'n'"),
        (b'{"type":"step","lease":"a","epoch":"1","n":2}', "Expected `int`"),
    ],
)
def test_what_is_no_message_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        codec.decode_request(data)


def test_a_hostile_array_takes_no_memory() -> None:
    shape = (2**40).to_bytes(8, "little")
    head = b"\x03<f8" + bytes([1]) + shape
    data = msgspec.msgpack.encode(msgspec.msgpack.Ext(codec.NDARRAY, head))
    with pytest.raises(ValueError, match="bytes"):
        codec.decode_plain(data)


@pytest.mark.parametrize("name", ["O", "|O8", "V8", "i4,i4", "<f8" * 9, "<f99", "()"])
def test_a_hostile_dtype_is_refused(name: str) -> None:
    head = bytes([len(name)]) + name.encode() + bytes([0]) + bytes(8)
    data = msgspec.msgpack.encode(msgspec.msgpack.Ext(codec.NDARRAY, head))
    with pytest.raises((ValueError, TypeError)):
        codec.decode_plain(data)


def test_a_message_nested_too_deep_is_refused() -> None:
    deep = b"\x91" * 100_000
    head = b"\x97\xa4step\xa1x\x01\x01" + deep
    with pytest.raises(RemoteProtocolError):
        codec.decode_request(b"LR\1\0" + len(head).to_bytes(4, "little") + head)
    with pytest.raises(RemoteProtocolError):
        codec.decode_request(b'{"type":"step","lease":"x","epoch":1,"n":1,"actions":' + b"[" * 100_000)


def test_extensions_nested_too_deep_are_refused() -> None:
    data = b"\x90"
    for _ in range(5000):
        data = msgspec.msgpack.encode(msgspec.msgpack.Ext(codec.TUPLE, b"\x91" + data))
    head = b"\x97\xa4step\xa1x\x01\x01" + data + b"\xc0\x01"
    with pytest.raises(RemoteProtocolError):
        codec.decode_request(b"LR\1\0" + len(head).to_bytes(4, "little") + head)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_give_a_typed_error_or_a_message(data: bytes) -> None:
    for decode in (codec.decode_request, codec.decode_reply):
        for bytes_ in (data, b"LR\1\0" + len(data).to_bytes(4, "little") + data, b"{" + data):
            try:
                decode(bytes_)
            except RemoteProtocolError:
                pass


@pytest.mark.parametrize("code", [codec.NDARRAY, codec.SCALAR])
@pytest.mark.parametrize("size", range(12))
def test_an_array_cut_short_is_a_typed_error(code: int, size: int) -> None:
    whole = codec.wrap(np.arange(2))
    assert isinstance(whole, msgspec.msgpack.Ext)
    infos = [{"a": msgspec.msgpack.Ext(code, bytes(whole.data)[:size])}]
    with pytest.raises(RemoteProtocolError, match="these bytes are no message"):
        codec.decode_reply(codec.encode(m.Stepped(LEASE, 3, infos=infos), bytes(16)))


@settings(max_examples=300, deadline=None)
@example(at=59, byte=0, cut=0)  # an array of no bytes at all
@given(st.integers(0, 200), st.integers(0, 255), st.integers(0, 200))
def test_a_message_with_one_byte_changed_or_cut_gives_a_typed_error_or_a_message(at: int, byte: int, cut: int) -> None:
    infos = codec.wrap([{"a": (1, np.arange(3)), "b": {"c": np.float32(1)}, 3: {4}}])
    data = bytearray(codec.encode(m.Stepped(LEASE, 3, infos=infos), bytes(16)))
    data[at % len(data)] = byte
    try:
        codec.decode_reply(data)
        codec.decode_reply(data[: cut % len(data)])
    except RemoteProtocolError:
        pass
