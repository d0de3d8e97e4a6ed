"""Gymie at both ends, against peers that were written from its description alone, over real sockets."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from peers.gymie_client import GymieClosed, OldGymieClient
from peers.gymie_server import start_old_gymie

import longrein
from longrein import gymie
from longrein.errors import LeaseLost, NotFound, RemoteEnvError, SpecError
from longrein.link.dialects import json_text
from longrein.link.dialects.gymie import space_from
from longrein.link.dialects.gymie_listener import cut, describe
from longrein.link.transports import ConnectOptions, parse_url, websocket


class Plain(gymnasium.Env[Any, Any]):
    """Whatever breaks the original: a Discrete observation, a NumPy reward, an info of arrays."""

    observation_space = spaces.Discrete(5)
    action_space = spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.first = int(self.np_random.integers(5))
        return self.first, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        info = {"array": np.arange(3, dtype=np.float32), "one": np.float32(0.5), "far": float("inf"), 7: None}
        return int(action[1]), np.float32(0.25), False, bool(action[0]), info


class Slow(gymnasium.Env[Any, Any]):
    """A step takes a second."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        time.sleep(1.0)
        return np.zeros(1, np.float32), 0.0, False, False, {}


@pytest.fixture
def server() -> Iterator[longrein.Server]:
    things = ["CartPole-v1", "FrozenLake-v1", "Blackjack-v1", ("Plain-v0", Plain), ("Slow-v0", Slow)]
    with longrein.Server(things, at="ws://127.0.0.1:0/gym", dialect="gymie") as server:
        yield server


@pytest.fixture
def client(server: longrein.Server) -> OldGymieClient:
    return OldGymieClient(server.urls[0])


# ------------------------------------------------------------------------------- our server, an unchanged old client


def test_an_old_client_plays_an_episode(client: OldGymieClient) -> None:
    env, local = client.make("CartPole-v1", seed=7), gymnasium.make("CartPole-v1")
    assert re.fullmatch(r"[0-9a-f]{32}", env.instance_id)
    first, _ = local.reset(seed=7)
    np.testing.assert_array_equal(np.float32(env.reset()), first)
    done, steps = False, 0
    while not done:
        observation, reward, done, info = env.step(steps % 2)
        expected = local.step(steps % 2)
        steps += 1
        np.testing.assert_array_equal(np.float32(observation), expected[0])
        assert (reward, done, info) == (expected[1], expected[2], {})
    np.testing.assert_array_equal(np.float32(env.reset()), local.reset()[0])
    assert env.close() is True


def test_the_frames_are_those_of_the_original(client: OldGymieClient) -> None:
    name = client.raw('{"method": "make", "params": {"env_id": "CartPole-v1", "seed": 0}}')
    one = f'"params": {{"instance_id": "{name}"'
    # str() of a Python list, json.dumps with its blanks, a bare id and a bare true.
    reset = client.raw(f'{{"method": "reset", {one}}}}}')
    assert reset == "[0.013696168549358845, -0.023021329194307327, -0.04590264707803726, -0.04834723472595215]"
    step = client.raw(f'{{"method": "step", {one}, "action": 1}}}}')
    observation = "[0.013235742226243019, 0.17272774875164032, -0.04686959087848663, -0.3551521897315979]"
    assert step == f"[{observation}, 1.0, false, {{}}]"
    assert client.raw(f'{{"method": "action_space", {one}}}}}') == '{"name": "Discrete", "n": 2}'
    assert client.raw(f'{{"method": "action_sample", {one}}}}}') in ("0", "1")
    assert client.raw(f'{{"method": "close", {one}}}}}') == "true"


@pytest.mark.parametrize(
    ("frame", "code", "reason"),
    [
        ("nonsense", 1003, "Message `nonsense` is invalid"),
        ("[]", 1003, "Message `[]` is invalid"),
        ("5", 1003, "Message `5` is invalid"),
        ('{"prop": 1}', 1003, "Message keys ['prop'] are missing or invalid"),
        ('{"method": "x", "params": {}}', 1007, "Method `x` not found"),
        ('{"method": "make", "params": {"foo": 1}}', 1007, "Parameters `{'foo': 1}` are wrong"),
        ('{"method": "make", "params": []}', 1007, "Parameters `[]` are wrong"),
        ('{"method": "make", "params": {"env_id": "Nope-v0"}}', 1007, "Environment `Nope-v0` not found"),
        ('{"method": "make", "params": {"env_id": "Nope"}}', 1007, "Environment `Nope` is malformed"),
        ('{"method": "make", "params": {"env_id": "os:Nope-v0"}}', 1007, "Environment `os:Nope-v0` not found"),
        ('{"method": "reset", "params": {"instance_id": "zz"}}', 1007, "Instance `zz` not found"),
        ('{"method": "step", "params": {"instance_id": "zz", "action": 1}}', 1007, "Instance `zz` not found"),
    ],
)
def test_an_error_closes_with_the_original_code_and_text(
    client: OldGymieClient, frame: str, code: int, reason: str
) -> None:
    with pytest.raises(GymieClosed) as closed:
        client.raw(frame)
    assert (closed.value.code, closed.value.reason) == (code, reason)


def test_a_wrong_action_closes_and_the_instance_lives_on(server: longrein.Server, client: OldGymieClient) -> None:
    env = client.make("CartPole-v1")
    with pytest.raises(GymieClosed) as closed:
        env.step(1)  # before the first reset
    assert (closed.value.code, closed.value.reason) == (1007, "Action `1` is wrong")
    again = OldGymieClient(server.urls[0])
    named = f'"params": {{"instance_id": "{env.instance_id}"'
    assert again.raw(f'{{"method": "reset", {named}}}}}').startswith("[")
    with pytest.raises(GymieClosed, match="-123"):
        again.raw(f'{{"method": "step", {named}, "action": -123}}}}')
    assert OldGymieClient(server.urls[0]).raw(f'{{"method": "step", {named}, "action": 1}}}}').startswith("[[")


def test_a_reason_is_cut_to_what_a_close_frame_carries(client: OldGymieClient) -> None:
    with pytest.raises(GymieClosed) as closed:
        client.raw("é" * 500)
    assert closed.value.reason == "Message `" + "é" * 57  # 9 bytes and 57 of two make 123
    assert len(cut("é" * 500)) == 122


def test_a_step_past_the_end_goes_to_the_environment(client: OldGymieClient) -> None:
    env = client.make("CartPole-v1", seed=0)
    env.reset()
    while not env.step(1)[2]:
        pass
    assert env.step(1)[2] is True


def test_what_broke_the_original_works(client: OldGymieClient) -> None:
    lake = client.make("FrozenLake-v1")
    assert lake.reset() == 0
    assert len(client.make("Blackjack-v1").reset()) == 3
    plain = client.make("Plain-v0", seed=0)
    first = plain.reset()
    assert client.make("Plain-v0", seed=0).reset() == first  # seed 0 is a seed
    assert plain.action_space() == {"name": "MultiDiscrete", "nvec": [2, 3], "shape": [2]}
    observation, reward, done, info = plain.step([1, 2])
    assert (observation, reward, done) == (2, 0.25, True)
    assert info == {"array": [0.0, 1.0, 2.0], "one": 0.5, "far": float("inf"), "7": None, "TimeLimit.truncated": True}


def test_another_path_says_that_it_runs(server: longrein.Server) -> None:
    url = server.urls[0].replace("ws://", "http://").replace("/gym", "/")
    with urllib.request.urlopen(url) as answer:
        assert (answer.status, answer.read()) == (200, b"Gymie is running...")


@pytest.mark.parametrize("words", ["Upgrade", "keep-alive, Upgrade", "upgrade"])
def test_the_handshake_of_every_browser_is_taken(server: longrein.Server, words: str) -> None:
    host, port = server.urls[0].removeprefix("ws://").removesuffix("/gym").split(":")
    with socket.create_connection((host, int(port)), 5.0) as line:
        line.sendall(
            f"GET /gym HTTP/1.1\r\nHost: {host}\r\nConnection: {words}\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        assert line.recv(4096).startswith(b"HTTP/1.1 101")


def test_a_page_of_elsewhere_is_turned_away(server: longrein.Server) -> None:
    host, port = server.urls[0].removeprefix("ws://").removesuffix("/gym").split(":")
    with socket.create_connection((host, int(port)), 5.0) as line:
        line.sendall(
            b"GET /gym HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nOrigin: https://x.example\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert line.recv(4096).startswith(b"HTTP/1.1 403")


def test_a_slow_environment_blocks_nobody(server: longrein.Server) -> None:
    slow, quick = OldGymieClient(server.urls[0]), OldGymieClient(server.urls[0])
    slow_env, quick_env = slow.make("Slow-v0"), quick.make("CartPole-v1")
    slow_env.reset(), quick_env.reset()
    waiting = threading.Thread(target=slow_env.step, args=(0,))
    waiting.start()
    started = time.monotonic()
    for _ in range(5):
        quick_env.step(0)
    assert time.monotonic() - started < 0.5
    assert waiting.is_alive()
    waiting.join()


def test_instances_of_a_client_that_left_are_reaped() -> None:
    limits = longrein.Limits(lease_ttl=0.2)
    with longrein.Server(["CartPole-v1"], at="ws://127.0.0.1:0/gym", dialect="gymie", limits=limits) as server:
        client = OldGymieClient(server.urls[0])
        env = client.make("CartPole-v1")
        env.reset()
        assert server.load == 1
        client.close()
        deadline = time.monotonic() + 5
        while server.load and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.load == 0
        with pytest.raises(GymieClosed, match="Instance"):
            OldGymieClient(server.urls[0]).raw(
                json.dumps({"method": "reset", "params": {"instance_id": env.instance_id}})
            )


def test_limits_hold() -> None:
    limits = longrein.Limits(max_leases=1)
    with longrein.Server(["CartPole-v1"], at="ws://127.0.0.1:0/gym", dialect="gymie", limits=limits) as server:
        OldGymieClient(server.urls[0]).make("CartPole-v1")
        with pytest.raises(GymieClosed, match="all 1 leases are taken"):
            OldGymieClient(server.urls[0]).make("CartPole-v1")


def test_many_frames_at_once_are_answered_in_order(server: longrein.Server) -> None:
    address, _ = parse_url(server.urls[0])
    line = websocket.connect(address, ConnectOptions(path="/gym"))
    line.send(b'{"method": "make", "params": {"env_id": "CartPole-v1"}}')
    name = bytes(line.receive(5.0) or b"").decode()
    for count in range(300):
        method = "reset" if count % 3 == 0 else "action_space" if count % 3 == 1 else "observation_space"
        line.send(json.dumps({"method": method, "params": {"instance_id": name}}).encode())
    for count in range(300):
        answer = bytes(line.receive(5.0) or b"")
        assert answer.startswith((b"[", b'{"name": "Discrete"', b'{"name": "Box"')[count % 3])
    line.close()


def test_overrides() -> None:
    @gymie.override("get_env")
    def get_env(env_id: str, seed: int | None = None, size: int = 0) -> Any:
        assert env_id == "anything at all"
        env = gymnasium.make("CartPole-v1")
        env.reset(seed=seed)
        env.unwrapped.size = size  # type: ignore[attr-defined]  # the test's own
        return env

    @gymie.override("process_step")
    def process_step(step: Any) -> Any:
        observation, reward, done, info = step
        return [float(x) * 0 for x in observation], reward * 2, done, {**info, "processed": True}

    try:
        with longrein.Server(gymie.things(), at="ws://127.0.0.1:0/gym", dialect="gymie") as server:
            client = OldGymieClient(server.urls[0])
            env = client.make("anything at all", seed=0, size=3)
            env.reset()
            assert env.step(1) == [[0.0] * 4, 2.0, False, {"processed": True}]
            with pytest.raises(GymieClosed, match="are wrong"):
                client.make("anything at all", colour=1)
    finally:
        gymie._overrides.clear()
    with pytest.raises(SpecError, match="step_process"):
        gymie.override("step_process")


class OldGym:
    """An environment of gym 0.17, as an override may return it."""

    class Discrete:
        n = 3

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = Discrete()
    metadata = {"render.modes": []}

    def seed(self, seed: int) -> None:
        self.seeded = seed

    def reset(self) -> Any:
        return np.zeros(2, np.float32)

    def step(self, action: int) -> tuple[Any, float, bool, dict[str, Any]]:
        return np.full(2, action / 2, np.float32), 1.0, action == 2, {"TimeLimit.truncated": True}

    def close(self) -> None:
        pass


def test_an_environment_of_old_gym_is_served() -> None:
    with longrein.Server([("Old-v0", OldGym)], at="ws://127.0.0.1:0") as server:
        env = longrein.connect(server.urls[0] + "/Old-v0")
        assert env.action_space == spaces.Discrete(3)
        env.reset(seed=4)
        assert env.get_attr("seeded") == 4  # type: ignore[attr-defined]  # a RemoteEnv
        assert env.step(1)[1:4] == (1.0, False, False)
        assert env.step(2)[1:4] == (1.0, False, True)
        env.close()


# ------------------------------------------------------------------------------------ our client, an old server


def test_our_client_plays_an_episode_at_an_old_server() -> None:
    with start_old_gymie() as old:
        env = longrein.connect(f"gymie://127.0.0.1:{old.port}/CartPole-v1")
        assert env.action_space == spaces.Discrete(2)
        observation, _ = env.reset(seed=5)
        assert observation in env.observation_space
        steps, over = 0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(steps % 2)
            assert reward == 1.0
            steps, over = steps + 1, terminated or truncated
        assert (terminated, truncated) == (True, False)
        env.close()
        frames = [json.loads(frame) for frame in old.received]
        assert frames[0] == {"method": "make", "params": {"env_id": "CartPole-v1"}}
        assert [frame["method"] for frame in frames][1:5] == ["observation_space", "action_space", "make", "close"]
        assert frames[-1]["method"] == "close"


def test_the_original_errors_are_typed_at_our_client() -> None:
    with start_old_gymie() as old:
        with pytest.raises(NotFound, match="Nope-v0"):
            longrein.connect(f"gymie://127.0.0.1:{old.port}/Nope-v0")
        env = longrein.connect(f"gymie://127.0.0.1:{old.port}/CartPole-v1")
        with pytest.raises(RemoteEnvError, match="Action") as wrong:
            env.step(0)  # before the first reset
        assert wrong.value.type == "WrongAction"
        env.reset()  # the line is made anew, and the instance is still there
        assert env.step(0)[1] == 1.0
        with pytest.raises(SpecError, match="names no environment"):
            longrein.connect(f"gymie://127.0.0.1:{old.port}")


def test_our_client_notices_that_an_instance_is_gone(server: longrein.Server) -> None:
    env: Any = longrein.connect(server.urls[0].replace("ws", "gymie").replace("/gym", "/CartPole-v1"))
    env.reset()
    env._instance = "0" * 32
    with pytest.raises(LeaseLost):
        env.step(0)


def test_a_late_answer_costs_the_line_and_is_never_mistaken(server: longrein.Server) -> None:
    env = longrein.connect(server.urls[0].replace("ws", "gymie").replace("/gym", "/Slow-v0"), timeout=0.2)
    env.reset()
    with pytest.raises(longrein.Error, match="within"):
        env.step(0)
    time.sleep(1.0)
    assert env.reset()[0].shape == (1,)  # and not the four values of the step
    env.close()


def test_both_ends_of_ours_agree_with_the_local_environment(server: longrein.Server) -> None:
    env = longrein.connect(server.urls[0].replace("ws", "gymie").replace("/gym", "/CartPole-v1"))
    local = gymnasium.make("CartPole-v1")
    np.testing.assert_array_equal(env.reset(seed=1)[0], local.reset(seed=1)[0])
    for step in range(300):
        ours, theirs = env.step(step % 2), local.step(step % 2)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:4] == theirs[1:4]
        if ours[2] or ours[3]:
            np.testing.assert_array_equal(env.reset()[0], local.reset()[0])
    env.close()


def test_a_vector_environment(server: longrein.Server) -> None:
    url = server.urls[0].replace("ws", "gymie").replace("/gym", "/CartPole-v1")
    envs = longrein.connect_vec(url, num_envs=3)
    observations, _ = envs.reset(seed=1)
    assert observations.shape == (3, 4)
    ended = 0
    for _ in range(60):
        _, _, terminated, truncated, _ = envs.step(np.ones(3, int))
        ended += int((terminated | truncated).sum())
    assert ended >= 9
    envs.close()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
        spaces.Box(0, 255, (2, 3), np.uint8),
        spaces.Discrete(4, start=2),
        spaces.MultiBinary([2, 3]),
        spaces.MultiDiscrete([3, 4]),
        spaces.Tuple([spaces.Discrete(2), spaces.Dict(a=spaces.MultiBinary(3))]),
    ],
)
def test_spaces_survive(space: spaces.Space[Any]) -> None:
    text = json_text.dumps(describe(space))
    json.loads(text, parse_constant=pytest.fail)  # no Infinity, which JavaScript cannot read
    assert space_from(json.loads(text)) == space


def test_the_door_stays_closed() -> None:
    with pytest.raises(SpecError, match="insecure"):
        longrein.Server(["CartPole-v1"], at="ws://0.0.0.0:0/gym", dialect="gymie")
    with pytest.raises(SpecError, match="knows no tokens"):
        longrein.Server(["CartPole-v1"], at="ws://127.0.0.1:0/gym", dialect="gymie", token="a-long-token")
    with pytest.raises(SpecError, match="is none of gymie"):
        longrein.Server(["CartPole-v1"], at="ws://127.0.0.1:0/gym", dialect="gimie")


def test_an_open_door_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    longrein.Server(["CartPole-v1"], at="ws://0.0.0.0:0/gym", dialect="gymie", insecure=True)
    assert sum("whoever can reach this address" in record.message for record in caplog.records) == 1
