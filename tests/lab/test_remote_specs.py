"""What a spec's `env` may name: ids, kinds with options, served environments, older systems; each trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import longrein
from longrein.errors import ConnectError
from longrein.lab import experiment, spec
from longrein.lab.session import SessionResult, run_session


def trained(folder: Path, env: Mapping[str, Any], name: str = "run") -> SessionResult:
    plain = {
        "agent": {
            "algorithm": {"name": "ppo", "rollout_steps": 16, "minibatch_size": 32, "epochs": 1},
            "net": {"hidden": [16]},
        },
        "env": env,
        "meta": {"env_steps": 100, "eval": {"episodes": 3}},
    }
    made = spec.from_plain("remote", plain)
    (folder / name).mkdir()
    settings = experiment.session_settings(made, 0)
    return run_session(settings, folder / name, lambda count: experiment.open_envs(made.envs[0], count))


def test_here_and_elsewhere_the_same_is_learned(tmp_path: Path) -> None:
    here = trained(tmp_path, {"id": "CartPole-v1", "num_envs": 2}, "here")
    assert (here.status, here.env_steps, len(here.evaluation)) == ("budget spent", 128, 3)
    with (
        longrein.Server(["CartPole-v1"], at="ws://127.0.0.1:0") as ws,
        longrein.Server(["CartPole-v1"], at="http://127.0.0.1:0") as http,
    ):
        for name, url in [("ws", ws.urls[0]), ("http", http.urls[0]), ("both", [*ws.urls, *http.urls])]:
            there = trained(tmp_path, {"url": url, "num_envs": 2}, name)
            assert there.evaluation == here.evaluation, name


def test_options_reach_the_maker_here_and_elsewhere(tmp_path: Path) -> None:
    options = {"max_episode_steps": 7}
    short = trained(tmp_path, {"id": "gymnasium:CartPole-v1", "num_envs": 2, "options": options}, "kind")
    assert short.evaluation == (7.0, 7.0, 7.0)
    with longrein.Server(["CartPole-v1"], at="ws://127.0.0.1:0") as server:
        there = trained(tmp_path, {"url": server.urls[0], "num_envs": 2, "options": options}, "ws")
    assert there.evaluation == short.evaluation


def test_older_systems_are_trained_on(tmp_path: Path) -> None:
    with longrein.Server(["CartPole-v1"], at="ws://127.0.0.1:0/gym", dialect="gymie") as server:
        url = re.sub(r"^ws://(.*)/gym$", r"gymie://\1/CartPole-v1", server.urls[0])
        one = trained(tmp_path, {"url": url, "num_envs": 2}, "gymie")
        listed = trained(tmp_path, {"url": [url, url], "num_envs": 2}, "list")
    assert (one.status, one.evaluation) == ("budget spent", listed.evaluation)
    with longrein.Server(["CartPole-v1"], at="http://127.0.0.1:0", dialect="multiserver") as server:
        url = server.urls[0].replace("http://", "multiserver://")
        single = trained(tmp_path, {"url": url, "num_envs": 1}, "multiserver")
    assert (single.status, len(single.evaluation)) == ("budget spent", 3), "three episodes, of one environment"


def test_what_cannot_be_reached_is_named_with_how_long_it_was_tried(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match=r"ws://127.0.0.1:1/CartPole-v1: .* \(tried for \d+\.\d s\)"):
        trained(tmp_path, {"url": "ws://127.0.0.1:1/CartPole-v1"})
    result = (tmp_path / "run" / "session_0" / "result.json").read_text()
    assert '"status": "failed"' in result
    assert "127.0.0.1:1" in result
