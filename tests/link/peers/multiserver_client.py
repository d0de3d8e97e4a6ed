"""An original-style MultiServerRL virtual environment over urllib, written from the fact sheet alone."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np


class OldVirtualEnvironment:
    """A remote environment: each call is one POST on a connection of its own, with a double-encoded body."""

    def __init__(self, host: str, port: int, buggy_seed: bool = False, patience: float = 10.0) -> None:
        self.base = f"http://{host}:{port}"
        self.buggy_seed = buggy_seed  # post the seed to the close route, as the original did
        self.patience = patience  # seconds of retrying while there is no server (the original never gave up)
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _make_request(self, route: str, params: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(json.dumps(params)).encode()
        headers = {"Content-Type": "application/json", "Accept": "*/*"}
        request = urllib.request.Request(f"{self.base}/{route}/", body, headers, method="POST")
        deadline = time.monotonic() + self.patience
        while True:
            try:
                with self.opener.open(request, timeout=30) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                with error:
                    return json.loads(error.read())  # the status is not looked at: a text body is a ValueError
            except OSError:
                if time.monotonic() + 1 > deadline:
                    raise
                time.sleep(1)

    def step(self, action: Any) -> tuple[list[Any], float, bool, dict[str, Any]]:
        answer = self._make_request("post_step_request", {"action": action})
        return answer["observation"], answer["reward"], answer["done"], answer["info"]

    def reset(self, **kwargs: Any) -> list[Any]:
        return self._make_request("post_reset_request", kwargs)["observation"]

    def render(self, mode: str = "human") -> np.ndarray:
        return np.array(self._make_request("post_render_request", {"mode": mode})["screen"])

    def close(self) -> bool:
        return self._make_request("post_close_request", {})["success"]

    def seed(self, seed: int | None = None) -> bool:
        route = "post_close_request" if self.buggy_seed else "post_seed_request"
        return self._make_request(route, {"seed": seed})["success"]

    @property
    def state(self) -> list[Any] | None:
        return self._make_request("post_state_request", {})["state"]
