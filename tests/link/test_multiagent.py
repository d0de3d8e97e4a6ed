"""A far PettingZoo environment is a PettingZoo environment: its own suites, over every transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import env_url
from gymnasium.utils.env_checker import data_equivalence
from mpe2 import simple_spread_v3, simple_tag_v3
from pettingzoo.classic import connect_four_v3, tictactoe_v3
from pettingzoo.test import api_test, max_cycles_test, parallel_api_test, parallel_seed_test, seed_test

import longrein
from longrein.errors import Error, LinkError, LocalProtocolError, SpaceError

Serve = Callable[..., longrein.Server]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet_screen")]


@pytest.fixture
def quiet_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def spread(max_cycles: int = 25) -> Any:
    return simple_spread_v3.parallel_env(max_cycles=max_cycles)


def spread_in_turns() -> Any:
    return simple_spread_v3.env(max_cycles=25)


PARALLEL = {"spread": spread, "tag": lambda: simple_tag_v3.parallel_env(max_cycles=25)}
AEC = {"tictactoe": tictactoe_v3.env, "connect_four": connect_four_v3.env, "spread_in_turns": spread_in_turns}


@pytest.mark.parametrize("name", PARALLEL)
def test_the_parallel_suite_passes(serve: Serve, name: str) -> None:
    url = env_url(serve([(name, PARALLEL[name])]))
    env = longrein.connect_parallel(url)
    parallel_api_test(env, num_cycles=60)
    env.close()
    parallel_seed_test(lambda: longrein.connect_parallel(url), num_cycles=10)


def test_max_cycles_reach_the_far_environment(serve: Serve) -> None:
    url = env_url(serve([("spread", spread)]))

    class Module:
        @staticmethod
        def parallel_env(max_cycles: int = 25) -> Any:
            return longrein.connect_parallel(url, max_cycles=max_cycles)

        @staticmethod
        def env(max_cycles: int = 25) -> Any:
            from pettingzoo.utils import parallel_to_aec

            return parallel_to_aec(longrein.connect_parallel(url, max_cycles=max_cycles))

    max_cycles_test(Module)


@pytest.mark.parametrize("name", AEC)
def test_the_aec_suite_passes(serve: Serve, name: str) -> None:
    url = env_url(serve([(name, AEC[name])]))
    env = longrein.connect_aec(url)
    api_test(env, num_cycles=60)
    env.close()
    seed_test(lambda: longrein.connect_aec(url), num_cycles=10)


def test_a_far_parallel_environment_matches_the_local_one(serve: Serve) -> None:
    remote, local = longrein.connect_parallel(env_url(serve([("spread", spread)]))), spread()
    assert data_equivalence(remote.reset(seed=5), local.reset(seed=5), exact=True)
    rng = np.random.default_rng(0)
    while local.agents:
        actions = {agent: int(rng.integers(local.action_space(agent).n)) for agent in local.agents}
        for far, near in zip(remote.step(actions), local.step(actions), strict=True):
            assert far.keys() == near.keys()
            assert all(np.array_equal(far[agent], near[agent]) for agent in near if not isinstance(near[agent], dict))
        assert remote.agents == local.agents


def test_a_far_aec_environment_matches_the_local_one(serve: Serve) -> None:
    remote, local = longrein.connect_aec(env_url(serve([("ttt", tictactoe_v3.env)]))), tictactoe_v3.env()
    remote.reset(seed=1)
    local.reset(seed=1)
    for agent in local.agent_iter():
        assert remote.agent_selection == agent
        far, near = remote.last(), local.last()
        assert np.array_equal(far[0]["observation"], near[0]["observation"])
        assert np.array_equal(far[0]["action_mask"], near[0]["action_mask"])
        assert far[1:4] == near[1:4]
        action = None if near[2] or near[3] else int(np.flatnonzero(near[0]["action_mask"])[0])
        remote.step(action)
        local.step(action)
    assert remote.agents == []


def test_a_wrong_action_names_the_agent(serve: Serve) -> None:
    env = longrein.connect_parallel(env_url(serve([("spread", spread)])))
    with pytest.raises(LocalProtocolError, match="reset first"):
        env.step({})
    env.reset(seed=0)
    good = dict.fromkeys(env.agents, 0)
    with pytest.raises(SpaceError, match=r"action\['agent_1'\]"):
        env.step(good | {"agent_1": 99})
    with pytest.raises(SpaceError, match="agent_9"):
        env.step(good | {"agent_9": 0})
    with pytest.raises(SpaceError, match="actions for"):
        env.step({"agent_0": 0})
    env.step(good)


def test_each_kind_says_how_to_connect_to_it(serve: Serve) -> None:
    server = serve([("spread", spread), ("ttt", tictactoe_v3.env), "CartPole-v1"])
    with pytest.raises(LinkError, match="connect_parallel"):
        longrein.connect(env_url(server, "spread"))
    with pytest.raises(LinkError, match="connect_aec"):
        longrein.connect_parallel(env_url(server, "ttt"))
    with pytest.raises(LinkError, match=r"longrein\.connect\(url\)"):
        longrein.connect_aec(env_url(server, "CartPole-v1"))
    with pytest.raises(Error, match="connect_parallel"):
        longrein.connect_vec(env_url(server, "spread"), num_envs=1)
