"""Experiments from Python: specs with their tables, and drlbox's two functions with every argument."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import longrein
from longrein import front
from longrein.errors import CheckpointError, SpecError
from longrein.lab import spec as specs
from longrein.lab.topology import Topology
from longrein.lab.trainer import Arguments
from longrein.learn import algorithms

SPEC: dict[str, Any] = {
    "agent": {"algorithm": {"name": "ppo", "rollout_steps": 32}, "net": {"hidden": [16]}},
    "env": {"id": "CartPole-v1", "num_envs": 2},
    "meta": {"env_steps": 200, "max_session": 2, "eval": {"episodes": 2}},
}


def cartpole() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("CartPole-v1")


def features(space: gymnasium.Space[Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(space.shape[0], 16), nn.ReLU())  # type: ignore[index]  # a Box


class Model(nn.Module):
    """Logits and a value."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__()
        assert isinstance(env.unwrapped, gymnasium.Env)  # drlbox's model makers are shown the environment itself
        self.body = nn.Linear(4, 16)
        self.logits, self.value = nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.relu(self.body(seen))
        return self.logits(inner), self.value(inner)


def first_two(observation: Any) -> Any:
    return observation[:2]


# ---------------------------------------------------------------------------------------------------------------- run


def test_run_returns_the_trial_with_its_tables(tmp_path: Path) -> None:
    trial = longrein.run(SPEC, "tiny", data=tmp_path, processes=0, meta__seed=5)
    assert trial.run.parent == tmp_path
    assert trial.failures == {}
    assert [result.status for result in trial.sessions if result is not None] == ["budget spent"] * 2
    for table, columns in (
        (trial.episodes, {"session", "env_steps", "length", "return", "truncated"}),
        (trial.metrics, {"session", "env_steps", "lr", "clip"}),
        (trial.evaluation, {"session", "seed", "length", "return"}),
    ):
        assert columns <= set(table.columns)
        assert sorted(set(table["session"])) == [5, 6]
    for seed, result in zip((5, 6), trial.sessions, strict=True):
        assert result is not None
        played = trial.evaluation[trial.evaluation["session"] == seed]
        assert tuple(played["return"]) == result.evaluation
        assert len(trial.episodes[trial.episodes["session"] == seed]) == result.episodes
    assert trial.policy(6).act(np.zeros(4)) in (0, 1)


def test_run_takes_files_and_processes(tmp_path: Path) -> None:
    file = tmp_path / "specs.yaml"
    file.write_text(specs.as_yaml({"one": SPEC, "two": SPEC}))
    told = []
    trial = longrein.run(
        file, "two", data=tmp_path, processes=1, on_progress=lambda seed, at: told.append(seed),
        **{"agent.algorithm.lr": 0.01, "meta.max_session": 1},
    )  # fmt: skip
    assert trial.spec.name == "two"
    assert trial.spec.agents[0].config.lr == 0.01
    assert set(told) == {0}
    assert set(trial.metrics["lr"]) == {0.01}


def test_run_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"agent\.algorithm\.l_r: there is no such key"):
        longrein.run(SPEC, data=tmp_path, **{"agent.algorithm.l_r": 1})
    with pytest.raises(SpecError, match="cannot be read"):
        longrein.run(tmp_path / "none.yaml", data=tmp_path)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- the trainer

DRLBOX = [
    "env_maker", "state_to_input", "load_model", "load_model_custom", "verbose", "feature_maker", "model_maker",
    "num_parallel", "port_begin", "discount", "train_steps", "rollout_maxlen", "batch_size", "online_learning",
    "replay_type", "replay_ratio", "replay_priority_type", "replay_kwargs", "optimizer", "opt_clip_norm",
    "opt_kwargs", "noisynet", "save_dir", "save_interval", "catch_signal", "a3c_entropy_weight", "acer_trunc_max",
    "acer_kl_weight", "acer_soft_update_ratio", "impala_trunc_rho_max", "impala_trunc_c_max", "dqn_double",
    "dqn_dueling", "policy_eps_start", "policy_eps_end", "policy_eps_decay_steps", "sync_target_interval",
    "kfac_inv_upd_interval",
]  # fmt: skip
EVALUATOR = [
    "env_maker", "state_to_input", "load_model", "load_model_custom", "verbose", "render_timestep", "render_end",
    "num_episodes", "policy_type", "policy_eps",
]  # fmt: skip


def test_every_argument_of_drlbox_is_there_and_documented() -> None:
    assert [one.name for one in dataclasses.fields(Arguments)] == DRLBOX
    assert [one.name for one in dataclasses.fields(front.EvaluatorArguments)] == [*EVALUATOR, "seed"]
    page = (Path(__file__).parents[1] / "docs/guides/from-drlbox.md").read_text()
    assert [name for name in (*DRLBOX, *EVALUATOR) if f"`{name}`" not in page] == []


def spec_of(algorithm: str, **arguments: Any) -> specs.Spec:
    given = {"env_maker": cartpole, "num_parallel": 4} | arguments
    return longrein.make_trainer(algorithm, **given).spec


def config_of(algorithm: str, **arguments: Any) -> Any:
    return spec_of(algorithm, **arguments).agents[0].config


def test_what_is_shared_means_the_same_for_all() -> None:
    for name in ("A3C", "acer", "Impala", "dqn"):
        spec = spec_of(name, discount=0.9, train_steps=5_000, rollout_maxlen=8, batch_size=3, save_interval=700,
                       opt_clip_norm=7.0, opt_kwargs={"learning_rate": 0.25})  # fmt: skip
        config = spec.agents[0].config
        assert spec.agents[0].algorithm == name.lower()
        assert spec.envs[0].num_envs == 12  # 4 actors, each of whom adds 3 rollouts to an update
        assert (spec.meta.env_steps, spec.meta.checkpoint_every) == (5_000, 700)
        assert (config.gamma, config.rollout_steps, config.max_grad_norm, config.lr) == (0.9, 8, 7.0, 0.25)
    config = config_of("a3c")
    assert (config.gamma, config.rollout_steps, config.lr, config.max_grad_norm) == (0.99, 32, 1e-4, 40.0)
    assert (config.optimizer, dict(config.optimizer_settings), config.entropy_weight) == ("adam", {"eps": 1e-4}, 0.01)


def test_acer_and_impala() -> None:
    config = config_of("acer", acer_trunc_max=5.0, acer_soft_update_ratio=0.1, a3c_entropy_weight=0.5, replay_ratio=2)
    assert (config.truncation, config.average_decay, config.entropy_weight) == (5.0, 0.9, 0.5)
    assert (config.replay_ratio, config.memory.prioritized, config.kl_weight, config.trust_region) == (2, False, 0, 1)
    # Four workers, each with a memory of its own.
    assert (config.memory.capacity, config.memory.min_size) == (1000 * 32, 100 * 32)
    assert config.memory.batch_size == 1
    config = config_of("acer", acer_kl_weight=0.1)
    assert (config.kl_weight, config.trust_region) == (0.1, None)
    config = config_of(
        "impala", impala_trunc_rho_max=2.0, impala_trunc_c_max=1.5, replay_type="prioritized",
        replay_priority_type="error", replay_kwargs={"maxlen": 20, "minlen": 2, "alpha": 0.5, "evict_rule": "sample"},
    )  # fmt: skip
    assert (config.rho_clip, config.c_clip, config.priority) == (2.0, 1.5, "error")
    memory = config.memory
    assert (memory.prioritized, memory.alpha, memory.beta, memory.eviction) == (True, 0.5, 0.4, "sampled")
    assert (memory.capacity, memory.min_size) == (20 * 32 * 4, 2 * 32 * 4)
    assert config_of("impala", replay_type=None).replay_ratio == 0
    assert [config_of(name, online_learning=False).epochs for name in ("acer", "impala")] == [0, 0]


@pytest.mark.parametrize(
    ("algorithm", "given", "topology"),
    [
        ("a3c", {"num_parallel": 4}, Topology(hogwild=4)),
        ("acer", {"num_parallel": 4}, Topology(hogwild=4)),
        ("impala", {"num_parallel": 4}, Topology(actors=4)),
        ("dqn", {"num_parallel": 2}, Topology(actors=2)),
        ("a2c", {"num_parallel": 2}, Topology(actors=2, ahead=0)),
        ("ppo", {}, "serial"),
        ("a3c", {"num_parallel": 1}, "serial"),
    ],
)
def test_num_parallel_is_a_topology(algorithm: str, given: dict[str, Any], topology: Any) -> None:
    spec = longrein.make_trainer(algorithm, env_maker=cartpole, batch_size=3, save_interval=777, **given).spec
    assert spec.meta.topology == topology
    assert spec.envs[0].num_envs == 3 * given.get("num_parallel", os.cpu_count())
    assert spec.meta.checkpoint_every == 777


def test_dqn() -> None:
    # Online alone: the memory is the newest rollouts, 2 x 8 env steps, and one update is made for each.
    config = config_of("dqn", num_parallel=2, rollout_maxlen=8, sync_target_interval=10, dqn_double=False)
    memory = config.memory
    assert (memory.capacity, memory.min_size, memory.batch_size, memory.n_steps) == (16, 16, 16, 8)
    assert (config.updates_per_step, config.target_every) == (1 / 16, 160)
    assert (config.double, config.dueling, config.noisy) == (False, False, "none")
    # With replay: one update online and four from the memory for each 16 env steps.
    config = config_of(
        "dqn", num_parallel=2, rollout_maxlen=8, replay_type="prioritized", dqn_dueling=True, noisynet="fg",
        policy_eps_start=0.5, policy_eps_end=0.1, policy_eps_decay_steps=300,
    )  # fmt: skip
    memory = config.memory
    assert (config.updates_per_step, memory.capacity, memory.combined) == (5 / 16, 1000 * 8 * 2, True)
    assert (config.dueling, config.noisy, memory.prioritized) == (True, "factorised", True)
    assert (config.epsilon.start, config.epsilon.end) == (0.5, 0.1)
    config = config_of("dqn", num_parallel=2, rollout_maxlen=8, replay_type="uniform", online_learning=False)
    assert (config.updates_per_step, config.memory.combined) == (4 / 16, False)


def test_kfac_is_an_optimizer() -> None:
    config = config_of("a3c", optimizer="kfac", kfac_inv_upd_interval=5, opt_kwargs={"norm_constraint": 1e-3})
    assert (config.natural.inverse_every, config.natural.kl_clip) == (5, 1e-3)


def test_other_algorithms_take_what_they_have_a_setting_for() -> None:
    default = algorithms.load("ppo")[0]()
    config = config_of("ppo", discount=0.9)
    assert (config.gamma, config.lr, config.rollout_steps) == (0.9, default.lr, default.rollout_steps)


def test_one_module_is_shared_and_a_pair_is_not() -> None:
    assert config_of("a3c", feature_maker=features).shared
    assert not config_of("a3c", feature_maker=lambda space: (features(space), features(space))).shared
    assert config_of("a3c", feature_maker=features, state_to_input=first_two).net.state_to_input is first_two


@pytest.mark.parametrize(
    ("algorithm", "arguments", "says"),
    [
        ("a4c", {}, r"there is no algorithm 'a4c'\n  hint: did you mean"),
        ("a3c", {"env_maker": None}, "env_maker: is missing"),
        ("a3c", {"num_paralel": 2}, r"num_paralel: make_trainer has no such argument\n  hint: did you mean 'num_paral"),
        ("a3c", {"num_parallel": 0}, "num_parallel: must be a whole number, at least 1, got 0"),
        ("a3c", {"dqn_double": True}, r"dqn_double: a3c does not use it\n  hint: leave it out; dqn do"),
        ("dqn", {"a3c_entropy_weight": 0.1}, "a3c_entropy_weight: dqn does not use it"),
        ("a3c", {"replay_type": "uniform"}, r"replay_type: a3c learns from fresh rollouts only\n  hint: leave it out"),
        ("acer", {"replay_type": "rank"}, "replay_type: 'rank' is none"),
        ("a3c", {"online_learning": False}, "online_learning: a3c learns from fresh rollouts only"),
        ("impala", {"online_learning": False, "replay_type": None}, "without a memory there is nothing to learn from"),
        ("dqn", {"online_learning": False}, "nothing to learn from\n  hint: replay_type='uniform'"),
        ("dqn", {"replay_type": "prioritized", "replay_priority_type": "differential"}, "hint: 'error'"),
        ("impala", {"replay_priority_type": "age"}, "replay_priority_type: 'age' is none"),
        ("impala", {"replay_kwargs": {"maxlem": 1}}, r"replay_kwargs.maxlem: there is no such key\n  hint: did"),
        ("impala", {"replay_type": None, "replay_kwargs": {"maxlen": 1}}, "replay_kwargs: there is no memory"),
        ("impala", {"replay_kwargs": {"evict_rule": "new"}}, "evict_rule: 'new' is none"),
        ("a3c", {"noisynet": "fg"}, r"noisynet: a3c has no noisy layers\n  hint: leave it out; dqn has them"),
        ("dqn", {"noisynet": "gf"}, "noisynet: 'gf' is none"),
        ("a3c", {"optimizer": torch.optim.Adam}, r"optimizer: is a type, and .*\n  hint: its name, as 'adam'"),
        ("a3c", {"opt_kwargs": {"rate": 1}}, "opt_kwargs.rate: there is no such keyword"),
        ("a3c", {"optimizer": "kfac", "opt_kwargs": {"epsilon": 1}}, "opt_kwargs.epsilon: kfac has no such keyword"),
        ("dqn", {"optimizer": "kfac"}, "optimizer: dqn has no setting 'natural'"),
        ("dqn", {"opt_kwargs": {"epsilon": 1e-4}}, "opt_kwargs.epsilon: dqn's Adam has settings of its own"),
        ("acer", {"model_maker": Model}, r"model_maker: acer's .*\n  hint: feature_maker: all but the last layer"),
        ("dqn", {"feature_maker": lambda space: (features(space), features(space))}, "gives 2 modules, dqn takes 1"),
        ("ppo", {"acer_trunc_max": 5}, "acer_trunc_max: ppo does not use it"),
        ("td3", {"opt_clip_norm": 5}, "opt_clip_norm: td3 has no setting 'max_grad_norm'"),
        ("a3c", {"load_model": "/no/such/file"}, "there is no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_with_what_to_do(algorithm: str, arguments: dict[str, Any], says: str) -> None:
    given = {"env_maker": cartpole} | arguments
    with pytest.raises((SpecError, CheckpointError), match=says):
        longrein.make_trainer(algorithm, **given)


SMALL = {"num_parallel": 2, "train_steps": 160, "rollout_maxlen": 8}
FEW = {"replay_kwargs": {"maxlen": 20, "minlen": 2}}


@pytest.mark.parametrize(
    ("algorithm", "evaluator", "arguments"),
    [
        ("a3c", "ac", {"model_maker": Model}),
        ("a3c", "ac", {"feature_maker": lambda space: (features(space), features(space)), "optimizer": "kfac"}),
        ("acer", "acer", {"feature_maker": features, "state_to_input": first_two, **FEW}),
        ("impala", "ac", {"feature_maker": features, "state_to_input": first_two, "replay_type": "prioritized", **FEW}),
        ("dqn", "dqn", {"model_maker": lambda env: nn.Linear(4, 2)}),
        ("dqn", "dqn", {"feature_maker": features, "dqn_dueling": True, "replay_type": "uniform", **FEW}),
    ],
)
def test_what_a_trainer_saved_an_evaluator_plays(
    algorithm: str, evaluator: str, arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"env_maker": cartpole, "save_dir": tmp_path, "verbose": True, **SMALL, **arguments}
    trainer = longrein.make_trainer(algorithm, **given)
    trial = trainer.run()
    (result,) = trial.sessions
    assert result is not None
    assert result.env_steps >= 160
    assert len(trial.episodes) == result.episodes
    printed = capsys.readouterr().out
    assert f"name: {algorithm}" in printed
    assert "training step " in printed
    makers = {key: value for key, value in arguments.items() if key in ("feature_maker", "model_maker")}
    convert = {key: value for key, value in arguments.items() if key == "state_to_input"}
    found = {}
    for source in (result.folder / front.POLICY, trial.run):
        found[source] = longrein.make_evaluator(
            evaluator, env_maker=cartpole, load_model=source, load_model_custom=makers, num_episodes=2,
            policy_type="greedy", **convert,
        ).run()  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"episode reward: {value:g}" for value in found[trial.run]]
    assert lines[2] == f"average episode reward: {np.mean(found[trial.run]):g}"
    assert found[trial.run] == found[result.folder / front.POLICY]
    with pytest.raises(SpecError, match=f"holds a policy of {algorithm}\n  hint: make_evaluator\\('{evaluator}'"):
        longrein.make_evaluator(
            {"ac": "dqn", "acer": "ac", "dqn": "acer"}[evaluator], env_maker=cartpole,
            load_model=result.folder / front.POLICY, load_model_custom=makers, **convert,
        ).run()  # fmt: skip


@pytest.mark.parametrize("algorithm", ["a3c", "dqn", "acer"])
def test_load_model_begins_with_its_weights(algorithm: str, tmp_path: Path) -> None:
    given = {"env_maker": cartpole, "feature_maker": features, "save_dir": tmp_path, **SMALL}
    first = longrein.make_trainer(algorithm, **given).run()
    assert first.sessions[0] is not None
    file = first.sessions[0].folder / front.POLICY
    # A learning rate of 0: what comes out is what it began with.
    still = longrein.make_trainer(algorithm, **given, load_model=file, opt_kwargs={"learning_rate": 0.0}).run()
    before, after = longrein.load_policy(file), still.policy(0)
    ours, theirs = before.policy.state_dict(), after.policy.state_dict()  # type: ignore[attr-defined]  # modules
    weights = [name for name in ours if "weight" in name or "bias" in name]
    assert weights
    assert all(torch.equal(ours[name], theirs[name]) for name in weights)
    other = given | {"feature_maker": lambda space: nn.Linear(space.shape[0], 5)}
    with pytest.raises((CheckpointError, SpecError), match="do not fit"):
        longrein.make_trainer(algorithm, **other, load_model=file)


def test_environments_elsewhere(tmp_path: Path) -> None:
    with longrein.Server("CartPole-v1", at="ws://127.0.0.1:0") as server:
        url = f"{server.urls[0]}/CartPole-v1"
        trial = longrein.make_trainer("a3c", env_maker=url, save_dir=tmp_path, feature_maker=features, **SMALL).run()
        assert trial.spec.envs[0].url == url
        returns = longrein.make_evaluator("ac", env_maker=url, load_model=trial.run, num_episodes=1).run()
        assert len(returns) == 1
        with pytest.raises(SpecError, match=r"model_maker: it is shown the environment, and that is elsewhere"):
            longrein.make_trainer("a3c", env_maker=url, model_maker=Model)


class Counting(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Counts frames, and what it was told to do."""

    rendered: list[int] = []
    actions: list[int] = []

    def render(self) -> None:
        self.rendered.append(len(self.actions))

    def step(self, action: Any) -> Any:
        self.actions.append(int(action))
        return super().step(action)


def test_the_evaluators_other_arguments(tmp_path: Path) -> None:
    trial = longrein.make_trainer("dqn", env_maker=cartpole, save_dir=tmp_path, **SMALL).run()
    Counting.rendered, Counting.actions = [], []

    def play(**arguments: Any) -> list[float]:
        given = {"env_maker": lambda: Counting(cartpole()), "load_model": trial.run, "num_episodes": 1}
        return longrein.make_evaluator("dqn", **given, **arguments).run()

    (length,) = play(policy_type="greedy", render_timestep=3, render_end=True)
    assert Counting.rendered == [*range(3, int(length) + 1, 3), int(length)]
    assert play(seed=4) == play(seed=4, policy_type="greedy")  # of dqn both are its best action: drlbox sampled by Q
    Counting.actions = []
    play(policy_eps=1.0)
    assert set(Counting.actions) == {0, 1}
    for wrong, says in (
        ({"policy_type": "best"}, "policy_type: 'best' is none"),
        ({"policy_eps": 2}, "policy_eps: must lie between 0 and 1"),
        ({"num_episodes": 0}, "num_episodes: must be at least 1"),
        ({"episodes": 3}, "episodes: make_evaluator has no such argument"),
    ):
        with pytest.raises(SpecError, match=says):
            longrein.make_evaluator("dqn", **({"env_maker": cartpole, "load_model": trial.run} | wrong))
    with pytest.raises(SpecError, match="load_model: is missing"):
        longrein.make_evaluator("dqn", env_maker=cartpole)
    elsewhere = longrein.make_evaluator("dqn", env_maker="Acrobot-v1", load_model=trial.run)
    with pytest.raises(CheckpointError, match="was made for observation_space"):
        elsewhere.run()


def test_vectors_of_continuous_actions_work(tmp_path: Path) -> None:
    """In drlbox a Box of three numbers crashed at the first update."""

    class Three(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.left = 5
            return np.zeros(2, np.float32), {}

        def step(self, action: Any) -> Any:
            assert action.shape == (3,)
            self.left -= 1
            return np.zeros(2, np.float32), float(action.sum()), self.left == 0, False, {}

    trial = longrein.make_trainer("a3c", env_maker=Three, save_dir=tmp_path, **SMALL).run()
    assert len(trial.metrics) >= 1


def test_a_client_loads_nothing_of_this() -> None:
    code = "import sys, longrein; longrein.connect_policy; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_torch_it_says_what_to_install() -> None:
    code = "import sys, longrein; sys.modules['torch'] = None; longrein.load_policy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "load_policy: needs the package 'torch'" in done.stderr
    assert "hint: pip install 'longrein[lab]'" in done.stderr
