"""SLM-Lab's specs of 2018: what became of each key, what is searched, and what is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longrein.errors import RunError, SpecError
from longrein.lab import spec as specs
from longrein.lab.search import search_space
from longrein.lab.spec_import import Imported, imported

DQN = """\
{
  "dqn_cartpole": {
    "agent": [{
      "name": "DQN",
      "algorithm": {
        "name": "DoubleDQN",
        "action_policy": "epsilon_greedy",
        "action_policy_update": "linear_decay",
        "explore_var_start": 1.0,
        "explore_var_end": 0.1,
        "explore_anneal_epi": 10,
        "gamma": 0.99,
        "training_epoch": 3,
        "training_iters_per_batch": 2,
        "training_frequency": 8,
        "training_min_timestep": 32,
      },
      "memory": {"name": "Replay", "max_size": 10000},
      "net": {
        "type": "MLPNet",
        "hid_layers": [64, 32],
        "hid_layers_activation": "relu",
        "clamp_grad": false,
        "clamp_grad_val": 1.0,
        "batch_size": 32,
        "optim": {"name": "Adam", "lr": 0.02},
        "loss": {"name": "mse_loss"},
        "update_type": "polyak",
        "update_frequency": 1,
        "polyak_weight": 0.9,
        "gpu": false,
      },
    }],
    "env": [{"name": "CartPole-v0", "max_timestep": 100, "max_episode": 50,}],
    "body": {"product": "outer", "num": 1},
    "meta": {"max_session": 2, "max_trial": 5, "train_mode": true, "search": "RandomSearch"},
    "search": {
      "agent": [{
        "algorithm": {
          "gamma__uniform": [0.9, 0.999],
          "explore_anneal_epi__choice": [10, 30, 50],
          "training_min_timestep__randint": [10, 60],
          "training_frequency__choice": [4, 8],
        },
        "net": {
          "hid_layers__choice": [[32], [64, 32]],
          "hid_layers_activation__choice": ["sigmoid", "relu", "tanh"],
          "polyak_weight__uniform": [0.9, 0.99],
          "optim": {"lr__normal": [0.02, 0.005]},
        },
        "memory": {"max_size_choice": [1000, 2000], "max_size__grid_search": [1000, 10000]},
      }],
    },
  },
}
"""

REINFORCE = {
    "reinforce_mlp_cartpole": {
        "agent": [{
            "name": "Reinforce",
            "algorithm": {
                "name": "Reinforce", "action_policy": "default", "gamma": 0.99, "num_epis_to_collect": 3,
                "add_entropy": True, "entropy_weight": 0.01, "continuous_action_clip": 2.0,
            },
            "memory": {"name": "OnPolicyReplay"},
            "net": {
                "type": "MLPdefault", "hid_layers": [64], "hid_layers_activation": "lrelu", "clamp_grad": True,
                "clamp_grad_val": 0.5, "optim": {"name": "RMSprop", "lr": 0.002},
            },
        }],
        "env": [{"name": "CartPole-v0", "max_timestep": None}],
        "body": {"product": "outer", "num": 1},
        "meta": {"max_episode": 300, "max_session": 1, "max_trial": None, "train_mode": True},
    }
}  # fmt: skip

ACTOR_CRITIC = {
    "ac_lunar": {
        "agent": [{
            "name": "ActorCritic",
            "algorithm": {
                "name": "ActorCritic", "action_policy": "softmax", "gamma": 0.99, "lamda": 0.95, "use_GAE": True,
                "num_step_returns": 100, "training_frequency": 32, "training_iters_per_batch": 4,
                "policy_loss_weight": 1.0, "val_loss_weight": 0.5, "add_entropy": False, "entropy_weight": 0.1,
            },
            "memory": {"name": "OnPolicyBatchReplay"},
            "net": {
                "type": "MLPseparate", "hid_layers": [64, 64], "hid_layers_activation": "tanh",
                "use_same_optim": False, "optim_actor": {"name": "Adam", "lr": 0.001},
                "optim_critic": {"name": "Adam", "lr": 0.005},
            },
        }],
        "env": [{"name": "LunarLander-v2", "max_timestep": None, "max_episode": 100}],
        "body": {"product": "outer", "num": 1},
        "meta": {"max_session": 4, "max_trial": 1, "search": "EvolutionarySearch"},
    }
}  # fmt: skip

SEVERAL = {
    "base_case": {
        "agent": [
            {"name": "Random", "algorithm": {"name": "Random", "action_policy": "default"},
             "memory": {"name": "Replay"}, "net": {"type": "MLPNet", "hid_layers": [8]}},
            {"name": "MultitaskDQN", "algorithm": {"name": "MultitaskDQN", "action_policy": "multi_boltzmann"},
             "memory": {"name": "PrioritizedReplay", "alpha": 0.7, "max_size": 500},
             "net": {"type": "MultiMLPNet", "hid_layers": [[[8], [8]], [16], [[8], [8]]]}},
        ],
        "env": [{"name": "CartPole-v0"}, {"name": "3DBall", "max_timestep": 500, "unity": {"gravity": 9.8}},
                {"name": "BreakoutDeterministic-v4", "max_timestep": 1000}],
        "body": {"product": "inner", "num": [1, 12]},
        "meta": {"max_session": 1, "max_episode": 10},
    },
    "vanilla": {
        "agent": {"name": "VanillaDQN", "algorithm": {"name": "VanillaDQN", "action_policy": "boltzmann",
                  "explore_var_start": 1.5, "explore_var_end": 0.3, "explore_anneal_epi": 20,
                  "training_batch_epoch": 3, "training_epoch": 4, "training_frequency": 8, "normalize_state": True},
                  "memory": {"name": "Replay", "batch_size": 32, "max_size": 10000, "use_cer": True},
                  "net": {"type": "MLPNet", "hid_layers": [32], "hid_layers_activation": "relu",
                  "clip_grad_val": None, "loss_spec": {"name": "SmoothL1Loss"},
                  "optim_spec": {"name": "Adam", "lr": 0.02},
                  "lr_scheduler_spec": {"name": "StepLR", "step_size": 500, "gamma": 0.9}}},
        "env": [{"name": "Nothing-v9"}],
        "meta": {},
    },
}  # fmt: skip


def brought(tmp_path: Path, old: str | dict[str, Any]) -> Imported:
    path = tmp_path / "old.json"
    path.write_text(old if isinstance(old, str) else json.dumps(old))
    found = imported(path)
    (tmp_path / "new.yaml").write_text(found.yaml)
    for name in found.specs:  # what comes out is right, as our own check has it, after a way through the file
        assert specs.load(tmp_path / "new.yaml", name).plain == specs.from_plain(name, found.specs[name]).plain
    return found


def told(found: Imported, key: str) -> str:
    """What is said of a key; fails when nothing is."""
    (note,) = [note for note in found.notes if f": {key}: " in note]
    return note.partition(f"{key}: ")[2]


def test_a_dqn_of_2018(tmp_path: Path) -> None:
    found = brought(tmp_path, DQN)
    spec = specs.load(tmp_path / "new.yaml")
    config = spec.agents[0].config
    assert spec.agents[0].algorithm == "dqn"
    assert (config.double, config.gamma, config.loss, config.lr) == (True, 0.99, "mse", 0.02)
    assert (config.rollout_steps, config.updates_per_step) == (8, 6 / 8)
    assert (config.target_update, config.tau) == ("polyak", 0.1)
    assert (config.memory.capacity, config.memory.batch_size, config.memory.min_size) == (10000, 32, 32)
    assert (config.net.hidden, config.net.activation) == ((64, 32), "relu")
    assert vars_of(config.epsilon) == (1.0, 0.1, 10 * 100)
    assert (spec.envs[0].id, spec.envs[0].num_envs) == ("CartPole-v0", 1)
    assert spec.envs[0].options == {"max_episode_steps": 100}
    assert (spec.meta.env_steps, spec.meta.max_session, spec.meta.max_trial) == (50 * 100, 2, 5 * 2)
    assert "50 episodes became 5,000 env steps" in told(found, "meta.env_steps")
    assert "10 episodes became 1,000 env steps" in told(found, "agent.0.algorithm.explore_anneal_epi")


def test_what_it_searched(tmp_path: Path) -> None:
    found = brought(tmp_path, DQN)
    search = found.specs["dqn_cartpole"]["search"]
    assert search == {
        "agent.algorithm.gamma": {"uniform": [0.9, 0.999]},
        "agent.algorithm.epsilon": {"choice": [{"linear": [1.0, 0.1, steps]} for steps in (1000, 3000, 5000)]},
        "agent.memory.min_size": {"randint": [10, 60]},
        "agent.net.hidden": {"choice": [[32], [64, 32]]},
        "agent.net.activation": {"choice": ["relu", "tanh"]},
        "agent.algorithm.tau": {"uniform": [0.01, 0.1]},  # 1 - weight, so the other way round
        "agent.algorithm.lr": {"normal": [0.02, 0.005]},
        "agent.memory.capacity": {"grid": [1000, 10000]},
    }
    space = search_space(specs.load(tmp_path / "new.yaml"))
    assert space.trials(10) == 10  # five for each of the two points of the grid
    assert "would move agent.algorithm.rollout_steps and agent.algorithm.updates_per_step at once" in told(
        found, "search.agent.0.algorithm.training_frequency__choice"
    )
    assert "'sigmoid' of the choice" in told(found, "search.agent.0.net.hid_layers_activation__choice")
    assert "has no place here" in told(found, "search.agent.0.memory.max_size_choice")  # the typo in its base.json


def test_a_reinforce_of_2018(tmp_path: Path) -> None:
    found = brought(tmp_path, REINFORCE)
    spec = specs.load(tmp_path / "new.yaml")
    config = spec.agents[0].config
    assert spec.agents[0].algorithm == "reinforce"
    assert (config.episodes_per_update, config.entropy_weight, config.max_grad_norm) == (3, 0.01, 0.5)
    assert (config.baseline, config.normalise_returns, config.optimizer, config.lr) == (False, True, "rmsprop", 0.002)
    assert (spec.meta.env_steps, spec.meta.max_trial) == (300 * 200, 1)  # CartPole-v0 ends after 200
    assert "'lrelu' is not there" in told(found, "agent.0.net.hid_layers_activation")
    assert len(found.notes) == 2


def test_an_actor_critic_of_2018(tmp_path: Path) -> None:
    found = brought(tmp_path, ACTOR_CRITIC)
    spec = specs.load(tmp_path / "new.yaml")
    config = spec.agents[0].config
    assert spec.agents[0].algorithm == "a2c"
    assert (config.advantage, config.lambda_, config.rollout_steps, config.episodic) == ("gae", 0.95, 32, False)
    assert (config.entropy_weight, config.value_weight, config.shared, config.lr) == (0.0, 0.5, False, 0.001)
    assert spec.envs[0].id == "LunarLander-v3"
    assert told(found, "env.0.name") == "LunarLander-v2 is LunarLander-v3 today"
    assert "0.005: actor and critic have one learning rate" in told(found, "agent.0.net.optim_critic.lr")
    assert "4 has no place here" in told(found, "agent.0.algorithm.training_iters_per_batch")
    assert "EvolutionarySearch is not there" in told(found, "meta.search")


def test_several_agents_and_what_is_not_known(tmp_path: Path) -> None:
    found = brought(tmp_path, SEVERAL)
    spec = specs.load(tmp_path / "new.yaml", "base_case")
    assert [agent.algorithm for agent in spec.agents] == ["random", "dqn"]
    assert [env.id for env in spec.envs] == ["CartPole-v0", "unity:3dball", "ALE/Breakout-v5"]
    assert (spec.body.product, spec.body.num, spec.meta.env_steps) == ("inner", [1, 12], 10 * 1000)
    memory = spec.agents[1].config.memory
    assert (memory.prioritized, memory.alpha, memory.capacity) == (True, 0.7, 500)
    assert "Unity scene unity:3dball" in told(found, "env.1.name")
    assert "{'gravity': 9.8} is not taken over" in told(found, "env.1.unity")
    assert "not a list of widths" in told(found, "agent.1.net.hid_layers")
    vanilla = specs.load(tmp_path / "new.yaml", "vanilla")
    config = vanilla.agents[0].config
    assert (config.exploration, vars_of(config.temperature)) == ("boltzmann", (1.5, 0.3, 20 * 200))
    assert (config.target_update, config.target_every, config.updates_per_step) == ("periodic", 1, 12 / 8)
    assert (config.memory.combined, config.loss) == (True, "huber")
    assert "a schedule by training steps" in told(found, "agent.0.net.lr_scheduler")
    assert "True has no place here" in told(found, "agent.0.algorithm.normalize_state")
    assert "Nothing-v9 is not known here" in told(found, "env.0.name")


def test_what_is_no_such_spec(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"old.json:1: agent: is missing"):
        brought(tmp_path, {"some": {"env": []}})
    with pytest.raises(SpecError, match="is neither YAML nor JSON"):
        brought(tmp_path, "{")


def test_the_command_writes_a_file_and_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(DQN)
    words = [sys.executable, "-m", "longrein.cli", "spec", "import", "old.json", "--to", "new.yaml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dqn_cartpole: search.agent.0.memory.max_size_choice" in done.stderr
    text = (tmp_path / "new.yaml").read_text()
    assert text.startswith("# Imported from old.json")
    assert specs.load(tmp_path / "new.yaml").name == "dqn_cartpole"
    with pytest.raises(RunError, match="is there already"):
        imported(tmp_path / "old.json").write(tmp_path / "new.yaml")


def vars_of(schedule: Any) -> tuple[float, float, int]:
    return schedule.start, schedule.end, schedule.steps
