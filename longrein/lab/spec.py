"""The spec: load, check strictly, override, resolve, fingerprint. Knows the sections and their keys, no environment.

A file (YAML, or JSON, trailing commas allowed) maps names to specs. A spec has the sections `agent`, `env`, `body`,
`meta` and `search`. Every mistake is a SpecError with the file and line, the dotted key, the problem and the nearest
right key.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from longrein.errors import SpecError
from longrein.lab import topology
from longrein.lab.search_space import space_of
from longrein.lab.topology import Topology
from longrein.learn import algorithms
from longrein.learn.schedules import SHAPES, Exponential, Linear, Periodic, Shape, plain_shape, shape_from

SECTIONS = ("agent", "env", "body", "meta", "search")
PARTS = ("net", "memory")  # sections of an agent beside `algorithm`, which are sections of its Config too


@dataclass(frozen=True)
class AgentSpec:
    """One agent: an algorithm with its settings."""

    algorithm: str
    """Name in the table of algorithms."""
    config: Any
    """The algorithm's Config."""


@dataclass(frozen=True)
class EnvSpec:
    """One environment, here or elsewhere."""

    id: str = ""
    """An id of Gymnasium, KIND:NAME, or file.py:factory; made in this process."""
    url: str | tuple[str, ...] = ""
    """Where it is served: one URL or several, over which the copies are spread."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """For its maker."""
    num_envs: int = 8
    """Copies stepped together."""
    elastic: bool = False
    """Whether copies may come and go while it trains: those that are there act, lost ones are tried for again.
    Needs `url`, and `meta.topology.first_ready`."""


@dataclass(frozen=True)
class BodySpec:
    """Which agents are in which environments, and how often."""

    product: Literal["outer", "inner", "custom"] = "outer"
    """outer: each agent in each environment. inner: agents and environments in pairs. custom: the list in `num`."""
    num: Any = 1
    """Bodies for each pair: a number, one for each environment, or for custom a list of [agent, env, body]."""


@dataclass(frozen=True)
class EvalSpec:
    """How what was learnt is judged, on seeds that training never sees."""

    every: int = 0
    """Env steps between evaluations while it trains; 0 evaluates at the end only."""
    episodes: int = 20
    """Episodes of each evaluation."""


@dataclass(frozen=True)
class MetaSpec:
    """How long, how often, and from which seed."""

    env_steps: int = 200_000
    """Env steps of a session, over all copies of an environment together."""
    max_session: int = 1
    """Sessions of a trial, each with a seed of its own."""
    max_trial: int = 1
    """Trials of a search."""
    seed: int = 0
    """Root of every random number; session k has seed + k."""
    target: float | None = None
    """Mean training return at which a session ends before its env steps are spent."""
    window: int = 100
    """Episodes over which the training return is averaged."""
    checkpoint_every: int = 20_000
    """Env steps between checkpoints."""
    eval: EvalSpec = EvalSpec()
    """Evaluation."""
    topology: Literal["serial"] | Topology = "serial"
    """Which processes take part: one for all (serial), or `actors` or `hogwild` workers beside each other."""
    sinks: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Where metrics go beside the run folder."""


@dataclass(frozen=True)
class Spec:
    """A spec, resolved: every default filled in, every value checked."""

    name: str
    agents: tuple[AgentSpec, ...]
    envs: tuple[EnvSpec, ...]
    body: BodySpec
    meta: MetaSpec
    search: Mapping[str, Any]

    @property
    def plain(self) -> dict[str, Any]:
        """The spec as a file could say it, with every default."""
        agents = [
            {"algorithm": {"name": agent.algorithm, **_without(plain_config(agent.config), PARTS)}}
            | {part: value for part, value in plain_config(agent.config).items() if part in PARTS}
            for agent in self.agents
        ]
        return {
            "agent": agents[0] if len(agents) == 1 else agents,
            "env": _plain(asdict(self.envs[0])) if len(self.envs) == 1 else [_plain(asdict(env)) for env in self.envs],
            "body": _plain(asdict(self.body)),
            "meta": _plain(asdict(self.meta)),
            "search": _plain(self.search),
        }

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of what was asked for: the same for the same spec, wherever its metrics go."""
        asked = self.plain
        del asked["meta"]["sinks"]
        text = json.dumps(asked, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """YAML's safe part, with numbers such as 1e-3 read as numbers."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Source:
    """One spec as the file has it: plain values, and the line of each dotted key."""

    file: str
    name: str
    values: Mapping[str, Any]
    lines: Mapping[str, int]

    def error(self, key: str, problem: str, hint: str = "") -> SpecError:
        """A SpecError that names the line of `key`, or of the nearest section above it."""
        above = key
        while above and above not in self.lines:
            above = above.rpartition(".")[0]
        line = self.lines.get(above, self.lines.get("", 0))
        return SpecError(key, problem, file=f"{self.file}:{line}" if line else self.file, hint=hint)


def read(path: Path) -> dict[str, Source]:
    """The specs of a file, unchecked. Raises SpecError when it is no file of specs."""
    try:
        return dict(_sources(path, yaml.compose(path.read_text(), Loader=_Loader)))
    except OSError as error:
        raise SpecError("file", f"cannot be read: {error.strerror}", file=str(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise SpecError("file", f"is neither YAML nor JSON: {getattr(error, 'problem', error)}", file=where) from None


def _sources(path: Path, node: Any) -> Iterator[tuple[str, Source]]:
    if not isinstance(node, yaml.MappingNode):
        raise SpecError("file", "does not map names to specs", file=str(path), hint="NAME: {agent: ..., env: ...}")
    loader = _Loader("")
    _refuse_twice(path, node, "")
    for name_node, body in node.value:
        name, line = str(loader.construct_object(name_node)), name_node.start_mark.line + 1
        values = loader.construct_object(body, deep=True)
        if not isinstance(values, dict):
            sections = "a spec has the sections " + ", ".join(SECTIONS)
            raise SpecError(name, f"is {type(values).__name__}, not a spec", file=f"{path}:{line}", hint=sections)
        yield name, Source(str(path), name, values, {"": line, **dict(_lines(body, ""))})


def _refuse_twice(path: Path, node: Any, above: str) -> None:
    """Raise SpecError for a key that a mapping has twice: the first would be dropped without a word."""
    if not isinstance(node, yaml.MappingNode | yaml.SequenceNode):
        return
    seen: set[str] = set()
    for index, entry in enumerate(node.value):
        key, below = entry if isinstance(entry, tuple) else (None, entry)
        name = str(index if key is None else key.value)
        dotted = f"{above}.{name}" if above else name
        if name in seen:
            raise SpecError(dotted, "is there twice", file=f"{path}:{key.start_mark.line + 1}", hint="leave one out")
        seen.add(name)
        _refuse_twice(path, below, dotted)


def _lines(node: Any, above: str) -> Iterator[tuple[str, int]]:
    """The dotted keys below a node, each with its line."""
    if isinstance(node, yaml.MappingNode):
        pairs = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(str(index), value, value) for index, value in enumerate(node.value)]
    else:
        return
    for name, key, value in pairs:
        path = f"{above}.{name}" if above else str(name)
        yield path, key.start_mark.line + 1
        yield from _lines(value, path)


def load(path: str | Path, name: str | None = None, overrides: Mapping[str, Any] | None = None) -> Spec:
    """One spec of a file, with overrides by dotted key, resolved and checked.

    name may be left out where the file has one. Raises SpecError.
    """
    sources = read(Path(path))
    if name is None and len(sources) == 1:
        name = next(iter(sources))
    if name is None or name not in sources:
        problem = f"{path} has no spec {name!r}" if name is not None else f"{path} has {len(sources)} specs: name one"
        raise SpecError("name", problem, hint=nearest(name or "", sources))
    return resolve(overridden(sources[name], overrides or {}))


def from_plain(name: str, values: Mapping[str, Any]) -> Spec:
    """A spec from plain values, as a run folder keeps it. Raises SpecError."""
    return resolve(Source(name, name, values, {}))


def overridden(source: Source, overrides: Mapping[str, Any]) -> Source:
    """The spec with some values replaced: agent.algorithm.lr, env.0.num_envs. Raises SpecError for an empty key."""
    values = json.loads(json.dumps(source.values, default=str))
    for key, value in overrides.items():
        *path, last = key.split(".")
        if not last or not all(path):
            raise SpecError("set", f"{key!r} is no dotted key", hint="as in --set agent.algorithm.lr=1e-3")
        here: Any = values
        for part in path:
            here = here[int(part)] if isinstance(here, list) and part.isdigit() else here.setdefault(part, {})
            if not isinstance(here, (dict, list)):
                raise SpecError("set", f"{key}: {part} is a value, and has no keys below it")
        if isinstance(here, list):
            here[int(last)] = value
        else:
            here[last] = value
    return replace(source, values=values)


def override_pairs(texts: list[str]) -> dict[str, Any]:
    """key=value texts of a command line; values are read as YAML. Raises SpecError."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise SpecError("set", f"{text!r} is not key=value", hint="as in --set agent.algorithm.lr=1e-3")
        pairs[key] = yaml.load(value, Loader=_Loader)  # a SafeLoader
    return pairs


# ----------------------------------------------------------------------------------------------------------- checking


def resolve(source: Source) -> Spec:
    """A source with every default filled in and every value checked. Raises SpecError."""
    values = source.values
    _known(source, "", values, SECTIONS)
    for section in ("agent", "env"):
        if section not in values:
            raise source.error(section, "is missing", hint=f"every spec says which {section}")
    agents = tuple(_agent(source, key, value) for key, value in _each(source, "agent", values["agent"]))
    envs = tuple(_env(source, key, value) for key, value in _each(source, "env", values["env"]))
    body = _dataclass(source, "body", values.get("body") or {}, BodySpec())
    meta = _dataclass(source, "meta", values.get("meta") or {}, MetaSpec())
    for name in ("env_steps", "max_session", "max_trial", "window", "checkpoint_every"):
        if getattr(meta, name) < 1:
            raise source.error(f"meta.{name}", f"must be at least 1, got {getattr(meta, name)}")
    _topology(source, meta, agents, envs, body)
    search = values.get("search") or {}
    if not isinstance(search, Mapping):
        raise source.error("search", f"is {_kind(search)}, not a mapping", hint="agent.algorithm.lr: {loguniform: ...}")
    spec = Spec(source.name, agents, envs, body, meta, {})
    if not search:
        return spec
    without = replace(source, values={name: part for name, part in values.items() if name != "search"})
    space_of(search, spec.plain, source.error, lambda changes: resolve(overridden(without, changes)))
    return replace(spec, search=dict(search))


def _topology(
    source: Source, meta: MetaSpec, agents: tuple[AgentSpec, ...], envs: tuple[EnvSpec, ...], body: BodySpec
) -> None:
    many = meta.topology if isinstance(meta.topology, Topology) else None
    try:
        if many is not None:
            bodies = max(len(agents), len(envs), body.num if isinstance(body.num, int) else 2)
            topology.check(many, agents[0].algorithm, envs[0].num_envs, bodies)
        for env in envs:
            topology.check_environments(many, env.url, elastic=env.elastic, evaluated=meta.eval.episodes > 0)
    except SpecError as error:
        raise source.error(error.key, error.problem, hint=error.hint) from None


def _each(source: Source, section: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries of a section that is one mapping or a list of them, with their dotted keys."""
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise source.error(section, "is an empty list")
    for index, entry in enumerate(entries):
        key = f"{section}.{index}" if isinstance(value, list) else section
        if not isinstance(entry, Mapping):
            raise source.error(key, f"is {_kind(entry)}, not a mapping")
        yield key, entry


def _agent(source: Source, key: str, value: Mapping[str, Any]) -> AgentSpec:
    _known(source, key, value, ("algorithm", *PARTS))
    settings = value.get("algorithm")
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise source.error(f"{key}.algorithm", "names no algorithm", hint="algorithm: {name: dqn, ...}")
    name = settings["name"]
    try:
        config_class, _ = algorithms.load(name)
    except SpecError as error:
        raise source.error(f"{key}.algorithm.name", error.problem, hint=error.hint) from None
    whole = {k: v for k, v in settings.items() if k != "name"}
    names = [one.name for one in fields(config_class)]
    for part in PARTS:
        if part in whole:
            raise source.error(f"{key}.algorithm.{part}", "is a section of its own", hint=f"write {key}.{part}: ...")
        if part in value:
            if part not in names:
                raise source.error(f"{key}.{part}", f"{name} has none", hint="leave it out")
            whole[part] = value[part]
    try:
        default = config_class()
    except TypeError:
        default = None
    own = {k: v for k, v in whole.items() if k not in PARTS}
    _known(source, f"{key}.algorithm", own, [one for one in names if one not in PARTS])
    checked = {
        k: _value(source, f"{key}.{k}" if k in PARTS else f"{key}.algorithm.{k}", v, _hints(config_class)[k],
                  getattr(default, k, None))
        for k, v in whole.items()
    }  # fmt: skip
    try:
        return AgentSpec(name, config_class(**checked))
    except SpecError as error:
        last = error.key.rpartition(".")[2]
        at = f"{key}.{error.key}" if error.key.startswith(PARTS) else f"{key}.algorithm.{last}"
        raise source.error(at, error.problem, hint=error.hint) from None


def _env(source: Source, key: str, value: Mapping[str, Any]) -> EnvSpec:
    env: EnvSpec = _dataclass(source, key, value, EnvSpec())
    if bool(env.id) == bool(env.url):
        raise source.error(key, "needs either id or url", hint="id: CartPole-v1, or url: ws://host:5000/CartPole-v1")
    if env.num_envs < 1:
        raise source.error(f"{key}.num_envs", f"must be at least 1, got {env.num_envs}")
    return env


def _dataclass(source: Source, key: str, value: Any, default: Any) -> Any:
    """A dataclass from a mapping: what is left out is as in `default`."""
    if not isinstance(value, Mapping):
        raise source.error(key, f"is {_kind(value)}, not a mapping")
    kind = type(default)
    _known(source, key, value, [one.name for one in fields(kind)])
    hints = _hints(kind)
    checked = {k: _value(source, f"{key}.{k}", v, hints[k], getattr(default, k)) for k, v in value.items()}
    try:
        return replace(default, **checked)
    except SpecError as error:
        raise source.error(f"{key}.{error.key.rpartition('.')[2]}", error.problem, hint=error.hint) from None


def _value(source: Source, key: str, value: Any, hint: Any, default: Any) -> Any:
    """A value as its type asks; raises SpecError where it is of another."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if isinstance(value, Mapping | Shape) and not set(SHAPES.values()).isdisjoint(args):
            return _schedule(source, key, value, args)
        for option in args:
            try:
                return _value(source, key, value, option, default)
            except SpecError:
                if is_dataclass(option) and isinstance(value, Mapping):
                    raise  # a section: its own mistake says more than that it is none
                continue
        raise source.error(key, f"is {value!r}", hint=f"one of {', '.join(_name(option) for option in args)}")
    if origin is Literal:
        if value not in args:
            raise source.error(key, f"is {value!r}", hint=nearest(str(value), [str(arg) for arg in args]))
        return value
    if is_dataclass(hint):
        if hint in SHAPES.values():
            return _schedule(source, key, value, (hint,))
        kind: Any = hint
        return _dataclass(source, key, value, default if isinstance(default, kind) else kind())
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise source.error(key, f"is {_kind(value)}, not a list")
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        pairs = zip(value, kinds, strict=False)
        return tuple(_value(source, f"{key}.{i}", one, kind, None) for i, (one, kind) in enumerate(pairs))
    if origin in (dict, Mapping) or hint in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        if not isinstance(value, Mapping):
            raise source.error(key, f"is {_kind(value)}, not a mapping")
        return value
    return _scalar(source, key, value, hint)


def _scalar(source: Source, key: str, value: Any, hint: Any) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and hint not in (int, float, str, bool, type(None)) and isinstance(value, hint):
        return value
    if not isinstance(hint, type) and callable(value):
        return value  # a function of the user's, in Python
    raise source.error(key, f"is {value!r}, {_kind(value)}", hint=f"it takes {_name(hint)}")


def _schedule(source: Source, key: str, value: Any, kinds: tuple[Any, ...]) -> Shape:
    try:
        shape = value if isinstance(value, Shape) else shape_from(value)
    except SpecError as error:
        raise source.error(key, error.problem) from None
    if shape is None or type(shape) not in kinds:
        known = ", ".join(map(_name, kinds))
        raise source.error(key, f"is {value!r}, no such schedule", hint=f"one of {known}")
    return shape


def _known(source: Source, key: str, value: Mapping[str, Any], names: Any) -> None:
    for name in value:
        if name not in names:
            at = f"{key}.{name}" if key else str(name)
            raise source.error(at, "there is no such key", hint=nearest(str(name), names))


def nearest(name: str, names: Any) -> str:
    """A hint: the nearest of some names, or all of them."""
    known = [str(one) for one in names]
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "one of " + ", ".join(known)


def _hints(kind: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "a yes or no", int: "a whole number",
             float: "a number", type(None): "nothing"}  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if is_dataclass(hint) and hint not in SHAPES.values():
        return "a mapping"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null",
             Linear: "{linear: [start, end, env_steps]}", Exponential: "{exponential: [start, end, half_life]}",
             Periodic: "{periodic: [start, end, half_life, period]}"}  # fmt: skip
    return names.get(hint, getattr(hint, "__name__", str(hint)))


# -------------------------------------------------------------------------------------------------------- plain values


def plain_config(config: Any) -> dict[str, Any]:
    """A Config as plain values. What has no plain form, a function, is left out."""
    return {
        one.name: _plain(getattr(config, one.name))
        for one in fields(config)
        if not callable(getattr(config, one.name)) or is_dataclass(getattr(config, one.name))
    }


def as_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    return str(yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=110))


def _plain(value: Any) -> Any:
    if isinstance(value, Shape):
        return plain_shape(value)
    if is_dataclass(value) and not isinstance(value, type):
        return plain_config(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}
