"""The JSON twin, as a browser or curl would speak it: every request of a whole conversation."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from environments import Counting, Vectorial, Zoo
from mpe2 import simple_spread_v3

import longrein
from longrein.link import spaces
from longrein.link.transports import ConnectOptions, parse_url, websocket

LEASE = "abcdefghijklmnopqrst"
Say = Callable[..., dict[str, Any]]


def world() -> Any:
    return simple_spread_v3.parallel_env(max_cycles=25)


@pytest.fixture
def say() -> Iterator[Say]:
    """Sends one message as text over a WebSocket, and gives the answer."""
    things = [("Counting", Counting), ("Zoo", Zoo), ("Vectorial", Vectorial), ("world", world)]
    with longrein.Server(things, at="ws://127.0.0.1:0") as server:
        line = websocket.connect(parse_url(server.urls[0])[0], ConnectOptions())
        number = iter(range(1, 1000))

        def ask(kind: str, **fields: Any) -> dict[str, Any]:
            envelope = {"type": kind, "lease": LEASE, "epoch": 1}
            envelope["n"] = 0 if kind in ("hello", "open", "ping") else next(number)
            line.send(json.dumps(envelope | fields).encode())
            answer = line.receive(10)
            assert answer is not None
            reply: dict[str, Any] = json.loads(answer)
            assert (reply["lease"], reply["n"]) == (LEASE, envelope["n"]) or kind == "hello" or reply["type"] == "fault"
            return reply

        yield ask
        line.close()


def test_a_whole_conversation(say: Say) -> None:
    welcome = say("hello", versions=[1])
    assert welcome["type"] == "welcome"
    assert welcome["environments"] == ["Counting", "Vectorial", "Zoo", "world"]
    opened = say(
        "open", env="Counting", options={"render_mode": "ansi", "length": 3}, num_envs=2, autoreset="same_step"
    )
    assert opened["type"] == "opened"
    assert spaces.space_from(opened["observation_space"]) == Counting.observation_space
    assert say("step", actions=[1, 2])["code"] == "reset_needed"
    assert say("reset", seeds=[1, 2])["observations"] == [[0, 0, 0], [0, 0, 0]]
    stepped = say("step", actions=[5, 6])
    assert stepped["observations"] == [[1, 5, 1], [1, 6, 1]]
    assert stepped["rewards"] == [1.0, 1.0]
    assert stepped["terminated"] == stepped["truncated"] == [False, False]
    assert stepped["infos"] == [{"total": 1}, {"total": 1}]
    say("step", actions=[5, 6])
    ended = say("step", actions=[5, 6])
    assert ended["terminated"] == [True, True]
    assert ended["observations"] == [[3, 6 - 1, 0], [3, 6, 0]]
    assert [(row, seen) for row, seen, _ in ended["final"]] == [(0, [3, 5, 3]), (1, [3, 6, 3])]
    assert say("step", actions=[1], ids=[1])["observations"] == [[4, 1, 1]]
    assert say("render", index=1)["frame"] == "step 4"
    assert say("call", op="get", name="length", index=0)["value"] == 3
    assert say("call", op="call", name="add", args=[1], kwargs={"b": 2})["value"] == [3, 3]
    assert say("step", actions=[1, -1])["code"] == "invalid_action"
    assert say("step", actions=7)["code"] == "invalid_action"
    assert say("ping")["type"] == "pong"
    assert say("close")["type"] == "closed"
    assert say("step", actions=[1, 1])["code"] == "lease_lost"


@pytest.mark.parametrize("arrays", ["list", "base64"])
def test_every_space_has_a_json_form(say: Say, arrays: str) -> None:
    opened = say("open", env="Zoo", arrays=arrays)
    seen = spaces.space_from(opened["observation_space"])
    done = spaces.space_from(opened["action_space"])
    done.seed(0)
    assert spaces.from_plain(seen, say("reset", seeds=[1])["observations"][0]) in seen
    for _ in range(5):
        stepped = say("step", actions=[spaces.to_plain(done, done.sample(), arrays=arrays)])
        assert stepped["type"] == "stepped", stepped
        assert spaces.from_plain(seen, stepped["observations"][0]) in seen


def test_vector_rewards_are_lists(say: Say) -> None:
    say("open", env="Vectorial", num_envs=2)
    say("reset")
    assert say("step", actions=[0, 1])["rewards"] == [[1.5, 0.0], [1.5, -1.0]]


def test_many_agents_are_objects(say: Say) -> None:
    opened = say("open", env="world")
    assert opened["kind"] == "parallel"
    agents = opened["spec"]["possible_agents"]
    assert say("reset", seeds=[1])["observations"].keys() == set(agents)
    stepped = say("step", actions=dict.fromkeys(agents, 0))
    assert stepped["rewards"].keys() == set(agents)
    assert stepped["infos"]["agents"] == agents


def test_curl_needs_a_few_headers_only() -> None:
    with longrein.Server([("Counting", Counting)], at="http://127.0.0.1:0") as server:

        def post(kind: str, body: dict[str, Any], n: int) -> tuple[int, dict[str, Any]]:
            headers = {"Content-Type": "application/json", "Longrein-Lease": LEASE, "Longrein-Number": str(n)}
            request = urllib.request.Request(f"{server.urls[0]}/v1/{kind}", json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    return answer.status, json.loads(answer.read())
            except urllib.error.HTTPError as error:
                return error.code, json.loads(error.read())

        assert post("open", {"env": "Counting"}, 0)[1]["type"] == "opened"
        assert post("step", {"actions": [1]}, 1)[0] == 409
        assert post("reset", {}, 2)[1]["observations"] == [[0, 0, 0]]
        assert post("step", {"actions": [4]}, 3)[1]["observations"] == [[1, 4, 1]]
        assert post("step", {"actions": [4]}, 3)[1]["observations"] == [[1, 4, 1]], "said again, answered again"
        assert post("step", {"actions": [4]}, 9)[1]["details"]["expected"] == 4
        assert post("step", {"actions": [-4]}, 4)[0] == 422
        assert np.array_equal(post("step", {"actions": [7]}, 5)[1]["observations"], [[2, 7, 2]])
        assert post("close", {}, 6)[0] == 200
        assert post("step", {"actions": [7]}, 7)[0] == 410
