"""What a server serves: names, and how to make the thing behind each. The allow list; it imports nothing for a client.

A thing to serve is given by whoever starts the server, as one of
  an id of Gymnasium's registry        "CartPole-v1", "ALE/Pong-v5", "module:Id-v0"
  a function in a file or a module     "file.py:factory", "package.module:factory"
  a function                           called once for each copy
  an environment                       one, held by one lease at a time
"""

from __future__ import annotations

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
from longrein.link import adapters

OPEN_OPTIONS = frozenset({"render_mode", "max_episode_steps"})
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

    def make(self, num_envs: int, options: Mapping[str, Any]) -> Any:
        """An adapter with `num_envs` environments. Raises OptionRefused, or whatever the environment raises."""
        function = self._function()
        allowed = self.allowed | (
            OPEN_OPTIONS if isinstance(self.source, str) and _is_id(self.source) else _names(function)
        )
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

    def _function(self) -> Callable[..., Any]:
        if isinstance(self.source, str):
            return _load_function(self.source)
        if callable(self.source) and not isinstance(self.source, (gymnasium.Env, gymnasium.vector.VectorEnv)):
            return self.source
        return lambda: self.source


def adapt(thing: Any, make: Callable[[], Any], num_envs: int) -> Any:
    """The adapter for a thing, whatever its kind; an adapter passes as it is."""
    if hasattr(thing, "kind") and thing.kind in ("vector", "batch", "parallel", "aec"):
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
            raise SpecError("env", f"two things are called {served.name!r}")
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
        if not _is_id(thing):
            _load_function(thing)  # an error now is better than one at the first client
            return Served(thing.rpartition(":")[2], thing, options, allowed)
        _check_id(thing)
        return Served(thing.rpartition(":")[2], thing, options, allowed)
    if isinstance(thing, tuple) and len(thing) == 2:
        return Served(str(thing[0]), thing[1], options, allowed)
    if isinstance(thing, (gymnasium.Env, gymnasium.vector.VectorEnv)) or not callable(thing):
        spec = getattr(thing, "spec", None)
        name = getattr(thing, "name", None) or (spec.id if spec is not None else type(thing).__name__)
        return Served(str(name), thing, {}, frozenset(), exclusive=True)
    return Served(getattr(thing, "__name__", "env").replace("<lambda>", "env"), thing, options, allowed)


_FUNCTION = re.compile(r"(?P<place>[^:]+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


def _is_id(source: str) -> bool:
    """Whether a string is an id of the registry, rather than PLACE:FUNCTION."""
    match = _FUNCTION.fullmatch(source)
    return match is None or (not match["place"].endswith(".py") and re.search(r"-v\d+$", source) is not None)


def _check_id(source: str) -> None:
    try:
        gymnasium.spec(source)
    except (gymnasium.error.Error, ImportError) as error:
        raise SpecError(
            "env", f"{source!r}: {error}", hint="an id (CartPole-v1), module:Id-v0, or file.py:factory"
        ) from None


def _load_function(source: str) -> Callable[..., Any]:
    if _is_id(source):
        return lambda **options: gymnasium.make(source, disable_env_checker=True, **options)
    place, _, name = source.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, FileNotFoundError) as error:
        raise SpecError("env", f"{place} cannot be loaded: {error}") from None
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
