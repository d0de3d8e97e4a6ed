"""A far vector environment is Gymnasium's, in all three autoreset modes, together or as each is ready."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from conftest import env_url
from environments import Broken, Counting, Vectorial, Zoo
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import longrein
from longrein.errors import LeaseLost, LinkTimeout, LocalProtocolError, RemoteEnvError, SpaceError, SpecError

Serve = Callable[..., longrein.Server]
HERE = Path(__file__).parent
MODES = {
    "next_step": AutoresetMode.NEXT_STEP,
    "same_step": AutoresetMode.SAME_STEP,
    "disabled": AutoresetMode.DISABLED,
}


@pytest.mark.parametrize("envs_per_lease", [None, 2, 1])
@pytest.mark.parametrize("mode", MODES)
def test_it_matches_gymnasiums_own(serve: Serve, mode: str, envs_per_lease: int | None) -> None:
    url = env_url(serve(["CartPole-v1"]))
    far = longrein.connect_vec(url, num_envs=3, autoreset=mode, envs_per_lease=envs_per_lease)
    near = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 3, autoreset_mode=MODES[mode])
    assert far.metadata["autoreset_mode"] is MODES[mode]
    assert far.observation_space == near.observation_space
    assert far.action_space == near.action_space
    near.action_space.seed(1)
    assert data_equivalence(far.reset(seed=7), near.reset(seed=7), exact=True)
    ended = 0
    for _ in range(120):
        actions = near.action_space.sample()
        mine, theirs = far.step(actions), near.step(actions)
        for a, b in zip(mine[:4], theirs[:4], strict=True):
            assert data_equivalence(a, b, exact=True)
        assert mine[4].keys() == theirs[4].keys()
        for key, value in theirs[4].items():
            if key == "final_obs":
                for a, b in zip(mine[4][key], value, strict=True):
                    assert np.array_equal(a, b) if b is not None else a is None
            elif not isinstance(value, dict):
                assert np.array_equal(mine[4][key], value), key
        over = theirs[2] | theirs[3]
        ended += int(over.sum())
        if mode == "disabled" and over.any():
            options = {"reset_mask": over}
            a, b = far.reset(options=dict(options)), near.reset(options=dict(options))
            assert data_equivalence(a[0], b[0], exact=True)
    assert ended > 5
    far.close()


def test_every_space_crosses_in_batches(serve: Serve) -> None:
    zoo = functools.partial(Zoo, large=False)
    url = env_url(serve([("Zoo", zoo)]))
    far = longrein.connect_vec(url, num_envs=2, autoreset="same_step", envs_per_lease=1)
    near = SyncVectorEnv([zoo, zoo], autoreset_mode=AutoresetMode.SAME_STEP)
    assert data_equivalence(far.reset(seed=3)[0], near.reset(seed=3)[0], exact=True)
    near.action_space.seed(0)
    for _ in range(30):
        actions = near.action_space.sample()
        assert data_equivalence(far.step(actions)[0], near.step(actions)[0], exact=True)


def test_rewards_may_be_vectors(serve: Serve) -> None:
    far = longrein.connect_vec(env_url(serve([("Vectorial", Vectorial)])), num_envs=3)
    far.reset()
    rewards = far.step(np.array([0, 1, 0]))[1]
    assert rewards.tolist() == [[1.5, 0.0], [1.5, -1.0], [1.5, 0.0]]


def test_seeds_reach_each_environment(serve: Serve) -> None:
    far = longrein.connect_vec(env_url(serve(["CartPole-v1"])), num_envs=3, envs_per_lease=2)
    by_one, _ = far.reset(seed=5)
    by_list, _ = far.reset(seed=[5, 6, 7])
    assert np.array_equal(by_one, by_list)
    with pytest.raises(LocalProtocolError, match="2 seeds for 3"):
        far.reset(seed=[1, 2])


def test_a_ready_made_vector_environment_is_served_as_it_is(serve: Serve) -> None:
    def factory() -> Any:
        return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 4, autoreset_mode=AutoresetMode.SAME_STEP)

    url = env_url(serve([("batch", factory)]))
    with pytest.raises(Exception, match="autoreset='same_step'"):
        longrein.connect_vec(url, num_envs=4, autoreset="next_step")
    with pytest.raises(Exception, match="num_envs=4"):
        longrein.connect_vec(url, num_envs=3, autoreset="same_step")
    far, near = longrein.connect_vec(url, num_envs=4, autoreset="same_step"), factory()
    assert data_equivalence(far.reset(seed=1), near.reset(seed=1), exact=True)
    near.action_space.seed(0)
    for _ in range(60):
        actions = near.action_space.sample()
        mine, theirs = far.step(actions), near.step(actions)
        assert all(data_equivalence(a, b, exact=True) for a, b in zip(mine[:4], theirs[:4], strict=True))
        assert mine[4].keys() == theirs[4].keys()


def test_attributes_of_each(serve: Serve) -> None:
    far = longrein.connect_vec(env_url(serve([("Counting", Counting)])), num_envs=3, envs_per_lease=2)
    far.set_attr("length", [3, 4, 5])
    assert far.get_attr("length") == (3, 4, 5)
    assert far.call("add", 1, b=2) == (3, 3, 3)


def test_frames_of_each(serve: Serve) -> None:
    far = longrein.connect_vec(env_url(serve([("Counting", Counting)])), num_envs=2, render_mode="ansi")
    far.reset()
    far.step(np.array([1, 1]))
    assert far.render() == ("step 1", "step 1")


# ------------------------------------------------------------------------------------------------------ send and recv


def test_the_first_ready_come_first(serve: Serve, transport: str) -> None:
    if transport == "memory":
        pytest.skip("calls in one thread come one after the other")
    delays = iter([0.0, 1.0, 0.0, 0.0])

    def factory() -> Counting:
        return Counting(delay=next(delays))

    far = longrein.connect_vec(env_url(serve([("some", factory)])), num_envs=4, envs_per_lease=1)
    far.reset()
    started = time.monotonic()
    far.send(np.arange(4))
    *_, infos = far.recv(min_ready=3)
    assert time.monotonic() - started < 1.0
    assert len(infos["env_id"]) == 3
    *_, infos = far.recv(min_ready=1)
    assert time.monotonic() - started >= 1.0


def test_rows_belong_to_their_environments(serve: Serve) -> None:
    far = longrein.connect_vec(env_url(serve([("Counting", Counting)])), num_envs=6, envs_per_lease=2)
    far.reset()
    rng = np.random.default_rng(0)
    taken = np.zeros(6, int)
    for _ in range(40):
        ids = rng.permutation(6)[: rng.integers(1, 7)]
        actions = 100 * ids + taken[ids]
        far.send(actions, ids)
        got = 0
        while got < len(ids):
            observations, rewards, _, _, infos = far.recv(min_ready=1)
            who = infos["env_id"]
            taken[who] += 1
            assert observations[:, 0].tolist() == taken[who].tolist()
            assert observations[:, 1].tolist() == (100 * who + taken[who] - 1).tolist()
            assert rewards.tolist() == taken[who].tolist()
            got += len(who)


def test_calls_out_of_turn_say_so(serve: Serve) -> None:
    far = longrein.connect_vec(env_url(serve([("Counting", Counting)])), num_envs=2, envs_per_lease=1)
    far.reset()
    with pytest.raises(LocalProtocolError, match="step_async before"):
        far.step_wait()
    far.step_async(np.zeros(2, int))
    with pytest.raises(LocalProtocolError, match="wait"):
        far.step_async(np.zeros(2, int))
    with pytest.raises(LocalProtocolError, match="wait"):
        far.reset()
    far.step_wait()
    far.send([1], [0])
    with pytest.raises(LocalProtocolError, match="not answered its last action"):
        far.send([1], [0])
    with pytest.raises(LocalProtocolError, match="min_ready is 2, 1"):
        far.recv(min_ready=2)
    with pytest.raises(LocalProtocolError, match="distinct"):
        far.send([1, 1], [1, 7])
    far.recv()


def test_a_timeout_loses_nothing(serve: Serve, transport: str) -> None:
    if transport == "memory":
        pytest.skip("a call in the same thread cannot be cut short")
    url = env_url(serve([("Counting", Counting)]), "Counting?delay=0.3")
    for envs_per_lease in (2, 1):
        far = longrein.connect_vec(url, num_envs=2, envs_per_lease=envs_per_lease)
        far.reset()
        far.step_async(np.array([1, 2]))
        with pytest.raises(LinkTimeout):
            far.step_wait(timeout=0.05)
        observations, *_ = far.step_wait(timeout=10)
        assert observations[:, 0].tolist() == [1, 1]
        assert far.step(np.array([3, 4]))[0][:, 0].tolist() == [2, 2]


def test_an_invalid_action_names_its_row(serve: Serve) -> None:
    far = longrein.connect_vec(env_url(serve(["CartPole-v1"])), num_envs=3)
    far.reset(seed=0)
    with pytest.raises(SpaceError, match=r"action\[1\]"):
        far.step(np.array([0, 5, 0]))
    with pytest.raises(SpaceError):
        far.step(np.array([0.5, 0, 0]))
    with pytest.raises(SpaceError):
        far.step(np.array([0, 0]))
    far.step(np.array([0, 1, 0]))


def test_what_one_environment_raises_arrives(serve: Serve) -> None:
    far = longrein.connect_vec(env_url(serve([("Broken", Broken)])), num_envs=2, envs_per_lease=1)
    far.reset()
    with pytest.raises(RemoteEnvError, match="the arm hit the table"):
        far.step(np.array([1, 9]))


def test_wrong_arguments_say_so(serve: Serve) -> None:
    url = env_url(serve(["CartPole-v1"]))
    with pytest.raises(SpecError, match="autoreset"):
        longrein.connect_vec(url, num_envs=2, autoreset="sometimes")
    with pytest.raises(SpecError, match="on_loss"):
        longrein.connect_vec(url, num_envs=2, on_loss="cry")
    with pytest.raises(SpecError, match="no URL"):
        longrein.connect_vec([])


def test_two_servers_with_different_environments_are_refused() -> None:
    with (
        longrein.Server(["CartPole-v1"], at="ws://127.0.0.1:0") as one,
        longrein.Server(["Acrobot-v1"], at="ws://127.0.0.1:0") as other,
        pytest.raises(SpecError, match="another observation_space"),
    ):
        longrein.connect_vec([one.urls[0], other.urls[0]])


# ------------------------------------------------------------------------------------------ environments that are lost


@pytest.fixture
def processes() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Server processes that can be killed."""
    running: list[subprocess.Popen[str]] = []

    def start(at: str = "ws://127.0.0.1:0", *more: str) -> tuple[subprocess.Popen[str], str]:
        command = [
            sys.executable,
            "-m",
            "longrein.cli",
            "serve",
            f"{HERE}/environments.py:Counting",
            "--quiet",
            "--at",
            at,
        ]
        process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().split()[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_a_server_that_restarts_has_lost_the_environment(processes: Any) -> None:
    process, url = processes()
    env = longrein.connect(url + "/Counting", reconnect=20)
    env.reset()
    env.step(1)
    process.kill()
    process.wait()
    processes(url)
    with pytest.raises(LeaseLost, match="no such lease"):
        env.step(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("envs_per_lease", [None, 1])
def test_lost_environments_are_replaced_where_that_is_wanted(
    processes: Any, mode: str, envs_per_lease: int | None
) -> None:
    process, url = processes()
    far = longrein.connect_vec(
        url + "/Counting", num_envs=2, autoreset=mode, envs_per_lease=envs_per_lease, on_loss="restart", reconnect=20
    )
    far.reset(seed=0)
    for _ in range(3):
        last = far.step(np.array([1, 2]))[0].copy()
    process.kill()
    process.wait()
    processes(url)
    observations, rewards, terminated, truncated, infos = far.step(np.array([1, 2]))
    assert truncated.all()
    assert not terminated.any()
    assert rewards.tolist() == [0, 0]
    assert infos["restarted"].tolist() == [True, True]
    if mode == "same_step":
        assert observations[:, 0].tolist() == [0, 0], "the new episodes' first observations"
        assert [final.tolist() for final in infos["final_obs"]] == last.tolist()
    else:
        assert observations.tolist() == last.tolist()
    if mode == "next_step":
        observations, rewards, _, truncated, _ = far.step(np.array([1, 2]))
        assert observations[:, 0].tolist() == [0, 0]
        assert not truncated.any()
    if mode == "disabled":
        assert far.reset(options={"reset_mask": np.array([True, True])})[0][:, 0].tolist() == [0, 0]
    assert far.step(np.array([3, 4]))[0].tolist() == [[1, 3, 1], [1, 4, 1]]
    far.close()


def test_a_dead_server_delays_nobody(processes: Any) -> None:
    (_, alive), (process, dead) = processes(), processes()
    far = longrein.connect_vec(
        [alive + "/Counting", dead + "/Counting"], num_envs=4, envs_per_lease=1, on_loss="restart", reconnect=60
    )
    far.reset(seed=0)
    process.kill()
    process.wait()
    far.send(np.zeros(2, int), [0, 1])
    started = time.monotonic()
    for _ in range(50):
        *_, infos = far.recv(min_ready=1)
        far.send(np.zeros(len(infos["env_id"]), int), infos["env_id"])
        assert set(infos["env_id"]) <= {0, 1}
    assert time.monotonic() - started < 5
