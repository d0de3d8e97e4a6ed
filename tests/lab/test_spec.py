"""Specs: what a right one means, and what each mistake is told, with its file, line, key and the nearest right key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longrein.errors import SpecError
from longrein.lab import spec as specs
from longrein.lab.topology import Topology
from longrein.learn.schedules import Linear

RIGHT = """\
first:
  agent:
    algorithm: {name: ppo, gamma: 0.9, lr: {linear: [1e-3, 0, 1000]}}
  env:
    id: CartPole-v1
    num_envs: 4
  meta:
    env_steps: 1000
    eval: {episodes: 5}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(RIGHT)
    return path


def test_a_spec_is_resolved_with_every_default(file: Path) -> None:
    spec = specs.load(file)
    assert spec.name == "first"
    (agent,) = spec.agents
    assert (agent.algorithm, agent.config.gamma, agent.config.lr) == ("ppo", 0.9, Linear(1e-3, 0.0, 1000))
    assert agent.config.epochs == type(agent.config)().epochs
    assert (spec.envs[0].id, spec.envs[0].num_envs) == ("CartPole-v1", 4)
    assert (spec.meta.env_steps, spec.meta.eval.episodes, spec.meta.max_session) == (1000, 5, 1)


def test_what_is_shown_reads_back_as_the_same_spec(file: Path, tmp_path: Path) -> None:
    spec = specs.load(file)
    (tmp_path / "again.json").write_text(json.dumps({"first": spec.plain}))
    again = specs.load(tmp_path / "again.json")
    assert again.plain == spec.plain
    assert again.fingerprint == spec.fingerprint


def test_the_fingerprint_is_of_what_was_asked(file: Path) -> None:
    plain = specs.load(file)
    assert specs.load(file, None, {"meta.env_steps": 1000}).fingerprint == plain.fingerprint
    assert specs.load(file, None, {"meta.env_steps": 1001}).fingerprint != plain.fingerprint


def test_overrides_reach_every_key(file: Path) -> None:
    pairs = specs.override_pairs(
        ["agent.algorithm.lr=1e-4", "env.num_envs=2", "meta.target=475", "env.options.a=[1, x]"]
    )
    spec = specs.load(file, None, pairs)
    assert spec.agents[0].config.lr == 1e-4
    assert (spec.envs[0].num_envs, spec.meta.target, spec.envs[0].options) == (2, 475.0, {"a": [1, "x"]})


def test_a_list_of_agents_and_environments(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(
        "two:\n  agent: [{algorithm: {name: ppo}}, {algorithm: {name: ppo, gamma: 0.5}}]\n"
        "  env: [{id: CartPole-v1}, {url: [ws://a:1, ws://b:1]}]\n"
    )
    spec = specs.load(path, None, {"env.0.num_envs": 3})
    assert [agent.config.gamma for agent in spec.agents] == [0.99, 0.5]
    assert spec.envs[0].num_envs == 3
    assert spec.envs[1].url == ("ws://a:1", "ws://b:1")


def test_json_with_trailing_commas_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"one": {"agent": {"algorithm": {"name": "ppo",},}, "env": {"id": "CartPole-v1",},},}')
    assert specs.load(path).envs[0].id == "CartPole-v1"


# Overrides of the right spec above, the line that is named, and what is said.
MISTAKES: list[tuple[str, Any, int, str, str]] = [
    ("agnet", {}, 1, "agnet: there is no such key", "did you mean 'agent'"),
    ("agent", [], 2, "agent: is an empty list", ""),
    ("agent", "ppo", 2, "agent: is a text, not a mapping", ""),
    ("agent.algorithm", "ppo", 3, "agent.algorithm: names no algorithm", "algorithm: {name: dqn"),
    ("agent.algorithm", {"gamma": 0.9}, 3, "agent.algorithm: names no algorithm", "algorithm: {name: dqn"),
    ("agent.algorithm.name", "ppoo", 3, "agent.algorithm.name: there is no algorithm 'ppoo'", "did you mean 'ppo'"),
    ("agent.algorithm.name", 7, 3, "agent.algorithm: names no algorithm", ""),
    ("agent.algorithm.gama", 0.9, 3, "agent.algorithm.gama: there is no such key", "did you mean 'gamma'"),
    ("agent.algorithm.gamma", "high", 3, "agent.algorithm.gamma: is 'high', a text", "it takes a number"),
    ("agent.algorithm.gamma", 1.5, 3, "agent.algorithm.gamma: must lie between 0 and 1, got 1.5", ""),
    ("agent.algorithm.gamma", None, 3, "agent.algorithm.gamma: is None, nothing", "it takes a number"),
    ("agent.algorithm.gamma", True, 3, "agent.algorithm.gamma: is True, a yes or no", "it takes a number"),
    ("agent.algorithm.epochs", 0, 3, "agent.algorithm.epochs: must be at least 1, got 0", ""),
    ("agent.algorithm.epochs", 2.5, 3, "agent.algorithm.epochs: is 2.5, a number", "it takes a whole number"),
    ("agent.algorithm.epochs", [4], 3, "agent.algorithm.epochs: is [4], a list", "it takes a whole number"),
    ("agent.algorithm.lr", "fast", 3, "agent.algorithm.lr: is 'fast'", "a number, {linear:"),
    ("agent.algorithm.lr", {"linear": [1]}, 3, "agent.algorithm.lr: is {'linear': [1]}", "{linear: [start, end"),
    ("agent.algorithm.lr", -1, 3, "agent.algorithm.lr: must never be negative, got -1.0", ""),
    ("agent.algorithm.lr", {"linear": [1, -1, 9]}, 3, "agent.algorithm.lr: must never be negative, got Linear", ""),
    ("agent.algorithm.lr", {"exponential": [1, 0, 0]}, 3, "lr: a schedule's half_life must be over 0, got 0", ""),
    ("agent.algorithm.lr", {"cosine": 1}, 3, "agent.algorithm.lr: is {'cosine': 1}", "{linear: [start, end"),
    (
        "agent.algorithm.normalise_advantage",
        "yes",
        3,
        "normalise_advantage: is 'yes', a text",
        "it takes true or false",
    ),
    ("agent.algorithm.value_clip", "wide", 3, "value_clip: is 'wide'", "a number, null"),
    ("agent.algorithm.net", {}, 3, "agent.algorithm.net: is a section of its own", "write agent.net"),
    ("agent.memory", {}, 2, "agent.memory: ppo has none", "leave it out"),
    ("agent.optimizer", {}, 2, "agent.optimizer: there is no such key", "one of algorithm, net, memory"),
    ("env", None, 4, "env: is nothing, not a mapping", ""),
    ("env.idd", "CartPole-v1", 4, "env.idd: there is no such key", "did you mean 'id'"),
    ("env.id", 7, 5, "env.id: is 7, a whole number", "it takes a text"),
    ("env.id", "", 4, "env: needs either id or url", "id: CartPole-v1, or url"),
    ("env.url", "ws://x", 4, "env: needs either id or url", "id: CartPole-v1, or url"),
    ("env.url", {"a": 1}, 4, "env.url: is {'a': 1}", "one of a text, tuple"),
    ("env.num_envs", 0, 6, "env.num_envs: must be at least 1, got 0", ""),
    ("env.num_envs", "four", 6, "env.num_envs: is 'four', a text", "it takes a whole number"),
    ("env.options", [1], 4, "env.options: is a list, not a mapping", ""),
    ("body.product", "iner", 1, "body.product: is 'iner'", "did you mean 'inner'"),
    ("body.number", 2, 1, "body.number: there is no such key", "did you mean 'num'"),
    ("body", 3, 1, "body: is a whole number, not a mapping", ""),
    ("meta.env_step", 5, 7, "meta.env_step: there is no such key", "did you mean 'env_steps'"),
    ("meta.env_steps", 0, 8, "meta.env_steps: must be at least 1, got 0", ""),
    ("meta.env_steps", "many", 8, "meta.env_steps: is 'many', a text", "it takes a whole number"),
    ("meta.max_session", 0, 7, "meta.max_session: must be at least 1, got 0", ""),
    ("meta.seed", "s", 7, "meta.seed: is 's', a text", "it takes a whole number"),
    ("meta.target", "high", 7, "meta.target: is 'high'", "one of a number, null"),
    ("meta.window", 0, 7, "meta.window: must be at least 1, got 0", ""),
    ("meta.checkpoint_every", -1, 7, "meta.checkpoint_every: must be at least 1, got -1", ""),
    ("meta.eval.episode", 3, 9, "meta.eval.episode: there is no such key", "did you mean 'episodes'"),
    ("meta.eval", 5, 9, "meta.eval: is a whole number, not a mapping", ""),
    ("search", ["lr"], 1, "search: is a list, not a mapping", "agent.algorithm.lr"),
]


@pytest.mark.parametrize(("key", "value", "line", "says", "hint"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_is_told(file: Path, key: str, value: Any, line: int, says: str, hint: str) -> None:
    with pytest.raises(SpecError) as raised:
        specs.load(file, None, {key: value})
    text = str(raised.value)
    assert text.startswith(f"{file}:{line}: ")
    assert says in text
    assert hint in raised.value.hint


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("one:\n  agent: {algorithm: {name: ppo}}\n")
    with pytest.raises(SpecError, match=r"spec.yaml:1: env: is missing"):
        specs.load(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1, 2\n", r"spec.yaml:2: file: is neither YAML nor JSON"),
        ("- a\n- b\n", "does not map names to specs"),
        ("", "does not map names to specs"),
        ("one: 5\n", r"spec.yaml:1: one: is int, not a spec"),
        ("one: {agent: !!python/object/apply:os.system [ls]}\n", "is neither YAML nor JSON"),
    ],
)
def test_a_file_that_holds_no_specs(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=says):
        specs.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        specs.load(tmp_path / "nowhere.yaml")


def test_a_name_that_is_not_in_the_file(file: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'first'"):
        specs.load(file, "frist")
    two = tmp_path / "two.yaml"
    two.write_text(RIGHT + RIGHT.replace("first", "second"))
    with pytest.raises(SpecError, match="2 specs: name one"):
        specs.load(two)


@pytest.mark.parametrize("text", ["lr", "=3", "a..b=1"])
def test_an_override_that_is_none(file: Path, text: str) -> None:
    with pytest.raises(SpecError, match="set:"):
        specs.load(file, None, specs.override_pairs([text]))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "spec").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_spec_that_ships_is_right(path: Path) -> None:
    for name in specs.read(path):
        spec = specs.load(path, name)
        assert spec.fingerprint


def with_topology(file: Path, topology: Any, **others: Any) -> Any:
    return specs.load(file, None, {"meta.topology": topology, **others}).meta.topology


def test_a_topology_is_serial_unless_it_says_otherwise(file: Path) -> None:
    assert specs.load(file).meta.topology == "serial"
    found = with_topology(file, {"actors": 2, "ahead": 0})
    assert found == Topology(actors=2, ahead=0)
    assert found.engine == "processes"


def test_a_topology_reads_back_as_it_is_shown(file: Path) -> None:
    spec = specs.load(file, None, {"meta.topology": {"actors": 2}})
    assert specs.from_plain("first", spec.plain) == spec
    assert spec.fingerprint != specs.load(file).fingerprint


@pytest.mark.parametrize(
    ("topology", "key", "problem"),
    [
        ("parallel", "meta.topology", "one of serial, a mapping"),
        ({}, "meta.topology", "asks for no process"),
        ({"actor": 2}, "meta.topology.actor", "did you mean 'actors'"),
        ({"actors": "two"}, "meta.topology.actors", "a whole number"),
        ({"actors": -1}, "meta.topology.actors", "negative"),
        ({"actors": 2, "hogwild": 2}, "meta.topology.hogwild", "either"),
        ({"actors": 3}, "meta.topology.actors", "env.num_envs: 6"),
        ({"actors": 2, "engine": "mpi"}, "meta.topology.engine", "ray"),
        ({"actors": 2, "max_lag": -1}, "meta.topology.max_lag", "negative"),
        ({"hogwild": 2}, "meta.topology.hogwild", "ppo has no rule for workers"),
        ({"hogwild": 2, "inference": "central"}, "meta.topology.inference", "goes with actors"),
    ],
)
def test_what_a_topology_cannot_be(file: Path, topology: Any, key: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem) as raised:
        with_topology(file, topology)
    assert raised.value.key == key


def test_an_algorithm_that_learns_on_policy_only_takes_turns(file: Path) -> None:
    plain = {"agent.algorithm": {"name": "a2c"}}
    with pytest.raises(SpecError, match="a2c learns only from what its newest weights acted"):
        with_topology(file, {"actors": 2}, **plain)
    assert with_topology(file, {"actors": 2, "ahead": 0}, **plain).ahead == 0


def test_several_bodies_are_one_process_s_business(file: Path) -> None:
    with pytest.raises(SpecError, match="there are 2 bodies"):
        with_topology(file, {"actors": 2}, **{"body.num": 2})
