"""MultiServerRL 1.0: one environment behind six HTTP routes, each a POST of JSON that holds JSON. Both ends.

The body is a JSON text whose value is a text that holds JSON again, `"{\\"action\\": 1}"`: that is what existing
clients send and existing servers want. A server of ours takes a plain object too, and answers a seventh route, SPACES,
with which a client of ours learns what the format has no words for.
"""

from __future__ import annotations

import importlib
import json
import time
from typing import Any, Final

import gymnasium
import numpy as np

from longrein import errors
from longrein.link import messages as m
from longrein.link import spaces
from longrein.link.client import LinkOptions, link_options, persist, tls_context
from longrein.link.dialects import json_text
from longrein.link.protocol import error_of
from longrein.link.transports import Address, ConnectOptions, Listener, ListenOptions, http, parse_url
from longrein.link.transports.http import HttpConnection

RESET: Final = "/post_reset_request/"
STEP: Final = "/post_step_request/"
RENDER: Final = "/post_render_request/"
CLOSE: Final = "/post_close_request/"
SEED: Final = "/post_seed_request/"
STATE: Final = "/post_state_request/"
SPACES: Final = "/post_spaces_request/"

_IDLE_SECONDS: Final = 1.0  # a line that was idle for longer is looked at before it is used: the server may have left


def listen(address: Address, options: ListenOptions) -> Listener:
    """Serve one environment at these routes."""
    # By name and late: a client needs no server.
    half = importlib.import_module("longrein.link.dialects.multiserver_listener")
    listener: Listener = half.MultiServerListener(address, options)
    return listener


class MultiServerEnv(gymnasium.Env[Any, Any]):
    """An environment at an existing server of MultiServerRL.

    observation_space, action_space: needed where the server is the original, which tells neither.

    The format has no numbers, and the original closes the line after each answer: a step whose line breaks, or that
    times out, may or may not have been applied; the error says so, and it is not sent again.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(
        self,
        url: str,
        *,
        observation_space: gymnasium.Space[Any] | None = None,
        action_space: gymnasium.Space[Any] | None = None,
        secure: bool = False,
        link: LinkOptions | None = None,
        **options: Any,
    ) -> None:
        given, unknown = link_options(options)
        if unknown:
            raise errors.SpecError(
                next(iter(unknown)), "a MultiServerRL server takes no options from a client", hint="give them to it"
            )
        self.url = url
        self._link = link = link or given
        self._address, _ = parse_url(f"{'https' if secure else 'http'}://{url.partition('://')[2]}")
        self._options = ConnectOptions(
            timeout=min(link.wait, 10.0),
            max_message_bytes=link.max_message_bytes,
            ssl_context=tls_context(self._address, link),
        )
        self._connection: HttpConnection | None = None
        self._used = 0.0
        self._posted = ""
        self._closed = False
        self._dial(link.wait)
        if observation_space is None or action_space is None:
            told = self._told_spaces()
            observation_space = observation_space or told[0]
            action_space = action_space or told[1]
        self.observation_space = observation_space
        self.action_space = action_space

    def _told_spaces(self) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
        try:
            told = self._ask(SPACES)
        except errors.NotFound:
            raise errors.SpecError(
                "observation_space",
                f"the server at {self.url} cannot tell its spaces",
                hint="give observation_space=gymnasium.spaces.... and action_space=...",
            ) from None
        return spaces.space_from(told["observation_space"]), spaces.space_from(told["action_space"])

    # ------------------------------------------------------------------------------------------ Gymnasium's contract

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if not self._posted:
            self.post_reset(seed)
        return self._observed(self._answer(RESET)), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self._posted:
            self.post_step(action)
        answer = self._answer(STEP)
        info = answer.get("info")
        info = info if isinstance(info, dict) else {}
        terminated, truncated = json_text.ends_of(answer.get("done"), info)
        return self._observed(answer), float(answer.get("reward", "nan")), terminated, truncated, info

    def post_reset(self, seed: int | None) -> None:
        """Send a reset; `reset` takes its answer. The seed goes by a request of its own, as the format has it."""
        if seed is not None:
            self._ask(SEED, {"seed": seed})
        self._post(RESET, {})

    def post_step(self, action: Any) -> None:
        """Send a step; `step` takes its answer."""
        spaces.check(self.action_space, action)
        self._post(STEP, {"action": json_text.plain_of(self.action_space, action)})

    def render(self) -> Any:
        """A frame of the far side, uint8 [height, width, 3]."""
        return np.asarray(self._ask(RENDER, {"mode": "rgb_array"})["screen"], np.uint8)

    @property
    def state(self) -> Any:
        """The far environment's `state`, as plain values."""
        return self._ask(STATE)["state"]

    def close(self) -> None:
        """Close the far environment, and the line. May be called twice."""
        if self._closed:
            return
        try:
            if not self._posted and self._connection is not None and not self._connection.over:
                self._ask(CLOSE)
        except errors.LinkError:
            pass  # a server that is gone keeps nothing
        finally:
            self._closed = True
            self._drop()

    # ------------------------------------------------------------------------------------------------------ requests

    def _observed(self, answer: dict[str, Any]) -> Any:
        if "observation" not in answer:
            raise errors.RemoteProtocolError(f"an answer without an observation: {answer!r:.80}", url=self.url)
        return json_text.element_of(self.observation_space, answer["observation"])

    def _ask(self, route: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        self._post(route, params or {})
        return self._answer(route)

    def _post(self, route: str, params: dict[str, Any]) -> None:
        if self._closed:
            raise errors.LinkError("this environment is closed", url=self.url, hint="connect again")
        connection = self._connection
        if connection is not None and not connection.over and time.monotonic() - self._used > _IDLE_SECONDS:
            try:
                connection.receive(0)
            except errors.ConnectionClosed:
                pass  # it is over now
        if connection is None or connection.over:
            self._dial(self._link.reconnect)
        assert self._connection is not None
        self._connection.post(route, json_text.quick(json_text.dumps(params)))
        self._posted = route

    def _answer(self, route: str) -> dict[str, Any]:
        posted, self._posted = self._posted, ""
        if posted != route:
            raise errors.LocalProtocolError(f"{route} while {posted} has no answer", url=self.url)
        connection, timeout = self._connection, self._link.timeout
        assert connection is not None
        try:
            while not (body := connection.receive(timeout)):
                if body is None:
                    raise errors.LinkTimeout(
                        f"no answer to {route} within {timeout} s; it may still be applied",
                        seconds=timeout or 0.0,
                        url=self.url,
                        hint="give a longer timeout=...",
                    )
        except errors.LinkError:
            self._drop()
            raise
        self._used = time.monotonic()
        return self._read(connection.status, body, route)

    def _read(self, status: int, body: bytearray, route: str) -> dict[str, Any]:
        if status == 200:
            answer = json_text.loads(body, self.url)
            if isinstance(answer, dict):
                return answer
            raise errors.RemoteProtocolError(f"{route} was answered by {body[:80]!r}", url=self.url)
        try:
            told = json.loads(body)
            fault = m.Fault(
                "",
                0,
                str(told["error"]),
                str(told["message"]),
                applied=told.get("applied"),
                exception=str(told.get("exception", "")),
                traceback=str(told.get("traceback", "")),
                details=dict(told.get("details", {})),
            )
        except (ValueError, KeyError, TypeError):
            text = body[:300].decode("utf-8", "replace").strip()
            if status == 404:
                raise errors.NotFound(f"the server has no {route}", url=self.url) from None
            raise errors.RemoteEnvError(text, type=f"status {status}", applied=None, url=self.url) from None
        raise error_of(fault, self.url)

    def _dial(self, seconds: float) -> None:
        self._drop()
        self._connection = persist(
            lambda: http.connect(self._address, self._options, any_status=True), seconds, self._link.pause, self.url
        )
        self._used = time.monotonic()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self._posted = ""
        if connection is not None:
            connection.close()

    def __str__(self) -> str:
        return f"<MultiServerEnv at {self.url}>"


def connect(url: str, **options: Any) -> MultiServerEnv:
    """multiserver://host:18000 as an environment. Options: those of MultiServerEnv and of LinkOptions."""
    return MultiServerEnv(url, **options)


def spread(url: str, num_envs: int) -> list[str]:
    """Servers on consecutive ports, as `--count` starts them."""
    address, _ = parse_url(f"http://{url.partition('://')[2]}")
    host = f"[{address.host}]" if ":" in address.host else address.host
    return [f"multiserver://{host}:{(address.port or 18000) + index}" for index in range(num_envs)]
