"""What one actor gets out of 64 remote environments whose steps take 5 ms, 20 ms of network away: scale.py's case (a).

The environments are asleep in a server, a lease each. All bytes pass delay.py. Beside the session's rate stands that of
one environment alone, taken 64 times: what 64 programs could get that have one environment each, and a processor each.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import longrein
from longrein.lab.actor import connect
from longrein.lab.course import SessionSettings
from longrein.lab.records import read_table
from longrein.lab.session import run_session
from longrein.lab.topology import Topology
from longrein.learn import algorithms

ENVS = 64
STEP_MS, NETWORK_MS = 5.0, 20.0
HERE = Path(__file__).parent


class Asleep(gymnasium.Env[Any, Any]):
    """A step takes 5 ms of waiting, and an episode has 200."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
    action_space: gymnasium.Space[Any] = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        """Always the same."""
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: Any) -> Any:
        """As a simulator that works elsewhere."""
        time.sleep(STEP_MS / 1000)
        self.steps += 1
        return np.zeros(4, np.float32), 1.0, self.steps == 200, False, {}


@contextmanager
def far_away() -> Iterator[str]:
    """A server of such environments and a proxy before it, in processes of their own: the URL."""
    serve = [sys.executable, "-m", "longrein.cli", "serve", f"{__file__}:Asleep", "--quiet", "--at", "ws://127.0.0.1:0"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        place = server.stdout.readline().split()[-1].removeprefix("ws://")
        delay = [sys.executable, str(HERE / "delay.py"), "--to", place, "--ms", str(NETWORK_MS)]
        with subprocess.Popen(delay, stdout=subprocess.PIPE, text=True) as proxy:
            assert proxy.stdout is not None
            try:
                yield f"ws://{proxy.stdout.readline().strip()}/Asleep"
            finally:
                proxy.terminate()
                server.kill()


def alone(url: str, steps: int = 100) -> float:
    """Env steps a second of one environment."""
    env = longrein.connect(url)
    env.reset()
    for count in range(steps + 5):
        if count == 5:
            begun = time.perf_counter()
        if env.step(1)[2]:
            env.reset()
    seconds = time.perf_counter() - begun
    env.close()
    return steps / seconds


def opened(url: str, count: int, each: bool = False) -> Any:
    """The environments of an actor, a lease each, also where it steps them together."""
    return connect(url, count, each=True)


def session_rate(url: str, topology: Topology, env_steps: int) -> float:
    """Env steps a second of one session, from its third row of metrics on."""
    config_class, _ = algorithms.load("impala")
    asked = SessionSettings("", "impala", config_class(), num_envs=ENVS, max_env_steps=env_steps, evaluation_episodes=0,
                            checkpoint_every=10**9, topology=topology)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = read_table(run_session(asked, Path(folder), partial(opened, url)).folder / "metrics.csv")
    steps, seconds = rows["env_steps"], rows["seconds"]
    return (steps[-1] - steps[2]) / (seconds[-1] - seconds[2])


def case_latency(rounds: int) -> dict[str, float]:
    """Case (a) of the issue."""
    ways = {
        "first ready": Topology(actors=1, ahead=2, first_ready=1),
        "first 8 ready": Topology(actors=1, ahead=2, first_ready=8),
        "together": Topology(actors=1, ahead=2),
    }
    with far_away() as url:
        rates: dict[str, list[float]] = {"64 alone": []} | {name: [] for name in ways}
        for _ in range(rounds):
            rates["64 alone"].append(ENVS * alone(url))
            for name, topology in ways.items():
                rates[name].append(session_rate(url, topology, 20_000))
    return {name: statistics.median(found) for name, found in rates.items()}


if __name__ == "__main__":
    print(case_latency(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
