"""MultiServerRL's server half: six routes of HTTP, and SPACES, over one lease of the server.

The rules of the format stand in `longrein.link.dialects.multiserver`. There is one environment at an address, and
whoever posts steps it: the format has no word for a client.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from longrein.errors import SpecError
from longrein.link import messages as m
from longrein.link import spaces
from longrein.link.dialects import json_text, multiserver
from longrein.link.dialects.holder import Holder, Observed, Stepped
from longrein.link.transports import Address, Handler, ListenOptions, Peer
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
    """One environment at one address."""

    def __init__(self, address: Address, options: ListenOptions) -> None:
        self.handler: Handler
        self._options = options
        self._holder: Holder | None = None
        self._observation: Any = None
        self._seed: int | None = None
        self._draws = True  # the environment was made to give frames
        self._turn = asyncio.Lock()
        work = {
            multiserver.RESET: self._reset,
            multiserver.STEP: self._step,
            multiserver.RENDER: self._render,
            multiserver.CLOSE: self._close_env,
            multiserver.SEED: self._take_seed,
            multiserver.STATE: self._state,
            multiserver.SPACES: self._spaces,
        }
        routes = [Route(path, self._endpoint(function), methods=["POST"]) for path, function in work.items()]
        app = Starlette(routes=routes, exception_handlers={404: _no_route, 405: _no_route})
        app.router.redirect_slashes = False  # the original answers 404, not a redirection that a POST would lose
        self._http = HttpListener(address, options, with_origins(app, options.allowed_origins))

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
        await self._http.start(handler)

    async def close(self) -> None:
        await self._http.close()

    # ------------------------------------------------------------------------------------------------- one request

    def _endpoint(self, work: Callable[..., Any]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                params = await self._params(request)
                async with self._turn:
                    answer = await work(params, request)
            except Failed as failed:
                return _failure(failed.fault)
            except ClientDisconnect:
                return Response(status_code=400)
            return Response(json_text.dumps(answer, compact=True), media_type="application/json")

        return endpoint

    async def _params(self, request: Request) -> dict[str, Any]:
        """The parameters in a body: JSON that holds JSON, or a plain object."""
        body, limit = bytearray(), self._options.max_message_bytes
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise Failed(m.Fault("", 0, "too_large", f"a body of more than {limit} bytes"))
        try:
            params = json.loads(body) if body else {}
            params = json.loads(params) if isinstance(params, str) else params
        except (ValueError, RecursionError) as error:
            raise Failed(m.Fault("", 0, "bad_message", f"the body is no JSON: {error}")) from None
        if not isinstance(params, dict):
            raise Failed(m.Fault("", 0, "bad_message", f"the body is no JSON object but {type(params).__name__}"))
        return params

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

    async def _held(self, request: Request) -> Holder:
        """The lease; a new one where there is none, or where the server has ended it."""
        if self._holder is not None and self.handler.holds(self._holder.name):
            return self._holder
        peer = Peer(f"{request.client.host}:{request.client.port}" if request.client else "")
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

    async def _reset(self, params: dict[str, Any], request: Request) -> dict[str, Any]:
        unknown = sorted(set(params) - {"seed", "options"})
        if unknown:
            raise Failed(m.Fault("", 0, "bad_message", f"reset takes seed and options, not {unknown[0]!r}"))
        holder = await self._held(request)
        seed, self._seed = params.get("seed", self._seed), None
        if not (seed is None or type(seed) is int):
            raise Failed(m.Fault("", 0, "bad_message", f"the seed is {seed!r}, not a whole number"))
        observed: Observed = await self._ask(lambda done: holder.reset(seed, done, params.get("options")))
        self._observation = observed.observation
        return {"observation": self._plain(holder)}

    async def _step(self, params: dict[str, Any], request: Request) -> dict[str, Any]:
        if set(params) != {"action"}:
            raise Failed(m.Fault("", 0, "bad_message", f"step takes action, and got {sorted(params) or 'nothing'}"))
        holder = await self._held(request)
        stepped: Stepped = await self._ask(holder.step, params["action"])
        self._observation = stepped.observation
        return {
            "observation": self._plain(holder),
            "reward": stepped.reward,
            "done": stepped.terminated or stepped.truncated,
            "info": json_text.info_of(stepped.terminated, stepped.truncated, stepped.info),
        }

    async def _render(self, params: dict[str, Any], request: Request) -> dict[str, Any]:
        holder, mode = await self._held(request), params.get("mode", "rgb_array")
        if mode != "rgb_array":
            raise Failed(m.Fault("", 0, "bad_message", f"the mode is {mode!r}: a server gives rgb_array, no window"))
        frame = await self._ask(holder.render) if self._draws else None
        if not isinstance(frame, np.ndarray):
            name = holder.opened.spec.get("id") if holder.opened is not None else ""
            raise Failed(m.Fault("", 0, "not_found", f"{name} gives no frames"))
        return {"screen": frame}

    async def _close_env(self, params: dict[str, Any], request: Request) -> dict[str, Any]:
        if "seed" in params:  # the original's client posts its seed here, and its server then fails
            return await self._take_seed(params, request)
        holder, self._holder = self._holder, None
        if holder is not None and self.handler.holds(holder.name):
            await self._ask(holder.give_back)
        return {"success": True}

    async def _take_seed(self, params: dict[str, Any], request: Request) -> dict[str, Any]:
        if type(params.get("seed")) is not int:
            raise Failed(m.Fault("", 0, "bad_message", f"the seed is {params.get('seed')!r}, not a whole number"))
        self._seed = params["seed"]
        return {"success": True}

    async def _state(self, params: dict[str, Any], request: Request) -> dict[str, Any]:
        holder = await self._held(request)
        try:
            return {"state": await self._ask(lambda done: holder.call("get", "state", done))}
        except Failed as failed:
            if failed.fault.code != "not_found":
                raise
        return {"state": None if self._observation is None else self._plain(holder)}

    async def _spaces(self, params: dict[str, Any], request: Request) -> dict[str, Any]:
        holder = await self._held(request)
        return {
            "observation_space": spaces.describe(holder.observation_space),
            "action_space": spaces.describe(holder.action_space),
        }

    def _plain(self, holder: Holder) -> Any:
        return json_text.plain_of(holder.observation_space, self._observation)


def _failure(fault: m.Fault) -> Response:
    told = {
        "error": fault.code, "message": fault.message, "exception": fault.exception, "traceback": fault.traceback,
        "applied": fault.applied, "details": fault.details,
    }  # fmt: skip
    status = _STATUS.get(fault.code, 500)
    return Response(json_text.dumps(told, compact=True), status, media_type="application/json")


async def _no_route(request: Request, error: Exception) -> Response:
    known = ", ".join(getattr(multiserver, n) for n in ("RESET", "STEP", "RENDER", "CLOSE", "SEED", "STATE", "SPACES"))
    text = f"{request.method} {request.url.path}: this server takes POST at {known}, each with its last slash"
    return Response(json.dumps({"error": "no_route", "message": text}), 404, media_type="application/json")
