"""A session leaves a folder from which its policy and its graph can be made again, however it ends."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
from collections.abc import Container
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from longrein.errors import CheckpointError, LinkError, RunError
from longrein.lab import checkpoint, records
from longrein.lab.demo import PPO_CARTPOLE
from longrein.lab.evaluation import evaluate
from longrein.lab.session import (
    Progress,
    SessionSettings,
    evaluation_seeds,
    load_policy,
    run_session,
    seed_of,
)
from longrein.learn import algorithms
from longrein.learn.algorithms.ppo import Config


def cartpoles(count: int, mode: AutoresetMode = AutoresetMode.SAME_STEP) -> VectorEnv[Any, Any, Any]:
    return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * count, autoreset_mode=mode)


def settings(**changes: Any) -> SessionSettings:
    config = Config(rollout_steps=32, epochs=2)
    short = {"num_envs": 4, "max_env_steps": 1024, "evaluation_episodes": 3}
    return SessionSettings("CartPole-v1 here", "ppo", config, **short | changes)


def test_evaluations_on_the_way_change_nothing_but_their_file(tmp_path: Path) -> None:
    often = run_session(settings(evaluation_every=300), tmp_path / "often", cartpoles)
    once = run_session(settings(), tmp_path / "once", cartpoles)
    rows = records.read_table(often.folder / "evaluation.csv")
    # At the first update behind each 300 env steps, and at the end.
    assert sorted(set(rows["env_steps"])) == [384.0, 640.0, 1024.0]
    assert len(rows["return"]) == 9
    assert once.evaluation == often.evaluation
    saved = [checkpoint.load(run.folder / "checkpoint.pt")["state"]["policy"] for run in (often, once)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_a_session_leaves_all_its_files(tmp_path: Path) -> None:
    seen: list[Progress] = []
    result = run_session(settings(seed=3), tmp_path, cartpoles, seen.append)
    assert result.status == "budget spent"
    assert not result.solved
    assert result.env_steps == 1024 == seen[-1].env_steps
    assert len(result.evaluation) == 3
    folder = tmp_path / "session_3"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "episodes.csv", "metrics.csv", "evaluation.csv", "tensorboard", "checkpoint.pt", "graph.png", "result.json",
    }  # fmt: skip
    assert (folder / "graph.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "graph.png").stat().st_size > 10_000
    with (folder / "episodes.csv").open() as file:
        episodes = list(csv.DictReader(file))
    assert len(episodes) == result.episodes
    # CartPole gives 1 a step: a return is a length.
    assert all(float(row["return"]) == int(row["length"]) for row in episodes)
    metrics = records.read_table(folder / "metrics.csv")
    assert metrics["env_steps"] == [128.0, 384.0, 640.0, 896.0]  # at least 200 env steps apart
    assert json.loads((folder / "result.json").read_text())["status"] == "budget spent"
    assert any(path.stat().st_size > 500 for path in (folder / "tensorboard").iterdir())


def test_the_same_seed_gives_the_same_session(tmp_path: Path) -> None:
    states = []
    for run in ("one", "two"):
        result = run_session(settings(seed=5), tmp_path / run, cartpoles)
        states.append(checkpoint.load(result.folder / "checkpoint.pt")["state"]["policy"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_saved_policy_plays_as_it_did(tmp_path: Path) -> None:
    result = run_session(settings(), tmp_path, cartpoles)
    envs = cartpoles(2)
    policy = load_policy(result.folder, envs).policy
    rows = evaluate(policy, envs, evaluation_seeds(0, 3))
    assert tuple(row[2] for row in rows) == result.evaluation
    other = SyncVectorEnv([lambda: gymnasium.make("MountainCar-v0")])
    with pytest.raises(CheckpointError, match="observation_space"):
        load_policy(result.folder, other)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_evaluation_plays_each_seed_once_in_each_mode(mode: AutoresetMode) -> None:
    envs = cartpoles(3, mode)
    _, build = algorithms.load("ppo")
    policy = build(Config(), envs.single_observation_space, envs.single_action_space, 0).policy
    seeds = [11, 12, 13, 14]
    rows = evaluate(policy, envs, seeds)
    expected = []
    for seed in seeds:
        env = gymnasium.make("CartPole-v1")
        observation, _ = env.reset(seed=seed)
        length, over = 0, False
        while not over:
            action, _ = policy.act(policy.encode(observation[None]), deterministic=True)
            observation, _, terminated, truncated, _ = env.step(policy.for_env(action)[0])
            length, over = length + 1, terminated or truncated
        expected.append((seed, length, float(length)))
    assert rows == expected


class Losing(gymnasium.vector.VectorWrapper):
    """Says now and then that an environment was lost, and replaced."""

    def __init__(self, envs: Any, at: Container[int], row: int) -> None:
        super().__init__(envs)
        self.at, self.row, self.steps = at, row, 0

    def step(self, actions: Any) -> Any:
        self.steps += 1
        *rest, infos = super().step(actions)
        if self.steps in self.at:
            infos = infos | {"restarted": np.arange(self.num_envs) == self.row}
        return *rest, infos


def test_an_episode_whose_environment_is_lost_is_played_again() -> None:
    envs = cartpoles(2)
    policy = algorithms.load("ppo")[1](Config(), envs.single_observation_space, envs.single_action_space, 0).policy
    undisturbed = evaluate(policy, envs, [5, 6, 7, 8])
    assert evaluate(policy, Losing(envs, (2, 11, 30), row=1), [5, 6, 7, 8]) == undisturbed
    with pytest.raises(RunError, match="was lost 20 times"):
        evaluate(policy, Losing(envs, range(10_000), row=0), [5, 6, 7, 8])


def test_training_and_evaluation_never_share_a_seed() -> None:
    for root in range(200):
        training = seed_of(root, "environments") // 2
        assert training + 100_000 < 2**30 <= evaluation_seeds(root, 1)[0]
    assert evaluation_seeds(1, 3) != evaluation_seeds(2, 3)
    assert seed_of(1, "actor") != seed_of(1, "learner")


def test_reaching_the_target_ends_training(tmp_path: Path) -> None:
    result = run_session(settings(target=5.0, window=10), tmp_path, cartpoles)
    assert result.solved
    assert result.env_steps < 1024


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_finished_folder(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def interrupt(progress: Progress) -> None:
        if progress.updates == 2:
            os.kill(os.getpid(), number)

    result = run_session(settings(max_env_steps=10**6), tmp_path, cartpoles, interrupt)
    assert result.status == "interrupted"
    assert result.evaluation == ()
    assert 256 <= result.env_steps < 512
    assert json.loads((result.folder / "result.json").read_text())["status"] == "interrupted"
    assert result.graph.stat().st_size > 0
    load_policy(result.folder, cartpoles(1))
    assert signal.getsignal(number) is before


def test_a_session_may_run_outside_the_main_thread(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(run_session(settings(), tmp_path, cartpoles)))
    thread.start()
    thread.join()
    assert results[0].env_steps == 1024


def test_a_session_that_fails_says_so_and_raises(tmp_path: Path) -> None:
    def unreachable(count: int) -> VectorEnv[Any, Any, Any]:
        raise LinkError("nobody is there", url="ws://127.0.0.1:1")

    with pytest.raises(LinkError):
        run_session(settings(), tmp_path, unreachable)
    found = json.loads((tmp_path / "session_0" / "result.json").read_text())
    assert found["status"] == "failed"
    assert "nobody is there" in found["error"]


def test_what_was_learnt_outlives_the_environments(tmp_path: Path) -> None:
    class Gone(gymnasium.vector.VectorWrapper):
        steps = 0

        def step(self, actions: Any) -> Any:
            self.steps += 1
            if self.steps > 100:
                raise LinkError("gone for good", url="ws://127.0.0.1:1")
            return self.env.step(actions)

    with pytest.raises(LinkError):
        run_session(settings(), tmp_path, lambda count: Gone(cartpoles(count)))
    saved = checkpoint.load(tmp_path / "session_0" / "checkpoint.pt")
    assert saved["env_steps"] == 400
    assert saved["version"] == 3


def test_a_session_does_not_write_into_another(tmp_path: Path) -> None:
    run_session(settings(), tmp_path, cartpoles)
    with pytest.raises(RunError, match="a folder of its own"):
        run_session(settings(), tmp_path, cartpoles)


# ------------------------------------------------------------------------------------------------------------- records


def test_runs_of_the_same_second_do_not_meet(tmp_path: Path) -> None:
    runs = [records.create_run(tmp_path, "x", {"session": settings()}) for _ in range(3)]
    assert len(set(runs)) == 3
    described = [json.loads((run / "settings.json").read_text()) for run in runs]
    assert described[0]["fingerprint"] == described[1]["fingerprint"]
    assert described[0]["settings"]["session"]["config"]["rollout_steps"] == 32
    assert described[0]["versions"]["torch"]


def test_a_run_that_cannot_be_made_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        records.create_run(tmp_path / "file", "x", {})


def test_a_reader_sees_whole_lines_only(tmp_path: Path) -> None:
    table = records.Table(tmp_path / "t.csv", ("a", "b"))
    table.append([(1, 2.5)])
    assert records.read_table(tmp_path / "t.csv") == {"a": [1.0], "b": [2.5]}, "readable while it is open"
    with (tmp_path / "t.csv").open("a") as file:
        file.write("3,")  # as another process would see it in the middle of a write
    assert records.read_table(tmp_path / "t.csv") == {"a": [1.0], "b": [2.5]}
    with pytest.raises(ValueError, match="expected 2 values"):
        table.append([(1,)])
    table.close()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"n": 1})

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(path, {"n": 2})
    assert checkpoint.load(path)["n"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(path)
    checkpoint.save(path, {"n": 1})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match="expected format 1, found 99"):
        checkpoint.load(path)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"format": 1, "trap": Trap()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "sprung").exists()


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.slow
def test_ppo_solves_cartpole(tmp_path: Path) -> None:
    config = algorithms.config_from(Config, PPO_CARTPOLE)
    asked = SessionSettings("CartPole-v1 here", "ppo", config, seed=41, target=475.0, max_env_steps=150_000)
    result = run_session(asked, tmp_path, cartpoles)
    assert result.solved, result
    assert np.mean(result.evaluation) >= 475
