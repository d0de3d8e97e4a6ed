"""Servers come and go, and whoever acts in their environments goes on with those that are there."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from environments import Counting

import longrein
from longrein.errors import LinkError, LocalProtocolError, NotFound, SpecError
from longrein.link.elastic import ElasticVectorEnv
from longrein.link.transports.nats_broker import start_broker

HERE = Path(__file__).parent
QUICK = {"reconnect": 0.2, "wait": 0.5, "pause": 0.1, "silence": 2.0}
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def serving() -> Iterator[Start]:
    """Servers as processes; the first argument is where, as on the command line."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str, thing: str = f"{HERE}/environments.py:Counting", ready: bool = True) -> Any:
        command = [sys.executable, "-m", "longrein.cli", "serve", thing, "--quiet", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        if ready:
            process.stdout.readline()
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Watch:
    """Acts in whatever answers, and holds what comes against what the environments count."""

    def __init__(self, envs: ElasticVectorEnv) -> None:
        self.envs = envs
        first, _ = envs.reset(seed=1)
        self.totals = first[:, 0].tolist()
        self.restarted, self.idle, self.steps = 0, 0, 0
        envs.send(np.zeros(envs.num_envs, int))

    def turn(self, min_ready: int = 1) -> None:
        observations, rewards, terminated, truncated, infos = self.envs.recv(min_ready, timeout=20)
        ids = infos["env_id"]
        for at, row in enumerate(ids):
            if infos.get("restarted", np.zeros(len(ids)))[at]:
                assert truncated[at]
                assert not terminated[at]
                assert infos["final_obs"][at][0] == self.totals[row], "the last that was seen"
                self.restarted += 1
            elif infos.get("idle", np.zeros(len(ids)))[at]:
                assert not truncated[at]
                self.idle += 1
            else:
                assert observations[at][0] == self.totals[row] + 1, "a step was lost, or made twice"
                assert rewards[at] == observations[at][0]
                self.steps += 1
            self.totals[row] = int(observations[at][0])
        self.envs.send(np.zeros(len(ids), int), ids)

    def until(self, holds: Callable[[], bool], seconds: float = 25.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, (self.envs.live, self.envs.joined, self.envs.left)
            self.turn()


def test_servers_of_one_name_come_and_go(serving: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "longrein.elastic")
    with start_broker() as broker:
        at = ("--at", f"{broker.url}/herd", "--max-leases", "2")
        first = serving(*at)
        envs = longrein.connect_vec(f"{broker.url}/herd/Counting", num_envs=6, elastic=True, **QUICK)
        assert envs.live == 2
        watch = Watch(envs)
        watch.until(lambda: watch.steps > 50)
        second, third = serving(*at), serving(*at)
        watch.until(lambda: envs.live == 6 and watch.idle == 4)
        assert (envs.joined, envs.left) == (4, 0)
        first.kill()
        watch.until(lambda: envs.left == 2)
        assert envs.live == 4
        steps = watch.steps
        watch.until(lambda: watch.steps > steps + 50)
        serving(*at)
        watch.until(lambda: watch.restarted == 2)
        assert (envs.live, envs.joined) == (6, 6)
        for process in (second, third):
            process.kill()
        watch.until(lambda: envs.left == 6)
        envs.close()
    said = [record.getMessage() for record in caplog.records]
    assert sum(" joined from " in one for one in said) == 6
    assert sum(" left: " in one for one in said) == 6
    assert "5 of 6 are there" in "".join(said)


def test_urls_of_which_some_are_down(serving: Start) -> None:
    ports = [free_port() for _ in range(3)]
    urls = [f"ws://127.0.0.1:{port}/Counting?length=30" for port in ports]
    at = [("--at", f"ws://127.0.0.1:{port}") for port in ports]
    serving(*at[1])
    envs = longrein.connect_vec(urls, num_envs=6, elastic=True, autoreset="next_step", **QUICK)
    assert envs.live == 2
    Watch(envs)
    assert set(envs.recv(2)[-1]["env_id"].tolist()) == {2, 3}
    envs.close()


def test_a_draining_server_is_left_at_the_end_of_the_episode(serving: Start) -> None:
    ports = [free_port() for _ in range(2)]
    urls = [f"ws://127.0.0.1:{port}/Counting" for port in ports]
    processes = [serving("--at", f"ws://127.0.0.1:{port}", "--allow-option", "length") for port in ports]
    envs = longrein.connect_vec(urls, num_envs=4, elastic=True, length=40, **QUICK)
    watch = Watch(envs)
    watch.until(lambda: watch.steps > 100)
    processes[0].send_signal(signal.SIGTERM)
    watch.until(lambda: envs.left == 2)
    processes[0].wait(10)
    assert envs.live == 2
    serving("--at", f"ws://127.0.0.1:{ports[0]}", "--allow-option", "length")
    watch.until(lambda: envs.live == 4 and watch.idle == 2)
    assert watch.restarted == 0, "the episodes had ended"
    envs.close()


def test_systems_dial_in_and_go(serving: Start) -> None:
    port = free_port()
    dial = ("--dial", f"ws://127.0.0.1:{port}")
    first = serving(*dial, ready=False)
    envs = longrein.connect_vec(
        f"ws+listen://127.0.0.1:{port}/Counting", num_envs=3, elastic=True, **(QUICK | {"wait": 2})
    )
    assert envs.live == 1
    watch = Watch(envs)
    watch.until(lambda: watch.steps > 20)
    serving(*dial, ready=False)
    serving(*dial, ready=False)
    watch.until(lambda: envs.live == 3 and watch.idle == 2)
    first.send_signal(signal.SIGKILL)
    watch.until(lambda: envs.left == 1)
    serving(*dial, ready=False)
    watch.until(lambda: watch.restarted == 1)
    assert envs.live == 3
    envs.close()


def test_nobody_for_too_long_is_an_error(serving: Start) -> None:
    port = free_port()
    url = f"ws://127.0.0.1:{port}/Counting"
    begun = time.monotonic()
    with pytest.raises(LinkError, match=r"none of the environments was there for 1 s; the last try: .*nothing listens"):
        longrein.connect_vec(url, num_envs=2, elastic=True, patience=1.0, **QUICK)
    assert time.monotonic() - begun < 5
    process = serving("--at", f"ws://127.0.0.1:{port}")
    envs = longrein.connect_vec(url, num_envs=2, elastic=True, patience=1.5, **QUICK)
    watch = Watch(envs)
    watch.turn()
    process.kill()
    with pytest.raises(LinkError, match="none of the environments was there"):
        watch.until(lambda: False, 10)
    envs.close()


def test_a_mistake_is_said_at_once() -> None:
    with longrein.Server([("Counting", Counting)], at="ws://127.0.0.1:0") as server:
        with pytest.raises(NotFound):
            longrein.connect_vec(f"{server.urls[0]}/Cuonting", num_envs=2, elastic=True)
        with pytest.raises(SpecError, match="reset themselves"):
            longrein.connect_vec(f"{server.urls[0]}/Counting", num_envs=2, elastic=True, autoreset="disabled")
        envs = longrein.connect_vec(f"{server.urls[0]}/Counting", num_envs=2, elastic=True)
        envs.reset()
        with pytest.raises(LocalProtocolError, match="not stepped together"):
            envs.step([0, 0])
        envs.close()
    with pytest.raises(SpecError, match="cannot come and go"):
        longrein.connect_vec("gymie://127.0.0.1:1", num_envs=2, elastic=True)


def test_no_thread_or_descriptor_stays() -> None:
    with longrein.Server([("Counting", Counting)], at="ws://127.0.0.1:0") as server:

        def once() -> tuple[int, int]:
            envs = longrein.connect_vec(f"{server.urls[0]}/Counting", num_envs=3, elastic=True)
            Watch(envs).turn()
            envs.close()
            time.sleep(0.3)
            ours = [thread.name for thread in threading.enumerate() if "longrein-finder" in thread.name]
            return len(ours), len(os.listdir("/proc/self/fd"))

        threads, descriptors = once()
        assert threads == 0
        again = once()
        assert again[0] == 0
        assert again[1] <= descriptors
