"""MultiServerRL's server half: six routes of HTTP, and SPACES, over one lease of the server.

The rules of the format stand in `longrein.link.dialects.multiserver`. There is one environment at an address, and
whoever posts steps it: the format has no word for a client.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from longrein.errors import SpecError
from longrein.link import messages as m
from longrein.link import spaces
from longrein.link.dialects import json_text, multiserver
from longrein.link.dialects.holder import Holder, Observed, Stepped
from longrein.link.transports import Address, Buffer, Handler, ListenOptions, Peer
from longrein.link.transports.http_app import with_origins
from longrein.link.transports.http_listener import HttpListener

log = logging.getLogger("longrein.server")

_STATUS: Final = {
    "bad_message": 400, "invalid_action": 400, "bad_space": 400, "reset_needed": 409, "out_of_turn": 409,
    "not_found": 404, "forbidden": 403, "too_large": 413, "capacity": 503, "draining": 503, "lease_lost": 503,
}  # fmt: skip


class Failed(Exception):
    """A request that is answered with a fault; it never leaves this module."""

    def __init__(self, fault: m.Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class MultiServerListener:
    """One environment at one address. To the HTTP transport it is the handler of the seven routes."""

    def __init__(self, address: Address, options: ListenOptions) -> None:
        self.handler: Handler
        self._holder: Holder | None = None
        self._observation: Any = None
        self._seed: int | None = None
        self._draws = True  # the environment was made to give frames
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._work: dict[str, Callable[[dict[str, Any], Peer], Coroutine[Any, Any, dict[str, Any]]]] = {
            multiserver.RESET: self._reset,
            multiserver.STEP: self._step,
            multiserver.RENDER: self._render,
            multiserver.CLOSE: self._close_env,
            multiserver.SEED: self._take_seed,
            multiserver.STATE: self._state,
            multiserver.SPACES: self._spaces,
        }
        app = Starlette(exception_handlers={404: _no_route})
        routes = {path.encode(): path for path in self._work}
        self._http = HttpListener(address, options, routes, with_origins(app, options.allowed_origins))

    @property
    def url(self) -> str:
        return self._http.url

    async def start(self, handler: Handler) -> None:
        self.handler = handler
        served = handler.describe()["environments"]
        if len(served) != 1:
            raise SpecError(
                "env",
                f"multiserver has one environment at an address, {len(served)} were given",
                hint="start one server each; --count N starts copies of one on consecutive ports",
            )
        await self._http.start(self)  # type: ignore[arg-type]  # of a Handler it needs what concerns lines alone

    async def close(self) -> None:
        await self._http.close()
        for task in list(self._tasks):
            task.cancel()

    # ------------------------------------------------------------------------------------------------- one request

    def received(self, line: Any, body: Buffer) -> None:
        """A POST to one of the routes."""
        route = line.head.kind
        try:
            params = params_of(bytes(body))
        except Failed as failed:
            line.reply(*_failure(failed.fault))
            return
        holder = self._holder
        held = holder is not None and not self._tasks and self.handler.holds(holder.name)
        if holder is not None and held and route == multiserver.STEP and set(params) == {"action"}:
            # The way of nearly every request, without a task of its own.
            holder.step(params["action"], functools.partial(self._stepped, line, holder))
            return
        task = asyncio.get_running_loop().create_task(self._answer(line, route, params))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def lost(self, line: Any) -> None:
        """A line ended; the environment is nobody's in particular, and stays."""

    def _stepped(self, line: Any, holder: Holder, value: Stepped | m.Fault) -> None:
        if isinstance(value, m.Fault):
            line.reply(*_failure(value))
        else:
            line.reply(200, json_text.dumps(self._moment(holder, value), compact=True).encode())

    async def _answer(self, line: Any, route: str, params: dict[str, Any]) -> None:
        try:
            async with self._turn:
                answer = await self._work[route](params, line.peer)
        except Failed as failed:
            line.reply(*_failure(failed.fault))
            return
        line.reply(200, json_text.dumps(answer, compact=True).encode())

    async def _ask(self, request: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
        """What a request to the holder gives. Raises Failed."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(value: Any) -> None:
            if not answer.done():  # the client may have gone
                answer.set_result(value)

        request(*args, done, **kwargs)
        value = await answer
        if isinstance(value, m.Fault):
            raise Failed(value)
        return value

    async def _held(self, peer: Peer) -> Holder:
        """The lease; a new one where there is none, or where the server has ended it."""
        if self._holder is not None and self.handler.holds(self._holder.name):
            return self._holder
        for options in ({"render_mode": "rgb_array"}, {}):
            holder = Holder(self.handler, peer)
            self._draws = bool(options)
            try:
                await self._ask(holder.open, "", options)
            except Failed as failed:
                if not options or failed.fault.code not in ("forbidden", "env_error"):
                    raise
                log.info("%s is served without frames: %s", self.url, failed.fault.message)
                continue
            break
        self._holder, self._observation = holder, None
        return holder

    # --------------------------------------------------------------------------------------------------- the routes

    async def _reset(self, params: dict[str, Any], peer: Peer) -> dict[str, Any]:
        unknown = sorted(set(params) - {"seed", "options"})
        if unknown:
            raise Failed(m.Fault("", 0, "bad_message", f"reset takes seed and options, not {unknown[0]!r}"))
        holder = await self._held(peer)
        seed, self._seed = params.get("seed", self._seed), None
        if not (seed is None or type(seed) is int):
            raise Failed(m.Fault("", 0, "bad_message", f"the seed is {seed!r}, not a whole number"))
        observed: Observed = await self._ask(lambda done: holder.reset(seed, done, params.get("options")))
        self._observation = observed.observation
        return {"observation": self._plain(holder)}

    async def _step(self, params: dict[str, Any], peer: Peer) -> dict[str, Any]:
        if set(params) != {"action"}:
            raise Failed(m.Fault("", 0, "bad_message", f"step takes action, and got {sorted(params) or 'nothing'}"))
        holder = await self._held(peer)
        return self._moment(holder, await self._ask(holder.step, params["action"]))

    def _moment(self, holder: Holder, stepped: Stepped) -> dict[str, Any]:
        self._observation = stepped.observation
        return {
            "observation": self._plain(holder),
            "reward": stepped.reward,
            "done": stepped.terminated or stepped.truncated,
            "info": json_text.info_of(stepped.terminated, stepped.truncated, stepped.info),
        }

    async def _render(self, params: dict[str, Any], peer: Peer) -> dict[str, Any]:
        holder, mode = await self._held(peer), params.get("mode", "rgb_array")
        if mode != "rgb_array":
            raise Failed(m.Fault("", 0, "bad_message", f"the mode is {mode!r}: a server gives rgb_array, no window"))
        frame = await self._ask(holder.render) if self._draws else None
        if not isinstance(frame, np.ndarray):
            name = holder.opened.spec.get("id") if holder.opened is not None else ""
            raise Failed(m.Fault("", 0, "not_found", f"{name} gives no frames"))
        return {"screen": frame}

    async def _close_env(self, params: dict[str, Any], peer: Peer) -> dict[str, Any]:
        if "seed" in params:  # the original's client posts its seed here, and its server then fails
            return await self._take_seed(params, peer)
        holder, self._holder = self._holder, None
        if holder is not None and self.handler.holds(holder.name):
            await self._ask(holder.give_back)
        return {"success": True}

    async def _take_seed(self, params: dict[str, Any], peer: Peer) -> dict[str, Any]:
        if type(params.get("seed")) is not int:
            raise Failed(m.Fault("", 0, "bad_message", f"the seed is {params.get('seed')!r}, not a whole number"))
        self._seed = params["seed"]
        return {"success": True}

    async def _state(self, params: dict[str, Any], peer: Peer) -> dict[str, Any]:
        holder = await self._held(peer)
        try:
            return {"state": await self._ask(lambda done: holder.call("get", "state", done))}
        except Failed as failed:
            if failed.fault.code != "not_found":
                raise
        return {"state": None if self._observation is None else self._plain(holder)}

    async def _spaces(self, params: dict[str, Any], peer: Peer) -> dict[str, Any]:
        holder = await self._held(peer)
        return {
            "observation_space": spaces.describe(holder.observation_space),
            "action_space": spaces.describe(holder.action_space),
        }

    def _plain(self, holder: Holder) -> Any:
        return json_text.plain_of(holder.observation_space, self._observation)


def params_of(body: bytes) -> dict[str, Any]:
    """The parameters in a body: JSON that holds JSON, or a plain object. Raises Failed."""
    try:
        params = json_text.parse(body) if body else {}
        params = json_text.parse(params) if isinstance(params, str) else params
    except (ValueError, RecursionError) as error:
        raise Failed(m.Fault("", 0, "bad_message", f"the body is no JSON: {error}")) from None
    if not isinstance(params, dict):
        raise Failed(m.Fault("", 0, "bad_message", f"the body is no JSON object but {type(params).__name__}"))
    return params


def _failure(fault: m.Fault) -> tuple[int, bytes]:
    told = {
        "error": fault.code, "message": fault.message, "exception": fault.exception, "traceback": fault.traceback,
        "applied": fault.applied, "details": fault.details,
    }  # fmt: skip
    return _STATUS.get(fault.code, 500), json_text.dumps(told, compact=True).encode()


async def _no_route(request: Request, error: Exception) -> Response:
    known = ", ".join(getattr(multiserver, n) for n in ("RESET", "STEP", "RENDER", "CLOSE", "SEED", "STATE", "SPACES"))
    text = f"{request.method} {request.url.path}: this server takes POST at {known}, each with its last slash"
    return Response(json.dumps({"error": "no_route", "message": text}), 404, media_type="application/json")
