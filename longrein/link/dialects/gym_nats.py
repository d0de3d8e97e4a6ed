"""gym-nats 0.1: an existing system that answers six subjects of a NATS broker. The codec and the agent's side.

Arrays travel as base64 of little-endian float64, flat. A step is four requests: ACTION, REWARD, UPDATE, DONE. A system
may answer each subject from a task of its own, so the broker's order says nothing about the order of its work: the
reads may only be sent when ACTION has been answered. Among themselves the three reads are independent. Hence `order`:

serial    one request after the other, as the original does: four round trips a step, two a reset
reads     ACTION, then the three reads at once: two round trips a step; right wherever reads change nothing
together  all four at once: one round trip; only for a system that works through its requests in the order of arrival

Beyond the original: `rl.spaces`, answered with a JSON object (`SPACES`), tells the spaces. Whoever does not know the
subject does not answer it, and is then discovered as the original does.
"""

from __future__ import annotations

import base64
import binascii
import enum
import importlib
import json
import logging
import secrets
import time
from dataclasses import replace
from typing import Any, Final

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces as gym_spaces

from longrein import errors
from longrein.link import messages as m
from longrein.link import spaces
from longrein.link.client import link_options, persist, tls_context
from longrein.link.protocol import error_of
from longrein.link.transports import Address, ConnectOptions, Listener, ListenOptions, parse_url
from longrein.link.transports import nats_wire as wire
from longrein.link.transports.nats_line import BrokerLine

log = logging.getLogger("longrein.nats")

Array = npt.NDArray[np.float64]
ORDERS: Final = ("serial", "reads", "together")
SPACES: Final = "rl.spaces"
INBOX: Final = "_INBOX.longrein."  # a reply to such a subject may be a fault: a JSON object, which no array looks like
EXTENSION_SECONDS: Final = 0.5  # how long an answer to SPACES is waited for
EXACT: Final = 2**53  # integers up to here are float64's own


class Channels(enum.Enum):
    """The subjects; the one of DONE is spelled as the original spells it."""

    UPDATE = "rl.update"
    REWARD = "rl.reward"
    ACTION = "rl.action"
    RESET = "rl.reset"
    ACTIONS = "rl.actions"
    DONE = "r.done"


# --------------------------------------------------------------------------------------------------------- the codec


def numpy_encode(array: npt.NDArray[Any]) -> bytes:
    """base64 of the array's raw little-endian float64, flat and without a header. Raises SpaceError for other types."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float64:
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise errors.SpaceError("array", "float64", str(kind), hint="array.astype(numpy.float64)")
    return base64.b64encode(np.ascontiguousarray(array, "<f8").tobytes())


def numpy_decode(data: bytes | bytearray) -> Array:
    """The flat, read-only float64 array of such bytes. Raises SpaceError."""
    try:
        return np.frombuffer(base64.b64decode(data, validate=True), "<f8")
    except (binascii.Error, ValueError) as error:
        raise errors.SpaceError("array", "base64 of float64 numbers", f"{bytes(data[:40])!r} ({error})") from None


def flat(space: gymnasium.Space[Any], value: Any) -> Array:
    """An element as flat float64: one-hot where it is a choice, which is what a MultiBinary agent expects to see."""
    return np.asarray(gym_spaces.utils.flatten(space, value), np.float64).reshape(-1)


def unflat(space: gymnasium.Space[Any], array: Array) -> Any:
    """The element that `flat` made flat. Raises SpaceError when the length is another's."""
    width = gym_spaces.utils.flatdim(space)
    if array.size != width:
        raise errors.SpaceError("array", f"{width} numbers for {space}", f"{array.size}")
    return gym_spaces.utils.unflatten(space, array)


def refuse_lossy(space: gymnasium.Space[Any], path: str) -> None:
    """Raise SpaceError for a space whose elements do not survive the way through flat float64."""
    if not space.is_np_flattenable or any(isinstance(leaf, gym_spaces.Text) for leaf in _leaves(space)):
        raise errors.SpaceError(path, "a space of fixed length", str(space), hint="serve it without --dialect")
    for leaf in _leaves(space):
        dtype = np.dtype(leaf.dtype) if leaf.dtype is not None else np.dtype(np.int64)
        wide = dtype.kind in "iu" and dtype.itemsize == 8 and isinstance(leaf, gym_spaces.Box)
        if dtype.kind == "c" or dtype.itemsize > 8 or (wide and _bound(leaf) > EXACT):
            raise errors.SpaceError(path, "numbers that float64 holds", str(leaf), hint="serve it without --dialect")


def _bound(space: Any) -> float:
    return float(max(abs(np.asarray(space.low, np.float64)).max(), abs(np.asarray(space.high, np.float64)).max()))


def _leaves(space: gymnasium.Space[Any]) -> list[gymnasium.Space[Any]]:
    if isinstance(space, gym_spaces.Dict):
        return [leaf for member in space.spaces.values() for leaf in _leaves(member)]
    if isinstance(space, gym_spaces.Tuple):
        return [leaf for member in space.spaces for leaf in _leaves(member)]
    return [space]


def subject_of(prefix: str, subject: str) -> str:
    """The subject of one of several systems on a broker."""
    return f"{prefix}.{subject}" if prefix else subject


# ---------------------------------------------------------------------------------------------------- the system's half


def listen(address: Address, options: ListenOptions) -> Listener:
    """Answer the six subjects, and SPACES, on a broker."""
    # By name and late: an agent needs no server.
    half = importlib.import_module("longrein.link.dialects.gym_nats_listener")
    listener: Listener = half.GymNatsListener(address, options)
    return listener


# ----------------------------------------------------------------------------------------------------- the agent's half


class NatsEnv(gymnasium.Env[Any, Any]):
    """An existing system that answers gym-nats' subjects, as an environment.

    host, port, user, password: of the broker. subject_prefix: which of several systems on it. order: see the module.
    timeout: seconds to wait for each answer. observation_space, action_space: in place of those that are discovered.
    Discovered are the spaces that the system tells (SPACES), else MultiBinary(N) and Discrete(n) from the lengths of
    its answers, as the original does; a state that is not binary makes the first a Box of float64.

    Raises ConnectError where there is no broker, or nobody answers a subject; LinkTimeout when an answer is late (a
    late answer is recognised and dropped; whether an action was applied is then unknown); ConnectionClosed when the
    broker is lost: the next request dials it again.
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "ansi"]}

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | str = 4222,
        user: str | None = None,
        password: str | None = None,
        *,
        subject_prefix: str = "",
        order: str = "",
        timeout: float = 5.0,
        observation_space: gymnasium.Space[Any] | None = None,
        action_space: gymnasium.Space[Any] | None = None,
        render_mode: str | None = None,
        secure: bool = False,
        **options: Any,
    ) -> None:
        if order and order not in ORDERS:
            raise errors.SpecError("order", f"{order!r} is none of {', '.join(ORDERS)}")
        if render_mode not in (None, "human", "ansi"):
            raise errors.SpecError("render_mode", f"{render_mode!r} is none of human, ansi")
        link, unknown = link_options(options)
        if unknown:
            raise errors.SpecError(next(iter(unknown)), "gym-nats takes no such option")
        if user is not None:
            link = replace(link, credentials={**link.credentials, "user": user, "password": password or ""})
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'tls' if secure else 'nats'}://{shown}:{port}/{subject_prefix}"
        self.render_mode = render_mode
        self._link = link
        self._timeout = timeout
        self._prefix = subject_prefix
        self._address, _ = parse_url(self.url)
        self._options = ConnectOptions(
            timeout=min(link.wait, 10.0),
            max_message_bytes=link.max_message_bytes,
            ssl_context=tls_context(self._address, link),
            credentials=dict(link.credentials),
        )
        self._inbox = INBOX + secrets.token_hex(11)
        self._count = 0
        self._answers: dict[int, bytearray] = {}  # of requests that are still waited for, by number
        self._waiting: dict[int, str] = {}
        self._begun: list[int] = []  # a step or a reset that was posted
        self._shown: Any = None
        self._line: BrokerLine | None = None
        self._closed = False
        self._binary = False
        self._splits_done = False
        self._dial(link.wait)
        self._discover(observation_space, action_space, order)

    def _discover(self, seen: gymnasium.Space[Any] | None, done: gymnasium.Space[Any] | None, order: str) -> None:
        told = self._told_spaces()
        self.order = order or ("together" if told.get("in_order") else "reads")
        self._splits_done = bool(told.get("truncation"))
        state = self._array(Channels.UPDATE)
        actions = self._array(Channels.ACTIONS)
        if seen is None and "observation_space" in told:
            seen = spaces.space_from(told["observation_space"])
        if done is None and "action_space" in told:
            done = spaces.space_from(told["action_space"])
        self._binary = seen is None
        if seen is None:
            binary = bool(np.isin(state, (0.0, 1.0)).all())
            box = gym_spaces.Box(-np.inf, np.inf, (state.size,), np.float64)
            seen = gym_spaces.MultiBinary(state.size) if binary else box
        self.observation_space = seen
        self.action_space = done if done is not None else gym_spaces.Discrete(max(1, actions.size))

    def _told_spaces(self) -> dict[str, Any]:
        """What the system tells of its spaces; nothing where it does not know the subject."""
        try:
            told = json.loads(bytes(self._request(SPACES, seconds=min(EXTENSION_SECONDS, self._timeout))))
        except (errors.ConnectError, errors.LinkTimeout, ValueError):
            return {}
        if not isinstance(told, dict):
            return {}
        if "fault" in told:
            raise self._error(told)
        return told

    # ------------------------------------------------------------------------------------------ Gymnasium's contract

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The format has no seed: `seed` only seeds this end's `np_random`."""
        super().reset(seed=seed)
        if not self._begun:
            self.post_reset(seed)
        begun, self._begun = self._begun, []
        self._confirmed(begun[0])
        state = self._take(begun[1]) if len(begun) > 1 else self._request(Channels.UPDATE.value)
        return self._observed(state), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self._begun:
            self.post_step(action)
        begun, self._begun = self._begun, []
        self._confirmed(begun[0])
        reads = (Channels.REWARD, Channels.UPDATE, Channels.DONE)
        if self.order == "serial":
            reward, state, done = (self._request(channel.value) for channel in reads)
        else:
            sent = begun[1:] or self._send([(channel.value, b"") for channel in reads])
            reward, state, done = (self._take(number) for number in sent)
        ends = self._decoded(done)
        if self._splits_done and ends.size == 2:
            terminated, truncated = bool(ends[0]), bool(ends[1])
        else:
            terminated, truncated = bool(ends.sum() > 0), False
        return self._observed(state), float(self._decoded(reward).sum()), terminated, truncated, {}

    def post_reset(self, seed: int | None) -> None:
        """Send a reset; `reset` takes its answer."""
        both = [(Channels.RESET.value, b""), (Channels.UPDATE.value, b"")]
        self._begun = self._send(both if self.order == "together" else both[:1])

    def post_step(self, action: Any) -> None:
        """Send a step; `step` takes its answer."""
        space = self.action_space
        spaces.check(space, action)
        if isinstance(space, gym_spaces.Discrete):
            number = np.array([int(action) - int(space.start)], np.float64)
        else:
            number = flat(space, action)
        requests = [(Channels.ACTION.value, numpy_encode(number))]
        if self.order == "together":
            requests += [(channel.value, b"") for channel in (Channels.REWARD, Channels.UPDATE, Channels.DONE)]
        self._begun = self._send(requests)

    def render(self) -> Any:
        if self.render_mode == "human":
            print(f"Current state: {self._shown}")
            return None
        return f"Current state: {self._shown}"

    def close(self) -> None:
        """Close the line to the broker; the system itself stays. May be called twice."""
        self._closed = True
        self._drop()

    def request(self, channel: Channels, data: bytes = b"") -> bytes:
        """One request of the format, and its answer's bytes."""
        return bytes(self._request(channel.value, data))

    # --------------------------------------------------------------------------------------------- values and errors

    def _observed(self, state: bytearray) -> Any:
        array = self._decoded(state)
        if not self._binary:
            self._shown = unflat(self.observation_space, array)
            return self._shown
        if (array.size,) != self.observation_space.shape:
            raise errors.SpaceError("observation", f"{self.observation_space.shape} numbers", f"{array.size}")
        if isinstance(self.observation_space, gym_spaces.MultiBinary):
            if not np.isin(array, (0.0, 1.0)).all():
                raise errors.SpaceError(
                    "observation",
                    "zeros and ones, as the first state had",
                    str(array[:8]),
                    hint="give observation_space=gymnasium.spaces.Box(...)",
                )
            array = array.astype(np.int8)  # the space's own
        self._shown = array.copy()
        return self._shown

    def _confirmed(self, number: int) -> None:
        """ACTION and RESET are answered by nothing, or by a fault."""
        data = self._take(number)
        if data[:1] == b"{":
            raise self._error(json.loads(bytes(data)))

    def _array(self, channel: Channels) -> Array:
        return self._decoded(self._request(channel.value))

    def _decoded(self, data: bytearray) -> Array:
        if data[:1] == b"{":
            raise self._error(json.loads(bytes(data)))
        return numpy_decode(data)

    def _error(self, told: dict[str, Any]) -> errors.Error:
        fault = m.Fault(
            "",
            0,
            str(told.get("fault", "env_error")),
            str(told.get("message", "")),
            applied=told.get("applied"),
            exception=str(told.get("exception", "")),
            traceback=str(told.get("traceback", "")),
            details=dict(told.get("details") or {}),
        )
        return error_of(fault, self.url)

    # ------------------------------------------------------------------------------------------------------ requests

    def _request(self, subject: str, data: bytes = b"", seconds: float | None = None) -> bytearray:
        return self._take(self._send([(subject, data)])[0], seconds)

    def _send(self, requests: list[tuple[str, bytes]]) -> list[int]:
        """Send requests in one write; their numbers."""
        if self._closed:
            raise errors.LinkError("this environment is closed", url=self.url, hint="make it again")
        if self._line is None:
            self._dial(self._link.reconnect)
        assert self._line is not None
        numbers, parts = [], []
        for subject, data in requests:
            self._count += 1
            numbers.append(self._count)
            self._waiting[self._count] = subject
            parts.append(wire.publish(subject_of(self._prefix, subject), f"{self._inbox}.{self._count}", data))
        try:
            self._line.write(b"".join(parts))
        except errors.LinkError:
            self._drop()
            raise
        return numbers

    def _take(self, number: int, seconds: float | None = None) -> bytearray:
        """The answer to request `number`; answers to others that are waited for are kept, all others dropped."""
        seconds = self._timeout if seconds is None else seconds
        deadline = time.monotonic() + seconds
        try:
            while number not in self._answers:
                if self._line is None:
                    raise errors.ConnectionClosed("the broker was lost before it answered", url=self.url)
                message = self._line.next_message()
                if message is not None:
                    self._sort(message)
                elif not self._line.read(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise errors.LinkTimeout(
                        f"the system did not answer {self._waiting[number]} within {seconds:g} s",
                        seconds=seconds,
                        url=self.url,
                        hint="is it busy, or stuck? timeout=... waits longer",
                    )
        except errors.LinkError as error:
            if isinstance(error, errors.ConnectionClosed):
                self._drop()
            self._waiting.clear()  # what still comes for them is late
            self._answers.clear()
            raise
        return self._answers.pop(number)

    def _sort(self, message: wire.Message) -> None:
        last = message.subject.rpartition(".")[2]
        subject = self._waiting.pop(int(last), None) if last.isdigit() else None
        if subject is None:
            return  # late
        if message.status == "503":
            raise errors.ConnectError(
                f"no system answers {subject_of(self._prefix, subject)} on this broker",
                url=self.url,
                hint="is it running, and is subject_prefix right?",
            )
        self._answers[int(last)] = message.payload

    def _dial(self, seconds: float) -> None:
        self._line = persist(lambda: BrokerLine(self._address, self._options), seconds, self._link.pause, self.url)
        self._line.write(wire.subscribe_line(f"{self._inbox}.*", 1))

    def _drop(self) -> None:
        line, self._line = self._line, None
        self._answers.clear()
        self._begun = []
        if line is not None:
            line.close()

    def __str__(self) -> str:
        return f"<NatsEnv at {self.url}>"


def connect(url: str, **options: Any) -> NatsEnv:
    """gym-nats://host:port/PREFIX as an environment. Options: those of NatsEnv and of LinkOptions."""
    scheme = "tls" if options.pop("secure", False) else "nats"
    address, _ = parse_url(f"{scheme}://{url.partition('://')[2]}")
    prefix = ".".join(part for part in (address.path, address.env.replace("/", ".")) if part)
    options = {"subject_prefix": prefix} | dict(address.options) | options
    return NatsEnv(address.host, address.port or 4222, secure=scheme == "tls", **options)


def spread(url: str, num_envs: int) -> list[str]:
    """One system is one environment; several are named by several URLs. Raises SpecError."""
    if num_envs != 1:
        raise errors.SpecError(
            "num_envs", f"{url} is one system, {num_envs} environments were asked for", hint="give a list of URLs"
        )
    return [url]
