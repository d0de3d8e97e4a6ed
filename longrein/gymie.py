"""Gymie's own front, under its own names: `start`, `override`, and `python -m longrein.gymie -l HOST -p PORT`."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import gymnasium
import typer

from longrein.errors import Error, SpecError
from longrein.link import spaces
from longrein.link.adapters.old_gym import as_gymnasium
from longrein.link.dialects.gymie_listener import GET_ENV, PROCESS_STEP
from longrein.link.served import OPEN_OPTIONS, Served, registered_ids
from longrein.link.server import Server

Function = TypeVar("Function", bound=Callable[..., Any])
OVERRIDABLE = ("get_env", "process_step")
_overrides: dict[str, Callable[..., Any]] = {}


def override(name: str) -> Callable[[Function], Function]:
    """Replace one of the server's functions, for the servers that are started afterwards.

    "get_env": get_env(env_id, seed=None, **params) -> an environment of Gymnasium or gym; params are those of `make`.
    "process_step": process_step((observation, reward, done, info)) -> the four values to send, fit for JSON.
    Raises SpecError for any other name.
    """
    if name not in OVERRIDABLE:
        raise SpecError("override", f"{name!r} is none of {', '.join(OVERRIDABLE)}")

    def keep(function: Function) -> Function:
        _overrides[name] = function
        return function

    return keep


class ProcessedStep(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose steps the server's owner processes before they are sent."""

    def __init__(self, env: gymnasium.Env[Any, Any], process_step: Callable[[Any], Any]) -> None:
        super().__init__(env)
        self.process_step = process_step
        self.metadata = {**env.metadata, "longrein.calls": [PROCESS_STEP]}

    def gymie_step(self, plain: Any) -> Any:
        """One step with an action as JSON carries it, as the four values of an older gym."""
        action = spaces.from_plain(self.action_space, plain)
        spaces.check(self.action_space, action)
        observation, reward, terminated, truncated, info = self.env.step(action)
        if truncated and not terminated:
            info = {**info, "TimeLimit.truncated": True}
        return self.process_step((observation, reward, terminated or truncated, info))


def things() -> list[Any]:
    """What a Gymie server serves: what `get_env` makes, else every environment that Gymnasium knows here."""
    get_env, process_step = _overrides.get("get_env"), _overrides.get("process_step")
    if get_env is not None:
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(get_env).parameters.values())
        make = functools.partial(_make, get_env, process_step)
        allowed = frozenset({"*"} if takes_any else inspect.signature(get_env).parameters)
        return [Served(GET_ENV, make, allowed=allowed)]
    ids = registered_ids()
    if process_step is None:
        return list(ids)
    return [Served(i, functools.partial(_make, _gym_make, process_step, env_id=i), allowed=OPEN_OPTIONS) for i in ids]


def _gym_make(env_id: str, **options: Any) -> gymnasium.Env[Any, Any]:
    return gymnasium.make(env_id, disable_env_checker=True, **options)


def _make(make: Callable[..., Any], process_step: Callable[[Any], Any] | None, **params: Any) -> Any:
    made = make(**params)
    env = as_gymnasium(made)
    if env is None:
        raise SpecError("get_env", f"it returned {type(made).__name__}, no environment of gym or Gymnasium")
    return env if process_step is None else ProcessedStep(env, process_step)


def start(host: str = "127.0.0.1", port: int = 5000, *, insecure: bool = False, **options: Any) -> None:
    """Serve Gymie's clients at ws://host:port/gym until SIGTERM or Ctrl-C.

    Gymie knows no tokens: a host beyond loopback must be asked for with `insecure=True`. Further options are those of
    `longrein.Server`. Raises SpecError, and ConnectError when the port is taken.
    """
    with Server(things(), at=f"ws://{host}:{port}/gym", dialect="gymie", insecure=insecure, **options) as server:
        print(f"listening on {server.urls[0]}", flush=True)
        server.wait()


def _main(
    host: Annotated[str, typer.Option("-l", "--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("-p", "--port", help="Port; 0 takes a free one.")] = 5000,
    insecure: Annotated[bool, typer.Option(help="Listen beyond this machine: whoever reaches it may use it.")] = False,
) -> None:
    """Serve Gymie's clients with every environment that Gymnasium knows here."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        start(host, port, insecure=insecure)
    except Error as error:
        print(f"longrein: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(_main)
