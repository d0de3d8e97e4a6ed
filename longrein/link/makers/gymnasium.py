"""Gymnasium's registry: its own environments, and ids of packages that register theirs once they are imported."""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any

import gymnasium

from longrein.errors import SpecError
from longrein.link.makers import TABLE, install, nearest

OPTIONS = frozenset({"render_mode", "max_episode_steps"})

_FAMILIES = {  # by the module of the entry point: what is needed to step it, and which extra brings that
    "gymnasium.envs.classic_control": ("gymnasium", "classic"),
    "gymnasium.envs.toy_text": ("gymnasium", "classic"),
    "gymnasium.envs.box2d": ("Box2D", "box2d"),
    "gymnasium.envs.mujoco": ("mujoco", "mujoco"),
}
_PROVIDERS = {"ALE": "atari", "MinAtar": "minatar"}  # by the namespace: whose package registers it


def names() -> list[str]:
    """Gymnasium's own, each in its newest version, where what it needs is installed."""
    newest: dict[str, tuple[int, str]] = {}
    for name, spec in gymnasium.registry.items():
        family = _family(spec)
        if family is not None and importlib.util.find_spec(family[0]) is not None:
            newest[spec.name] = max(newest.get(spec.name, (-1, "")), (spec.version or 0, name))
    return sorted(name for _, name in newest.values())


def lacking() -> list[str]:
    """The extras that would bring more of Gymnasium's own."""
    return sorted({extra for package, extra in _FAMILIES.values() if importlib.util.find_spec(package) is None})


def make(
    name: str, num_envs: int, autoreset: str, *, vectorization: str = "sync", **options: Any
) -> gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any]:
    """One environment; `options` are those of `gymnasium.make`.

    vectorization: how several are stepped, one by one (sync) or all as one array (native), which few can be.
    Raises SpecError for another, or where this environment cannot be.
    """
    provide(name)
    if vectorization not in ("sync", "native"):
        raise SpecError("env.options.vectorization", f"{vectorization!r} is neither sync nor native")
    if vectorization == "native":
        from longrein.link.makers import native

        native.check(name, options)
        if num_envs > 1:
            return native.make(name, num_envs, autoreset, **options)
    return gymnasium.make(name, disable_env_checker=True, **options)


def check(name: str) -> None:
    """Raises SpecError where the registry has no such id, or what it needs is not installed."""
    provide(name)
    try:
        spec = gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        near = nearest(name, list(gymnasium.registry), "ids")
        hint = f"{near} Also module:Id-v0, file.py:factory and KIND:NAME (`longrein envs`) can be served."
        raise SpecError("env", f"{name!r}: {error}", hint=hint) from None
    family = _family(spec)
    if family is not None and importlib.util.find_spec(family[0]) is None:
        raise SpecError("env", f"{name} needs the package {family[0]!r}", hint=install(family[1]))


def provide(name: str) -> None:
    """Import the package that registers an id, where that is known by its namespace.

    Only for names that come from whoever starts a server: a client's name must import nothing.
    Raises SpecError where that package is not installed.
    """
    kind = _PROVIDERS.get(name.partition("/")[0])
    if kind is None or name in gymnasium.registry:
        return
    TABLE[kind].load()
    if kind == "minatar":
        importlib.import_module("minatar.gym").register_envs()


def _family(spec: gymnasium.envs.registration.EnvSpec) -> tuple[str, str] | None:
    """None for environments that are not Gymnasium's own, and for its own that no longer work."""
    module = re.match(r"[\w.]+", spec.entry_point) if isinstance(spec.entry_point, str) else None
    return _FAMILIES.get(module[0].rpartition(".")[0]) if module else None
