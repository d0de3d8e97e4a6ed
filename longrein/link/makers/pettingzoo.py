"""PettingZoo's environments: classic board and card games, MPE (the package mpe2) and butterfly."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

from longrein.errors import SpecError
from longrein.link.makers import install, unknown

OPTIONS = frozenset({"api", "render_mode", "max_cycles", "continuous_actions"})

_FAMILIES = {"pettingzoo.classic": "aec", "mpe2": "parallel", "pettingzoo.butterfly": "parallel"}
_EXTRA = "pettingzoo"
_NEEDS = {"chess": "chess", "hanabi": "pyspiel", "leduc": "rlcard", "texas": "rlcard", "pistonball": "pymunk"}
"""What a game needs besides pygame, by the first word of its name."""


def names() -> list[str]:
    """The games of the three families that can be loaded here, with their versions."""
    if importlib.util.find_spec("pygame") is None:
        return []
    lacking = {word for word, package in _NEEDS.items() if importlib.util.find_spec(package) is None}
    found = (name for family in _FAMILIES for name in _games(family))
    return sorted(name for name in found if name.partition("_")[0] not in lacking)


def make(name: str, num_envs: int, autoreset: str, *, api: str = "auto", **options: Any) -> Any:
    """api: "aec" (one acts at a time), "parallel" (all at once), or "auto": aec for classic, parallel for the others.

    `options` are those of the game: render_mode, max_cycles and what else it takes.
    """
    family = _family(name)
    module = _module(family, name)
    api = _FAMILIES[family] if api == "auto" else api
    if api not in ("aec", "parallel"):
        raise SpecError("api", f"{api!r} is none of auto, aec, parallel")
    if api == "parallel" and not hasattr(module, "parallel_env"):
        raise SpecError("api", f"in {name} the agents act in turn", hint="api='aec', and longrein.connect_aec(url)")
    if options.get("render_mode") != "human" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame wants a screen even for what is drawn unseen
    return (module.parallel_env if api == "parallel" else module.env)(**options)


def check(name: str) -> None:
    """Raises SpecError for a game that there is not, or that cannot be loaded here."""
    _module(_family(name), name)


def _games(family: str) -> Iterator[str]:
    root, _, below = family.partition(".")
    spec = importlib.util.find_spec(root)
    if spec is None or spec.submodule_search_locations is None:
        return
    folders = [os.path.join(place, below) for place in spec.submodule_search_locations]
    yield from (found.name for found in pkgutil.iter_modules(folders) if re.fullmatch(r"\w+_v\d+", found.name))


def _family(name: str) -> str:
    for family in _FAMILIES:
        if name in _games(family):
            return family
    raise unknown("pettingzoo", name, names())


def _module(family: str, name: str) -> Any:
    try:
        return importlib.import_module(f"{family}.{name}")
    except ImportError as error:
        raise SpecError("env", f"pettingzoo:{name} cannot be loaded: {error}", hint=install(_EXTRA)) from None
