"""What `longrein install` does: Unity players are fetched, for all else the pip command is told."""

from __future__ import annotations

from collections.abc import Sequence

from longrein.errors import SpecError
from longrein.link import makers
from longrein.link.makers import unity_setup


def install_all(things: Sequence[str]) -> None:
    """Install what each KIND:NAME needs, or say the command that does. Raises SpecError for what is no KIND:NAME."""
    for thing in things:
        parts = makers.split(thing)
        if parts is None:
            raise SpecError("env", f"{thing!r} is no KIND:NAME", hint="as in longrein install unity:3dball")
        kind, name = parts
        if kind == "unity":
            print(f"{thing} is at {unity_setup.install(name)}; longrein serve {thing} serves it")
        elif makers.kinds()[kind].installed:
            print(f"{thing}: {kind} is installed")
        else:
            print(f"{thing} needs: {makers.kinds()[kind].how}")
