"""Spec files of SLM-Lab, as they were in 2018, turned into ours. Knows the old keys and what became of each.

The old spec is read as it stands (trailing commas too), known keys are moved, and what has no place here is told.
A search is moved by trying it out: the old spec is imported once with each searched value, and what differs is the
setting that is searched here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium

from longrein.errors import RunError, SpecError
from longrein.lab import spec as specs
from longrein.lab.records import write_text
from longrein.lab.search_space import ARGUMENTS

Plain = dict[str, Any]

ALGORITHMS = {
    "VanillaDQN": "dqn", "DQNBase": "dqn", "DQN": "dqn", "DoubleDQN": "dqn", "DRQN": "dqn", "DDRQN": "dqn",
    "DuelingDQN": "dqn", "MultitaskDQN": "dqn", "MultiHeadDQN": "dqn", "HydraDQN": "dqn",
    "SARSA": "sarsa", "DeepSARSA": "sarsa", "Reinforce": "reinforce", "ActorCritic": "a2c", "PPO": "ppo",
    "SoftActorCritic": "sac", "Random": "random",
}  # fmt: skip
"""What each of its algorithms is here."""

NEEDLESS = {
    "algorithm.name", "algorithm.action_pdtype", "memory.name", "net.type", "net.gpu", "name",
    "algorithm.action_policy_update", "net.optim.name", "net.optim_actor.name", "net.use_same_optim",
}  # fmt: skip
"""Keys of an agent that are looked at elsewhere, or that say what goes without saying here."""


@dataclass(frozen=True)
class Imported:
    """What became of a file."""

    specs: Mapping[str, Plain]
    """Our specs by name, as a file says them."""
    notes: tuple[str, ...]
    """What could not be taken over, or only with a change of meaning: one line each."""
    source: str

    @property
    def yaml(self) -> str:
        """The file to write, the notes at its head."""
        head = [f"# Imported from {self.source} by `longrein spec import`.", *(f"# {note}" for note in self.notes)]
        return "\n".join(head) + "\n" + specs.as_yaml(self.specs)

    def write(self, path: Path) -> None:
        """Write the file. Raises RunError when it is there already, or cannot be written."""
        if path.exists():
            raise RunError(f"{path} is there already", hint="give another name, or remove it")
        try:
            write_text(path, self.yaml)
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error}") from error


def imported(path: Path, *, episode_steps: int = 200) -> Imported:
    """The specs of a file of SLM-Lab's. Raises SpecError when it is none.

    episode_steps: env steps of an episode, where the old spec counts episodes and nothing says how long they may be.
    """
    found: dict[str, Plain] = {}
    notes: list[str] = []
    for name, source in specs.read(path).items():
        if not isinstance(source.values.get("agent"), list | dict) or "env" not in source.values:
            raise source.error("agent", "is missing, or is no list", hint="a spec of SLM-Lab: agent, env, body, meta")
        one = _Import(name, episode_steps)
        found[name] = one.whole(source.values)
        try:
            specs.from_plain(name, found[name])
        except SpecError as error:
            one.say(error.key, f"what came of it is refused: {error.problem}")
        notes += one.notes
    return Imported(found, tuple(notes), str(path))


@dataclass
class _Import:
    """One spec on its way."""

    name: str
    episode_steps: int
    notes: list[str] = field(default_factory=list)

    def say(self, key: str, what: str) -> None:
        note = f"{self.name}: {key}: {what}"
        if note not in self.notes:
            self.notes.append(note)

    def whole(self, old: Mapping[str, Any]) -> Plain:
        new = self.spec(old)
        drawn = self.search(old)
        if drawn:
            new["search"] = drawn
            grids = [len(one["grid"]) for one in drawn.values() if "grid" in one]
            for points in grids:  # there, max_trial was for each point of the grid
                new["meta"]["max_trial"] *= points
        return new

    def spec(self, old: Mapping[str, Any]) -> Plain:
        envs = [self.env(f"env.{k}", one) for k, one in enumerate(_listed(old["env"]))]
        steps = max(self.steps_of(one) for one in _listed(old["env"]))
        agents = [self.agent(f"agent.{k}", one, steps) for k, one in enumerate(_listed(old["agent"]))]
        body = {key: value for key, value in (old.get("body") or {}).items() if key in ("product", "num")}
        new: Plain = {
            "agent": agents[0] if len(agents) == 1 else agents,
            "env": envs[0] if len(envs) == 1 else envs,
        }
        if body not in ({}, {"product": "outer", "num": 1}):
            new["body"] = body
        new["meta"] = self.meta(old, steps)
        for key in old:
            if key not in ("agent", "env", "body", "meta", "search", "name"):
                self.say(key, "is not known, and left out")
        return new

    # ------------------------------------------------------------------------------------------------- environments

    def env(self, key: str, old: Mapping[str, Any]) -> Plain:
        name = str(old.get("name", ""))
        new: Plain = {"id": self.env_id(f"{key}.name", name), "num_envs": 1}
        if old.get("max_timestep"):
            new["options"] = {"max_episode_steps": old["max_timestep"]}
        for rest, value in old.items():
            if rest == "unity" and value:
                self.say(f"{key}.unity", f"{value} is not taken over; give it in env.options")
            elif rest not in ("name", "max_timestep", "max_episode", "unity", "save_epi_frequency", "train_mode"):
                self.say(f"{key}.{rest}", f"{value!r} has no place here, and is left out")
        return new

    def env_id(self, key: str, name: str) -> str:
        if name in gymnasium.registry:
            return name
        base, _, version = name.partition("-v")
        newest = [one for one in gymnasium.registry.values() if one.name == base and one.namespace is None]
        if version and newest:
            found = max(newest, key=lambda one: one.version or 0).id
            self.say(key, f"{name} is {found} today")
            return found
        game = re.fullmatch(r"([A-Z]\w*?)(?:Deterministic|NoFrameskip)?-v[04]", name)
        if game:
            self.say(key, f"{name} is taken for the Atari game ALE/{game[1]}-v5, whose frame skip is its own")
            return f"ALE/{game[1]}-v5"
        if not version:
            self.say(key, f"{name} is taken for the Unity scene unity:{name.lower()}; `longrein envs unity` lists them")
            return f"unity:{name.lower()}"
        self.say(key, f"{name} is not known here; put in what it is called today")
        return name

    def steps_of(self, env: Mapping[str, Any]) -> int:
        """Env steps that an episode may take at most."""
        known = gymnasium.registry.get(str(env.get("name")))
        return int(env.get("max_timestep") or (known.max_episode_steps if known else 0) or self.episode_steps)

    def meta(self, old: Mapping[str, Any], steps: int) -> Plain:
        given = dict(old.get("meta") or {})
        episodes = [given.pop("max_episode", None), *(env.get("max_episode") for env in _listed(old["env"]))]
        most = max((int(one) for one in episodes if one), default=0)
        new: Plain = {}
        if most:
            new["env_steps"] = most * steps
            self.say("meta.env_steps", f"{most} episodes became {most * steps:,} env steps, {steps} an episode")
        new["max_session"] = int(given.pop("max_session", None) or 1)
        new["max_trial"] = int(given.pop("max_trial", None) or 1)
        way = given.pop("search", "RandomSearch")
        if way != "RandomSearch":
            self.say("meta.search", f"{way} is not there; search.method says how to search, pbt being nearest to it")
        for key, value in given.items():
            if key not in ("train_mode", "distributed", "resources") or (key == "distributed" and value):
                self.say(f"meta.{key}", f"{value!r} has no place here, and is left out")
        return new

    # ------------------------------------------------------------------------------------------------------- agents

    def agent(self, key: str, old: Mapping[str, Any], steps: int) -> Plain:
        flat = dict(_flat({part: old.get(part) or {} for part in ("algorithm", "memory", "net")}))
        flat = {_later(name): value for name, value in flat.items()}
        was = str(flat.get("algorithm.name", old.get("name", "")))
        name = ALGORITHMS.get(was)
        if name is None:
            self.say(f"{key}.algorithm.name", f"{was!r} is not there; dqn stands in its place")
            name = "dqn"
        new: Plain = {"algorithm": {"name": name}, "net": {}, "memory": {}}
        left = {one: value for one, value in flat.items() if one not in NEEDLESS}
        left["memory.kind"] = str(flat.get("memory.name") or "")
        _MAKERS.get(name, _nothing)(self, key, was, left, new, steps)
        if name != "random":
            _net(self, key, str(flat.get("net.type", "")), left, new)
            _optimizer(self, key, str(flat.get("net.optim.name", "Adam")), name, left, new)
        for rest, value in left.items():
            if value is not None and value is not False:
                self.say(f"{key}.{rest}", f"{value!r} has no place here, and is left out")
        return {part: values for part, values in new.items() if values}

    # ------------------------------------------------------------------------------------------------------- search

    def search(self, old: Mapping[str, Any]) -> Plain:
        drawn: Plain = {}
        for path, value in _leaves(old.get("search") or {}, ()):
            *above, last = path
            key, _, kind = str(last).partition("__")
            at = ".".join(("search", *map(str, above), str(last)))
            kind = {"": "grid", "grid_search": "grid"}.get(kind, kind)
            if kind not in ARGUMENTS or not isinstance(value, list) or not value:
                self.say(at, f"{kind} of {value!r} is no distribution here, and is left out")
                continue
            found = self._moved(old, (*above, key), kind, value, at)
            if found is not None:
                drawn[found[0]] = {kind: found[1]}
        return drawn

    def _moved(
        self, old: Mapping[str, Any], path: tuple[Any, ...], kind: str, values: list[Any], at: str
    ) -> tuple[str, list[Any]] | None:
        """Our key, and the values or numbers for it: by importing the spec with each of them."""
        tried = [values[0], values[0] + values[1]] if kind == "normal" else values  # as numbers that it may draw
        try:
            olds = [_with(old, path, one) for one in tried]
        except (KeyError, IndexError, TypeError):
            self.say(at, "leads to nothing in the spec, and is left out")
            return None
        plain = [dict(_dotted(_Import(self.name, self.episode_steps).spec(one))) for one in (*olds, old)]
        keys = [key for key in dict.fromkeys(key for one in plain for key in one)
                if any(one.get(key) != plain[-1].get(key) for one in plain)]  # fmt: skip
        if len(keys) != 1:
            what = "has no place here" if not keys else f"would move {' and '.join(keys)} at once"
            self.say(at, f"{what}, and is left out")
            return None
        found = [one.get(keys[0]) for one in plain[:-1]]
        if kind in ("grid", "choice"):
            left_out = [was for was, now in zip(values, found, strict=True) if now is None]
            if left_out:
                self.say(at, f"{', '.join(map(repr, left_out))} of the {kind} have no place here, and are left out")
            return keys[0], [one for index, one in enumerate(found) if one is not None and one not in found[:index]]
        if not all(isinstance(one, int | float) for one in found):
            self.say(
                at, f"{kind} of {keys[0]} is no range of numbers here, and is left out; a choice of values would do"
            )
            return None
        if kind == "normal":
            if found != tried:
                self.say(at, f"normal of {keys[0]} is measured in other units here, and is left out")
                return None
            return keys[0], values
        return keys[0], sorted(found)


# --------------------------------------------------------------------------------------------- what became of each key

Maker = Callable[[_Import, str, str, Plain, Plain, int], None]


def _nothing(say: _Import, key: str, was: str, old: Plain, new: Plain, steps: int) -> None:
    old.clear()


def _values(say: _Import, key: str, was: str, old: Plain, new: Plain, steps: int) -> None:
    """dqn and sarsa."""
    algorithm, memory = new["algorithm"], new["memory"]
    _move(old, "algorithm.gamma", algorithm, "gamma")
    _explore(say, key, old, algorithm, steps)
    every = old.pop("algorithm.training_frequency", None) or 1
    batches = (old.pop("algorithm.training_epoch", None) or 1) * (
        old.pop("algorithm.training_iters_per_batch", None) or 1
    )
    if algorithm["name"] == "sarsa":
        old.pop("algorithm.training_min_timestep", None)
        algorithm |= {"n_steps": 1, "rollout_steps": max(int(every), 2), "epochs": int(batches)}
        _move(old, "memory.batch_size", algorithm, "minibatch_size")
        for rest in [one for one in old if one.startswith("memory.")]:
            old.pop(rest)  # on-policy memories hold one rollout, and so does ours
        return
    algorithm |= {"rollout_steps": int(every), "updates_per_step": batches / every}
    algorithm["double"] = "Double" in was or was == "DDRQN"
    _replay(say, key, old, memory)
    _move(old, "algorithm.training_min_timestep", memory, "min_size")
    memory.setdefault("min_size", min(memory.get("batch_size", 32), memory.get("capacity", 32)))
    if was == "VanillaDQN":
        algorithm |= {"target_update": "periodic", "target_every": 1}  # it had no target network
        for rest in ("update_type", "update_frequency", "polyak"):
            old.pop(f"net.{rest}", None)
    kind = {"replace": "periodic", "polyak": "polyak"}.get(old.pop("net.update_type", None) or "")
    polyak, often = old.pop("net.polyak", None), old.pop("net.update_frequency", None)
    if kind:
        algorithm["target_update"] = kind
        if kind == "polyak" and polyak is not None:
            algorithm["tau"] = round(1.0 - polyak, 12)  # there, the share that stayed
        elif kind == "periodic" and often:
            algorithm["target_every"] = int(often)
    loss = old.pop("net.loss.name", None)
    if loss is not None:
        found = {"mse_loss": "mse", "mseloss": "mse", "smooth_l1_loss": "huber", "smoothl1loss": "huber"}
        if str(loss).lower() in found:
            algorithm["loss"] = found[str(loss).lower()]
        else:
            say.say(f"{key}.net.loss.name", f"{loss!r} is not there: mse or huber")


def _reinforce(say: _Import, key: str, was: str, old: Plain, new: Plain, steps: int) -> None:
    algorithm = new["algorithm"]
    # Its returns were normalised in each episode, in place of a learnt baseline.
    algorithm |= {"baseline": False, "normalise_returns": True}
    _move(old, "algorithm.gamma", algorithm, "gamma")
    episodes = old.pop("algorithm.num_epis_to_collect", None) or old.pop("algorithm.training_frequency", None)
    if episodes:
        algorithm["episodes_per_update"] = int(episodes)
    _entropy(old, algorithm)
    _on_policy(old)


def _actor_critic(say: _Import, key: str, was: str, old: Plain, new: Plain, steps: int) -> None:
    """a2c and ppo."""
    algorithm = new["algorithm"]
    for old_key, new_key in (("gamma", "gamma"), ("lamda", "lambda_"), ("lam", "lambda_")):
        _move(old, f"algorithm.{old_key}", algorithm, new_key)
    _entropy(old, algorithm)
    for old_key in ("val_loss_weight", "val_loss_coef"):
        _move(old, f"algorithm.{old_key}", algorithm, "value_weight")
    weight = old.pop("algorithm.policy_loss_weight", old.pop("algorithm.policy_loss_coef", 1.0))
    if weight != 1.0:
        say.say(
            f"{key}.algorithm.policy_loss_weight", f"{weight!r}: here the policy's loss weighs 1, the others change"
        )
    gae = old.pop("algorithm.use_gae", None)
    n_steps = old.pop("algorithm.num_step_returns", None)
    every = old.pop("algorithm.training_frequency", None) or old.pop("algorithm.time_horizon", None)
    episodic = str(old.get("memory.kind")) == "OnPolicyReplay"
    if algorithm["name"] == "ppo":
        for old_key, new_key in (
            ("clip_eps", "clip"),
            ("training_epoch", "epochs"),
            ("minibatch_size", "minibatch_size"),
        ):
            _move(old, f"algorithm.{old_key}", algorithm, new_key)
        if every:
            algorithm["rollout_steps"] = int(every)
    else:
        algorithm["advantage"] = "gae" if gae else "n_step"
        if episodic:
            algorithm |= {"episodic": True, "episodes_per_update": int(every or 1)}
            if n_steps and not gae:
                say.say(f"{key}.algorithm.num_step_returns", f"{n_steps!r}: whole episodes are summed here")
        else:
            algorithm["rollout_steps"] = int((every if gae else n_steps or every) or 5)
    for rest in ("training_epoch", "training_iters_per_batch"):
        if old.get(f"algorithm.{rest}") == 1:
            old.pop(f"algorithm.{rest}")
    _on_policy(old)


def _sac(say: _Import, key: str, was: str, old: Plain, new: Plain, steps: int) -> None:
    algorithm, memory = new["algorithm"], new["memory"]
    _move(old, "algorithm.gamma", algorithm, "gamma")
    _replay(say, key, old, memory)
    _move(old, "algorithm.training_min_timestep", memory, "min_size")


_MAKERS: Mapping[str, Maker] = {
    "dqn": _values, "sarsa": _values, "reinforce": _reinforce, "a2c": _actor_critic, "ppo": _actor_critic, "sac": _sac,
}  # fmt: skip


def _replay(say: _Import, key: str, old: Plain, memory: Plain) -> None:
    kind = old.pop("memory.kind")
    if kind == "PrioritizedReplay":
        memory["prioritized"] = True
        _move(old, "memory.alpha", memory, "alpha")
        _move(old, "memory.epsilon", memory, "epsilon")
    elif kind not in ("", "Replay"):
        say.say(f"{key}.memory.name", f"{kind!r} is not there; a replay of single env steps stands in its place")
    for old_key, new_key in (("max_size", "capacity"), ("batch_size", "batch_size"), ("use_cer", "combined")):
        _move(old, f"memory.{old_key}", memory, new_key)


def _explore(say: _Import, key: str, old: Plain, algorithm: Plain, steps: int) -> None:
    policy = str(old.pop("algorithm.action_policy", "epsilon_greedy"))
    way = "boltzmann" if policy.endswith("boltzmann") else "epsilon"
    if policy.removeprefix("multi_head_").removeprefix("multi_") not in ("boltzmann", "epsilon_greedy", "default"):
        say.say(f"{key}.algorithm.action_policy", f"{policy!r} is not there; epsilon_greedy stands in its place")
    algorithm["exploration"] = way
    numbers = [old.pop(f"algorithm.explore_{part}", None) for part in ("var_start", "var_end", "anneal_epi")]
    start, end, episodes = numbers
    if start is None:
        return
    name = "temperature" if way == "boltzmann" else "epsilon"
    if end is None or not episodes:
        algorithm[name] = float(start)
        return
    algorithm[name] = {"linear": [start, end, int(episodes) * steps]}
    says = f"{episodes} episodes became {int(episodes) * steps:,} env steps, {steps} an episode at most"
    say.say(f"{key}.algorithm.explore_anneal_epi", says)


def _entropy(old: Plain, algorithm: Plain) -> None:
    weight = next((old.pop(f"algorithm.{one}") for one in ("entropy_weight", "entropy_coef", "entropy_coef.start_val")
                   if f"algorithm.{one}" in old), None)  # fmt: skip
    added = old.pop("algorithm.add_entropy", weight is not None)
    algorithm["entropy_weight"] = float(weight or 0.0) if added else 0.0


def _on_policy(old: Plain) -> None:
    """An on-policy memory holds what was gathered, and so does ours: nothing to set. Bounds come from the space."""
    for rest in [one for one in old if one.startswith("memory.")] + [
        "algorithm.continuous_action_clip", "algorithm.training_min_timestep",
        "algorithm.explore_var_start", "algorithm.explore_var_end", "algorithm.explore_anneal_epi",
    ]:  # fmt: skip
        old.pop(rest, None)
    if str(old.get("algorithm.action_policy")) in ("default", "softmax", "gaussian"):
        old.pop("algorithm.action_policy")


def _net(say: _Import, key: str, kind: str, old: Plain, new: Plain) -> None:
    net, algorithm = new["net"], new["algorithm"]
    for one in ("net.fc_hid_layers", "net.hid_layers"):
        hidden = old.pop(one, None)
        if hidden and all(isinstance(width, int) for width in hidden):
            net["hidden"] = hidden
        elif hidden:
            say.say(f"{key}.{one}", f"{hidden!r}: not a list of widths; net.hidden and net.image say what is there")
    activation = old.pop("net.hid_layers_activation", None)
    if activation in ("relu", "tanh", "elu", "silu"):
        net["activation"] = activation
    elif activation is not None:
        say.say(f"{key}.net.hid_layers_activation", f"{activation!r} is not there; net.activation keeps its default")
    if kind.startswith("Recurrent"):
        net["recurrent"] = "lstm" if str(old.pop("net.cell_type", "GRU")).upper() == "LSTM" else "gru"
        _move(old, "net.rnn_hidden_size", net, "recurrent_size")
        if algorithm["name"] in ("dqn", "sarsa", "sac"):
            say.say(f"{key}.net.type", f"{kind}: {algorithm['name']} has no recurrent layer here")
            net.pop("recurrent")
            net.pop("recurrent_size", None)
    if kind.startswith("Dueling") and algorithm["name"] == "dqn":
        algorithm["dueling"] = True
    if kind == "MLPshared" or old.pop("net.shared", False):
        algorithm["shared"] = True


def _optimizer(say: _Import, key: str, kind: str, name: str, old: Plain, new: Plain) -> None:
    algorithm = new["algorithm"]
    _move(old, "net.optim.lr", algorithm, "lr")
    _move(old, "net.optim_actor.lr", algorithm, "lr")
    critic = old.pop("net.optim_critic.lr", None)
    if critic is not None and critic != algorithm.get("lr"):
        say.say(f"{key}.net.optim_critic.lr", f"{critic!r}: actor and critic have one learning rate here")
    if name in ("reinforce", "a2c"):
        ours = {"adam": "adam", "rmsprop": "rmsprop"}.get(kind.lower())
        algorithm["optimizer"] = ours or "adam"
    else:
        ours = "adam" if kind.lower() == "adam" else None
    if ours is None:
        say.say(f"{key}.net.optim.name", f"{kind!r} is not there; Adam stands in its place")
    scheduler = [old.pop(one) for one in list(old) if one.startswith("net.lr_scheduler.")]
    if any(scheduler):
        say.say(f"{key}.net.lr_scheduler", "a schedule by training steps; here {linear: [start, end, env_steps]}")
    value = old.pop("net.clip_grad_val", None)
    if old.pop("net.clip_grad", True) and value is not None:
        algorithm["max_grad_norm"] = float(value)


def _later(key: str) -> str:
    """Keys that were called otherwise in another month of 2018, by one name."""
    for was, now in (
        ("_spec.", "."), ("clamp_grad", "clip_grad"), ("net.batch_size", "memory.batch_size"),
        ("training_batch_epoch", "training_iters_per_batch"), ("use_GAE", "use_gae"),
        ("polyak_weight", "polyak"), ("polyak_coef", "polyak"), ("net.loss_name", "net.loss.name"),
        ("net.optim_name", "net.optim.name"), ("net.lr_decay", "net.lr_scheduler."),
    ):  # fmt: skip
        key = key.replace(was, now)
    return key


# ---------------------------------------------------------------------------------------------------------- plain data


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _move(old: Plain, key: str, new: Plain, name: str) -> None:
    value = old.pop(key, None)
    if value is not None:
        new[name] = value


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested mappings; lists are values."""
    for key, value in values.items():
        dotted = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping):
            yield from _flat(value, dotted)
        else:
            yield dotted, value


def _dotted(values: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of one of our specs; lists of mappings have their index as a key, schedules are values."""
    for key, value in enumerate(values) if isinstance(values, list) else values.items():
        dotted = f"{above}.{key}" if above else str(key)
        within = (isinstance(value, Mapping) and "linear" not in value) or (
            isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value)
        )
        if within:
            yield from _dotted(value, dotted)
        else:
            yield dotted, value


def _leaves(values: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The searched keys below a search block, each with its path."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(values, list) and values and all(isinstance(one, Mapping) for one in values):
        for index, value in enumerate(values):
            yield from _leaves(value, (*path, index))
    else:
        yield path, values


def _with(old: Mapping[str, Any], path: tuple[Any, ...], value: Any) -> Plain:
    """A copy of an old spec with one value replaced."""
    copy: Plain = deepcopy(dict(old))
    here: Any = copy
    for part in path[:-1]:
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here[part]
    here[path[-1]] = value
    return copy
