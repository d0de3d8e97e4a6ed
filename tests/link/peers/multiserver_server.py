"""An original-style MultiServerRL server on wsgiref, written from the fact sheet alone."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import gymnasium
import numpy as np


class OldApi:
    """An unwrapped gymnasium environment (no step limit) with the calls of the old gym."""

    def __init__(self, env_id: str) -> None:
        self.env: Any = gymnasium.make(env_id, disable_env_checker=True).unwrapped
        self.next_seed: int | None = None

    def seed(self, seed: int | None = None) -> None:
        self.next_seed = seed

    def reset(self) -> Any:
        seed, self.next_seed = self.next_seed, None
        return self.env.reset(seed=seed)[0]

    def step(self, action: Any) -> tuple[Any, Any, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, bool(terminated or truncated), info

    def render(self, mode: str = "human") -> Any:
        if mode == "human":
            return None
        self.env.render_mode = mode
        return self.env.render()

    def close(self) -> None:
        self.env.close()


class OldMultiServer:
    """The six routes on one environment, and what came in: (method, path, raw body) of each request."""

    def __init__(self, env_id: str) -> None:
        self.port = 0
        self.received: list[tuple[str, str, bytes]] = []
        self.env = OldApi(env_id)
        names = ("reset", "step", "render", "close", "seed", "state")
        self.routes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            f"/post_{name}_request/": getattr(self, "post_" + name) for name in names
        }

    def post_reset(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"observation": self.env.reset(**params).tolist()}

    def post_step(self, params: dict[str, Any]) -> dict[str, Any]:
        observation, reward, done, info = self.env.step(**params)
        return {"observation": observation.tolist(), "reward": reward, "done": done, "info": info}

    def post_render(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"screen": self.env.render(**params).tolist()}  # mode human: None has no tolist, hence a 500

    def post_close(self, params: dict[str, Any]) -> dict[str, Any]:
        self.env.close(**params)
        return {"success": True}

    def post_seed(self, params: dict[str, Any]) -> dict[str, Any]:
        self.env.seed(**params)
        return {"success": True}

    def post_state(self, params: dict[str, Any]) -> dict[str, Any]:
        state = self.env.env.state
        return {"state": None if state is None else np.asarray(state).tolist()}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """The WSGI application; what it raises becomes the plain 500 of wsgiref."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        self.received.append((method, path, body))
        if method != "POST" or path not in self.routes:
            page = b"<html><head><title>404 Not Found</title></head><body><h1>404 Not Found</h1></body></html>"
            start_response("404 Not Found", [("Content-Type", "text/html"), ("Content-Length", str(len(page)))])
            return [page]
        params = json.loads(json.loads(body))  # a plain object inside: TypeError
        answer = json.dumps(self.routes[path](params), separators=(",", ":")).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
        return [answer]


class QuietHandler(WSGIRequestHandler):
    """Keeps access lines and tracebacks out of the test output."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def get_stderr(self) -> Any:
        return io.StringIO()


@contextmanager
def start_old_multiserver(env_id: str = "CartPole-v1") -> Iterator[OldMultiServer]:
    """Run the server on a free port of 127.0.0.1, in one thread."""
    app = OldMultiServer(env_id)
    with make_server("127.0.0.1", 0, app, handler_class=QuietHandler) as server:
        app.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield app
        finally:
            server.shutdown()
            thread.join()
            app.env.close()
