"""The JSON Schema of spec files: it takes what a spec may say, refuses what it may not, and tells what keys mean."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from longrein.lab import spec as specs
from longrein.lab.spec_schema import field_docs, spec_schema
from longrein.learn import algorithms
from longrein.learn.replay import Memory
from longrein.learn.torsos import Net

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "spec").rglob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = spec_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))


def mistakes(validator: jsonschema.Draft202012Validator, spec: Any) -> list[str]:
    return [error.message for error in validator.iter_errors({"some": spec})]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "spec")))
def test_every_spec_that_ships_fits(validator: jsonschema.Draft202012Validator, path: Path) -> None:
    for source in specs.read(path).values():
        assert mistakes(validator, source.values) == []


@pytest.mark.parametrize("name", algorithms.TABLE)
def test_every_algorithm_with_all_its_defaults_fits(validator: jsonschema.Draft202012Validator, name: str) -> None:
    spec = specs.from_plain("some", {"agent": {"algorithm": {"name": name}}, "env": {"id": "CartPole-v1"}})
    plain = json.loads(json.dumps(spec.plain))
    assert mistakes(validator, {**plain, "search": {}}) == []
    config, _ = algorithms.load(name)
    for field in dataclasses.fields(config):
        if field.name not in specs.PARTS:
            wrong = {**plain["agent"]["algorithm"], field.name + "x": 1}
            assert mistakes(validator, {**plain, "search": {}, "agent": {**plain["agent"], "algorithm": wrong}})


RIGHT: dict[str, Any] = {
    "agent": {"algorithm": {"name": "dqn", "lr": {"linear": [1e-3, 1e-4, 1000]}}, "memory": {"capacity": 10}},
    "env": {"id": "CartPole-v1"},
}


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("env", {"url": ["ws://a:1", "ws://b:1"], "num_envs": 4}, True),
        ("env", {"url": "gymie://a:1/CartPole-v1"}, True),
        ("env", [{"id": "CartPole-v1", "options": {"a": [1]}}, {"url": "nats://a/x"}], True),
        ("env", {"id": "CartPole-v1", "url": ""}, True),
        ("env", {"id": "CartPole-v1", "url": "ws://a:1"}, False),
        ("env", {"num_envs": 4}, False),
        ("env", [], False),
        ("env", {"id": 7}, False),
        ("agent", [RIGHT["agent"], {"algorithm": {"name": "ppo", "epochs": 3}}], True),
        ("agent", [RIGHT["agent"], {"algorithm": {"name": "ppo", "epoch": 3}}], False),
        ("agent", {"algorithm": {"name": "dqm"}}, False),
        ("agent", {"algorithm": {"name": "ppo"}, "memory": {}}, False),
        ("agent", {"algorithm": {"name": "dqn", "gamma": "high"}}, False),
        ("agent", {"algorithm": {"name": "dqn", "gamma": True}}, False),
        ("agent", {"algorithm": {"name": "dqn", "lr": {"linear": [1]}}}, False),
        ("agent", {"algorithm": {"name": "dqn"}, "memory": {"beta": {"start": 0, "end": 1, "steps": 9}}}, True),
        ("agent", {"algorithm": {"name": "dqn"}, "net": {"hidden": [64, 64.5]}}, False),
        ("agent", {"algorithm": {"name": "a2c", "imitation": {"nope": 1}}}, False),
        ("body", {"product": "custom", "num": [[0, 0, 0]]}, True),
        ("body", {"product": "iner"}, False),
        ("meta", {"env_steps": 1e4, "target": None, "eval": {"episodes": 3}}, True),
        ("meta", {"env_steps": "many"}, False),
        ("meta", {"eval": {"episode": 3}}, False),
        ("search", {"agent.algorithm.lr": {"loguniform": [1e-5, 1e-2]}, "method": "optuna"}, True),
        ("search", {"agent.net.hidden": {"grid": [[32], [64]]}, "method": {"name": "asha", "grace": 5}}, True),
        ("search", {"agent.algorithm.lr": {"uniform": {"low": 0, "high": 1}}}, True),
        ("search", {"agent.algorithm.lr": {"uniform": [1]}}, False),
        ("search", {"agent.algorithm.lr": {"unifrom": [0, 1]}}, False),
        ("search", {"agent.algorithm.lr": 3}, False),
        ("search", {"lr": {"uniform": [0, 1]}}, False),
        ("search", {"method": "magic"}, False),
        ("seach", {}, False),
    ],
)
def test_what_fits_and_what_does_not(
    validator: jsonschema.Draft202012Validator, key: str, value: Any, fits: bool
) -> None:
    assert mistakes(validator, RIGHT) == []
    assert (mistakes(validator, {**RIGHT, key: value}) == []) is fits


def test_every_setting_says_what_it_means() -> None:
    silent = []
    for name in algorithms.TABLE:
        config, _ = algorithms.load(name)
        says = field_docs(config)
        silent += [f"{name}.{field.name}" for field in dataclasses.fields(config) if field.name not in says]
    assert silent == []
    assert field_docs(Net).keys() == {field.name for field in dataclasses.fields(Net)}
    assert field_docs(Memory)["n_steps"].startswith("Env steps of reward summed")


def test_the_command_prints_it() -> None:
    done = subprocess.run([sys.executable, "-m", "longrein.cli", "spec", "schema"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    schema = json.loads(done.stdout)
    described = schema["$defs"]["dqn"]["properties"]["algorithm"]["properties"]["double"]
    assert described["default"] is True
    assert "target network" in described["description"]
