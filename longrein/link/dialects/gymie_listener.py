"""Gymie's server half: WebSockets of its clients on the one side, leases of the server on the other.

The rules of the format stand in `longrein.link.dialects.gymie`.
"""

from __future__ import annotations

import math
import re
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import gymnasium
import picows
from gymnasium import spaces as gym_spaces
from picows import WSCloseCode, WSListener, WSMsgType, WSTransport, WSUpgradeRequest

from longrein.errors import ConnectError
from longrein.link import messages as m
from longrein.link.dialects import json_text
from longrein.link.dialects.gymie import INVALID_DATA, INVALID_MESSAGE, PATH
from longrein.link.dialects.holder import Holder, Observed, Stepped
from longrein.link.transports import Address, Handler, ListenOptions, Peer, websocket
from longrein.link.transports.websocket import keep_alive, listening_url, plain_upgrade

GET_ENV: Final = "get_env"  # the one name that is served where `get_env` is overridden
PROCESS_STEP: Final = "gymie_step"  # the attribute that is called where `process_step` is overridden
REASON_BYTES: Final = 123  # RFC 6455 section 5.5.1: a control frame carries 125, two of them are the code
STEPS_KEPT: Final = 64
QUEUED: Final = 32  # frames of one client that wait, before its socket is read no further

_ID: Final = re.compile(r"(?:[\w:-]+/)?[\w:.-]+-v\d+")


@dataclass
class Instance:
    """One environment that a client made."""

    name: str
    holder: Holder
    seed: int | None
    overridden: bool  # steps go through the server's own `process_step`
    fresh: bool = True  # not reset yet: the seed is still to be used
    line: GymieLine | None = None  # the one that used it last


class Wrong(Exception):
    """What closes a client's WebSocket; it never leaves this module."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class GymieListener:
    """Listens for Gymie's clients. The instances are the listener's, not a line's."""

    def __init__(self, address: Address, options: ListenOptions) -> None:
        self.address = address
        self.options = options
        self.path = f"/{address.env}" if address.env else PATH
        self.url = address.url
        self.handler: Handler
        self.instances: dict[str, Instance] = {}
        self.lines: set[GymieLine] = set()
        self._server: Any = None

    async def start(self, handler: Handler) -> None:
        self.handler = handler
        try:
            self._server = await picows.ws_create_server(
                self._welcome,
                self.address.host,
                self.address.port or 0,
                ssl=self.options.ssl_context if self.address.secure else None,
                max_frame_size=self.options.max_message_bytes,
                logger_name=websocket.PICOWS_LOG,
            )
        except OSError as error:
            raise ConnectError(
                f"cannot listen here: {error.strerror or error}", url=self.url, hint="is the port in use?"
            ) from error
        self.url = listening_url(self.address, self._server) + self.path

    def _welcome(self, request: WSUpgradeRequest) -> Any:
        plain_upgrade(request)
        if request.path.partition(b"?")[0].decode("latin-1") != self.path:
            response = picows.WSUpgradeResponse.create_ok_response(b"Gymie is running...")
            return picows.WSUpgradeResponseWithListener(response, None)
        origin = request.headers.get("Origin")
        if not websocket.origin_allowed(origin, self.options.allowed_origins):
            said = f"pages of {origin} may not connect here: --allow-origin {origin}".encode()
            response = picows.WSUpgradeResponse.create_error_response(HTTPStatus.FORBIDDEN, said)
            return picows.WSUpgradeResponseWithListener(response, None)
        return GymieLine(self)

    def forget_ended(self) -> None:
        """Drop the instances whose leases the server has ended."""
        for name in [name for name, each in self.instances.items() if not self.handler.holds(each.holder.name)]:
            del self.instances[name]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for line in list(self.lines):
            line.end(1001, "the server closed")


class GymieLine(WSListener):
    """One client's WebSocket: one frame is worked on at a time, as the original does."""

    def __init__(self, owner: GymieListener) -> None:
        self.peer = Peer("")
        self._owner = owner
        self._transport: WSTransport | None = None
        self._frames: deque[bytes] = deque()
        self._steps: dict[bytes, tuple[Instance, int]] = {}  # steps with numbered actions, by their bytes
        self._stepping: tuple[Instance, Any] | None = None
        self._parts: list[bytes] = []
        self._busy = False
        self._raw = b""  # the frame that is worked on

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport
        self._owner.lines.add(self)
        keep_alive(transport.underlying_transport.get_extra_info("socket"))
        name = transport.underlying_transport.get_extra_info("peername")
        self.peer = Peer(f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "unix")

    def on_ws_frame(self, transport: WSTransport, frame: picows.WSFrame) -> None:
        kind = frame.msg_type
        if kind is WSMsgType.TEXT and frame.fin and not self._parts and not self._busy:
            raw = frame.get_payload_as_bytes()
            known = self._steps.get(raw)  # a frame that was read before is not read again
            if known is not None:
                self._busy = True
                self._step(*known)
                return
            self._frames.append(raw)
            self._advance()
        elif kind in (WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.CONTINUATION):
            self._parts.append(frame.get_payload_as_bytes())
            if sum(map(len, self._parts)) > self._owner.options.max_message_bytes:
                self.end(1009, "over the limit of this server")
            elif frame.fin:
                self._frames.append(self._parts[0] if len(self._parts) == 1 else b"".join(self._parts))
                self._parts = []
                if len(self._frames) == QUEUED:
                    transport.underlying_transport.pause_reading()
                self._advance()
        elif kind is WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._transport = None
        self._frames.clear()
        self._owner.lines.discard(self)
        for instance in self._owner.instances.values():
            if instance.line is self:
                instance.holder.leave()
        self._owner.forget_ended()

    def end(self, code: int, reason: str) -> None:
        """Close the WebSocket."""
        if self._transport is not None:
            self._transport.send_close(WSCloseCode(code), cut(reason))
            self._transport.disconnect()
        self._frames.clear()

    def _advance(self) -> None:
        while self._frames and not self._busy and self._transport is not None:
            raw = self._raw = self._frames.popleft()
            if len(self._frames) == QUEUED - 1:
                self._transport.underlying_transport.resume_reading()
            self._busy = True
            try:
                self._take(raw)
            except Wrong as wrong:
                self._busy = False
                self.end(wrong.code, str(wrong))

    def _take(self, raw: bytes) -> None:
        try:
            message = json_text.parse(raw)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise Wrong(INVALID_MESSAGE, f"Message `{raw.decode('utf-8', 'replace')}` is invalid")
        if "method" not in message or "params" not in message:
            raise Wrong(INVALID_MESSAGE, f"Message keys {list(message)} are missing or invalid")
        name, params = message["method"], message["params"]
        method = _METHODS.get(name) if isinstance(name, str) else None
        if method is None:
            raise Wrong(INVALID_DATA, f"Method `{name}` not found")
        known, needed, function = method
        wrong = not isinstance(params, dict) or not needed <= set(params) or (known and not set(params) <= known)
        if wrong:
            raise Wrong(INVALID_DATA, f"Parameters `{params}` are wrong")
        function(self, params)

    def _instance(self, params: dict[str, Any]) -> Instance:
        name = params["instance_id"]
        instance = self._owner.instances.get(name) if isinstance(name, str) else None
        if instance is None:
            raise Wrong(INVALID_DATA, f"Instance `{name}` not found")
        instance.line = self
        return instance

    # ------------------------------------------------------------------------------------------------ the methods

    def make(self, params: dict[str, Any]) -> None:
        """A new instance."""
        env_id, seed = params["env_id"], params.get("seed")
        options = {key: value for key, value in params.items() if key not in ("env_id", "seed")}
        if not isinstance(env_id, str) or not (seed is None or type(seed) is int):
            raise Wrong(INVALID_DATA, f"Parameters `{params}` are wrong")
        served = self._owner.handler.describe()["environments"]
        overridden = served == [GET_ENV]
        if overridden:
            options |= {"env_id": env_id} | ({"seed": seed} if seed is not None else {})
        elif env_id not in served:
            what = "not found" if _ID.fullmatch(env_id) else "is malformed"
            raise Wrong(INVALID_DATA, f"Environment `{env_id}` {what}")
        self._owner.forget_ended()
        holder, name = Holder(self._owner.handler, self.peer), secrets.token_hex(16)

        def made(fault: m.Fault | None) -> None:
            if fault is None:
                instance = Instance(
                    name, holder, None if overridden else seed, PROCESS_STEP in _names(holder), line=self
                )
                self._owner.instances[name] = instance
                if seed is not None:
                    holder.action_space.seed(seed)
                if self._transport is None:
                    holder.leave()
                self._answer(name)
            elif fault.code == "forbidden" or fault.exception == "TypeError":
                self._fail(f"Parameters `{params}` are wrong")
            else:
                self._fail(_unknown(fault))

        holder.open(GET_ENV if overridden else env_id, options, made)

    def reset(self, params: dict[str, Any]) -> None:
        """The first observation, as the text of a Python list."""
        instance = self._instance(params)

        def done(value: Observed | m.Fault) -> None:
            if isinstance(value, m.Fault):
                self._fail(self._reason(value, instance, _unknown(value)))
            else:
                instance.fresh = False
                space = instance.holder.observation_space
                self._answer(json_text.observation_text(space, value.observation))

        instance.holder.reset(instance.seed if instance.fresh else None, done)

    def step(self, params: dict[str, Any]) -> None:
        """One step; `render` renders first, as the original does."""
        instance = self._instance(params)
        action = params["action"]
        if params.get("render"):
            instance.holder.render(lambda _: None)
        elif type(action) is int and not instance.overridden:
            if len(self._steps) >= STEPS_KEPT:
                self._steps.clear()
            self._steps[self._raw] = instance, action
        self._step(instance, action)

    def _step(self, instance: Instance, action: Any) -> None:
        self._stepping = instance, action
        instance.line = self
        if instance.overridden:
            instance.holder.call("call", PROCESS_STEP, self._stepped, action)
        else:
            instance.holder.step(action, self._stepped)

    def _stepped(self, value: Stepped | m.Fault | list[Any]) -> None:
        assert self._stepping is not None
        if type(value) is Stepped:
            observation, reward, terminated, truncated, info = value
            seen = json_text.observation_text(self._stepping[0].holder.observation_space, observation)
            told = json_text.dumps(json_text.info_of(terminated, truncated, info)) if info or truncated else "{}"
            number = repr(reward) if type(reward) is float and math.isfinite(reward) else json_text.dumps(reward)
            self._answer(f"[{seen}, {number}, {'true' if terminated or truncated else 'false'}, {told}]")
        elif isinstance(value, m.Fault):
            instance, action = self._stepping
            self._steps.clear()
            self._fail(self._reason(value, instance, f"Action `{action}` is wrong"))
        else:
            self._answer(json_text.dumps(value))

    def close(self, params: dict[str, Any]) -> None:
        """The instance ends."""
        instance = self._instance(params)
        del self._owner.instances[instance.name]
        self._steps.clear()
        instance.holder.give_back(lambda _: self._answer("true"))

    def observation_space(self, params: dict[str, Any]) -> None:
        """What can be observed."""
        self._answer(json_text.dumps(describe(self._instance(params).holder.observation_space)))

    def action_space(self, params: dict[str, Any]) -> None:
        """What can be done."""
        self._answer(json_text.dumps(describe(self._instance(params).holder.action_space)))

    def action_sample(self, params: dict[str, Any]) -> None:
        """A random action."""
        space = self._instance(params).holder.action_space
        self._answer(json_text.dumps(json_text.plain_of(space, space.sample())))

    # ----------------------------------------------------------------------------------------------------- answers

    def _reason(self, fault: m.Fault, instance: Instance, reason: str) -> str:
        if fault.code != "lease_lost":
            return reason
        self._owner.instances.pop(instance.name, None)
        return f"Instance `{instance.name}` not found"

    def _answer(self, text: str) -> None:
        self._busy = False
        if self._transport is not None:
            self._transport.send(WSMsgType.TEXT, text.encode())
            self._advance()

    def _fail(self, reason: str) -> None:
        self._busy = False
        websocket.log.warning("gymie: %s closed: %s", self.peer.address, reason)
        self.end(INVALID_DATA, reason)


_ONE: Final = frozenset({"instance_id"})
# For each method the parameters that it knows (none: any), those that it needs, and the function.
_METHODS: Final[dict[str, tuple[frozenset[str], frozenset[str], Callable[[GymieLine, dict[str, Any]], None]]]] = {
    "make": (frozenset(), frozenset({"env_id"}), GymieLine.make),
    "reset": (_ONE, _ONE, GymieLine.reset),
    "step": (_ONE | {"action", "render"}, _ONE | {"action"}, GymieLine.step),
    "close": (_ONE, _ONE, GymieLine.close),
    "observation_space": (_ONE, _ONE, GymieLine.observation_space),
    "action_space": (_ONE, _ONE, GymieLine.action_space),
    "action_sample": (_ONE, _ONE, GymieLine.action_sample),
}


def _names(holder: Holder) -> tuple[str, ...]:
    assert holder.opened is not None
    return tuple(holder.opened.metadata.get("longrein.calls", ()))


def _unknown(fault: m.Fault) -> str:
    return f"Unknonwn error: {fault.message}"  # the original's spelling, by which its clients know it


def cut(reason: str) -> bytes:
    """As much of a reason as a close frame carries, whole characters only."""
    return reason.encode()[:REASON_BYTES].decode("utf-8", "ignore").encode()


def describe(space: gymnasium.Space[Any]) -> dict[str, Any]:
    """A space as Gymie tells it. Beyond the original: dtype, start, nvec, and the members of Tuple and Dict."""
    name = type(space).__name__
    match space:
        case gym_spaces.Box():
            low, high = space.low.tolist(), space.high.tolist()
            return {"name": name, "shape": list(space.shape), "low": low, "high": high, "dtype": str(space.dtype)}
        case gym_spaces.Discrete():
            start = {"start": int(space.start)} if space.start else {}
            return {"name": name, "n": int(space.n), **start}
        case gym_spaces.MultiBinary():
            return {
                "name": name,
                "n": space.n if isinstance(space.n, int) else list(space.n),
                "shape": list(space.shape),
            }
        case gym_spaces.MultiDiscrete():
            return {"name": name, "nvec": space.nvec.tolist(), "shape": list(space.shape)}
        case gym_spaces.Tuple():
            return {"name": name, "spaces": [describe(member) for member in space.spaces]}
        case gym_spaces.Dict():
            return {"name": name, "spaces": {key: describe(member) for key, member in space.spaces.items()}}
    return {"name": name}
