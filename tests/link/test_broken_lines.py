"""Real lines that break: cut in the middle of a message, slow, half open; servers, brokers and clients killed."""

from __future__ import annotations

import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from environments import Counting

import longrein
from longrein.errors import CapacityReached, ConnectError, LeaseLost, LinkTimeout
from longrein.link.transports.nats_broker import start_broker

HERE = Path(__file__).parent


class CuttingProxy:
    """Passes bytes on between two sockets, and cuts both after a random number of them, wherever that is."""

    def __init__(self, port: int, seed: int, most: int) -> None:
        self.random = random.Random(seed)
        self.most = most
        self.cuts = 0
        self.silent = False  # passes nothing on, and closes nothing: a pulled cable
        self.target = port
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.closed:
            try:
                near, _ = self.listening.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                continue
            for side in (near, far):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass, args=(near, far), daemon=True).start()

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        budget = 600 + self.random.randrange(self.most)  # the handshakes should pass at times
        while not self.closed:
            ready, _, _ = select.select([near, far], [], [], 0.2)
            for side in ready:
                try:
                    data = side.recv(self.random.choice([1, 7, 64, 4096]))
                    if self.silent:
                        continue
                    (far if side is near else near).sendall(data[:budget])
                except OSError:
                    data = b""
                budget -= len(data)
                if not data or budget <= 0:
                    self.cuts += bool(data)
                    near.close()
                    far.close()
                    return

    def close(self) -> None:
        self.closed = True
        self.listening.close()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.mark.parametrize("scheme", ["ws", "http"])
@pytest.mark.parametrize("seed", range(4))
def test_lines_cut_anywhere_lose_and_double_nothing(scheme: str, seed: int) -> None:
    with longrein.Server([("Counting", Counting)], at=f"{scheme}://127.0.0.1:0") as server:
        proxy = CuttingProxy(port_of(server.urls[0]), seed, 6000)
        env = longrein.connect(f"{scheme}://127.0.0.1:{proxy.port}/Counting", wait=30, pause=0.01)
        env.reset(seed=0)
        for number in range(1, 301):
            assert env.step(number)[0].tolist() == [number, number, number]
        assert proxy.cuts > 3
        proxy.close()


def test_a_pulled_cable_is_noticed_and_mended() -> None:
    with longrein.Server([("Counting", Counting)], at="ws://127.0.0.1:0") as server:
        proxy = CuttingProxy(port_of(server.urls[0]), 0, 10**9)
        env = longrein.connect(f"ws://127.0.0.1:{proxy.port}/Counting", silence=0.5, pause=0.05)
        env.reset()
        env.step(1)
        proxy.silent = True
        threading.Timer(1.2, lambda: setattr(proxy, "silent", False)).start()
        assert env.step(2)[0].tolist() == [2, 2, 2]
        proxy.close()


def start_server(*words: str, env: str = "Counting") -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "longrein.cli", "serve", f"{HERE}/environments.py:{env}", "--quiet", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[Any]]]:
    """Processes that are to be ended with the test."""
    processes: list[subprocess.Popen[Any]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_a_broker_killed_and_started_again_loses_nothing(ended: Any) -> None:
    with start_broker() as broker:
        process, url = start_server("--at", f"{broker.url}/arm")
        ended.append(process)
        env = longrein.connect(url + "/Counting", reconnect=30)
        env.reset()
        for number in range(1, 61):
            assert env.step(number)[0].tolist() == [number, number, number]
            if number in (20, 40):
                broker.kill()
                threading.Timer(0.5, broker.restart).start()
        env.close()


def test_a_server_killed_on_a_broker_is_a_lost_lease(ended: Any) -> None:
    with start_broker() as broker:
        process, url = start_server("--at", f"{broker.url}/arm")
        ended.append(process)
        env = longrein.connect(url + "/Counting", reconnect=20)
        env.reset()
        process.kill()
        process.wait()
        started = time.monotonic()
        with pytest.raises(LeaseLost, match="not answered"):
            env.step(1)
        assert time.monotonic() - started < 8


def test_leases_go_to_the_server_with_the_fewest(ended: Any) -> None:
    with start_broker() as broker, start_two(broker.url) as servers:
        time.sleep(0.3)
        envs = [longrein.connect(f"{broker.url}/arm/Counting") for _ in range(8)]
        assert sorted(server.load for server in servers) == [4, 4]
        for env in envs:
            env.close()


class start_two:  # used as a function
    """Two servers of one name."""

    def __init__(self, url: str) -> None:
        self.servers = [longrein.Server([("Counting", Counting)], at=f"{url}/arm").start() for _ in range(2)]

    def __enter__(self) -> list[longrein.Server]:
        return self.servers

    def __exit__(self, *exc: object) -> None:
        for server in self.servers:
            server.close()


def test_nobody_of_that_name_is_said_at_once() -> None:
    with start_broker() as broker:
        started = time.monotonic()
        with pytest.raises(ConnectError, match="no server called 'arm'"):
            longrein.connect(f"{broker.url}/arm/Counting", wait=0.2)
        assert time.monotonic() - started < 3


def test_a_client_that_is_killed_frees_its_place(ended: Any) -> None:
    server, url = start_server("--at", "ws://127.0.0.1:0", "--max-leases", "1", "--lease-ttl", "0.5")
    ended.append(server)
    code = f"import longrein, time; e = longrein.connect({url!r}); e.reset(); print('in', flush=True); time.sleep(60)"
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    ended.append(client)
    assert client.stdout is not None
    assert client.stdout.readline() == "in\n"
    with pytest.raises(CapacityReached):
        longrein.connect(url)
    client.kill()
    deadline = time.monotonic() + 10
    while True:
        try:
            env = longrein.connect(url)
            break
        except CapacityReached:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    env.reset()
    assert env.step(1)[0].tolist() == [1, 1, 1]


def test_a_worker_process_that_dies_takes_nobody_with_it(ended: Any) -> None:
    server, url = start_server("--at", "ws://127.0.0.1:0", "--workers", "process", env="Broken")
    ended.append(server)
    first, second = longrein.connect(url + "?where=die"), longrein.connect(url)
    first.reset()
    second.reset()
    with pytest.raises(LeaseLost, match="exit code 3"):
        first.step(9)
    assert second.step(3)[0] == 3


@pytest.mark.parametrize("workers", ["inline", "thread", "process", "auto"])
def test_every_kind_of_worker_gives_the_same(ended: Any, workers: str) -> None:
    server, url = start_server("--at", "ws://127.0.0.1:0", "--workers", workers)
    ended.append(server)
    env = longrein.connect_vec(url, num_envs=3)
    env.reset(seed=0)
    for number in range(1, 40):
        assert env.step(np.arange(3))[0][:, 0].tolist() == [number] * 3
    env.close()


def test_an_environment_that_hangs_is_cut_off() -> None:
    limits = longrein.Limits(step_seconds=0.5, working_seconds=0.2)
    with longrein.Server([("Counting", lambda: Counting(delay=30))], at="ws://127.0.0.1:0", limits=limits) as server:
        env = longrein.connect(server.urls[0])
        env.reset()
        with pytest.raises(longrein.Error, match=r"longer than the 0\.5 s"):
            env.step(0)
        with pytest.raises(LeaseLost, match="hung"):
            env.step(0)


def test_a_slow_environment_blocks_nobody_else() -> None:
    things = [("slow", lambda: Counting(delay=1.0)), ("quick", Counting)]
    with longrein.Server(things, at="ws://127.0.0.1:0") as server:
        slow = longrein.connect(server.urls[0] + "/slow", timeout=0.05)
        quick = longrein.connect(server.urls[0] + "/quick")
        slow.reset()
        quick.reset()
        with pytest.raises(LinkTimeout):
            slow.step(0)
        started = time.monotonic()
        for _ in range(100):
            quick.step(0)
        assert time.monotonic() - started < 0.8


def test_sigterm_drains(ended: Any) -> None:
    server, url = start_server("--at", "ws://127.0.0.1:0")
    ended.append(server)
    env = longrein.connect(url)
    env.reset()
    server.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(CapacityReached, match="stopping"):
        longrein.connect(url)
    assert env.step(1)[0].tolist() == [1, 1, 1], "a live lease goes on"
    env.close()
    assert server.wait(10) == 0


def test_ctrl_c_closes(ended: Any) -> None:
    server, url = start_server("--at", "ws://127.0.0.1:0")
    ended.append(server)
    env = longrein.connect(url)
    env.reset()
    server.send_signal(signal.SIGINT)
    assert server.wait(10) == 0
