"""What a server serves: names, and how to make the thing behind each. The allow list; it imports nothing for a client.

A thing to serve is given by whoever starts the server, as one of
  an id of Gymnasium's registry        "CartPole-v1", "ALE/Pong-v5", "module:Id-v0"
  a kind and a name                    "atari:pong"; the kinds are those of `longrein.link.makers`
  a function in a file or a module     "file.py:factory", "package.module:factory"
  a function                           called once for each copy
  an environment                       one, held by one lease at a time
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium

from longrein.errors import SpecError
from longrein.link import adapters, makers
from longrein.link.makers import gymnasium as ids

OPEN_OPTIONS = ids.OPTIONS
"""Options that any client may pass for a Gymnasium id. Others must be allowed by whoever starts the server."""


class OptionRefused(Exception):
    """A client passed an option that it may not; it never leaves this package."""


@dataclass(frozen=True)
class Served:
    """One name that clients may open."""

    name: str
    source: str | Callable[..., Any] | Any
    options: Mapping[str, Any] = field(default_factory=dict)  # fixed by the server
    allowed: frozenset[str] = frozenset()  # further options that a client may pass; "*" for all
    exclusive: bool = False  # one thing, one lease

    def make(self, num_envs: int, options: Mapping[str, Any], autoreset: str = "disabled") -> Any:
        """An adapter with `num_envs` environments, where it is a vector environment of its own in that autoreset mode.

        Raises OptionRefused, or whatever the environment raises.
        """
        function, takes = self._function(num_envs, autoreset)
        allowed = self.allowed | takes
        refused = sorted(set(options) - allowed) if "*" not in allowed else []
        if refused:
            raise OptionRefused(
                f"{self.name} takes no option {refused[0]!r} from a client (allowed: "
                f"{', '.join(sorted(allowed)) or 'none'}); start the server with --allow-option {refused[0]}"
            )
        merged = {**options, **self.options}

        def make_one() -> Any:
            return function(**merged)

        return adapt(make_one(), make_one, num_envs)

    def _function(self, num_envs: int, autoreset: str) -> tuple[Callable[..., Any], frozenset[str]]:
        """What makes one, and the options that any client may pass to it."""
        if isinstance(self.source, str):
            made_by = _made_by(self.source)
            if made_by is None:
                function = _load_function(self.source)
                return function, _names(function)
            kind, name = made_by
            module = makers.load(kind)
            return functools.partial(module.make, name, num_envs, autoreset), makers.open_options(module)
        if callable(self.source) and not isinstance(self.source, (gymnasium.Env, gymnasium.vector.VectorEnv)):
            return self.source, _names(self.source)
        return lambda: self.source, frozenset()


def make_vec(source: str, num_envs: int, options: Mapping[str, Any]) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    """Environments in this process, with same-step autoreset, from what a server could serve. Raises SpecError."""
    made = make_here(source, num_envs, options)
    if isinstance(made, list):
        raise SpecError(
            "env.id", f"{source} makes {type(made[0]).__name__}, which has several agents",
            hint="serve it, and give its url",
        )  # fmt: skip
    return made


def make_here(
    source: str, num_envs: int, options: Mapping[str, Any]
) -> gymnasium.vector.VectorEnv[Any, Any, Any] | list[Any]:
    """As make_vec; of what has several agents that act at once, a list of so many PettingZoo environments."""
    _check(source)
    function, _ = Served("local", source)._function(num_envs, "same_step")
    first = function(**options)
    if isinstance(first, gymnasium.vector.VectorEnv):
        return first
    pettingzoo = sys.modules.get("pettingzoo")
    if pettingzoo is not None and isinstance(first, pettingzoo.ParallelEnv):
        return [first, *(function(**options) for _ in range(num_envs - 1))]
    if not isinstance(first, gymnasium.Env):
        raise SpecError(
            "env.id", f"{source} makes {type(first).__name__}, whose agents act in turn or which is a process",
            hint="a gymnasium.Env, a VectorEnv or a PettingZoo ParallelEnv; or serve it, and give its url",
        )  # fmt: skip
    made = iter([first])
    make = lambda: next(made, None) or function(**options)  # noqa: E731  # the first was made to look at it
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    return gymnasium.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=mode)


def adapt(thing: Any, make: Callable[[], Any], num_envs: int) -> Any:
    """The adapter for a thing, whatever its kind; an adapter passes as it is."""
    if hasattr(thing, "kind") and thing.kind in ("vector", "batch", "parallel", "aec", "policy"):
        return thing
    for kind in adapters.kinds():
        adapted = kind(thing, make, num_envs)
        if adapted is not None:
            return adapted
    raise SpecError(
        "env",
        f"{type(thing).__module__}.{type(thing).__qualname__} is no environment that can be served",
        hint="give a gymnasium.Env, a VectorEnv, a PettingZoo environment or a longrein.System",
    )


def serve_list(
    things: Sequence[Any], options: Mapping[str, Any] | None = None, allowed: Sequence[str] = ()
) -> dict[str, Served]:
    """The allow list for what was given to `serve`. Raises SpecError where a thing cannot be served."""
    found: dict[str, Served] = {}
    for thing in things:
        served = _served(thing, dict(options or {}), frozenset(allowed))
        if served.name in found:
            raise SpecError(
                "env",
                f"two things are called {served.name!r}",
                hint=f"serve them at two servers, or name one: longrein.Server([('other', {served.source!r})], ...)",
            )
        found[served.name] = served
    if not found:
        raise SpecError(
            "env",
            "nothing to serve",
            hint="name an environment, as in: longrein serve CartPole-v1 --at ws://127.0.0.1:5000",
        )
    return found


def _served(thing: Any, options: dict[str, Any], allowed: frozenset[str]) -> Served:
    if isinstance(thing, Served):
        return thing
    if isinstance(thing, str):
        _check(thing)
        return Served(_name_of(thing), thing, options, allowed)
    if isinstance(thing, tuple) and len(thing) == 2:
        if isinstance(thing[1], str):
            _check(thing[1])
        return Served(str(thing[0]), thing[1], options, allowed)
    if isinstance(thing, (gymnasium.Env, gymnasium.vector.VectorEnv)) or not callable(thing):
        spec = getattr(thing, "spec", None)
        name = getattr(thing, "name", None) or (spec.id if spec is not None else type(thing).__name__)
        return Served(str(name), thing, {}, frozenset(), exclusive=True)
    return Served(getattr(thing, "__name__", "env").replace("<lambda>", "env"), thing, options, allowed)


def registered_ids() -> list[str]:
    """Every id of Gymnasium's registry as it stands now, but for our own, which lead elsewhere."""
    ours = ("longrein.", "longrein/")
    return sorted(
        name for name, spec in gymnasium.registry.items() if not str(spec.entry_point or "longrein.").startswith(ours)
    )


_FUNCTION = re.compile(r"(?P<place>[^:]+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


def _made_by(source: str) -> tuple[str, str] | None:
    """Kind and name of what a maker makes; None for PLACE:FUNCTION. A kind wins over a module of its name."""
    return makers.split(source) or (("gymnasium", source) if _is_id(source) else None)


def _is_id(source: str) -> bool:
    """Whether a string is an id of the registry, rather than PLACE:FUNCTION."""
    match = _FUNCTION.fullmatch(source)
    return match is None or (not match["place"].endswith(".py") and re.search(r"-v\d+$", source) is not None)


def _check(source: str) -> None:
    """Raises SpecError for what cannot be made: an error now is better than one at the first client."""
    made_by = _made_by(source)
    if made_by is not None:
        makers.check(*made_by)
    else:
        _load_function(source)


def _name_of(source: str) -> str:
    """What clients call it: what stands after the colon; of a file, the name without its ending."""
    made_by = makers.split(source)
    name = made_by[1] if made_by else source.rpartition(":")[2]
    return Path(name).stem.lower() if made_by and Path(name).expanduser().is_file() else name


def _load_function(source: str) -> Callable[..., Any]:
    place, _, name = source.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, FileNotFoundError) as error:
        hint = f"Write file.py:factory or KIND:NAME. {makers.nearest(place, list(makers.TABLE), 'kinds')}"
        raise SpecError("env", f"{place} cannot be loaded: {error}", hint=hint) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise SpecError("env", f"{place} has no function {name!r}", hint="write it as file.py:factory")
    return function  # type: ignore[no-any-return]  # what the user wrote


def _load_file(path: Path) -> ModuleType:
    path = path.resolve()
    name = f"longrein_served_{abs(hash(str(path)))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _names(function: Callable[..., Any]) -> frozenset[str]:
    """The options that a factory takes by name: its author has decided that they may be passed."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return frozenset()
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
