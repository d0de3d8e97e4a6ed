"""Training goes on while servers come, leave and are killed: it ends with its budget, and counts every step once."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lab.test_crew import table

from longrein.errors import LinkError
from longrein.lab import spec as specs
from longrein.lab.actor import nats_broker
from longrein.lab.experiment import open_world, session_settings
from longrein.lab.records import SessionRecords, read_table
from longrein.lab.session import Progress, SessionSettings, run_session

Start = Callable[..., "subprocess.Popen[str]"]


pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The last row of metrics."""
    last: dict[str, float] = {}
    add = SessionRecords.add_metrics

    def add_metrics(self: SessionRecords, env_steps: int, metrics: Any, where: Any = None) -> None:
        last.update(metrics)
        add(self, env_steps, metrics, where)

    monkeypatch.setattr(SessionRecords, "add_metrics", add_metrics)
    return last


@pytest.fixture
def serving() -> Iterator[Start]:
    """Servers of Ticking as processes; the arguments are those of the command line."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str, delay: float = 0.01) -> Any:
        thing = f"{Path(__file__).parent}/ticking.py:Ticking"
        process = subprocess.Popen([sys.executable, "-m", "longrein.cli", "serve", thing, "--quiet", "--option",
                                    f"delay={delay}", *arguments])  # fmt: skip
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


class Story:
    """What happens while it trains: each part is begun when what it waits for is so, and 500 env steps have passed."""

    def __init__(self, asked: SessionSettings, *parts: tuple[Callable[[], bool], Callable[[], object]]) -> None:
        self.asked = asked
        self.parts = list(parts)
        self.next = 0

    def __call__(self, progress: Progress) -> None:
        if self.parts and progress.env_steps >= self.next and self.parts[0][0]():
            self.parts.pop(0)[1]()
            self.next = progress.env_steps + 500
            if not self.parts:  # from here on there is a budget
                object.__setattr__(self.asked, "max_env_steps", self.next)


def spec_at(tmp_path: Path, url: object, num_envs: int) -> Any:
    file = tmp_path / "spec.yaml"
    file.write_text(f"""
        herd:
          agent: {{algorithm: {{name: impala}}, net: {{hidden: [16, 16]}}}}
          env: {{url: {url}, num_envs: {num_envs}, elastic: true,
                 options: {{reconnect: 0.3, wait: 1.0, pause: 0.1, silence: 2.0}}}}
          meta: {{env_steps: 1000000, topology: {{actors: 1, first_ready: 1}}, eval: {{episodes: 0}}}}
    """)
    return specs.load(file)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("way", ["nats", "websocket", pytest.param("dial", marks=pytest.mark.slow)])
def test_training_goes_on_with_those_that_are_there(
    tmp_path: Path, serving: Start, seen: dict[str, float], way: str
) -> None:
    with nats_broker() as broker:
        port = free_port()
        match way:
            case "nats":
                at, url, each = [("--at", f"{broker}/herd", "--max-leases", "2")] * 3, f"{broker}/herd/Ticking", 2
            case "websocket":
                places = [f"ws://127.0.0.1:{free_port()}" for _ in range(3)]
                at, url, each = [("--at", place) for place in places], [f"{place}/Ticking" for place in places], 2
            case _:
                dialled = f"ws://127.0.0.1:{port}"
                at, url, each = [("--dial", dialled)] * 3, f"ws+listen://127.0.0.1:{port}/Ticking", 1
        spec = spec_at(tmp_path, url, 3 * each)
        asked = session_settings(spec, 3)
        first = serving(*at[0])
        others: list[Any] = []
        story = Story(
            asked,
            (lambda: seen["environments"] == each, lambda: others.extend((serving(*at[1]), serving(*at[2])))),
            (lambda: seen["environments"] == 3 * each, first.kill),
            (lambda: seen["environments"] == 2 * each, lambda: others[0].send_signal(signal.SIGTERM)),
            (lambda: seen["environments"] == each, lambda: None),
        )
        result = run_session(asked, tmp_path, partial(open_world, spec.envs[0]), story)
        assert others[0].wait(10) == 0, "it was left, and so it could end"
    assert not story.parts
    assert result.status == "budget spent"
    rows = read_table(result.folder / "metrics.csv")
    assert (max(rows["environments"]), rows["environments"][-1]) == (3 * each, each)
    assert (rows["environments_joined"][-1], rows["environments_left"][-1]) == (2 * each, 2 * each)
    episodes = table(result.folder / "episodes.csv")
    assert len(episodes) > 50
    for row in episodes:
        assert 3 <= int(row["length"]) <= 12
        assert float(row["return"]) == int(row["length"]), "a half or a doubled episode"
    played = sum(int(row["length"]) for row in episodes)
    assert played <= result.env_steps <= asked.max_env_steps + 20 * 3 * each
    assert result.env_steps - played <= 4 * each * 12 + 20 * 3 * each, "what was lost, and what has not ended"


def test_none_left_ends_the_session_with_what_is_missing(
    tmp_path: Path, serving: Start, seen: dict[str, float]
) -> None:
    place = f"ws://127.0.0.1:{free_port()}"
    spec = spec_at(tmp_path, f"{place}/Ticking", 2)
    spec.envs[0].options["patience"] = 1.5
    server = serving("--at", place)
    asked = session_settings(spec, 3)
    story = Story(asked, (lambda: seen["environments"] == 2, server.kill), (lambda: False, lambda: None))
    with pytest.raises(LinkError, match="none of the environments was there for"):
        run_session(asked, tmp_path, partial(open_world, spec.envs[0]), story)
    assert (tmp_path / "session_3" / "checkpoint.pt").exists(), "what was learnt stays"


def test_evaluation_takes_a_server_that_is_there(tmp_path: Path, serving: Start) -> None:
    places = [f"ws://127.0.0.1:{free_port()}" for _ in range(2)]
    spec = spec_at(tmp_path, [f"{place}/Ticking" for place in places], 4)
    serving("--at", places[1])
    spec.envs[0].options["wait"] = 5.0
    world = open_world(spec.envs[0], 3)
    assert world.num_envs == 3
    assert len(world.reset(seed=1)[0]) == 3
    world.close()
