"""The demo starts a server, trains on it, and leaves no process behind."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from longrein.errors import RoleDied, SpecError
from longrein.lab.actor import connect
from longrein.lab.demo import run_demo, server_process
from longrein.lab.session import Progress, SessionSettings, run_session
from longrein.learn.algorithms.ppo import Config

LISTENS = "import time; print('hello', flush=True); print('listening on ws://127.0.0.1:7', flush=True); time.sleep(60)"


BEFORE: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def others() -> None:
    """What earlier tests left running is not this one's business: multiprocessing's resource tracker, for one."""
    BEFORE.clear()
    BEFORE.update(psutil.Process().children(recursive=True))


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child not in BEFORE]


def test_a_server_process_says_where_it_listens_and_is_ended(tmp_path: Path) -> None:
    with server_process([sys.executable, "-c", LISTENS], tmp_path / "log") as url:
        assert url == "ws://127.0.0.1:7"
        assert len(children()) == 1
    assert children() == []


def test_it_is_ended_when_we_fail(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        server_process([sys.executable, "-c", LISTENS], tmp_path / "log"),
    ):
        raise ZeroDivisionError
    assert children() == []


def test_a_server_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    code = "import sys; print('the port is taken', file=sys.stderr); sys.exit(3)"
    with (
        pytest.raises(RoleDied, match=r"exit code 3\n.*the port is taken"),
        server_process([sys.executable, "-c", code], tmp_path / "log"),
    ):
        pass


def test_an_unknown_transport_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="one of websocket, http, nats"):
        run_demo("pigeon", data=str(tmp_path))


@pytest.mark.parametrize("at", ["websocket", "http", "nats"])
def test_the_demo_trains_over_the_link(tmp_path: Path, at: str) -> None:
    if at == "nats":
        pytest.importorskip("longrein.link.transports.nats_broker")
    said = io.StringIO()
    result = run_demo(at, max_env_steps=768, data=str(tmp_path), console=Console(file=said, width=120))
    assert not result.solved
    assert result.session.env_steps == 768
    assert len(result.session.evaluation) == 20
    assert result.session.graph.stat().st_size > 10_000
    assert (result.run / "settings.json").exists()
    assert "environment steps" in said.getvalue()
    assert f"run folder: {result.run}\n" in said.getvalue()
    assert children() == []


def test_ctrl_c_leaves_a_finished_folder_and_no_process(tmp_path: Path) -> None:
    code = f"from longrein.lab.demo import run_demo; run_demo(data={str(tmp_path)!r})"
    demo = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/session_0/metrics.csv")):
        assert time.monotonic() < deadline
        assert demo.poll() is None
        time.sleep(0.1)
    servers = psutil.Process(demo.pid).children(recursive=True)
    assert servers
    os.kill(demo.pid, signal.SIGINT)
    output, _ = demo.communicate(timeout=30)
    assert demo.returncode == 0
    assert b"interrupted" in output
    assert len(list(tmp_path.glob("*/session_0/result.json"))) == 1
    assert len(list(tmp_path.glob("*/session_0/checkpoint.pt"))) == 1
    psutil.wait_procs(servers, 10)
    assert not any(server.is_running() for server in servers)


def test_training_goes_on_when_its_server_dies_and_comes_back(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"ws://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "longrein.cli", "serve", "CartPole-v1", "--at", at, "--quiet"]
    with ExitStack() as stack:
        stack.enter_context(server_process(command, tmp_path / "first.log"))

        def kill(progress: Progress) -> None:
            if progress.updates == 2:
                (server,) = children()
                server.kill()
                stack.enter_context(server_process(command, tmp_path / "second.log"))

        config = Config(rollout_steps=32, epochs=1)
        settings = SessionSettings("x", "ppo", config, num_envs=4, max_env_steps=1024, evaluation_episodes=2)
        result = run_session(settings, tmp_path, lambda count: connect(f"{at}/CartPole-v1", count), kill)
    assert result.restarts == 4
    assert result.status == "budget spent"
    assert len(result.evaluation) == 2
    # Four rows of the lost step do not count, so one more batch was needed.
    assert result.env_steps == 9 * 128 - 4
    assert children() == []


@pytest.mark.slow
@pytest.mark.parametrize("at", ["websocket", "http"])
def test_the_demo_solves_cartpole(tmp_path: Path, at: str) -> None:
    assert run_demo(at, seed=43, data=str(tmp_path)).solved
