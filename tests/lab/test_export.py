"""A policy in a file acts as the one that it was, by itself, and as its ONNX graph does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from gymnasium.vector.utils import concatenate, create_empty_array
from lab import policies
from torch import nn
from typer.testing import CliRunner

import longrein
from longrein import cli
from longrein.errors import CheckpointError, RunError, SpaceError, SpecError
from longrein.lab.export import best_session, policy_of
from longrein.lab.onnx_graph import save_onnx
from longrein.lab.saved_policy import SavedPolicy, load_policy, save_policy

onnxruntime = pytest.importorskip("onnxruntime")


def exported(saved: SavedPolicy, path: Path) -> SavedPolicy:
    """A policy after its way through a file."""
    save_policy(path, saved.policy, saved.about)
    return longrein.load_policy(path)


def same(one: Any, other: Any) -> bool:
    """Whether two actions, or batches of them, are equal."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return np.array_equal(one, other) and np.asarray(one).dtype == np.asarray(other).dtype


def batch_of(space: Any, seen: list[Any]) -> Any:
    return concatenate(space, seen, create_empty_array(space, len(seen)))


@pytest.mark.parametrize("case", policies.CASES, ids=policies.name_of)
def test_an_exported_policy_acts_like_the_original(case: tuple[str, Any, Any, Any], tmp_path: Path) -> None:
    saved = policies.make(*case)
    found = exported(saved, tmp_path / "policy.safetensors")
    assert found.about.algorithm == case[0]
    assert (found.observation_space, found.action_space) == (saved.observation_space, saved.action_space)
    for one in policies.observations(saved.observation_space, 5):
        action = found.act(one)
        assert same(action, saved.act(one))  # whoever remembers, remembers the same
        assert action in found.action_space
    seen = batch_of(saved.observation_space, policies.observations(saved.observation_space, 6, seed=1))
    state, original = found.initial_state(6), saved.initial_state(6)
    for deterministic in (True, False, True):  # twice the same, but for what was remembered in between
        draws = [torch.Generator().manual_seed(5) for _ in range(2)]
        actions, state = found.act_batch(seen, deterministic, state, draws[0])
        expected, original = saved.act_batch(seen, deterministic, original, draws[1])
        assert same(actions, expected)
        assert (state is None) == (not saved.recurrent)
        if state is not None:
            assert original is not None
            assert np.array_equal(state, original)
            assert bool(state.any())


def test_the_state_is_handed_through(tmp_path: Path) -> None:
    saved = policies.make("ppo", {"net": {"recurrent": "lstm", "recurrent_size": 8}})
    found = exported(saved, tmp_path / "p")
    one = policies.observations(saved.observation_space, 1)[0]
    first, state = found.act_batch(one[None])
    assert state is not None
    assert state.shape == (1, 32)  # output and cell, of the policy's layer and of the value's
    following, _ = found.act_batch(one[None], True, state)
    found.act(one)
    assert found.act(one) == following[0]
    found.reset()
    assert found.act(one) == first[0]


def test_the_file_says_what_it_holds(tmp_path: Path) -> None:
    saved = policies.make("ppo", {"normalise_observation": True})
    save_policy(tmp_path / "p.safetensors", saved.policy, saved.about)
    with safetensors.safe_open(tmp_path / "p.safetensors", framework="np") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert metadata["format"] == "longrein.policy"
    assert metadata["algorithm"] == "ppo"
    assert metadata["normaliser"] == "observation"
    assert metadata["recurrent"] == "none"
    assert metadata["env_steps"] == "12"
    assert json.loads(metadata["config"])["net"]["hidden"] == [16]
    assert json.loads(metadata["action_space"]) == {"type": "Discrete", "n": 3, "start": 2, "dtype": "int64"}
    assert "Linear" in metadata["net"]
    assert "normaliser.moments.mean" in names


def test_a_loaded_policy_needs_no_environment_and_no_run(tmp_path: Path) -> None:
    saved = policies.make("dqn")
    save_policy(tmp_path / "p.safetensors", saved.policy, saved.about)
    code = f"""
import sys, longrein
policy = longrein.load_policy({str(tmp_path / "p.safetensors")!r})
print(policy.act([0.1, 0.2, 0.3, 0.4]))
print([name for name in ("matplotlib", "longrein.lab.session", "longrein.link.client") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(saved.act([0.1, 0.2, 0.3, 0.4])), "[]"]


class TestObservations:
    """What is no observation is refused, with what was expected."""

    @pytest.mark.parametrize(
        ("seen", "says"),
        [
            (np.zeros(3, np.float32), r"observation: expected float32 of shape \(4,\), got shape \(3,\)"),
            ([0.0, float("nan"), 0.0, 0.0], r"observation\[1\]: expected a number, got nan"),
            ("left", r"observation: expected float32 of shape \(4,\), got str 'left'"),
            (None, r"observation: expected float32 of shape \(4,\), got NoneType None"),
            ({"a": 1}, r"observation: expected float32 of shape \(4,\), got dict"),
            ([[0.0], [1.0, 2.0]], r"observation: expected float32 of shape \(4,\)"),
            (np.zeros(4, np.complex64), r"observation: expected float32 of shape \(4,\)"),
        ],
    )
    def test_one(self, seen: Any, says: str) -> None:
        with pytest.raises(SpaceError, match=says):
            policies.make("ppo").act(seen)

    def test_choices_are_within_their_space(self) -> None:
        policy = policies.make("ppo", seen=Discrete(4))
        assert policy.act(3) in policy.action_space
        with pytest.raises(SpaceError, match="observation: expected an integer from 0 to 3, got 4"):
            policy.act(4)
        with pytest.raises(SpaceError, match="expected numbers of int64, got numbers of float64"):
            policy.act(1.5)

    def test_members_are_named(self) -> None:
        policy = policies.make(*next(case for case in policies.CASES if "action_mask" in str(case[2])))
        seen = policies.observations(policy.observation_space, 1)[0]
        with pytest.raises(SpaceError, match=r"observation\['at'\]: expected float32 of shape \(4,\)"):
            policy.act(seen | {"at": np.zeros(5)})
        with pytest.raises(SpaceError, match="a mapping with the keys"):
            policy.act({"at": seen["at"]})

    def test_a_batch(self) -> None:
        policy = policies.make("ppo")
        with pytest.raises(SpaceError, match=r"expected float32 of shape \(2, 4\), got shape \(2, 5\)"):
            policy.act_batch(np.zeros((2, 5)))
        with pytest.raises(SpaceError, match="observations: expected a batch"):
            policy.act_batch(3)

    def test_numbers_outside_the_bounds_pass(self) -> None:
        policy = policies.make("sac", seen=policies.TORQUE)
        assert policy.act([9.0, -9.0]) in policy.action_space


GRAPHS = [case for case in policies.CASES if case[0] != "random" and not isinstance(case[3], policies.Dict)]
QUICK = [case for case in GRAPHS if policies.name_of(case) in ("dqn", "ppo-lstm-8")]


def check_graph(case: tuple[str, Any, Any, Any], tmp_path: Path) -> None:
    saved = policies.make(*case)
    save_onnx(tmp_path / "policy.onnx", saved)
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    assert names[0] in ("action_values", "parameters", "squashed")
    assert names[1:] == (["action", "next_state"] if saved.recurrent else ["action"])
    rng = np.random.default_rng(2)
    for rows in (1, 7):
        batch = batch_of(saved.observation_space, policies.observations(saved.observation_space, rows, seed=rows))
        given = {"observation": saved.policy.encode(batch)}
        state = saved.initial_state(rows)
        if state is not None:
            state = given["state"] = rng.normal(size=state.shape).astype(np.float32)
        found = dict(zip(names, session.run(None, given), strict=True))
        actions, following = saved.act_batch(batch, True, state)
        assert found["action"].dtype == actions.dtype
        assert np.allclose(found["action"], actions, atol=1e-5)
        if following is not None:
            assert np.allclose(found["next_state"], following, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["algorithm"]) == case[0]


@pytest.mark.parametrize("case", QUICK, ids=policies.name_of)
def test_the_onnx_graph_does_what_the_policy_does(case: tuple[str, Any, Any, Any], tmp_path: Path) -> None:
    check_graph(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in GRAPHS if case not in QUICK], ids=policies.name_of)
def test_every_onnx_graph_does_what_its_policy_does(case: tuple[str, Any, Any, Any], tmp_path: Path) -> None:
    check_graph(case, tmp_path)


def test_the_graph_itself_rescales_what_it_is_given(tmp_path: Path) -> None:
    seen = Dict({"level": Box(0.0, 50.0, (2,)), "action_mask": MultiBinary(3)})
    saved = policies.make("dqn", {"net": {"rescale_observation": True}}, seen)
    save_onnx(tmp_path / "policy.onnx", saved)
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"])
    level = np.random.default_rng(2).uniform(0, 50, (40, 2)).astype(np.float32)
    mask = np.array([[1, 1, index % 2] for index in range(40)], np.int8)
    _, actions = session.run(None, {"observation": np.concatenate([level, mask.astype(np.float32)], 1)})
    expected, _ = saved.act_batch({"level": level, "action_mask": mask}, True)
    assert actions.tolist() == expected.tolist()
    assert len(set(actions.tolist())) > 1
    loaded = exported(saved, tmp_path / "policy.safetensors")
    assert loaded.act_batch({"level": level, "action_mask": mask}, True)[0].tolist() == expected.tolist()


def test_what_has_no_graph_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"random\.Policy has no graph"):
        save_onnx(tmp_path / "p.onnx", policies.make("random"))
    both = next(case for case in policies.CASES if isinstance(case[3], policies.Dict))
    with pytest.raises(SpecError, match="are several, and a graph gives one tensor"):
        save_onnx(tmp_path / "p.onnx", policies.make(*both))
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_does_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = policies.make("dqn")
    monkeypatch.setattr(saved.policy, "for_env", lambda action: action + 1)  # the graph says otherwise
    with pytest.raises(RunError, match="the graph does"):
        save_onnx(tmp_path / "p.onnx", saved)
    assert list(tmp_path.iterdir()) == []


class TestBadFiles:
    """What is no policy is refused, with what it is instead."""

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no such file\n  hint: longrein export"):
            load_policy(tmp_path / "p")

    def test_other_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "p").write_bytes(b"\xff" * 300)
        with pytest.raises(CheckpointError, match="is no file of a policy"):
            load_policy(tmp_path / "p")

    def test_cut_short(self, tmp_path: Path) -> None:
        saved = policies.make("dqn")
        save_policy(tmp_path / "p", saved.policy, saved.about)
        whole = (tmp_path / "p").read_bytes()
        (tmp_path / "p").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="is no file of a policy"):
            load_policy(tmp_path / "p")

    def test_somebody_elses_tensors(self, tmp_path: Path) -> None:
        (tmp_path / "p").write_bytes(safetensors.torch.save({"x": torch.zeros(2)}))
        with pytest.raises(CheckpointError, match="holds tensors, but no policy of longrein"):
            load_policy(tmp_path / "p")

    def test_another_layout(self, tmp_path: Path) -> None:
        metadata = {"format": "longrein.policy", "version": "2", "longrein": "9.0"}
        (tmp_path / "p").write_bytes(safetensors.torch.save({"x": torch.zeros(2)}, metadata))
        with pytest.raises(CheckpointError, match=r"expected layout 1, found 2\n  hint: longrein 9\.0 wrote it"):
            load_policy(tmp_path / "p")

    def test_no_room(self, tmp_path: Path) -> None:
        saved = policies.make("dqn")
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_policy(tmp_path / "file" / "p", saved.policy, saved.about)


def test_makers_without_a_name_are_asked_for(tmp_path: Path) -> None:
    maker = lambda space: nn.Linear(4, 8)  # noqa: E731  # what has no name is the point
    saved = policies.make("ppo", {"net": {"feature_maker": maker}})
    save_policy(tmp_path / "p", saved.policy, saved.about)
    with pytest.raises(SpecError, match="has no name to be found by\n  hint: give feature_maker="):
        load_policy(tmp_path / "p")
    one = policies.observations(saved.observation_space, 1)[0]
    assert load_policy(tmp_path / "p", feature_maker=maker).act(one) == saved.act(one)
    with pytest.raises(CheckpointError, match="weights do not fit"):
        load_policy(tmp_path / "p", feature_maker=lambda space: nn.Linear(4, 9))
    with pytest.raises(SpecError, match="head: is no maker of a net"):
        load_policy(tmp_path / "p", head=maker)


SPEC = {
    "agent": {"algorithm": {"name": "ppo", "rollout_steps": 32}, "net": {"hidden": [16]}},
    "env": {"id": "CartPole-v1", "num_envs": 2},
    "meta": {"env_steps": 200, "max_session": 2, "eval": {"episodes": 2}},
}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two short sessions."""
    return longrein.run(SPEC, "tiny", data=tmp_path_factory.mktemp("data"), processes=0)


def test_export_writes_the_best_session_of_a_run(trial: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["export", str(trial.run), str(tmp_path / "p.safetensors"), "--onnx"])
    assert done.exit_code == 0, done.output
    assert "p.safetensors: ppo, trained on CartPole-v1" in done.output
    assert (tmp_path / "p.onnx").exists()
    means = [float(np.mean(session.evaluation)) for session in trial.sessions]
    best = trial.run / f"session_{int(np.argmax(means))}"
    assert best_session(trial.run) == best
    ours, theirs = load_policy(tmp_path / "p.safetensors"), policy_of(best)
    for one in policies.observations(ours.observation_space, 20):
        assert ours.act(one) == theirs.act(one)
    assert ours.about.env == "CartPole-v1"
    assert ours.about.env_steps == trial.sessions[0].env_steps


def test_a_session_can_be_named(trial: Any) -> None:
    worst = {0: 1, 1: 0}[int(best_session(trial.run).name[-1])]
    assert policy_of(trial.run / f"session_{worst}").about.algorithm == "ppo"
    with pytest.raises(CheckpointError, match=r"has no body 1.0.0\n  hint: one of 0.0.0"):
        policy_of(trial.run, body="1.0.0")


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run"):
        policy_of(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"settings": {"name": "x", "spec": SPEC}}))
    with pytest.raises(RunError, match="has no session with a checkpoint"):
        policy_of(tmp_path)
