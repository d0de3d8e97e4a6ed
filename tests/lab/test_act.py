"""A policy as a service: over each transport it acts as it does here, for many at once, and whatever comes."""

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Dict
from gymnasium.vector.utils import concatenate, create_empty_array
from lab import policies

import longrein
from longrein.errors import (
    CapacityReached,
    ConnectError,
    LeaseLost,
    LinkError,
    NotFound,
    ProtocolError,
    SpaceError,
    SpecError,
    TooLarge,
    Unauthenticated,
)
from longrein.lab.acting import Service, policy_server
from longrein.lab.saved_policy import SavedPolicy, save_policy
from longrein.link import messages as m
from longrein.link.client import Client
from longrein.link.server import Limits, Server

Serve = Callable[..., Server]
LSTM = {"net": {"recurrent": "lstm", "recurrent_size": 8}}


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    """A real broker of this module's own."""
    from longrein.link.transports.nats_broker import start_broker

    with start_broker() as broker:
        yield broker.url


@pytest.fixture(params=["websocket", "http", "nats"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "nats":
        return f"{request.getfixturevalue('broker')}/{tmp_path.name}"
    return {"websocket": "ws://127.0.0.1:0", "http": "http://127.0.0.1:0"}[request.param]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that are closed when the test ends: `serve(policy, at, **options)`."""
    servers: list[Server] = []

    def start(policy: SavedPolicy, at: str = "ws://127.0.0.1:0", **options: Any) -> Server:
        servers.append(policy_server(policy, at, **options).start())
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def batch_of(space: Any, seen: list[Any]) -> Any:
    return concatenate(space, seen, create_empty_array(space, len(seen)))


@pytest.mark.parametrize("name", ["ppo", "td3", "both"])
def test_it_acts_as_it_does_here(name: str, address: str, serve: Serve) -> None:
    both = next(case for case in policies.CASES if isinstance(case[3], Dict))
    policy = policies.make(*both) if name == "both" else policies.make(name)
    server = serve(policy, address)
    seen = policies.observations(policy.observation_space, 6)
    with longrein.connect_policy(server.urls[0]) as remote:
        assert (remote.observation_space, remote.action_space) == (policy.observation_space, policy.action_space)
        assert remote.metadata["algorithm"] == policy.about.algorithm
        for one in seen:
            action, expected = remote.act(one), policy.act(one)
            assert type(action) is type(expected)
            assert str(action) == str(expected)
        assert remote.act(seen[0], deterministic=False) in policy.action_space
    with longrein.connect_policy(server.urls[0], num_envs=6) as remote:
        batch = batch_of(policy.observation_space, seen)
        assert str(remote.act_batch(batch)) == str(policy.act_batch(batch)[0])
        some = batch_of(policy.observation_space, [seen[4], seen[1]])
        assert str(remote.act_batch(some, ids=[4, 1])) == str(policy.act_batch(some)[0])


def test_sessions_remember_for_themselves(address: str, serve: Serve) -> None:
    policy = policies.make("ppo", LSTM)
    server = serve(policy, address)
    seen = np.stack(policies.observations(policy.observation_space, 24)).reshape(8, 3, 4)
    states: list[Any] = [None, None]
    with longrein.connect_policy(server.urls[0], 3) as one, longrein.connect_policy(server.urls[0], 3) as other:
        for step, batch in enumerate(seen):
            if step == 4:  # the middle row of one of them begins an episode
                one.reset([False, True, False])
                states[0][1] = 0.0
            if step == 6:
                other.reset()
                states[1] = None
            for index, remote in enumerate((one, other)):
                shown = batch if index == 0 else -batch
                expected, states[index] = policy.act_batch(shown, True, states[index])
                assert np.array_equal(remote.act_batch(shown), expected)


def test_a_broken_line_advances_no_memory_twice(address: str, serve: Serve) -> None:
    policy = policies.make("impala", LSTM)
    server = serve(policy, address)
    with longrein.connect_policy(server.urls[0]) as remote:
        for step, one in enumerate(policies.observations(policy.observation_space, 9)):
            if step % 3 == 2:
                remote._client.break_line()
            assert remote.act(one) == policy.act(one)


# ------------------------------------------------------------------------------------------------------------ batching


def asked(service: Service, rows: list[Any]) -> list[Any]:
    """What several sessions get that ask at the same time, one thread each."""
    with ThreadPoolExecutor(len(rows)) as pool:
        return [one.result() for one in [pool.submit(service.act, row, None, True) for row in rows]]


def some_rows(count: int, each: int = 2) -> list[Any]:
    return [np.random.default_rng(seed).normal(size=(each, 4)).astype(np.float32) for seed in range(count)]


def test_requests_that_come_together_are_answered_together() -> None:
    policy = policies.make("dqn")
    service = Service(policy, max_wait=20.0)
    for _ in range(5):
        service.join()
    rows = some_rows(5)
    started = time.monotonic()
    found = asked(service, rows)
    assert time.monotonic() - started < 10.0  # nobody was waited for once all were there
    assert (service.batches, service.requests) == (1, 5)
    for (action, _), row in zip(found, rows, strict=True):
        assert np.array_equal(action, policy.decide(row, True, None)[0])


def test_a_batch_holds_no_more_than_its_size() -> None:
    service = Service(policies.make("dqn"), max_rows=4, max_wait=0.5)
    for _ in range(7):
        service.join()
    asked(service, some_rows(6))
    assert service.batches == 3  # of two requests with two rows each
    asked(service, some_rows(1, each=9))  # more than fit are still one request
    assert service.batches == 4


def test_nobody_waits_longer_than_the_age() -> None:
    service = Service(policies.make("dqn"), max_wait=1.0)
    service.join()
    service.join()  # this one never asks
    started = time.monotonic()
    asked(service, some_rows(1))
    assert time.monotonic() - started >= 1.0
    service.leave()
    started = time.monotonic()
    asked(service, some_rows(1))
    assert time.monotonic() - started < 1.0


class Picky(SavedPolicy):
    """Raises for negative numbers."""

    def decide(self, encoded: Any, *rest: Any) -> Any:
        if (encoded < 0).any():
            raise ArithmeticError("a negative number")
        return super().decide(encoded, *rest)


def test_what_one_request_raises_the_others_do_not_hear_of() -> None:
    saved = policies.make("dqn")
    service = Service(Picky(saved.policy, saved.about), max_wait=20.0)
    for _ in range(4):
        service.join()
    rows = [np.full((1, 4), value, np.float32) for value in (1.0, -1.0, 2.0, 3.0)]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(service.act, row, None, True) for row in rows]
        assert isinstance(answers[1].exception(), ArithmeticError)
        for index in (0, 2, 3):
            assert np.array_equal(answers[index].result()[0], saved.decide(rows[index], True, None)[0])


def test_many_clients_at_once(serve: Serve) -> None:
    policy = policies.make("a3c", {"net": {"recurrent": "gru", "recurrent_size": 8}})
    server = serve(policy)
    seen = policies.observations(policy.observation_space, 12)
    policy.reset()
    expected = [policy.act(one) for one in seen]

    def client(_: int) -> list[Any]:
        with longrein.connect_policy(server.urls[0]) as remote:
            return [remote.act(one) for one in seen]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(client, range(8))) == [expected] * 8


@pytest.mark.parametrize(
    ("settings", "says"), [({"max_rows": 0}, "batch: must be at least 1"), ({"max_wait": -1}, "wait: must not be")]
)
def test_sizes_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        policy_server(policies.make("dqn"), "ws://127.0.0.1:0", **settings)


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        (np.zeros(3), r"observation: expected float32 of shape \(4,\), got shape \(3,\)"),
        ([0.0, 0.0, float("nan"), 0.0], r"observation\[2\]: expected a number, got nan"),
        ("left", "observation: expected float32"),
        (None, "observation: expected float32"),
    ],
)
def test_garbage_is_refused_before_it_is_sent(seen: Any, says: str, serve: Serve) -> None:
    server = serve(policies.make("ppo"))
    with longrein.connect_policy(server.urls[0]) as remote:
        with pytest.raises(SpaceError, match=says):
            remote.act(seen)
        assert remote.act(np.zeros(4)) in remote.action_space  # the line stands


@pytest.mark.parametrize(
    ("fields", "region", "error", "says"),
    [
        ((), b"", SpaceError, r"observation: expected 16 bytes: 1 of Box.*, got 0 bytes"),
        ((), b"\0" * 24, SpaceError, "got 24 bytes"),
        ((), b"\0" * 12 + b"\0\0\xc0\x7f", SpaceError, r"observation\[0\]\[3\]: expected a number, got nan"),
        ((None, [0, 0]), b"\0" * 32, LinkError, "ids name each row once"),
        ((None, []), b"", LinkError, "ids name each row once, and at least one"),
        ((None, [7]), b"\0" * 16, ProtocolError, "row 7 does not exist: this session has 1"),
        ((None, None, True, [True, False]), b"\0" * 16, LinkError, "begin has 2 entries for 1 rows"),
    ],
)
def test_garbage_that_arrives_is_refused(
    fields: Any, region: bytes, error: type[Exception], says: str, address: str, serve: Serve
) -> None:
    server = serve(policies.make("ppo"), address)
    client = Client(server.urls[0])
    with pytest.raises(error, match=says):
        client.ask(m.Act, *fields, region=region)
    reply, _, _ = client.ask(m.Act, region=b"\0" * 16)
    assert isinstance(reply, m.Acted)
    client.close()


@pytest.mark.parametrize("kind", [m.Reset, m.Step, m.Render])
def test_a_policy_takes_nothing_but_act(kind: type[m.Request], serve: Serve) -> None:
    client = Client(serve(policies.make("ppo")).urls[0])
    with pytest.raises((ProtocolError, LinkError), match=r"takes act, not|before the first reset"):
        client.ask(kind)
    with pytest.raises(ProtocolError, match="takes act, not call"):
        client.ask(m.Call, "call", "update")
    client.close()


def test_a_policy_is_no_environment_and_the_other_way_round(serve: Serve) -> None:
    server = serve(policies.make("ppo"))
    for connect in (longrein.connect, longrein.connect_parallel):
        with pytest.raises(LinkError, match=r"polic.*\n  hint: use longrein.connect_policy"):
            connect(server.urls[0])
    with pytest.raises(SpecError, match=r"no Gymnasium environment \(policy\)\n  hint: use longrein.connect_policy"):
        longrein.connect_vec(server.urls[0], 2)
    with longrein.Server("CartPole-v1", at="ws://127.0.0.1:0") as environments:
        with pytest.raises(LinkError, match=r"an environment is served here, not a policy\n  hint: use longrein.conn"):
            longrein.connect_policy(environments.urls[0])
        client = Client(environments.urls[0])
        with pytest.raises(ProtocolError, match="an environment is served here, not a policy: it takes no act"):
            client.ask(m.Act, region=b"\0" * 16)
        client.close()


def test_tokens_and_limits(address: str, serve: Serve) -> None:
    limits = Limits(max_leases=1, max_envs_per_lease=8)
    server = serve(policies.make("ppo"), address, token="open sesame", limits=limits)
    for token in (None, "wrong"):
        with pytest.raises(Unauthenticated):
            longrein.connect_policy(server.urls[0], token=token, wait=2.0)
    with pytest.raises(TooLarge, match="9 environments in a lease; 1 to 8 are allowed"):
        longrein.connect_policy(server.urls[0], 9, token="open sesame")
    with longrein.connect_policy(server.urls[0], token="open sesame") as remote:
        assert remote.act(np.zeros(4)) in remote.action_space
        with pytest.raises(CapacityReached):
            longrein.connect_policy(server.urls[0], token="open sesame")


def test_names(serve: Serve) -> None:
    server = serve(policies.make("ppo"), name="walker")
    with longrein.connect_policy(f"{server.urls[0]}/walker") as remote:
        assert remote.act(np.zeros(4)) in remote.action_space
    with pytest.raises(NotFound, match="'runner' is not served here; served: walker"):
        longrein.connect_policy(f"{server.urls[0]}/runner")


def post(url: str, fields: dict[str, Any], headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """What curl would do."""
    request = urllib.request.Request(url, json.dumps(fields).encode(), headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_curl_can_ask(serve: Serve) -> None:
    policy = policies.make("td3")
    url = serve(policy, "http://127.0.0.1:0").urls[0]
    lease = {"lease": "l" * 22}
    status, opened = post(f"{url}/v1/open", lease | {"env": "policy", "num_envs": 2})
    assert (status, opened["kind"]) == (200, "policy")
    seen = [[0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4]]
    status, acted = post(f"{url}/v1/act", lease | {"n": 1, "observations": seen})
    assert (status, acted["type"]) == (200, "acted")
    assert np.allclose(acted["actions"], policy.act_batch(np.array(seen, np.float32))[0])
    for number, (wrong, says) in enumerate(
        [
            ([seen[0], [1, 2, 3]], "observation[1]: expected float32 of shape (4,), got shape (3,)"),
            ([seen[0]], "observations: expected a list with one observation for each of 2 rows, got 1"),
            ([seen[0], "left"], "observation[1]: expected"),
            ([seen[0], ["NaN", 0, 0, 0]], "observation[1][0]: expected a number, got nan"),
            ({"a": 1}, "observations: expected a list"),
        ],
        2,
    ):
        status, fault = post(f"{url}/v1/act", lease | {"n": number, "observations": wrong})
        assert fault["code"] == "invalid_observation", fault
        assert status == 422
        assert says in fault["message"]
    status, fault = post(f"{url}/v1/act", lease | {"n": 7, "observation": seen})
    assert status == 422
    assert "a act has no 'observation'; it has" in fault["message"]
    status, fault = post(f"{url}/v1/step", lease | {"n": 7, "actions": [0, 0]})
    assert fault["code"] in ("out_of_turn", "reset_needed")
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=20) as reply:
        assert "/v1/act" in json.load(reply)["paths"]


# ------------------------------------------------------------------------------------------------- the command, killed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`longrein act` in a process, listening."""
    running: list[subprocess.Popen[str]] = []

    def start(file: Path, at: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "longrein.cli", "act", str(file), "--at", at, "--quiet"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on ")
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def exported(policy: SavedPolicy, path: Path) -> Path:
    save_policy(path, policy.policy, policy.about)
    return path


def test_a_killed_server(command: Callable[..., subprocess.Popen[str]], serve: Serve, tmp_path: Path) -> None:
    policy = policies.make("ppo")
    url = f"ws://127.0.0.1:{free_port()}"
    process = command(exported(policy, tmp_path / "policy.safetensors"), url)
    one = np.full(4, 0.3, np.float32)
    patient, hasty = (longrein.connect_policy(url, reconnect=seconds) for seconds in (60.0, 0.2))
    assert patient.act(one) == hasty.act(one) == policy.act(one)
    stopped = threading.Event()
    answers: list[Any] = []

    def keep_asking() -> None:
        while not stopped.is_set():
            answers.append(patient.act(one))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    process.kill()
    process.wait()
    with pytest.raises(ConnectError, match="tried for"):
        hasty.act(one)
    before = len(answers)
    serve(policy, url)
    deadline = time.monotonic() + 60.0
    while len(answers) <= before + 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    stopped.set()
    asking.join()
    assert len(answers) > before + 5  # it went on by itself
    assert set(answers) == {policy.act(one)}
    for remote in (patient, hasty):
        remote.close()


def test_what_remembered_says_that_it_is_lost(serve: Serve) -> None:
    policy = policies.make("ppo", LSTM)
    url = f"http://127.0.0.1:{free_port()}"
    server = serve(policy, url)
    remote = longrein.connect_policy(url, reconnect=30.0)
    remote.act(np.zeros(4))
    server.close()
    serve(policy, url)
    with pytest.raises(LeaseLost):
        remote.act(np.zeros(4))
    remote.close()


def test_the_command_drains_when_told(command: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    url = f"ws://127.0.0.1:{free_port()}"
    process = command(exported(policies.make("td3"), tmp_path / "p"), url)
    with longrein.connect_policy(url) as remote:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None  # it lets its sessions finish
        assert remote.act(np.zeros(4)) in remote.action_space
    assert process.wait(60) == 0
