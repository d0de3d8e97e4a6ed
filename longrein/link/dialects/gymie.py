"""Gymie 0.5: JSON text frames over a WebSocket at /gym, strictly in order, with no request numbers. Both ends.

A frame is `{"method": ..., "params": {...}}`, and the next frame from the other side answers it. `make` is answered by
a bare instance id, everything else by JSON; an error closes the WebSocket, with its code and its text. An instance
outlives the WebSocket: whoever knows its id may use it on another.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

import gymnasium
import numpy as np
from gymnasium import spaces as gym_spaces

from longrein import errors
from longrein.link import spaces
from longrein.link.client import LinkOptions, link_options, persist, query_options
from longrein.link.dialects import json_text
from longrein.link.transports import Address, ConnectOptions, Listener, ListenOptions, parse_url, websocket
from longrein.link.transports.websocket import WebSocketConnection

PATH: Final = "/gym"
_STEPS_KEPT: Final = 256
INVALID_MESSAGE, INVALID_DATA = 1003, 1007  # the two close codes of the original


def listen(address: Address, options: ListenOptions) -> Listener:
    """Listen for Gymie's clients."""
    # By name and late: a client needs no server.
    half = importlib.import_module("longrein.link.dialects.gymie_listener")
    listener: Listener = half.GymieListener(address, options)
    return listener


class GymieEnv(gymnasium.Env[Any, Any]):
    """An environment at an existing Gymie server.

    The format has no numbers: an answer that is late cannot be told from the next one. So a request that times out, or
    whose line breaks, costs the line, and whether its step was applied is unknown; the instance lives on at the server,
    and the next request uses it on a new line.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        url: str,
        *,
        link: LinkOptions | None = None,
        seed: int | None = None,
        observation_space: gymnasium.Space[Any] | None = None,
        action_space: gymnasium.Space[Any] | None = None,
        **env_options: Any,
    ) -> None:
        given, env_options = link_options(env_options)
        self.url = url
        self._link = link = link or given
        address = server_address(url)
        self._env_id, self._address = address.env, address
        if not self._env_id:
            raise errors.SpecError("url", f"{url} names no environment", hint="gymie://host:5000/CartPole-v1")
        self._connect_options = ConnectOptions(
            timeout=min(link.wait, 10.0), max_message_bytes=link.max_message_bytes, path=PATH
        )
        self._make_options = query_options(address) | env_options
        self._connection: WebSocketConnection | None = None
        self._awaited = ""  # the method of a request that has no answer yet
        self._instance = ""
        self._steps: dict[int, bytes] = {}  # the requests of numbered actions: the same bytes every time
        self._dial(link.wait)
        self._make(seed)
        self.observation_space = self._space("observation_space", observation_space)
        self.action_space = self._space("action_space", action_space)

    def _space(self, name: str, given: gymnasium.Space[Any] | None) -> gymnasium.Space[Any]:
        if given is not None:
            return given
        plain = self._ask(name)
        found = space_from(plain)
        if found is None:
            raise errors.SpecError(
                name, f"the server only tells that it is {plain!r}", hint=f"give {name}=gymnasium.spaces...."
            )
        return found

    # ------------------------------------------------------------------------------------------ Gymnasium's contract

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """With a seed a new instance is made, since Gymie takes a seed there and nowhere else."""
        super().reset(seed=seed)
        if not self._awaited:
            self.post_reset(seed)
        return json_text.element_of(self.observation_space, self._answer("reset")), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self._awaited:
            self.post_step(action)
        answer = self._answer("step")
        if not isinstance(answer, list) or len(answer) != 4 or not isinstance(answer[3], dict):
            raise errors.RemoteProtocolError(f"a step was answered by {answer!r:.80}", url=self.url)
        observation, reward, done, info = answer
        terminated, truncated = json_text.ends_of(done, info)
        return json_text.element_of(self.observation_space, observation), float(reward), terminated, truncated, info

    def post_reset(self, seed: int | None) -> None:
        """Send a reset; `reset` takes its answer."""
        if seed is not None:
            old = self._instance
            self._make(seed)
            self._ask("close", instance=old)
        self._post("reset", instance_id=self._instance)

    def post_step(self, action: Any) -> None:
        """Send a step; `step` takes its answer."""
        known = self._steps.get(int(action)) if isinstance(action, (int, np.integer)) else None
        if known is not None:
            self._send("step", known)
            return
        spaces.check(self.action_space, action)
        plain = json_text.plain_of(self.action_space, action)
        request = json_text.quick({"method": "step", "params": {"instance_id": self._instance, "action": plain}})
        if type(plain) is int and len(self._steps) < _STEPS_KEPT:
            self._steps[plain] = request
        self._send("step", request)

    def close(self) -> None:
        """Close the instance at the server, and the line. May be called twice."""
        if getattr(self, "_connection", None) is not None:
            try:
                if not self._awaited and self._instance:
                    self._ask("close")
            except errors.LinkError:
                pass  # a server that is gone keeps nothing
            finally:
                self._drop()
        self._instance = ""
        self._steps.clear()

    def action_sample(self) -> Any:
        """An action drawn by the server."""
        return json_text.element_of(self.action_space, self._ask("action_sample"))

    # --------------------------------------------------------------------------------------------------- the line

    def _make(self, seed: int | None) -> None:
        params = {"env_id": self._env_id, **self._make_options} | ({"seed": seed} if seed is not None else {})
        self._post("make", **params)
        self._instance = self._receive().decode("utf-8", "replace")
        self._steps.clear()

    def _ask(self, method: str, instance: str = "") -> Any:
        self._post(method, instance_id=instance or self._instance)
        return self._answer(method)

    def _answer(self, method: str) -> Any:
        if self._awaited != method:
            raise errors.LocalProtocolError(f"{method} while {self._awaited} has no answer", url=self.url)
        return json_text.loads(self._receive(), self.url)

    def _post(self, method: str, **params: Any) -> None:
        if not self._instance and method != "make":
            raise errors.LinkError("this environment is closed", url=self.url, hint="connect again")
        self._send(method, json_text.quick({"method": method, "params": params}))

    def _send(self, method: str, request: bytes) -> None:
        if self._connection is None:
            self._dial(self._link.reconnect)
        assert self._connection is not None
        self._awaited = method
        try:
            self._connection.send(request)
        except errors.ConnectionClosed as error:
            raise self._lost(error) from None

    def _receive(self) -> bytearray:
        assert self._connection is not None
        timeout = self._link.timeout
        try:
            while not (found := self._connection.receive(timeout)):
                if found is None:
                    raise errors.LinkTimeout(
                        f"no answer to {self._awaited} within {timeout} s; it may still be applied",
                        seconds=timeout or 0.0,
                        url=self.url,
                        hint="give a longer timeout=...",
                    )
        except errors.ConnectionClosed as error:
            raise self._lost(error) from None
        except errors.LinkError:
            self._drop()
            raise
        self._awaited = ""
        return found

    def _lost(self, error: errors.ConnectionClosed) -> errors.Error:
        """What a line that ended in the middle of a request stands for: often the server's word for an error."""
        awaited = self._awaited
        self._drop()
        if error.code not in (INVALID_MESSAGE, INVALID_DATA):
            return error
        said = error.said
        if said.startswith("Instance"):
            return errors.LeaseLost(said, url=self.url, hint="the server restarted or reaped it: connect again")
        if said.startswith("Environment"):
            return errors.NotFound(said, url=self.url, hint="is the id right, and known to the server's gym?")
        if awaited in ("step", "reset", "make") and not said.startswith("Param"):
            kind = "WrongAction" if said.startswith("Action") else "Exception"
            return errors.RemoteEnvError(said, type=kind, applied=None, url=self.url)
        return errors.RemoteProtocolError(said, url=self.url)

    def _dial(self, seconds: float) -> None:
        self._connection = persist(
            lambda: websocket.connect(self._address, self._connect_options), seconds, self._link.pause, self.url
        )

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self._awaited = ""
        if connection is not None:
            connection.close()

    def __str__(self) -> str:
        return f"<GymieEnv {self._env_id} at {self.url}>"


def server_address(url: str) -> Address:
    """The WebSocket of a gymie:// URL; the environment's id is its path."""
    address, _ = parse_url("ws://" + url.partition("://")[2])
    return address


def connect(url: str, **options: Any) -> GymieEnv:
    """gymie://host:5000/ENV_ID as an environment. Options: those of LinkOptions, `seed`, `observation_space`,
    `action_space`; all others go to the server's `make`."""
    return GymieEnv(url, **options)


def spread(url: str, num_envs: int) -> list[str]:
    """An instance for each environment, each on a line of its own, since a line answers in order."""
    return [url] * num_envs


def space_from(plain: Any) -> gymnasium.Space[Any] | None:
    """The space that such a description tells; None where it does not tell enough."""
    match plain:
        case {"name": "Box", "shape": shape, "low": low, "high": high}:
            dtype = plain.get("dtype", "float32")
            lows, highs = (np.asarray(bound, np.float64).astype(dtype).reshape(shape) for bound in (low, high))
            return gym_spaces.Box(lows, highs, tuple(shape), dtype)
        case {"name": "Discrete", "n": n}:
            return gym_spaces.Discrete(n, start=plain.get("start", 0))
        case {"name": "MultiBinary", "n": n}:
            return gym_spaces.MultiBinary(n)
        case {"name": "MultiDiscrete", "nvec": nvec}:
            return gym_spaces.MultiDiscrete(nvec)
        case {"name": "Tuple", "spaces": [*members]}:
            known = [space for space in map(space_from, members) if space is not None]
            return gym_spaces.Tuple(known) if len(known) == len(members) else None
        case {"name": "Dict", "spaces": {**named}}:
            found = {str(key): space for key, one in named.items() if (space := space_from(one)) is not None}
            return gym_spaces.Dict(found) if len(found) == len(named) else None
    return None
