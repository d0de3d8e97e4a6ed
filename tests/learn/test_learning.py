"""Every spec that ships learns: trained from a seed that no result is reported on, to its target."""

from __future__ import annotations

from pathlib import Path

import pytest
from learn.training import train

from longrein.lab import spec as specs
from longrein.lab.spec import plain_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SEED = 1000
RISING = {
    "dqn_lunarlander": (150_000, 0.0), "ppo_lunarlander": (300_000, 0.0), "acer_lunarlander": (150_000, 0.0),
    "appo_lunarlander": (300_000, 0.0),
}  # fmt: skip
"""Specs whose budget is for another day: (env steps, mean return that they have passed by then)."""
LESS = {"reinforce_cartpole": 400.0, "sarsa_cartpole": 400.0, "sac_cartpole": 400.0}
"""Specs of which less is asked than their target."""


def shipped() -> list[tuple[str, str]]:
    """(file, name) of every spec of one agent with a target."""
    found = []
    for path in sorted((ROOT / "spec").glob("*.yaml")):
        for name in specs.read(path):
            spec = specs.load(path, name)
            one = len(spec.agents) == len(spec.envs) == 1 and spec.meta.topology == "serial"
            if spec.meta.target is not None and one and not spec.search:
                found.append((path.name, name))
    return found


@pytest.mark.parametrize(("file", "name"), shipped())
def test_a_shipped_spec_learns(file: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where examples/ is
    spec = specs.load(ROOT / "spec" / file, name)
    agent, env, meta = spec.agents[0], spec.envs[0], spec.meta
    budget, target = RISING.get(name, (meta.env_steps, LESS.get(name, meta.target)))
    assert target is not None
    made = train(
        agent.algorithm, plain_config(agent.config), env.id, options=env.options, env_steps=budget, seed=SEED,
        num_envs=env.num_envs, target=target, window=meta.window,
    )  # fmt: skip
    assert made.reached is not None, str(made)
