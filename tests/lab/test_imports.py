"""What training imports, in a process of its own: nothing large that it does not use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

UNUSED = ("torch._dynamo", "torch._inductor", "sympy", "scipy", "pandas", "matplotlib", "plotly", "ray", "jinja2")
TRAIN = """
import json
import sys
import torch
from longrein.lab.actor import Actor, make_envs
from longrein.learn import algorithms
from longrein.learn.rollout import Rollout

name, settings = sys.argv[1], json.loads(sys.argv[2])
envs = make_envs("Pendulum-v1" if name == "sac" else "CartPole-v1", 2, {})
make, build = algorithms.load(name)
config = algorithms.config_from(make, {"net": {"hidden": [8]}} | settings)
algorithm = build(config, envs.single_observation_space, envs.single_action_space, 0)
actor = Actor(envs, algorithm.policy, seed=0, generator=torch.Generator().manual_seed(0))
rollout = Rollout(algorithm.rollout_steps)
for _ in range(8):
    for transition in actor.collect(algorithm.rollout_steps):
        rollout.add(transition)
    algorithm.update(rollout.take())
algorithm.load_state_dict(algorithm.state_dict())
assert algorithm.updates > 0
"""


def left_over(code: str, *arguments: str) -> list[str]:
    """Which of UNUSED a fresh process has imported when it has run this."""
    told = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {UNUSED!r} if name in sys.modules]))"
    line = [sys.executable, "-c", told, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ppo", {"rollout_steps": 8, "minibatch_size": 8}),
        ("dqn", {"memory": {"min_size": 8}}),
        ("sac", {"memory": {"min_size": 8}}),
        ("a2c", {"optimizer": "rmsprop"}),
    ],
)
def test_training_imports_neither_the_compiler_nor_what_draws(name: str, settings: dict[str, object]) -> None:
    assert left_over(TRAIN, name, json.dumps(settings)) == []


def test_what_runs_a_spec_imports_none_of_it_before_it_is_needed() -> None:
    assert left_over("import longrein.lab.demo, longrein.lab.modes, longrein.lab.session") == []
