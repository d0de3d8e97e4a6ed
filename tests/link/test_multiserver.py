"""MultiServerRL at both ends over real sockets, against peers that were written from its description alone."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from peers.multiserver_client import OldVirtualEnvironment
from peers.multiserver_server import start_old_multiserver

import longrein
from longrein.errors import ConnectError, LinkTimeout, LocalProtocolError, RemoteEnvError, SpaceError, SpecError
from longrein.link.dialects import multiserver
from longrein.link.fleet import Fleet, consecutive

CART_POLE = {"observation_space": spaces.Box(-np.inf, np.inf, (4,)), "action_space": spaces.Discrete(2)}


class Stateless(gymnasium.Env[Any, Any]):
    """No `state`, no frames, a far bound, an info of arrays, and a failure on demand."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.normal(size=2), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if action == 3:
            raise RuntimeError("the third rail")
        time.sleep(0.5 if action == 2 else 0)
        return np.array([np.inf, 1.0]), np.float32(0.5), False, action == 1, {"array": np.arange(2), "nan": np.nan}


@pytest.fixture
def server() -> Iterator[longrein.Server]:
    with longrein.Server(["CartPole-v1"], at="http://127.0.0.1:0", dialect="multiserver") as server:
        yield server


@pytest.fixture
def stateless() -> Iterator[longrein.Server]:
    with longrein.Server([("Stateless", Stateless)], at="http://127.0.0.1:0", dialect="multiserver") as server:
        yield server


def port_of(server: longrein.Server) -> int:
    return int(server.urls[0].rsplit(":", 1)[1])


def url_of(server: longrein.Server) -> str:
    return server.urls[0].replace("http", "multiserver")


def post(server: longrein.Server, path: str, body: bytes | None) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(server.urls[0] + path, body) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


# ------------------------------------------------------------------------------- our server, an unchanged old client


def test_an_old_client_plays_an_episode(server: longrein.Server) -> None:
    env, local = OldVirtualEnvironment("127.0.0.1", port_of(server)), gymnasium.make("CartPole-v1")
    assert env.seed(3) is not None
    first, _ = local.reset(seed=3)
    np.testing.assert_array_equal(np.float32(env.reset()), first)
    done, steps = False, 0
    while not done:
        observation, reward, done, _ = env.step(steps % 2)
        expected = local.step(steps % 2)
        steps += 1
        np.testing.assert_array_equal(np.float32(observation), expected[0])
        assert (reward, done) == (expected[1], expected[2])
    np.testing.assert_array_equal(env.state, local.unwrapped.state)  # type: ignore[attr-defined]  # CartPole's
    frame = np.asarray(env.render("rgb_array"))
    assert frame.shape == (400, 600, 3)
    assert len(np.unique(frame)) > 1
    env.step(0)  # past the end, as the original's unwrapped environment takes it
    env.close()


def test_the_bytes_are_those_of_the_original(server: longrein.Server) -> None:
    assert post(server, multiserver.SEED, b'"{\\"seed\\": 0}"') == (200, b'{"success":true}')
    status, body = post(server, multiserver.RESET, b'"{}"')
    observation = b"[0.013696168549358845,-0.023021329194307327,-0.04590264707803726,-0.04834723472595215]"
    assert (status, body) == (200, b'{"observation":' + observation + b"}")
    status, body = post(server, multiserver.STEP, b'"{\\"action\\": 1}"')
    observation = b"[0.013235742226243019,0.17272774875164032,-0.04686959087848663,-0.3551521897315979]"
    assert (status, body) == (200, b'{"observation":' + observation + b',"reward":1.0,"done":false,"info":{}}')
    assert post(server, multiserver.STEP, b'{"action": 1}')[0] == 200  # a plain object, which the original refuses
    assert post(server, multiserver.CLOSE, b'"{}"') == (200, b'{"success":true}')


def test_the_seed_that_the_original_client_posts_to_close_is_a_seed(server: longrein.Server) -> None:
    first, again = (OldVirtualEnvironment("127.0.0.1", port_of(server), buggy_seed=True) for _ in range(2))
    first.seed(11)
    expected = first.reset()
    again.seed(11)
    assert again.reset() == expected


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "says"),
    [
        ("/nowhere/", b'"{}"', 404, "no_route", "this server takes POST at"),
        ("/post_reset_request", b'"{}"', 404, "no_route", "last slash"),
        ("/post_reset_request/", None, 404, "no_route", "takes POST"),
        ("/post_reset_request/", b"nonsense", 400, "bad_message", "no JSON"),
        ("/post_reset_request/", b"[1]", 400, "bad_message", "no JSON object but list"),
        ("/post_reset_request/", b'"{\\"speed\\": 1}"', 400, "bad_message", "takes seed and options"),
        ("/post_reset_request/", b'{"seed": "x"}', 400, "bad_message", "whole number"),
        ("/post_step_request/", b'"{}"', 400, "bad_message", "takes action"),
        ("/post_step_request/", b'"{\\"action\\": 0}"', 409, "reset_needed", "before the first reset"),
        ("/post_render_request/", b'"{\\"mode\\": \\"human\\"}"', 400, "bad_message", "no window"),
        ("/post_seed_request/", b'"{}"', 400, "bad_message", "whole number"),
    ],
)
def test_an_error_says_what_is_wrong(
    server: longrein.Server, path: str, body: bytes | None, status: int, code: str, says: str
) -> None:
    found, told = post(server, path, body)
    assert (found, told["error"]) == (status, code)
    assert says in told["message"]


def test_a_long_body_is_refused() -> None:
    limits = longrein.Limits(max_message_bytes=1000)
    with longrein.Server(["CartPole-v1"], at="http://127.0.0.1:0", dialect="multiserver", limits=limits) as server:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server.urls[0] + multiserver.RESET, b" " * 2000)
        assert refused.value.code == 413


def test_a_page_of_elsewhere_steps_nothing(server: longrein.Server) -> None:
    request = urllib.request.Request(
        server.urls[0] + multiserver.RESET,
        b'"{}"',
        {"Origin": "https://elsewhere.example", "Content-Type": "text/plain"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 403
    assert server.load == 0


def test_any_environment_has_a_state(stateless: longrein.Server) -> None:
    env = OldVirtualEnvironment("127.0.0.1", port_of(stateless))
    assert env.state is None
    first = env.reset()
    assert env.state == first
    assert post(stateless, multiserver.RENDER, b"{}")[1]["error"] == "not_found"
    info = {"array": [0, 1], "nan": None, "TimeLimit.truncated": True}
    assert list(env.step(1)) == [[float("inf"), 1.0], 0.5, True, info]
    assert env.state == [float("inf"), 1.0]


def test_an_idle_environment_is_reaped_and_made_again() -> None:
    limits = longrein.Limits(idle_seconds=0.2)
    with longrein.Server(["CartPole-v1"], at="http://127.0.0.1:0", dialect="multiserver", limits=limits) as server:
        env = OldVirtualEnvironment("127.0.0.1", port_of(server))
        env.reset()
        deadline = time.monotonic() + 5
        while server.load and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.load == 0
        assert len(env.reset()) == 4


def test_one_environment_at_an_address() -> None:
    with pytest.raises(SpecError, match="one environment at an address"):
        longrein.Server(["CartPole-v1", "Taxi-v4"], at="http://127.0.0.1:0", dialect="multiserver").start()


# ------------------------------------------------------------------------------------ our client, an old server


def test_our_client_plays_an_episode_at_an_old_server() -> None:
    with start_old_multiserver() as old:
        env = longrein.connect(f"multiserver://127.0.0.1:{old.port}", **CART_POLE)
        observation, _ = env.reset(seed=2)
        np.testing.assert_array_equal(observation, gymnasium.make("CartPole-v1").reset(seed=2)[0])
        steps, over = 0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(steps % 2)
            assert observation.dtype == np.float32
            assert reward == 1.0
            steps, over = steps + 1, terminated or truncated
        assert len(env.state) == 4  # type: ignore[attr-defined]  # a MultiServerEnv
        assert env.render().shape == (400, 600, 3)  # type: ignore[union-attr]  # as above
        env.close()
        assert old.received[:3] == [
            ("POST", "/post_seed_request/", b'"{\\"seed\\": 2}"'),
            ("POST", "/post_reset_request/", b'"{}"'),
            ("POST", "/post_step_request/", b'"{\\"action\\": 0}"'),
        ]


def test_an_old_server_cannot_tell_its_spaces() -> None:
    with start_old_multiserver() as old, pytest.raises(SpecError, match="cannot tell its spaces"):
        longrein.connect(f"multiserver://127.0.0.1:{old.port}")


def test_an_old_servers_error_is_typed() -> None:
    with start_old_multiserver() as old:
        env: Any = longrein.connect(f"multiserver://127.0.0.1:{old.port}", **CART_POLE)
        env.reset()
        with pytest.raises(RemoteEnvError, match="contact the administrator"):
            env._ask(multiserver.STEP, {"nonsense": 1})
        assert env.step(0)[1] == 1.0
        env.close()


def test_retry_until_the_server_is_up_with_a_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(ConnectError, match="tried for"):
        longrein.connect(f"multiserver://127.0.0.1:{port}", wait=0.5)
    assert time.monotonic() - started < 5
    late = longrein.Server(["CartPole-v1"], at=f"http://127.0.0.1:{port}", dialect="multiserver")
    threading.Timer(0.5, late.start).start()
    env = longrein.connect(f"multiserver://127.0.0.1:{port}", wait=10)
    assert env.reset()[0].shape == (4,)
    env.close()
    late.close()


# --------------------------------------------------------------------------------------------------- both ends of ours


def test_both_ends_agree_with_the_local_environment(server: longrein.Server) -> None:
    env, local = longrein.connect(url_of(server)), gymnasium.make("CartPole-v1")
    assert env.observation_space == local.observation_space
    np.testing.assert_array_equal(env.reset(seed=1)[0], local.reset(seed=1)[0])
    for step in range(300):
        ours, theirs = env.step(step % 2), local.step(step % 2)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:4] == theirs[1:4]
        if ours[2] or ours[3]:
            np.testing.assert_array_equal(env.reset()[0], local.reset()[0])
    env.close()
    with pytest.raises(longrein.Error, match="is closed"):
        env.reset()


def test_errors_come_through(stateless: longrein.Server) -> None:
    env: Any = longrein.connect(url_of(stateless), timeout=0.2)
    with pytest.raises(LocalProtocolError, match="reset first"):
        env.step(0)
    env.reset()
    with pytest.raises(SpaceError):
        env.step(4)
    with pytest.raises(SpaceError):
        env._ask(multiserver.STEP, {"action": "left"})
    with pytest.raises(RemoteEnvError, match="third rail") as raised:
        env.step(3)
    assert "Traceback" in raised.value.traceback
    with pytest.raises(LinkTimeout, match="may still be applied"):
        env.step(2)
    time.sleep(0.6)
    assert env.reset()[0].shape == (2,)
    env.close()


def test_a_fleet_is_a_vector_environment() -> None:
    with Fleet(["CartPole-v1"], f"http://127.0.0.1:{free_ports(3)}", 3, dialect="multiserver") as fleet:
        assert len({url.rsplit(":", 1)[1] for url in fleet.urls}) == 3
        envs = longrein.connect_vec(fleet.urls[0].replace("http", "multiserver"), num_envs=3, autoreset="same_step")
        local = gymnasium.make_vec(
            "CartPole-v1", 3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": "SameStep"}
        )
        np.testing.assert_array_equal(envs.reset(seed=1)[0], local.reset(seed=1)[0])
        for step in range(40):
            actions = np.array([step % 2, 1, 0])
            ours, theirs = envs.step(actions), local.step(actions)
            for mine, other in zip(ours[:4], theirs[:4], strict=True):
                np.testing.assert_array_equal(mine, other)
            assert ("final_obs" in ours[4]) == ("final_obs" in theirs[4])
        envs.close()


def free_ports(count: int) -> int:
    """The first of so many consecutive free ports."""
    for port in range(18100, 60000, count):
        try:
            lines = [socket.create_server(("127.0.0.1", port + index)) for index in range(count)]
        except OSError:
            continue
        for line in lines:
            line.close()
        return port
    raise AssertionError("no free ports")


def test_a_fleets_start_that_fails_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConnectError, match="listens there already"):
        Fleet(["CartPole-v1"], f"http://127.0.0.1:{taken.getsockname()[1]}", 1, dialect="multiserver")
    with pytest.raises(SpecError, match="65535"):
        consecutive("http://localhost:65535", 3)
    with pytest.raises(SpecError, match="no port"):
        consecutive("http://localhost", 3)
    assert consecutive("ws://127.0.0.1:5000/gym", 2) == ["ws://127.0.0.1:5000/gym", "ws://127.0.0.1:5001/gym"]


def test_the_command_serves_a_fleet_and_ends_all_of_it() -> None:
    port = free_ports(2)
    words = ["serve", "CartPole-v1", "--dialect", "multiserver", "--at", f"http://127.0.0.1:{port}", "--count", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "longrein.cli", *words, "--quiet"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [
        f"listening on http://127.0.0.1:{port + index}\n" for index in range(2)
    ]
    assert len(OldVirtualEnvironment("127.0.0.1", port + 1).reset()) == 4
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    for index in range(2):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port + index))
