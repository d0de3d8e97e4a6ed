"""gym-nats' system half: requests of agents on six subjects of a broker, answered from one lease of the server.

They are worked through in the order in which they came, so that an agent of ours may send a whole step at once.
The format has no word for an error: an agent of the original gets no answer and times out, an agent of ours is told.
"""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from typing import Any, Final

import numpy as np
from gymnasium import spaces as gym_spaces

from longrein.errors import ConnectError, SpaceError, SpecError, TooLarge
from longrein.link import messages as m
from longrein.link import spaces
from longrein.link.dialects import gym_nats
from longrein.link.dialects.gym_nats import INBOX, SPACES, Channels, flat, numpy_decode, numpy_encode, subject_of
from longrein.link.dialects.holder import Holder, Observed, Stepped
from longrein.link.transports import Address, Handler, ListenOptions, Peer
from longrein.link.transports import nats_wire as wire
from longrein.link.transports.nats_responder import Responder

log = logging.getLogger("longrein.nats")

QUEUED: Final = 1024  # requests that wait; more are dropped, as a broker drops what a slow consumer does not take
_PREFIX: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class GymNatsListener:
    """One environment behind the six subjects."""

    def __init__(self, address: Address, options: ListenOptions) -> None:
        self.prefix = ".".join(part for part in (address.path, address.env.replace("/", ".")) if part)
        if self.prefix and not _PREFIX.fullmatch(self.prefix):
            raise ConnectError(
                f"{self.prefix!r} is no prefix of subjects", url=address.url, hint="letters, digits, - _ and dots"
            )
        self.url = f"{address.scheme}://{address.host}:{address.port}/{self.prefix}".rstrip("/")
        self.handler: Handler
        self._options = options
        self._subjects = {subject_of(self.prefix, channel.value): channel.value for channel in Channels}
        self._subjects[subject_of(self.prefix, SPACES)] = SPACES
        self._responder = Responder(
            address, options, self.url, "longrein gym-nats system", self._subscriptions, self._received
        )
        self._holder: Holder | None = None
        self._queue: deque[tuple[str, bytes, str]] = deque()
        self._reply = ""  # the subject of the request that is under way
        self._state: Any = None  # what UPDATE, REWARD and DONE tell
        self._reward = np.zeros(1)
        self._done = np.zeros(2)

    async def start(self, handler: Handler) -> None:
        self.handler = handler
        served = handler.describe()["environments"]
        if len(served) != 1:
            raise SpecError(
                "env",
                f"gym-nats has one environment on its subjects, {len(served)} were given",
                hint="start one server each, with --at nats://host:4222/PREFIX",
            )
        await self._responder.start()

    def _subscriptions(self) -> list[bytes]:
        return [wire.subscribe_line(subject, number) for number, subject in enumerate(self._subjects, 1)]

    def _received(self, message: wire.Message) -> None:
        subject = self._subjects.get(message.subject)
        if subject is None or not message.reply:
            return
        if len(self._queue) >= QUEUED:
            log.warning("%d requests wait already: one for %s is dropped", QUEUED, message.subject)
            return
        self._queue.append((subject, bytes(message.payload), message.reply))
        self._advance()

    def _advance(self) -> None:
        while self._queue and not self._reply:
            subject, payload, self._reply = self._queue.popleft()
            if self._holder is None or not self.handler.holds(self._holder.name):
                self._open(subject, payload)
            else:
                self._work(subject, payload)

    def _open(self, subject: str, payload: bytes) -> None:
        """A lease, and its first state: an agent asks for the state before it asks for a reset."""
        holder = self._holder = Holder(self.handler, Peer("nats"))

        def opened(fault: m.Fault | None) -> None:
            if fault is not None:
                self._fail(fault)
                return
            try:
                gym_nats.refuse_lossy(holder.observation_space, "observation_space")
                gym_nats.refuse_lossy(holder.action_space, "action_space")
            except SpaceError as error:
                holder.give_back(lambda _: None)
                self._fail(m.Fault("", 0, "env_error", str(error), exception="SpaceError"))
                return
            holder.reset(None, begun)

        def begun(value: Observed | m.Fault) -> None:
            if isinstance(value, m.Fault):
                holder.give_back(lambda _: None)
                self._fail(value)
                return
            self._begin(value)
            self._work(subject, payload)

        holder.open("", {}, opened)

    def _begin(self, value: Observed) -> None:
        self._state, self._reward, self._done = value.observation, np.zeros(1), np.zeros(2)

    def _work(self, subject: str, payload: bytes) -> None:
        holder = self._holder
        assert holder is not None
        match subject:
            case Channels.UPDATE.value:
                self._answer(numpy_encode(flat(holder.observation_space, self._state)))
            case Channels.REWARD.value:
                self._answer(numpy_encode(self._reward))
            case Channels.DONE.value:
                self._answer(numpy_encode(self._done))
            case Channels.ACTIONS.value:
                self._answer(numpy_encode(np.arange(_width(holder.action_space), dtype=np.float64)))
            case Channels.RESET.value:
                holder.reset(None, self._was_reset)
            case Channels.ACTION.value:
                self._act(holder, payload)
            case _:
                self._answer(json.dumps(describe(holder)).encode())

    def _was_reset(self, value: Observed | m.Fault) -> None:
        if isinstance(value, m.Fault):
            self._fail(value)
        else:
            self._begin(value)
            self._answer(b"")

    def _act(self, holder: Holder, payload: bytes) -> None:
        try:
            action = action_of(holder.action_space, payload)
        except SpaceError as error:
            details = {"path": error.path, "expected": error.expected, "got": error.got}
            self._fail(m.Fault("", 0, "invalid_action", str(error), details=details))
            return
        holder.step(action, self._was_stepped, plain=False)

    def _was_stepped(self, value: Stepped | m.Fault) -> None:
        if isinstance(value, m.Fault):
            self._fail(value)
            return
        self._state = value.observation
        self._reward = np.atleast_1d(np.asarray(value.reward, np.float64))
        self._done = np.array([value.terminated, value.truncated], np.float64)
        self._answer(b"")

    def _answer(self, payload: bytes) -> None:
        reply, self._reply = self._reply, ""
        try:
            self._responder.publish(reply, payload)
        except TooLarge as error:
            self._reply = reply
            self._fail(m.Fault("", 0, "too_large", str(error)))
            return
        self._advance()

    def _fail(self, fault: m.Fault) -> None:
        log.warning("%s: %s: %s", self.url, fault.code, fault.message)
        reply, self._reply = self._reply, ""
        if reply.startswith(INBOX):
            told = {
                "fault": fault.code, "message": fault.message, "exception": fault.exception,
                "traceback": fault.traceback, "applied": fault.applied, "details": fault.details,
            }  # fmt: skip
            self._responder.publish(reply, json.dumps(told, default=str).encode())
        self._advance()

    async def close(self) -> None:
        await self._responder.close()


def _width(space: Any) -> int:
    return int(space.n) if isinstance(space, gym_spaces.Discrete) else gym_spaces.utils.flatdim(space)


def action_of(space: Any, payload: bytes) -> Any:
    """The action of an ACTION's payload: for Discrete the index of the choice. Raises SpaceError."""
    numbers = numpy_decode(payload)
    if not isinstance(space, gym_spaces.Discrete):
        return gym_nats.unflat(space, numbers)
    if numbers.size != 1 or not 0 <= numbers[0] < space.n or numbers[0] % 1:
        raise SpaceError("action", f"one index from 0 to {int(space.n) - 1}", str(numbers[:8]))
    return np.int64(int(space.start) + int(numbers[0]))


def describe(holder: Holder) -> dict[str, Any]:
    """The answer to SPACES: the spaces by the link's published schema, and what else an agent may rely on.

    in_order: requests are worked through in the order of arrival. truncation: DONE is [terminated, truncated].
    """
    return {
        "version": 1,
        "observation_space": spaces.describe(holder.observation_space),
        "action_space": spaces.describe(holder.action_space),
        "in_order": True,
        "truncation": True,
    }
