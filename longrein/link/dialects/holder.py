"""One lease, held inside the server on behalf of a foreign client that knows nothing of leases.

Requests in, answers by callback and in order, one under way at a time. It speaks the link's own messages to the server
(its `Handler`), and knows neither the foreign format nor its socket.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from gymnasium import spaces as gym_spaces

from longrein.errors import SpaceError
from longrein.link import codec, spaces
from longrein.link import messages as m
from longrein.link.protocol import new_lease_name
from longrein.link.transports import Buffer, Handler, Peer

_MOST: Final = 2**32 - 2  # numbers above it do not fit the short way of a step
_INT64: Final = struct.Struct("<q")
_SIGNALS: Final = struct.Struct("<d2?6x")  # reward and flags of one environment, as `codec.pack_signals` has them
_NOTHING: Final = m.Stepped("", 0)


class Stepped(NamedTuple):
    """What one step gave; the reward is a number, or an array where it is a vector."""

    observation: Any
    reward: Any
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class Observed(NamedTuple):
    """What a reset gave."""

    observation: Any
    info: dict[str, Any]


Done = Callable[[Any], None]
"""Takes what the request gave (Observed, Stepped, a value, None), or the Fault that it met."""


class Holder:
    """A lease of one environment. To the server it is the line on which the lease lives."""

    persistent = True
    hears = True

    def __init__(self, handler: Handler, peer: Peer) -> None:
        self.peer = peer
        self.name = new_lease_name()
        self.opened: m.Opened | None = None
        self._handler = handler
        self._n = 0
        self._waiting: deque[tuple[Callable[[], bytes | None], Done]] = deque()
        self._done: Done | None = None  # of the request that is under way
        self._sending = False  # the server may answer before it returns
        self._left = False
        self._start, self._choices = 0, 0  # of numbered actions
        self._scalar = True  # the reward is a number
        self._observed: spaces.Layout
        self._acted: spaces.Layout
        self._step: codec.Bare
        self._stepped: codec.Bare

    # ------------------------------------------------------------------------------------ what a dialect asks for

    def open(self, env: str, options: Mapping[str, Any], done: Done) -> None:
        """Take the lease. `done` gets None."""
        wrapped = {key: codec.wrap(value) for key, value in options.items()}
        # A client of an older system steps past an episode's end if it likes: nobody told it not to.
        request = m.Open(self.name, 1, 0, env, wrapped, 1, "free")
        self._ask(lambda: codec.encode(request), done)

    def reset(self, seed: int | None, done: Done, options: dict[str, Any] | None = None) -> None:
        """`done` gets Observed."""
        seeds: list[int | None] | None = None if seed is None else [seed]
        self._ask(lambda: codec.encode(m.Reset(self.name, 1, self._number(), seeds, codec.wrap(options))), done)

    def step(self, action: Any, done: Done, *, plain: bool = True) -> None:
        """Step with an action of plain values, as JSON carries it, or with an element. `done` gets Stepped."""
        if (
            type(action) is int
            and self._done is None
            and not self._waiting
            and 0 <= action - self._start < self._choices
        ):
            self._left = False  # nearly every step: a numbered action, and nothing before it
            self._done = done
            n = self._number()
            region = _INT64.pack(action)
            message = self._step.encode(n, region) if n < _MOST else codec.encode(m.Step(self.name, 1, n), region)
            self._handler.received(self, message)
            self._next()
            return
        self._ask(lambda: self._step_message(action, plain), done)

    def render(self, done: Done) -> None:
        """`done` gets the frame, as the environment's render() gave it."""
        self._ask(lambda: codec.encode(m.Render(self.name, 1, self._number())), done)

    def call(self, op: str, name: str, done: Done, *args: Any) -> None:
        """Read ("get"), write ("set") or call ("call") an attribute. `done` gets its value."""
        wrapped = [codec.wrap(arg) for arg in args]
        self._ask(lambda: codec.encode(m.Call(self.name, 1, self._number(), op, name, wrapped, {}, 0)), done)

    def close(self, reason: str = "") -> None:
        """The server closes the line; what is under way stays without an answer."""
        self._waiting.clear()

    def give_back(self, done: Done) -> None:
        """End the lease. `done` gets None."""
        self._ask(lambda: codec.encode(m.Close(self.name, 1, self._number())), done)

    def leave(self) -> None:
        """The foreign client's own line is gone: the lease waits for it as long as the server's limits say.

        What is under way is finished first: its answer is what the next request waits for.
        """
        self._left = True
        self._lose()

    def _lose(self) -> None:
        if self._left and self._done is None and not self._waiting:
            self._handler.lost(self)

    @property
    def observation_space(self) -> Any:
        return self._observed.space

    @property
    def action_space(self) -> Any:
        return self._acted.space

    # ----------------------------------------------------------------------------------- one request after the other

    def _ask(self, message: Callable[[], bytes | None], done: Done) -> None:
        self._left = False
        self._waiting.append((message, done))
        self._next()

    def _next(self) -> None:
        if self._sending:
            return
        self._sending = True
        while self._waiting and self._done is None:
            message, self._done = self._waiting.popleft()
            data = message()
            if data is not None:  # else it was answered already: the action was none
                self._handler.received(self, data)
        self._sending = False

    def _number(self) -> int:
        self._n += 1
        return self._n

    def _step_message(self, action: Any, plain: bool) -> bytes | None:
        space = self._acted.space
        try:
            action = spaces.from_plain(space, action) if plain else action
            spaces.check(space, action)
            region, loose = self._acted.pack((action,))
        except SpaceError as error:
            about = {"path": error.path, "expected": error.expected, "got": error.got, "hint": error.hint}
            self._answer(m.Fault(self.name, self._n, "invalid_action", str(error), details=about))
            return None
        n = self._number()
        if loose is None and n < _MOST:
            return self._step.encode(n, region)
        return codec.encode(m.Step(self.name, 1, n, loose), region)

    def _answer(self, value: Any) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(value)
        self._next()
        self._lose()

    # --------------------------------------------------------------------------------------- what the server calls

    def route(self, lease: str) -> str:
        return ""

    def send(self, message: Buffer, *, final: bool = True) -> None:
        if not final:
            return  # Working, Draining: the older systems have no word for it
        data = message if isinstance(message, (bytes, bytearray)) else bytes(message)
        if self.opened is not None and self._stepped.number(data) == self._n:
            self._answer(self._moment(_NOTHING, data, self._stepped.length))
            return
        reply, offset = codec.decode_reply(data)
        match reply:
            case m.Opened():
                self._open(reply)
            case m.Observed():
                self._answer(self._first(reply, data, offset))
            case m.Stepped():
                self._answer(self._moment(reply, data, offset))
            case m.Frame():
                self._answer(reply.frame)
            case m.Result():
                self._answer(reply.value)
            case m.Fault():
                self._answer(reply)
            case _:
                self._answer(None)

    def _open(self, opened: m.Opened) -> None:
        if opened.kind != "vector":
            self._waiting.clear()
            self._answer(m.Fault(self.name, 0, "bad_space", "a PettingZoo environment has no place in this dialect"))
            self.give_back(lambda _: None)
            return
        self._observed = spaces.Layout(spaces.space_from(opened.observation_space))
        self._acted = spaces.Layout(spaces.space_from(opened.action_space))
        space = self._acted.space
        if isinstance(space, gym_spaces.Discrete) and space.dtype == np.int64:
            self._start, self._choices = int(space.start), int(space.n)
        self._scalar = not opened.reward_shape
        self._step = codec.Bare(m.Step(self.name, opened.epoch, 0))
        self._stepped = codec.Bare(m.Stepped(self.name, 0))
        self.opened = opened
        self._answer(None)

    def _first(self, reply: m.Observed, data: Buffer, offset: int) -> Observed:
        observation = self._observed.unpack_one(data, offset, reply.observations)
        return Observed(observation, reply.infos[0] if reply.infos else {})

    def _moment(self, reply: m.Stepped, data: Buffer, offset: int) -> Stepped:
        info = reply.infos[0] if reply.infos else {}
        if self._scalar:
            reward, terminated, truncated = _SIGNALS.unpack_from(data, offset)
            observation = self._observed.unpack_one(data, offset + _SIGNALS.size, reply.observations)
            return Stepped(observation, reward, terminated, truncated, info)
        assert self.opened is not None
        rewards, ends, cuts, offset = codec.unpack_signals(data, offset, 1, tuple(self.opened.reward_shape))
        observation = self._observed.unpack_one(data, offset, reply.observations)
        return Stepped(observation, rewards[0], bool(ends[0]), bool(cuts[0]), info)
