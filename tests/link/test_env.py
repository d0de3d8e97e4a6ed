"""A far environment is the local one: Gymnasium's own checkers, bit for bit, over every transport."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from conftest import env_url
from environments import Broken, Counting, Strange, Vectorial, Zoo
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.utils.env_match import check_environments_match

import longrein
from longrein.errors import (
    CapacityReached,
    Error,
    Forbidden,
    LinkError,
    LinkTimeout,
    LocalProtocolError,
    NotFound,
    RemoteEnvError,
    SpaceError,
)
from longrein.link.codec import Opaque

Serve = Callable[..., longrein.Server]
IDS = ["CartPole-v1", "FrozenLake-v1", "Blackjack-v1", "LunarLander-v3"]


def connected(serve: Serve, env: Any, name: str = "", **options: Any) -> longrein.RemoteEnv:
    return longrein.connect(env_url(serve([env]), name), **options)


@pytest.mark.parametrize("env_id", IDS)
def test_a_far_environment_matches_the_local_one(serve: Serve, env_id: str) -> None:
    remote = connected(serve, env_id)
    local = gymnasium.make(env_id, disable_env_checker=True)
    check_environments_match(local, remote, num_steps=1000, seed=7)
    remote.close()


def test_every_space_and_info_matches_the_local_one(serve: Serve) -> None:
    remote = connected(serve, ("Zoo", Zoo))
    local = Zoo()
    assert remote.observation_space == local.observation_space
    assert remote.action_space == local.action_space
    local.action_space.seed(0)
    for episode in range(6):
        assert data_equivalence(local.reset(seed=episode), remote.reset(seed=episode), exact=True)
        for _ in range(local.length):
            action = local.action_space.sample()
            assert data_equivalence(local.step(action), remote.step(action), exact=True)
    check_environments_match(local, remote, num_steps=1000, seed=3)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "FrozenLake-v1", "Blackjack-v1"])
@pytest.mark.filterwarnings("ignore")
def test_gymnasium_finds_nothing_to_complain_about(serve: Serve, env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    check_env(connected(serve, env_id), skip_render_check=False)


def test_observations_are_the_callers_own(serve: Serve) -> None:
    env = connected(serve, ("Counting", Counting))
    kept = [env.reset()[0]] + [env.step(action)[0] for action in range(5)]
    assert [observation.tolist() for observation in kept] == [[0, 0, 0]] + [[n + 1, n, n + 1] for n in range(5)]
    kept[0][:] = 7  # they can be written to
    assert env.step(9)[0].tolist() == [6, 9, 6]


def test_frames_are_the_far_sides(serve: Serve) -> None:
    env = connected(serve, ("Counting", Counting), render_mode="rgb_array")
    env.reset()
    env.step(1)
    assert np.array_equal(env.render(), np.full((4, 5, 3), 1, np.uint8))
    text = longrein.connect(env.url, render_mode="ansi")
    text.reset()
    assert text.render() == "step 0"


def test_options_and_infos_cross_nested(serve: Serve) -> None:
    env = connected(serve, ("Counting", Counting))
    options = {"where": {"x": 1.5, "path": (1, 2), "mask": np.array([True, False])}}
    _, info = env.reset(options=options)
    assert data_equivalence(info["options"], options)


def test_properties_are_read_written_and_called(serve: Serve) -> None:
    env = connected(serve, ("Counting", Counting))
    assert env.get_attr("length") == 1_000_000
    env.set_attr("length", 2)
    env.reset()
    assert not env.step(0)[2]
    assert env.step(0)[2]
    assert env.call("add", 1) == 11
    assert env.call("add", 1, b=2) == 3
    with pytest.raises(NotFound):
        env.get_attr("no_such_thing")
    with pytest.raises(NotFound, match="call it"):
        env.get_attr("add")
    with pytest.raises(Forbidden, match="private"):
        env.get_attr("__class__")


def test_a_repeat_stops_when_the_episode_ends(serve: Serve) -> None:
    env = connected(serve, ("Counting", Counting), name="Counting?length=5")
    env.reset()
    observation, reward, terminated, _, info = env.step_repeat(1, 3)
    assert (observation.tolist(), reward, terminated, info["repeats"]) == ([3, 1, 3], 1.0 + 2.0 + 3.0, False, 3)
    observation, reward, terminated, _, info = env.step_repeat(1, 3)
    assert (observation.tolist(), reward, terminated, info["repeats"]) == ([5, 1, 5], 4.0 + 5.0, True, 2)


def test_rewards_may_be_vectors(serve: Serve) -> None:
    env = connected(serve, ("Vectorial", Vectorial))
    env.reset()
    assert env.step(1)[1].tolist() == [1.5, -1.0]


def test_two_leases_do_not_share_an_environment(serve: Serve) -> None:
    server = serve([("Counting", Counting)])
    first, second = (longrein.connect(env_url(server)) for _ in range(2))
    first.reset()
    second.reset()
    for _ in range(3):
        first.step(1)
    assert second.step(2)[0].tolist() == [1, 2, 1]


def test_gymnasium_makes_it_by_its_id(serve: Serve) -> None:
    server = serve(["CartPole-v1"])
    env = gymnasium.make("longrein/Remote-v0", url=env_url(server))
    observation, _ = env.reset(seed=1)
    assert observation in env.observation_space
    again = env.unwrapped.spec.make()
    assert np.array_equal(again.reset(seed=1)[0], observation)


# ----------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("action", "expected"),
    [(2, "2"), (-1, "-1"), (1.0, "1.0"), ("left", "left"), (None, "None"), (np.array([0, 1]), "array")],
)
def test_an_invalid_action_says_what_was_expected(serve: Serve, action: Any, expected: str) -> None:
    env = connected(serve, "CartPole-v1")
    env.reset(seed=0)
    with pytest.raises(SpaceError) as raised:
        env.step(action)
    assert raised.value.path.startswith("action")
    assert expected in str(raised.value)
    env.step(1)  # and it goes on


def test_an_invalid_part_of_an_action_is_named(serve: Serve) -> None:
    env = connected(serve, ("Zoo", Zoo))
    env.reset(seed=0)
    action = env.action_space.sample()
    action["push"] = np.array([0.0, math.nan], np.float32)
    with pytest.raises(SpaceError, match="push"):
        env.step(action)


def test_a_step_before_the_reset_is_refused(serve: Serve) -> None:
    env = connected(serve, "CartPole-v1")
    with pytest.raises(LocalProtocolError, match="reset first"):
        env.step(0)
    env.reset()
    env.step(0)


def test_a_step_after_the_end_is_refused(serve: Serve) -> None:
    env = connected(serve, ("Counting", Counting), name="Counting?length=1")
    env.reset()
    env.step(0)
    with pytest.raises(LocalProtocolError, match="ended"):
        env.step(0)
    env.reset()
    assert env.step(0)[0][0] == 2


def test_what_the_environment_raises_arrives_with_its_traceback(serve: Serve) -> None:
    env = connected(serve, ("Broken", Broken))
    env.reset()
    with pytest.raises(RemoteEnvError, match="the arm hit the table") as raised:
        env.step(9)
    assert raised.value.type == "RuntimeError"
    assert 'if self.where == "step" and action == 9' in raised.value.traceback or "in step" in raised.value.traceback
    assert raised.value.applied is None
    assert env.step(3)[0] == 3  # the line still stands


def test_what_the_environment_raises_when_made_or_reset_arrives(serve: Serve) -> None:
    server = serve([("Broken", Broken)])
    with pytest.raises(RemoteEnvError, match="not plugged in"):
        longrein.connect(env_url(server, "Broken?where=init"))
    env = longrein.connect(env_url(server, "Broken?where=reset"))
    with pytest.raises(RemoteEnvError, match="no ground"):
        env.reset()


def test_an_observation_outside_its_space_is_a_fault_of_the_far_side(serve: Serve) -> None:
    env = connected(serve, ("Broken", Broken), name="Broken?where=outside")
    env.reset()
    with pytest.raises(Error, match="not a number"):
        env.step(9)
    assert env.step(1)[0] == 1


def test_what_is_not_served_is_not_found(serve: Serve) -> None:
    server = serve(["CartPole-v1", "Acrobot-v1"])
    for name in ("Pendulum-v1", "os:system", "../etc/passwd", ""):
        with pytest.raises(NotFound, match="Acrobot-v1, CartPole-v1"):
            longrein.connect(env_url(server, name))


def test_a_space_that_cannot_be_described_says_so(serve: Serve) -> None:
    server = serve([("Strange", Strange)])
    with pytest.raises(SpaceError, match="one of Gymnasium's spaces"):
        longrein.connect(env_url(server))


def test_an_option_that_is_not_allowed_is_refused(serve: Serve) -> None:
    server = serve(["FrozenLake-v1"])
    with pytest.raises(Forbidden, match="--allow-option is_slippery"):
        longrein.connect(env_url(server, "FrozenLake-v1?is_slippery=false"))


def test_allowed_options_reach_the_maker(serve: Serve) -> None:
    server = serve(["FrozenLake-v1"], allow_options=["is_slippery"])
    env = longrein.connect(env_url(server, "FrozenLake-v1?is_slippery=false"))
    env.reset(seed=0)
    assert [env.step(2)[0] for _ in range(3)] == [1, 2, 3]


def test_the_last_lease_is_refused_with_capacity(serve: Serve) -> None:
    server = serve(["CartPole-v1"], limits=longrein.Limits(max_leases=1))
    first = longrein.connect(env_url(server))
    with pytest.raises(CapacityReached, match="all 1 leases"):
        longrein.connect(env_url(server))
    first.close()
    longrein.connect(env_url(server)).close()


def test_a_closed_environment_says_so(serve: Serve) -> None:
    env = connected(serve, "CartPole-v1")
    env.close()
    env.close()
    with pytest.raises(LinkError, match="closed"):
        env.reset()


def test_a_timeout_leaves_the_lease_usable(serve: Serve, transport: str) -> None:
    if transport == "memory":
        pytest.skip("a call in the same thread cannot be cut short")
    env = connected(serve, ("Counting", Counting), name="Counting?delay=0.4", timeout=0.1)
    env.reset()
    with pytest.raises(LinkTimeout, match=r"0\.1 s") as raised:
        env.step(1)
    assert isinstance(raised.value, TimeoutError)
    env._client.link = longrein.LinkOptions(timeout=10.0)
    assert env.step(2)[0].tolist() == [2, 2, 2], "the late answer is not taken for this one, and no step was lost"


def test_a_slow_server_says_that_it_works(serve: Serve, transport: str) -> None:
    if transport == "memory":
        pytest.skip("a call in the same thread says nothing until it returns")
    env = connected(serve, ("Counting", Counting), name="Counting?delay=2.5", timeout=30.0, silence=1.6, reconnect=5.0)
    env.reset()
    assert env.step(1)[0][0] == 1  # silent for longer than 1.6 s, but for its Working
    if transport != "http":  # there it is a bare "102 Processing"
        assert env._client.working is not None


def test_what_cannot_cross_in_an_info_is_marked(serve: Serve) -> None:
    class Secretive(Counting):
        def step(self, action: Any) -> Any:
            *moment, _ = super().step(action)
            return *moment, {"thing": Secretive}

    env = connected(serve, ("Secretive", Secretive))
    env.reset()
    assert isinstance(env.step(0)[4]["thing"], Opaque)
