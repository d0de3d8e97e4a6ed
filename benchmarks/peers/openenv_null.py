"""OpenEnv's own server and client around a null environment. Runs in a virtual environment with OpenEnv in it.

`serve PORT SIZE` serves; `step PORT SIZE` reads a number of seconds on each line and prints the steps per second.
"""

import sys
import time
from typing import Any

from openenv.core.client_types import StepResult
from openenv.core.env_client import EnvClient
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class NullAction(Action):
    move: int


class NullObservation(Observation):
    values: list[float]


class NullEnvironment(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True
    size = 4

    def reset(self, seed: Any = None, episode_id: Any = None, **kwargs: Any) -> NullObservation:
        return NullObservation(values=[0.0] * self.size, reward=0.0, done=False)

    def step(self, action: NullAction, timeout_s: Any = None, **kwargs: Any) -> NullObservation:
        return NullObservation(values=[0.0] * self.size, reward=1.0, done=False)

    @property
    def state(self) -> State:
        return State()


class NullClient(EnvClient):
    def _step_payload(self, action: NullAction) -> dict[str, Any]:
        return {"move": action.move}

    def _parse_result(self, payload: dict[str, Any]) -> StepResult:
        seen = payload["observation"]
        return StepResult(NullObservation(values=seen["values"]), payload.get("reward"), payload.get("done", False))

    def _parse_state(self, payload: dict[str, Any]) -> State:
        return State(**payload)


def serve(port: int, size: int) -> None:
    import uvicorn

    NullEnvironment.size = size
    app = create_fastapi_app(NullEnvironment, NullAction, NullObservation, max_concurrent_envs=8)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def step(port: int) -> None:
    with NullClient(base_url=f"http://127.0.0.1:{port}").sync() as client:
        client.reset()
        action = NullAction(move=1)
        print("ready", flush=True)
        for line in sys.stdin:
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < float(line):
                client.step(action)
                count += 1
            print(count / (time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    what, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    serve(port, size) if what == "serve" else step(port)
