"""Kinds of environment that come from other packages, written KIND:NAME; which extra brings each. No wire, no lease.

A kind is a module of this package, or one that another package names by the entry point `longrein.makers`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

from longrein.errors import SpecError


class Making(Protocol):
    """What the module of a kind offers.

    It may also offer
    `OPTIONS`, a frozenset of the options that any client may pass: none without it. None of them may read or write
    files, open a window or take memory without a limit.
    `check(name)`, which raises SpecError for what it cannot make, where `names` is not the whole answer.
    `lacking()`, the extras that would bring more names.
    """

    def names(self) -> list[str]:
        """What can be made on this machine, as it is written after the colon."""

    def make(self, name: str, num_envs: int, autoreset: str, **options: Any) -> Any:
        """A gymnasium.Env, a PettingZoo environment or an adapter; for several also a VectorEnv of `num_envs`.

        A VectorEnv must be in the mode `autoreset`: "next_step", "same_step", "disabled" or "free". Where an Env is
        returned for several, this is called again for each further one.
        """


@dataclass(frozen=True)
class Maker:
    """One kind: where its module is, and what must be installed for it."""

    module: str
    needs: str
    """The package that is imported; without it the extra is missing."""
    extra: str
    """The extra of longrein that installs it."""
    about: str
    """What is made, in a few words."""
    hint: str = ""
    """How to install it, where that is not by the extra."""

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None

    @property
    def how(self) -> str:
        """What to do when it is not installed."""
        return self.hint or install(self.extra)

    def load(self) -> Making:
        """Its module. Raises SpecError that says how to install what is missing."""
        if not self.installed:
            raise SpecError("env", f"{self.about} needs the package {self.needs!r}", hint=self.how)
        try:
            return cast(Making, importlib.import_module(self.module))
        except ImportError as error:
            raise SpecError("env", f"{self.about} cannot be loaded: {error}", hint=self.how) from None


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'longrein[{extra}]'"


_HERE = "longrein.link.makers"
TABLE: dict[str, Maker] = {
    "gymnasium": Maker(f"{_HERE}.gymnasium", "gymnasium", "classic", "Gymnasium (control, toy text, Box2D, MuJoCo)"),
    "atari": Maker(f"{_HERE}.atari", "ale_py", "atari", "ALE (Atari 2600 games with the usual preprocessing)"),
    "minatar": Maker(f"{_HERE}.minatar", "minatar", "minatar", "MinAtar (five Atari games on a 10x10 grid)"),
    "retro": Maker(f"{_HERE}.retro", "stable_retro", "retro", "Stable-Retro (console games, one of them free)"),
    "envpool": Maker(f"{_HERE}.envpool", "envpool", "envpool", "EnvPool (many environments stepped in C++)"),
    "pettingzoo": Maker(f"{_HERE}.pettingzoo", "pettingzoo", "pettingzoo", "PettingZoo (classic, MPE, butterfly)"),
    "unity": Maker(f"{_HERE}.unity", "unityagents", "unity", "Unity (players of ML-Agents 0.2)",
                   hint="longrein install unity:3dball"),
}  # fmt: skip
"""The kinds. `gymnasium` is also what makes a plain id."""


def kinds() -> dict[str, Maker]:
    """The table, with what other packages add; a kind of the table cannot be replaced."""
    return {point.name: point.load() for point in entry_points(group="longrein.makers")} | TABLE


def split(source: str) -> tuple[str, str] | None:
    """Kind and name of KIND:NAME; None where what stands before the colon is no kind."""
    kind, colon, name = source.partition(":")
    if not colon or not name:
        return None
    return (kind, name) if kind in TABLE or kind in entry_points(group="longrein.makers").names else None


def load(kind: str) -> Making:
    """The module of a kind. Raises SpecError where it is unknown or its package is missing."""
    maker = TABLE.get(kind) or kinds().get(kind)
    if maker is None:
        raise SpecError("env", f"there is no kind {kind!r}", hint=nearest(kind, list(kinds()), "kinds"))
    return maker.load()


def open_options(module: Making) -> frozenset[str]:
    """The options that any client may pass."""
    return frozenset(getattr(module, "OPTIONS", ()))


def check(kind: str, name: str) -> None:
    """Raises SpecError for what cannot be made, so that a server says so when it starts."""
    module = load(kind)
    if hasattr(module, "check"):
        module.check(name)
        return
    known = module.names()
    if name not in known and not Path(name).expanduser().is_file():  # some kinds also take the path of a file
        raise unknown(kind, name, known)


def unknown(kind: str, name: str, known: Sequence[str]) -> SpecError:
    """The error for a name that nothing is known by, with those near it."""
    near = nearest(name, known, "names", f"{kind}:")
    return SpecError("env", f"there is no {kind}:{name}", hint=f"{near} `longrein envs {kind}` lists all.")


def nearest(name: str, known: Sequence[str], what: str, before: str = "") -> str:
    """A hint that names what is near, or the first few; upper and lower case do not count."""
    lower = {one.lower(): before + one for one in known}
    near = difflib.get_close_matches(name.lower(), list(lower), 3)
    if near:
        return f"Did you mean {' or '.join(lower[one] for one in near)}?"
    if not known:
        return f"There are no {what}."
    return f"The {what} are {', '.join([before + one for one in known[:7]])}{', ...' if len(known) > 7 else ''}."
