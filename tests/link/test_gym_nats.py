"""gym-nats at both ends over a real broker, against peers that were written from its description alone."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from peers.nats_agent import OldNatsEnv
from peers.nats_system import start_old_system

import longrein
from longrein import gym_nats
from longrein.errors import ConnectError, ConnectionClosed, LinkTimeout, RemoteEnvError, SpaceError, SpecError
from longrein.gym_nats import Channels, NatsEnv, numpy_decode, numpy_encode
from longrein.link.dialects.gym_nats import flat, refuse_lossy, unflat
from longrein.link.transports import nats_wire as wire

if TYPE_CHECKING:
    from longrein.link.transports.nats_broker import Broker


@pytest.fixture(scope="module")
def port(broker: Broker) -> int:
    return int(broker.url.rsplit(":", 1)[1])


def by_hand(action: int, switches: list[int]) -> list[int]:
    """What the panel of `peers.nats_system` does: an action flips three of its switches."""
    return [value ^ (index in {action, action + 1, (action + 3) % 6}) for index, value in enumerate(switches)]


# ------------------------------------------------------------------------------------------------------- the codec


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([1], b"AAAAAAAA8D8="),
        ([1.5], b"AAAAAAAA+D8="),
        ([0.0], b"AAAAAAAAAAA="),
        ([0, 1, 0, 1], b"AAAAAAAAAAAAAAAAAADwPwAAAAAAAAAAAAAAAAAA8D8="),
        ([0, 0], b"AAAAAAAAAAAAAAAAAAAAAA=="),
        ([1, 3, -1000, 3.211], b"AAAAAAAA8D8AAAAAAAAIQAAAAAAAQI/A46WbxCCwCUA="),
    ],
)
def test_arrays_have_the_original_bytes(numbers: list[float], text: bytes) -> None:
    array = np.array(numbers, np.float64)
    assert numpy_encode(array) == text
    np.testing.assert_array_equal(numpy_decode(text), array)
    assert not numpy_decode(text).flags.writeable


def test_the_codec_refuses_what_it_cannot_carry() -> None:
    with pytest.raises(SpaceError, match="float32"):
        numpy_encode(np.zeros(2, np.float32))
    for data in (b"!!", b"AAAA", b"\xff"):
        with pytest.raises(SpaceError, match="base64"):
            numpy_decode(data)


def test_the_subjects_are_the_original_ones() -> None:
    assert {channel.name: channel.value for channel in Channels} == {
        "UPDATE": "rl.update", "REWARD": "rl.reward", "ACTION": "rl.action", "RESET": "rl.reset",
        "ACTIONS": "rl.actions", "DONE": "r.done",
    }  # fmt: skip


@pytest.mark.parametrize(
    "space",
    [
        spaces.MultiBinary(4),
        spaces.Discrete(5, start=-2),
        spaces.MultiDiscrete([3, 2]),
        spaces.Box(-np.inf, np.inf, (2, 3), np.float32),
        spaces.Box(0, 255, (4, 4), np.uint8),
        spaces.Dict(a=spaces.Discrete(3), b=spaces.Box(-1, 1, (2,), np.float64)),
    ],
)
def test_elements_survive_the_way_through_float64(space: spaces.Space[Any]) -> None:
    refuse_lossy(space, "space")
    space.seed(0)
    for _ in range(20):
        value = space.sample()
        found = unflat(space, numpy_decode(numpy_encode(flat(space, value))))
        assert found in space
        np.testing.assert_equal(found, value)


@pytest.mark.parametrize(
    "space", [spaces.Text(5), spaces.Sequence(spaces.Discrete(2)), spaces.Box(0, 2**60, (1,), np.int64)]
)
def test_spaces_that_would_lose_are_refused(space: spaces.Space[Any]) -> None:
    with pytest.raises(SpaceError):
        refuse_lossy(space, "space")


# ------------------------------------------------------------------------------------- our agent, an existing system


@pytest.mark.parametrize(("order", "delay"), [("serial", 0.0), ("reads", 0.02)])
def test_our_agent_plays_an_episode(broker: Broker, port: int, order: str, delay: float) -> None:
    """With a system that takes its time over an action, reads sent too early would see the state before it."""
    with start_old_system(broker.url, delay=delay) as system:
        env = gymnasium.make("longrein:nats-v0", host="127.0.0.1", port=port, order=order)
        assert env.observation_space == spaces.MultiBinary(6)
        assert env.action_space == spaces.Discrete(3)
        state, _ = env.reset()
        expected = [int(value) for value in state]
        for step in range(1, 11):
            state, reward, terminated, truncated, info = env.step(step % 3)
            expected = by_hand(step % 3, expected)
            assert list(state) == expected
            assert state in env.observation_space
            assert reward == sum(expected) - 0.5  # its reward is [switches that are on, -0.5]: the sum counts
            assert (terminated, truncated, info) == (step == 10 or all(expected), False, {})
            if terminated:
                break
        assert step == 10
        env.close()
        asked = [subject for subject in system.received if subject != "rl.spaces"]
        assert asked[:4] == ["rl.update", "rl.actions", "rl.reset", "rl.update"]
        assert asked[4:8] == ["rl.action", "rl.reward", "rl.update", "r.done"]


def test_reads_wait_for_the_action(broker: Broker, port: int) -> None:
    """The reason for the order: all at once, a system that answers each subject on its own shows the old state."""
    with start_old_system(broker.url, delay=0.05):
        env = NatsEnv(port=port, order="together")
        first, _ = env.reset()
        early, *_ = env.step(1)
        np.testing.assert_array_equal(early, first)
        env.close()


def test_several_systems_on_one_broker(broker: Broker, port: int) -> None:
    with start_old_system(broker.url, subject_prefix="left."), start_old_system(broker.url, subject_prefix="right."):
        envs = longrein.connect_vec([f"gym-nats://127.0.0.1:{port}/{name}" for name in ("left", "right")])
        observations, _ = envs.reset()
        assert observations.shape == (2, 6)
        observations, *_ = envs.step(np.array([0, 1]))
        assert list(observations[0]) != list(observations[1])
        envs.close()
    with pytest.raises(SpecError, match="is one system"):
        longrein.connect_vec(f"gym-nats://127.0.0.1:{port}", num_envs=2)


def test_nobody_answers(port: int) -> None:
    with pytest.raises(ConnectError, match=r"no system answers plant\.rl\.update"):
        NatsEnv(port=port, subject_prefix="plant", wait=0.1)


def test_no_broker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    with pytest.raises(ConnectError, match="no broker"):
        NatsEnv(port=free, wait=0.1)


def test_a_late_answer_is_never_mistaken(broker: Broker, port: int) -> None:
    with start_old_system(broker.url, delay=0.3):
        env = NatsEnv(port=port, timeout=0.1)
        state, _ = env.reset()
        with pytest.raises(LinkTimeout, match=r"rl\.action"):
            env.step(0)
        time.sleep(0.4)
        env._timeout = 2.0
        after, *_ = env.step(1)  # the first action was applied after all
        assert list(after) == by_hand(1, by_hand(0, [int(value) for value in state]))
        env.close()


def test_a_lost_broker_is_an_error_and_the_next_request_dials_again() -> None:
    from longrein.link.transports.nats_broker import start_broker

    with start_broker() as first:
        port = int(first.url.rsplit(":", 1)[1])
        with start_old_system(first.url):
            env = NatsEnv(port=port, reconnect=10.0)
            env.reset()
            first.kill()
            with pytest.raises(ConnectionClosed):
                env.step(0)
    with start_broker(port) as second, start_old_system(second.url):
        env.reset()
        env.step(0)
        env.close()
    with pytest.raises(longrein.Error, match="is closed"):
        env.reset()


def test_a_state_that_is_not_binary_makes_a_box(broker: Broker, port: int) -> None:
    with responding(broker, {"rl.update": np.array([0.5, -3.0]), "rl.actions": np.zeros(2)}):
        env = NatsEnv(port=port)
        assert env.observation_space == spaces.Box(-np.inf, np.inf, (2,), np.float64)
        env.close()
        given = NatsEnv(port=port, observation_space=spaces.Box(-9, 9, (2, 1), np.float32))
        assert given.observation_space.shape == (2, 1)
        given.close()


@contextlib.contextmanager
def responding(broker: Broker, answers: dict[str, Any]) -> Iterator[list[bytes]]:
    """A system of a few lines over a bare socket; what it receives, as bytes."""
    import threading

    host, _, port = broker.url.removeprefix("nats://").rpartition(":")
    line = socket.create_connection((host, int(port)))
    line.sendall(wire.connect_line({"verbose": False}))
    for number, subject in enumerate(answers, 1):
        line.sendall(wire.subscribe_line(subject, number))
    line.sendall(wire.PING)
    reader, heard, ready = wire.Reader(2**20), [], threading.Event()

    def work() -> None:
        while data := line.recv(65536):
            reader.feed(data)
            while (event := reader.next_event()) is not None:
                if event == wire.Control("PONG"):
                    ready.set()
                if isinstance(event, wire.Message):
                    heard.append(bytes(event.payload))
                    answer = answers[event.subject]
                    payload = answer if isinstance(answer, bytes) else numpy_encode(np.asarray(answer, np.float64))
                    line.sendall(wire.publish(event.reply, "", payload))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(5.0)
    try:
        yield heard
    finally:
        line.shutdown(socket.SHUT_RDWR)
        thread.join()
        line.close()


def test_the_requests_have_the_original_bytes(broker: Broker, port: int) -> None:
    answers = {channel.value: np.zeros(2) for channel in Channels} | {"rl.action": b"", "rl.reset": b""}
    with responding(broker, answers) as heard:
        env = NatsEnv(port=port)
        env.reset()
        env.step(1)
        env.close()
        assert heard == [b"", b"", b"", b"", b"AAAAAAAA8D8=", b"", b"", b""]


def test_garbage_from_a_system(broker: Broker, port: int) -> None:
    with responding(broker, {"rl.update": b"\x00garbage", "rl.actions": np.zeros(2)}), pytest.raises(SpaceError):
        NatsEnv(port=port)
    with responding(broker, {"rl.spaces": b"[1]", "rl.update": np.zeros(3), "rl.actions": np.zeros(2)}):
        env = NatsEnv(port=port)
        assert env.observation_space == spaces.MultiBinary(3)
        env.close()


# ------------------------------------------------------------------------------------ our system, an existing agent


@pytest.mark.parametrize(
    ("name", "size", "binary"), [("CartPole-v1", 4, False), ("FrozenLake-v1", 16, True), ("Taxi-v4", 500, True)]
)
def test_an_old_agent_steps_our_system(broker: Broker, port: int, name: str, size: int, binary: bool) -> None:
    with longrein.Server([name], at=broker.url, dialect="gym-nats"):
        agent = OldNatsEnv("127.0.0.1", port)
        assert agent.observation_n == size
        assert agent.action_n == gymnasium.make(name).action_space.n  # type: ignore[attr-defined]  # a Discrete
        state = agent.reset()
        assert np.asarray(state).dtype == np.float64
        done, steps = False, 0
        while not done and steps < 300:
            state, _, done, info = agent.step(steps % agent.action_n)
            steps += 1
            assert info == {}
            if binary:
                assert sum(state) == 1.0
        assert done or name == "Taxi-v4"
        agent.close()


def test_both_ends_of_ours_lose_nothing(broker: Broker, port: int) -> None:
    """CartPole's float32 and its time limit survive: spaces and truncation are told by the extension."""
    served = [("Short", lambda: gymnasium.make("CartPole-v1", max_episode_steps=5))]
    with longrein.Server(served, at=f"{broker.url}/plant", dialect="gym-nats"):
        env = longrein.connect(f"gym-nats://127.0.0.1:{port}/plant")
        local = gymnasium.make("CartPole-v1")
        assert env.observation_space == local.observation_space
        state, _ = env.reset()
        assert state.dtype == np.float32
        ends = [env.step(0)[2:4] for _ in range(5)]
        assert ends == [(False, False)] * 4 + [(False, True)]
        env.close()


@pytest.mark.parametrize("name", ["Pendulum-v1", "Blackjack-v1"])
def test_more_spaces_by_the_extension(broker: Broker, port: int, name: str) -> None:
    with longrein.Server([name], at=broker.url, dialect="gym-nats"):
        env = longrein.connect(f"gym-nats://127.0.0.1:{port}")
        assert env.observation_space == gymnasium.make(name).observation_space
        assert env.reset()[0] in env.observation_space
        for _ in range(10):
            state, _, terminated, _, _ = env.step(env.action_space.sample())
            assert state in env.observation_space
            if terminated:
                env.reset()
        env.close()


def test_an_existing_system_by_its_callables(broker: Broker, port: int) -> None:
    level = [0.0]

    def step(action: int) -> Any:
        level[0] += action - 1
        if level[0] > 2:
            raise RuntimeError("it overflowed")
        return np.array(level, np.float32), -abs(level[0]), False

    system = longrein.System(
        spaces.Box(-9, 9, (1,)), spaces.Discrete(3), reset=lambda: np.zeros(1, np.float32), step=step
    )
    with longrein.Server(system, at=broker.url, dialect="gym-nats"):
        env = longrein.connect(f"gym-nats://127.0.0.1:{port}")
        env.reset()
        assert env.step(2)[:2] == (np.float32(1.0), -1.0)
        env.step(2)
        with pytest.raises(RemoteEnvError, match="overflowed"):
            env.step(2)
        old = OldNatsEnv("127.0.0.1", port)
        with pytest.raises(Exception, match="imeout"):  # the format has no word for it
            old.step(2)
        with pytest.raises(SpaceError, match="index"):
            env._confirmed(env._send([("rl.action", numpy_encode(np.array([7.0])))])[0])  # type: ignore[attr-defined]
        assert env.reset()[0].shape == (1,)
        env.close()
        old.close()


def test_an_idle_environment_is_reaped_and_made_again(broker: Broker, port: int) -> None:
    limits = longrein.Limits(idle_seconds=0.2)
    with longrein.Server(["CartPole-v1"], at=broker.url, dialect="gym-nats", limits=limits) as server:
        env = longrein.connect(f"gym-nats://127.0.0.1:{port}")
        env.reset()
        deadline = time.monotonic() + 5
        while server.load and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.load == 0
        assert env.step(0)[1] == 1.0
        env.close()


def test_one_environment_on_the_subjects(broker: Broker) -> None:
    with pytest.raises(SpecError, match="one environment"):
        longrein.Server(["CartPole-v1", "FrozenLake-v1"], at=broker.url, dialect="gym-nats").start()
    with pytest.raises(ConnectError, match="no prefix"):
        longrein.Server(["CartPole-v1"], at=f"{broker.url}/a*b", dialect="gym-nats")


def test_the_old_names_are_there() -> None:
    assert gym_nats.__all__ == ["Channels", "NatsEnv", "numpy_decode", "numpy_encode"]
    assert json.dumps([channel.name for channel in Channels])
