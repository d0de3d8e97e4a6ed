"""What a space is on the wire: every kind of space, through every function, and what is hostile refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces as gs
from gymnasium.spaces import GraphInstance
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector.utils import concatenate, create_empty_array
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from longrein.errors import SpaceError
from longrein.link import spaces

INT64 = np.iinfo(np.int64)
FIXED = [
    gs.Box(-1, 1, (3,), np.float32),
    gs.Box(-1, 1, (), np.float64),
    gs.Box(0, 1, (0, 3), np.float32),
    gs.Box(-np.inf, np.inf, (2, 2), np.float32),
    gs.Box(np.array([-np.inf, 0, -1], np.float32), np.array([np.inf, np.inf, 1], np.float32)),
    gs.Box(0, 255, (8, 8, 3), np.uint8),
    gs.Box(0, 1, (5,), np.bool_),
    gs.Box(-5, 5, (2,), np.float16),
    gs.Box(-100, 100, (3, 1), np.int16),
    gs.Box(0, 2**40, (2,), np.uint64),
    gs.Box(INT64.min, INT64.max, (2,), np.int64),
    gs.Discrete(1),
    gs.Discrete(7, start=-3),
    gs.Discrete(5, dtype=np.int32),
    gs.MultiDiscrete([3, 4, 5]),
    gs.MultiDiscrete([[2, 3], [4, 5]], start=[[-1, 0], [7, 2]]),
    gs.MultiBinary(4),
    gs.MultiBinary([2, 3]),
]
LOOSE = [
    gs.Text(5),
    gs.Text(6, min_length=0, charset="äöü€🐎 "),
    gs.Sequence(gs.Box(0, 1, (2,))),
    gs.Sequence(gs.Discrete(4), stack=True),
    gs.Sequence(gs.Dict({"a": gs.Discrete(3), "b": gs.Box(0, 1, (2,))}), stack=True),
    gs.Sequence(gs.Text(3)),
    gs.Sequence(gs.Sequence(gs.MultiBinary(2))),
    gs.Graph(gs.Box(-1, 1, (3,)), gs.Discrete(5)),
    gs.Graph(gs.Discrete(4), gs.Box(0, 1, (2,))),
    gs.Graph(gs.Box(-1, 1, (2, 2)), None),
    gs.OneOf([gs.Discrete(2), gs.Box(0, 1, (2,)), gs.Text(3)]),
    gs.OneOf([gs.MultiBinary(3), gs.Tuple([gs.Discrete(2), gs.Text(2)])]),
]
NESTED = [
    gs.Dict({"z": gs.Discrete(3), "a": gs.Box(0, 1, (2,)), "m": gs.MultiBinary(2)}),
    gs.Tuple([gs.Discrete(3), gs.Tuple([gs.Box(0, 1, (1,)), gs.Dict({"x": gs.MultiDiscrete([2, 2])})])]),
    gs.Dict({"deep": gs.Dict({"deeper": gs.Dict({"deepest": gs.Box(0, 1, (1, 1))})}), "text": gs.Text(4)}),
    gs.Tuple([gs.Graph(gs.Box(0, 1, (1,)), gs.Discrete(2)), gs.Sequence(gs.Discrete(2)), gs.Box(0, 1, (3,))]),
    gs.Dict({"one": gs.OneOf([gs.Discrete(2), gs.Dict({"q": gs.Box(0, 1, (2,))})]), "two": gs.Discrete(2, start=5)}),
    gs.Tuple([]),
    gs.Dict({}),
]
ALL = [*FIXED, *LOOSE, *NESTED]
every_space = pytest.mark.parametrize("space", ALL, ids=lambda space: str(space)[:60])


def samples(space: gs.Space[Any], count: int = 5) -> list[Any]:
    space.seed(3)
    return [space.sample() for _ in range(count)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, GraphInstance):
        return isinstance(b, GraphInstance) and all(
            (x is None and y is None) or (np.array_equal(x, y) and x.dtype == y.dtype)
            for x, y in zip(a, b, strict=True)
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(data_equivalence(a, b, exact=True))


@every_space
def test_a_description_rebuilds_the_space(space: gs.Space[Any]) -> None:
    description = json.loads(json.dumps(spaces.describe(space), allow_nan=False))
    Draft202012Validator(spaces.SCHEMA).validate(description)
    again = spaces.space_from(description)
    assert again == space
    if isinstance(space, gs.Dict):
        assert list(again.spaces) == list(space.spaces)  # type: ignore[attr-defined]  # it is a Dict too


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(spaces.SCHEMA)


@every_space
def test_elements_cross_in_columns(space: gs.Space[Any]) -> None:
    layout = spaces.Layout(space)
    values = samples(space)
    for value in values:
        region, loose = layout.pack([value])
        assert len(region) == layout.nbytes(1)
        whole = bytearray(8) + bytearray(region)
        assert same(layout.unpack_one(whole, 8, loose), value)
    region, loose = layout.pack(values)
    assert len(region) == layout.nbytes(len(values))
    assert all(same(a, b) for a, b in zip(layout.unpack_each(bytearray(region), 0, 5, loose), values, strict=True))
    parts, also = layout.parts(values)
    assert b"".join(parts) == bytes(region)
    assert (also is None) == (loose is None)


@every_space
def test_batches_are_gymnasiums_own(space: gs.Space[Any]) -> None:
    layout, values = spaces.Layout(space), samples(space)
    region, loose = layout.pack(values)
    mine = layout.unpack_batch(bytearray(region), 0, 5, loose)
    theirs = concatenate(space, values, create_empty_array(space, 5, fn=np.zeros))
    assert same(mine, theirs)
    again, more = layout.pack_batch(theirs, 5)
    assert bytes(again) == bytes(region)
    assert same(layout.unpack_batch(bytearray(again), 0, 5, more), theirs)
    assert all(same(a, b) for a, b in zip(spaces.iterate(space, theirs, 5), values, strict=True))
    both = spaces.concatenate_batches(space, [(mine, 5), (spaces.take(space, mine, np.array([4, 0])), 2)])
    assert all(same(a, b) for a, b in zip(spaces.iterate(space, both, 7), [*values, values[4], values[0]], strict=True))


@every_space
@pytest.mark.parametrize("arrays", ["array", "list", "base64"])
def test_elements_cross_as_plain_values(space: gs.Space[Any], arrays: str) -> None:
    for value in samples(space):
        plain = spaces.to_plain(space, value, arrays=arrays)
        if arrays != "array":
            plain = json.loads(json.dumps(plain, allow_nan=False))
        assert same(spaces.from_plain(space, plain), value)


@every_space
def test_samples_pass_the_check(space: gs.Space[Any]) -> None:
    for value in samples(space):
        spaces.check(space, value)


def test_infinities_and_nan_have_one_spelling() -> None:
    space = gs.Box(-np.inf, np.inf, (3,), np.float64)
    value = np.array([np.nan, np.inf, -np.inf])
    plain = spaces.to_plain(space, value, arrays="list")
    assert plain == ["NaN", "Infinity", "-Infinity"]
    assert np.array_equal(spaces.from_plain(space, plain), value, equal_nan=True)


ROBOT = gs.Dict({"arm": gs.Tuple([gs.Discrete(3), gs.Box(-1, 1, (2,), np.float32)]), "say": gs.Text(3, charset="abc")})
GOOD: dict[str, Any] = {"arm": (1, np.zeros(2, np.float32)), "say": "ab"}


@pytest.mark.parametrize(
    ("space", "value", "path"),
    [
        (gs.Discrete(3), 3, "action"),
        (gs.Discrete(3, start=1), 0, "action"),
        (gs.Discrete(3), True, "action"),
        (gs.Discrete(3), 1.0, "action"),
        (gs.Box(-1, 1, (2, 2), np.float32), np.array([[0, 0], [0, 2]], np.float32), "action[1][1]"),
        (gs.Box(-1, 1, (2,), np.float32), np.array([np.nan, 0], np.float32), "action[0]"),
        (gs.Box(-1, 1, (2,), np.float32), np.zeros(3, np.float32), "action"),
        (gs.Box(0, 9, (2,), np.int64), np.array([0.5, 1]), "action"),
        (gs.Box(0, 9, (2,), np.uint8), [1, 300], "action"),
        (gs.MultiDiscrete([3, 4]), [0, 4], "action[1]"),
        (gs.MultiBinary(3), [0, 2, 1], "action[1]"),
        (gs.Text(3), "abcd", "action"),
        (gs.Text(3, charset="abc"), "abd", "action[2]"),
        (gs.Text(3), 5, "action"),
        (ROBOT, GOOD | {"arm": (1, np.array([0, 2], np.float32))}, "action['arm'][1][1]"),
        (ROBOT, GOOD | {"say": "x"}, "action['say'][0]"),
        (ROBOT, {"arm": GOOD["arm"]}, "action"),
        (ROBOT, [], "action"),
        (gs.Sequence(gs.Discrete(2)), (0, 1, 2), "action[2]"),
        (gs.OneOf([gs.Discrete(2), gs.Text(3)]), (2, 0), "action[0]"),
        (gs.OneOf([gs.Discrete(2), gs.Text(3)]), (0, 5), "action[1]"),
        (gs.Graph(gs.Discrete(2), None), GraphInstance(np.array([0, 2]), None, None), "action.nodes[1]"),
        (
            gs.Graph(gs.Discrete(2), gs.Discrete(2)),
            GraphInstance(np.array([0, 1]), np.array([1]), np.array([[0, 2]])),
            "action.edge_links",
        ),
    ],
)
def test_what_is_outside_is_named(space: gs.Space[Any], value: Any, path: str) -> None:
    with pytest.raises(SpaceError) as raised:
        spaces.check(space, value)
    assert raised.value.path == path
    assert raised.value.expected
    assert raised.value.got


def test_numbers_that_lose_nothing_pass() -> None:
    spaces.check(gs.Box(-1, 1, (2,), np.float32), [0, 1])
    spaces.check(gs.Box(-1, 1, (2,), np.float32), np.zeros(2, np.float64))
    spaces.check(gs.Discrete(3), np.int8(2))
    spaces.check(gs.Discrete(3), np.array(2))


class Custom(gs.Space[Any]):
    """A space that nobody else knows."""


@pytest.mark.parametrize(
    "space",
    [Custom(), gs.Tuple([gs.Discrete(2), Custom()]), gs.Dict({1: gs.Discrete(2)})],
    ids=["own", "inside", "key"],
)
def test_a_space_that_cannot_be_described_says_so(space: gs.Space[Any]) -> None:
    with pytest.raises(SpaceError):
        spaces.describe(space)


BOX = {"type": "Box", "dtype": "float32", "shape": [2], "low": 0, "high": 1}


@pytest.mark.parametrize(
    "description",
    [
        None, 7, [], {}, {"type": "Ball"}, {"type": ["Box"]}, BOX | {"dtype": "O"}, BOX | {"dtype": "float33"},
        BOX | {"shape": [-1]}, BOX | {"shape": [2**40, 2**40]}, BOX | {"shape": "2"}, BOX | {"low": [0, 0, 0]},
        BOX | {"low": "nought"}, BOX | {"low": 2}, {"type": "Discrete", "n": 0, "start": 0, "dtype": "int64"},
        {"type": "Discrete", "n": 2.5, "start": 0, "dtype": "int64"}, {"type": "Discrete", "n": 2},
        {"type": "Discrete", "n": 2**80, "start": 0, "dtype": "int64"},
        {"type": "MultiBinary", "n": -3}, {"type": "MultiBinary", "n": [2**50, 2**50]},
        {"type": "MultiDiscrete", "nvec": [[2], [3, 4]], "start": [0], "dtype": "int64"},
        {"type": "Text", "min_length": 5, "max_length": 2, "charset": "a"},
        {"type": "Dict", "spaces": [["a", BOX], ["a", BOX]]}, {"type": "Dict", "spaces": {"a": BOX}},
        {"type": "Tuple", "spaces": [BOX, None]}, {"type": "Sequence", "space": BOX}, {"type": "Graph", "node": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_description_is_refused(description: Any) -> None:
    with pytest.raises(SpaceError):
        spaces.space_from(description)


def test_a_description_nested_too_deep_is_refused() -> None:
    description: Any = BOX
    for _ in range(100):
        description = {"type": "Tuple", "spaces": [description]}
    with pytest.raises(SpaceError, match="inside one another"):
        spaces.space_from(description)


@every_space
def test_a_region_too_short_is_refused(space: gs.Space[Any]) -> None:
    layout = spaces.Layout(space)
    region, loose = layout.pack(samples(space))
    if layout.nbytes(5):
        with pytest.raises(SpaceError):
            layout.unpack_batch(bytearray(region)[: layout.nbytes(5) // 2], 0, 5, loose)
    if loose:
        with pytest.raises(SpaceError):
            layout.unpack_batch(bytearray(region), 0, 5, loose[:-1])
        with pytest.raises(SpaceError):
            layout.unpack_batch(bytearray(region), 0, 6, loose)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(plain_values)
def test_any_plain_value_is_an_element_or_a_typed_error(plain: Any) -> None:
    for space in ALL:
        try:
            value = spaces.from_plain(space, plain)
            spaces.check(space, value)
        except SpaceError:
            continue
        assert value in space or isinstance(space, (gs.Graph, gs.Sequence, gs.OneOf, gs.Box))


@settings(max_examples=200, deadline=None)
@given(plain_values)
def test_any_description_is_a_space_or_a_typed_error(plain: Any) -> None:
    for description in (
        plain,
        BOX | {"low": plain},
        {"type": "Dict", "spaces": plain},
        {"type": "Graph", "node": plain},
    ):
        try:
            spaces.space_from(description)
        except SpaceError:
            continue


def test_scalars_keep_their_types() -> None:
    layout = spaces.Layout(gs.Tuple([gs.Discrete(32), gs.Discrete(11), gs.Discrete(2)]))
    assert spaces.scalar_types(layout, (np.int64(1), np.int64(2), np.int64(0))) is None
    value = (1, np.int32(2), True)
    letters = spaces.scalar_types(layout, value)
    assert letters == "IcB"
    again = spaces.restore_scalars(layout, (np.int64(1), np.int64(2), np.int64(1)), letters)
    assert again == value
    assert [type(item) for item in again] == [int, np.int32, bool]
    for reward in (1.5, 3, True, np.float32(0.5), np.float64(2.5), np.int64(4)):
        back = spaces.scalar_as(float(reward), spaces.scalar_letter(reward))
        assert (type(back), back) == (type(reward), reward)
