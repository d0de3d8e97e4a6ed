"""The ASGI application for all that is not a step: health, metrics, the description of the paths, a page, preflights.

It also answers the paths that carry messages, since a connection that was handed over to it stays with it. The one
place that knows uvicorn's inside is `_uvicorn_protocol`.
"""

from __future__ import annotations

import asyncio
import html
import json
from collections.abc import Callable
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longrein.link.transports import Buffer, Handler, Line, ListenOptions, Peer, http_json
from longrein.link.transports.http_framing import HEAD_BYTES
from longrein.link.transports.http_openapi import describe_paths

KEEP_ALIVE_SECONDS: Final = 75
REQUEST_SECONDS: Final = 30.0
"""Within this time a request must be whole."""

_PEER: Final = "longrein.peer"


class Application:
    """The application of one listener, and the connections that were handed over to it."""

    def __init__(self, app: ASGIApp, loop: asyncio.AbstractEventLoop) -> None:
        self._new_protocol, self._state = _uvicorn_protocol(app, loop)

    def take_over(self, transport: asyncio.Transport, peer: Peer, data: bytes) -> None:
        """Serve this connection from now on; `data` came already and was not taken."""
        protocol = self._new_protocol(peer)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if data:
            protocol.data_received(data)

    def close(self) -> None:
        """End all connections that were handed over."""
        for connection in list(self._state.connections):
            connection.transport.close()


def _uvicorn_protocol(app: ASGIApp, loop: asyncio.AbstractEventLoop) -> tuple[Callable[[Peer], asyncio.Protocol], Any]:
    """A maker of uvicorn's protocol around `app`, and the state in which uvicorn keeps the open connections.

    uvicorn's protocol bounds neither a head nor the time that a request takes: the class here does. Nor does it tell an
    answer that is underway that the connection has ended, when another request came behind it: the answer is then
    written to a closed transport, which uvloop takes for an error, and logs at length.
    """
    from uvicorn.config import Config
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
    from uvicorn.server import ServerState

    class BoundedProtocol(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None
        _in_head = False
        _unread = 0  # bytes of a head (or of trailers) that came so far
        _answering: RequestResponseCycle | None = None

        def data_received(self, data: bytes) -> None:
            self._unread += len(data)
            super().data_received(data)
            if self._in_head and self._unread > HEAD_BYTES:
                self._end()

        def on_message_begin(self) -> None:
            self._in_head, self._unread = True, 0
            self._cancel()
            self._deadline = loop.call_later(REQUEST_SECONDS, self._expire)
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            self._unread += len(name) + len(value)
            if self._unread > 2 * HEAD_BYTES:
                raise ValueError("too many headers")  # the parser makes it an HttpParserError, and uvicorn a 400
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._in_head, self._unread = False, 0
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._cancel()
            super().on_message_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            self._end()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            super().send_400_response(msg)
            self._end()

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
            self._answering = cycle
            super()._start_asgi_task(cycle, app)

        def _expire(self) -> None:
            if self.flow.read_paused:  # we do not read: not the client's fault
                self._deadline = loop.call_later(REQUEST_SECONDS, self._expire)
            else:
                self._end()

        def _unsupported_upgrade_warning(self) -> None:
            """An upgrade is only an offer; uvicorn's advice to install a WebSocket library would mislead."""

        def _end(self) -> None:
            for cycle in (self._answering, self.cycle):
                if cycle is not None:
                    cycle.disconnected = True
                    cycle.message_event.set()
            self.transport.close()

        def _cancel(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    config = Config(
        app, loop="none", ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
        server_header=False, date_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )  # fmt: skip
    config.load()
    state = ServerState()

    def new_protocol(peer: Peer) -> asyncio.Protocol:
        # The state comes back in each request's scope: the way to tell the application what TLS knows of the client.
        return BoundedProtocol(config=config, server_state=state, app_state={_PEER: peer}, _loop=loop)

    return new_protocol, state


def make_app(handler: Handler, options: ListenOptions) -> ASGIApp:
    """The application: an ASGI callable that needs no lifespan."""
    description: list[Response] = []

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(request: Request) -> Response:
        return PlainTextResponse("ready\n") if handler.ready else PlainTextResponse("draining\n", 503)

    async def metrics(request: Request) -> Response:
        return Response(handler.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(request: Request) -> Response:
        if not description:
            description.append(JSONResponse(describe_paths()))
        return description[0]

    async def index(request: Request) -> Response:
        return HTMLResponse(_page(handler.describe()), headers={"Content-Security-Policy": _POLICY})

    async def message(request: Request) -> Response:
        return await _answer(request, handler, options.max_message_bytes)

    routes = [
        Route("/", index),
        Route("/healthz", health),
        Route("/readyz", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        *(Route(path.decode(), message, methods=["POST"]) for path in http_json.PATHS),
    ]
    return with_origins(Starlette(routes=routes), options.allowed_origins)


# ------------------------------------------------------------------------------------------------------- messages


class AppLine:
    """One request that waits for its answer."""

    persistent: bool = False
    hears: bool = False

    def __init__(self, peer: Peer, answer: asyncio.Future[bytes | None]) -> None:
        self.peer = peer
        self._answer = answer

    def route(self, lease: str) -> str:
        """The path is the same for all."""
        return ""

    def send(self, message: Buffer, *, final: bool = True) -> None:
        """Answer. ASGI has no word for a 102: what is not final is dropped."""
        if final and not self._answer.done():
            self._answer.set_result(bytes(message))

    def close(self, reason: str = "") -> None:
        """Give up the request: it is answered with 503, and the connection ends."""
        if not self._answer.done():
            self._answer.set_result(None)


async def _answer(request: Request, handler: Handler, limit: int) -> Response:
    """Have a message answered by the handler, as `http_server` does."""
    kind = http_json.PATHS[request.url.path.encode()]
    try:
        body = await _body(request, limit)
    except ClientDisconnect:
        return Response(status_code=400)
    if body is None:
        text = f"more than {limit} bytes\n"
        return PlainTextResponse(text, 413, {"Connection": "close"})
    try:
        if not body and not kind:
            raise http_json.BadBody("the body is empty: it must be one message")
        whole = http_json.to_message(kind, body, dict(request.headers.raw)) if kind else body
    except http_json.BadBody as error:
        return _reply(kind, http_json.fault("bad_message", str(error)))
    waiting: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
    line: Line = AppLine(_peer(request), waiting)
    handler.received(line, whole)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    either: set[asyncio.Future[Any]] = {waiting, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not waiting.done():
            waiting.cancel()
            handler.lost(line)
    answer = None if waiting.cancelled() else waiting.result()
    if answer is None:
        if not waiting.cancelled():
            handler.lost(line)
        return PlainTextResponse("the server gave up this request\n", 503, {"Connection": "close"})
    return _reply(kind, answer)


def _reply(kind: str, answer: bytes) -> Response:
    text = answer.startswith(b"{")
    status = http_json.status_of(answer) if kind and text else 200
    return Response(answer, status, media_type="application/json" if text else "application/vnd.longrein")


async def _body(request: Request, limit: int) -> bytearray | None:
    """The body, or None where it is over the limit."""
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        return None
    body = bytearray()
    async for part in request.stream():
        if len(body) + len(part) > limit:
            return None
        body += part
    return body


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _peer(request: Request) -> Peer:
    known: Peer = request.scope["state"][_PEER]
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return Peer(known.address, token.strip(), known.certificate) if scheme.lower() == "bearer" else known


# -------------------------------------------------------------------------------------------------------- origins

_METHODS: Final = b"GET, HEAD, POST, OPTIONS"
_HEADERS: Final = b"authorization, content-type, longrein-lease, longrein-epoch, longrein-number, longrein-interim"


def with_origins(app: ASGIApp, allowed: tuple[str, ...]) -> ASGIApp:
    """Turn away browsers of origins that are not allowed, and answer the preflights of those that are.

    Starlette's own middleware lets a foreign origin's request pass and only hides the answer: a step would be taken.
    """

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        origin = headers.get(b"origin")
        if origin is None:
            await app(scope, receive, send)
            return
        if "*" not in allowed and origin.decode("latin-1") not in allowed:
            text = f"the origin {origin.decode('latin-1')[:200]} is not allowed here"
            await PlainTextResponse(text, 403, {"Connection": "close"})(scope, receive, send)
            return
        cross = [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            response = Response(status_code=204)
            response.raw_headers += [
                *cross,
                (b"access-control-allow-methods", _METHODS),
                (b"access-control-allow-headers", _HEADERS),
                (b"access-control-max-age", b"600"),
            ]
            await response(scope, receive, send)
            return

        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *cross]
            await send(message)

        await app(scope, receive, send_with)

    return guarded


# ----------------------------------------------------------------------------------------------------------- page

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def _page(description: dict[str, Any]) -> str:
    text = html.escape(json.dumps(description, indent=2, default=str))
    links = "".join(
        f'<li><a href="{path}">{path}</a>: {what}</li>'
        for path, what in (
            ("/healthz", "200 while the process lives"),
            ("/readyz", "200 while new leases are taken, 503 while draining"),
            ("/metrics", "counters, for Prometheus"),
            ("/openapi.json", "the paths for curl and browsers, in OpenAPI 3.1"),
        )
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>longrein</title>'
        "<style>body{font-family:sans-serif;max-width:50em;margin:2em auto}</style>"
        "<h1>A longrein server</h1><p>It serves reinforcement learning environments. In Python: "
        '<code>longrein.connect("http://HOST:PORT/ENVIRONMENT")</code>.</p>'
        f"<ul>{links}</ul><pre>{text}</pre></html>\n"
    )
