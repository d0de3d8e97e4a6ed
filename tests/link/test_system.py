"""An existing system as an environment: listening, and dialling out to a trainer that waits."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

import longrein
from longrein.errors import CapacityReached, LinkTimeout, RemoteEnvError, SpaceError

EXAMPLE = Path(__file__).parents[2] / "examples" / "existing_system.py"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class Tank:
    """A tank that is filled and emptied."""

    def __init__(self) -> None:
        self.level = 5
        self.moves = 0
        self.closed = False

    def empty(self) -> Any:
        self.level = 5
        return np.array([5], np.int64)

    def move(self, action: int) -> Any:
        self.moves += 1
        self.level += 1 if action else -1
        return np.array([self.level], np.int64), float(self.level), self.level in (0, 10)

    def close(self) -> None:
        self.closed = True


def tank_system(tank: Tank) -> longrein.System:
    space = Box(-100, 100, (1,), np.int64)
    return longrein.System(space, Discrete(2), reset=tank.empty, step=tank.move, close=tank.close, name="Tank")


@pytest.fixture(scope="module")
def crossing() -> Any:
    sys.path.insert(0, str(EXAMPLE.parent))
    import existing_system

    return existing_system


def test_a_system_steps_where_it_listens() -> None:
    tank = Tank()
    with longrein.Server(tank_system(tank), at="ws://127.0.0.1:0") as server:
        env = longrein.connect(server.urls[0] + "/Tank")
        assert env.reset()[0].tolist() == [5]
        for level in range(6, 10):
            assert env.step(1)[:4] == (np.array([level]), float(level), False, False)
        assert env.step(1)[2], "full"
        env.close()
        assert not tank.closed, "a lease ended; the system stays"
        again = longrein.connect(server.urls[0])
        assert again.reset()[0].tolist() == [5]
    assert tank.moves == 5


def test_there_is_one_system_so_one_lease_holds_it() -> None:
    with longrein.Server(tank_system(Tank()), at="ws://127.0.0.1:0") as server:
        first = longrein.connect(server.urls[0])
        with pytest.raises(CapacityReached, match="there is one Tank"):
            longrein.connect(server.urls[0])
        first.close()
        longrein.connect(server.urls[0]).close()


def test_act_and_observe_are_as_good_as_step() -> None:
    seen: list[int] = []
    system = longrein.System(
        Discrete(10),
        Discrete(3),
        reset=lambda: 0,
        act=seen.append,
        observe=lambda: (len(seen), 1.0, False, len(seen) == 2),
    )
    with longrein.Server(system, at="memory://acting") as _:
        env = longrein.connect("memory://acting")
        env.reset()
        assert env.step(2) == (1, 1.0, False, False, {})
        assert env.step(0)[3]
    assert seen == [2, 0]


def test_wrong_callables_say_what_is_wanted() -> None:
    with pytest.raises(SpaceError, match="either step, or act and observe"):
        longrein.System(Discrete(2), Discrete(2), reset=lambda: 0)
    system = longrein.System(Discrete(2), Discrete(2), reset=lambda: 0, step=lambda action: "what?")
    with longrein.Server(system, at="memory://wrong") as _:
        env = longrein.connect("memory://wrong")
        env.reset()
        with pytest.raises((SpaceError, RemoteEnvError), match="what"):
            env.step(0)


@pytest.fixture
def dialling() -> Iterator[Any]:
    processes: list[subprocess.Popen[str]] = []

    def start(port: int, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(EXAMPLE), "--to", f"ws://127.0.0.1:{port}", *more]
        processes.append(subprocess.Popen(command, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_system_dials_out_and_is_trained_on(dialling: Any, crossing: Any) -> None:
    port = free_port()
    dialling(port)
    env = longrein.connect(f"ws+listen://127.0.0.1:{port}", wait=30)
    local = crossing.as_environment(crossing.Crossing())
    first, mine = env.reset(seed=3)[0], local.reset(seed=3)[0]
    assert np.array_equal(first, mine)
    for step in range(120):
        far, near = env.step(step % 2), local.step(step % 2)
        assert np.array_equal(far[0], near[0])
        assert far[1:4] == near[1:4]
    assert far[3], "the shift is over"
    env.close()


def test_a_trainer_that_restarts_finds_the_system_again(dialling: Any) -> None:
    port = free_port()
    dialling(port)
    for seed in range(2):
        env = longrein.connect(f"ws+listen://127.0.0.1:{port}", wait=30)
        env.reset(seed=seed)
        env.step(1)
        env.close()


def test_a_line_that_breaks_is_mended_by_the_system(dialling: Any) -> None:
    port = free_port()
    dialling(port)
    env = longrein.connect(f"ws+listen://127.0.0.1:{port}", wait=30, reconnect=20)
    env.reset(seed=1)
    for step in range(10):
        env.step(0)
        if step == 5:
            env._client.break_line()
    assert env.get_attr("name") == "Crossing"
    env.close()


def test_several_systems_make_a_vector_environment(dialling: Any) -> None:
    port = free_port()
    for _ in range(2):
        dialling(port)
    env = longrein.connect_vec(f"ws+listen://127.0.0.1:{port}", num_envs=2, envs_per_lease=1, wait=30)
    observations, _ = env.reset(seed=0)
    assert observations.shape == (2, 3)
    env.step(np.array([0, 1]))
    env.close()


def test_nobody_dials_in(dialling: Any) -> None:
    started = time.monotonic()
    with pytest.raises(LinkTimeout, match=r"no system dialled in within 0\.5 s"):
        longrein.connect(f"ws+listen://127.0.0.1:{free_port()}", wait=0.5)
    assert time.monotonic() - started < 5


def test_a_stranger_who_dials_in_is_sent_away(dialling: Any) -> None:
    port = free_port()
    dialling(port, "--token", "not the right one")
    with pytest.raises(LinkTimeout):
        longrein.connect(f"ws+listen://127.0.0.1:{port}", wait=2, token="the right one")
    dialling(port, "--token", "the right one")
    env = longrein.connect(f"ws+listen://127.0.0.1:{port}", wait=30, token="the right one")
    env.reset(seed=0)
    env.close()
