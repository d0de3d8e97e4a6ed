"""A real Unity player, in an interpreter of its own, stepped over WebSocket from this one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import longrein
from longrein.errors import ConnectError, RemoteEnvError, SpaceError, SpecError
from longrein.link.makers import unity, unity_player, unity_setup

PLAYER = "3dball"
installed = pytest.mark.skipif(
    not unity_setup.interpreter().exists() or PLAYER not in unity_player.found_players(),
    reason=f"no Unity player here: longrein install unity:{PLAYER}",
)
Serve = Callable[..., tuple[str, psutil.Process]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`longrein serve unity:3dball` as a user types it; its URL, and its process."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> tuple[str, psutil.Process]:
        command = [sys.executable, "-m", "longrein.cli", "serve", f"unity:{PLAYER}", "--at", "ws://127.0.0.1:0", *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process.stdout.readline().split()[-1], psutil.Process(process.pid)

    yield start
    for process in started:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def player_of(server: psutil.Process) -> psutil.Process:
    (player,) = [child for child in server.children() if child.name().endswith("x86_64") or "ball" in child.name()]
    return player


@installed
def test_a_thousand_steps_as_a_vector_environment(serve: Serve) -> None:
    url, server = serve("--option", "actions=4", "--option", "max_episode_steps=1000")
    assert Path(server.exe()).resolve() == unity_setup.interpreter().resolve() or "unity" in " ".join(server.cmdline())
    envs = longrein.connect_vec(url, num_envs=12, autoreset="same_step")
    observations, _ = envs.reset()
    assert observations.shape == (12, 8)
    envs.action_space.seed(0)
    ended = 0
    for _ in range(1000):
        last = observations
        observations, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())
        assert observations in envs.observation_space
        over = terminated | truncated
        # A ball that stays up earns 0.1 a step for its agent, one that falls costs 1 and ends the episode.
        np.testing.assert_allclose(rewards, np.where(terminated, -1.0, 0.1), atol=1e-5)
        for index in np.flatnonzero(over):
            np.testing.assert_array_equal(infos["final_obs"][index], last[index])
        ended += int(over.sum())
    assert ended > 100
    player = player_of(server)
    envs.close()
    assert_gone(player)


@installed
def test_the_scene_as_a_parallel_environment_with_its_controls(serve: Serve) -> None:
    url, _ = serve("--option", "view=parallel")
    env = longrein.connect_parallel(url)
    observations, _ = env.reset()
    assert len(observations) == 12
    assert all(re.fullmatch(r"Ball3DBrain-\d+", agent) for agent in env.possible_agents)
    for _ in range(200):
        if not env.agents:
            env.reset()
        observations, rewards, *_ = env.step({agent: env.action_space(agent).sample() for agent in env.agents})
        assert set(observations) == set(rewards)
    assert env.get_attr("behaviours")["Ball3DBrain"]["agents"] == 12
    assert env.get_attr("parameters") == {}
    with pytest.raises(RemoteEnvError, match="no parameters"):
        env.call("set_parameters", gravity=1.0)
    env.call("configure", train_mode=True)
    env.close()


@installed
def test_a_player_that_dies_is_told_at_once(serve: Serve) -> None:
    url, server = serve()
    envs = longrein.connect_vec(url, num_envs=12, autoreset="same_step")
    envs.reset()
    player_of(server).kill()
    started = time.monotonic()
    with pytest.raises(RemoteEnvError, match="died with exit code -9"):
        envs.step(np.zeros(12, int))
    assert time.monotonic() - started < 10
    envs.close()


@installed
def test_what_does_not_fit_the_scene_is_refused_and_leaves_no_player(serve: Serve) -> None:
    url, server = serve()
    with pytest.raises(SpaceError, match="has 12 agents"):
        longrein.connect_vec(url, num_envs=3, autoreset="same_step")
    deadline = time.monotonic() + 10
    while server.children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.children() == []


@installed
def test_a_killed_server_leaves_no_player(serve: Serve) -> None:
    url, server = serve()
    longrein.connect_vec(url, num_envs=12, autoreset="same_step").reset()
    player = player_of(server)
    server.kill()
    assert_gone(player)


def assert_gone(player: psutil.Process) -> None:
    deadline = time.monotonic() + 10
    while player.is_running() and player.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not player.is_running() or player.status() == psutil.STATUS_ZOMBIE


# ------------------------------------------------------------------------------------------------- without a player


def test_players_are_found_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "Scene.x86_64").touch()
    monkeypatch.setenv(unity_player.FOLDERS, f"{tmp_path / 'first'}:{tmp_path / 'second'}")
    assert unity.names() == ["scene"]
    with pytest.raises(SpecError, match="not executable"):
        unity_player.player_file("SCENE")
    (tmp_path / "first/Scene.x86_64").chmod(0o755)
    assert unity_player.player_file("scene") == tmp_path / "first/Scene.x86_64"
    with pytest.raises(SpecError, match="no Unity player 'other'; found: scene"):
        unity_player.player_file("other")


def test_without_its_python_end_it_says_what_to_do() -> None:
    with pytest.raises(SpecError, match="longrein install unity:3dball"):
        longrein.Server(["unity:3dball"], at="ws://127.0.0.1:0")


def test_by_hand_needs_a_port() -> None:
    unity.check(unity.BY_HAND)
    with pytest.raises(SpecError, match="no port to wait at"):
        unity.make(unity.BY_HAND, 1, "same_step")


def test_only_known_players_are_installed() -> None:
    with pytest.raises(SpecError, match="3dball, gridworld, tennis"):
        unity_setup.install("doom")


def test_a_player_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    with pytest.raises(ConnectError, match="cannot be fetched"):
        unity_setup._fetch("3dball", tmp_path / "3dball")
    assert list(tmp_path.iterdir()) == []


def test_the_process_is_moved_only_for_unity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    moved: list[object] = []
    monkeypatch.setattr(os, "execve", lambda *words: moved.append(words))
    monkeypatch.setattr(unity_setup, "interpreter", lambda: tmp_path / "python")
    unity_setup.move(["unity:3dball"])  # nothing is installed: the maker says what to do
    (tmp_path / "python").touch()
    unity_setup.move(["CartPole-v1"])
    assert moved == []
    unity_setup.move(["CartPole-v1", "unity:3dball"])
    assert len(moved) == 1
