"""An existing system as an environment: a few callables in the system's own process. Knows no wire and no lease."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium

from longrein.errors import SpaceError


class System(gymnasium.Env[Any, Any]):
    """An existing system, made an environment by the callables that its owner has anyway.

    Give `reset` and either `step`, or `act` and `observe`:

    reset() or reset(seed) -> observation, or (observation, info)
    step(action) -> (observation, reward, terminated) or (..., truncated) or (..., truncated, info)
    act(action) -> None, followed by observe() -> what step returns
    close() -> None, optional

    There is one system, so one lease at a time holds it. Serve it with `longrein.serve(system, at=...)`, or let it
    dial out to a waiting trainer with `longrein.dial(system, to=...)`.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        *,
        reset: Callable[..., Any],
        step: Callable[[Any], Any] | None = None,
        act: Callable[[Any], None] | None = None,
        observe: Callable[[], Any] | None = None,
        close: Callable[[], None] | None = None,
        name: str = "System",
    ) -> None:
        if (step is None) == (act is None or observe is None):
            raise SpaceError(
                "System",
                "either step, or act and observe",
                "both or neither",
                hint="step(action) -> (observation, reward, terminated); or act(action) and observe()",
            )
        self.observation_space = observation_space
        self.action_space = action_space
        self.name = name
        self._reset, self._step, self._act, self._observe, self._close = reset, step, act, observe, close
        self._takes_seed = _takes_argument(reset)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        first = self._reset(seed) if self._takes_seed else self._reset()
        if isinstance(first, tuple) and len(first) == 2 and isinstance(first[1], dict):
            return first
        return first, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._step is not None:
            moment = self._step(action)
        else:
            assert self._act is not None
            assert self._observe is not None
            self._act(action)
            moment = self._observe()
        match moment:
            case (observation, reward, terminated):
                return observation, reward, bool(terminated), False, {}
            case (observation, reward, terminated, truncated):
                return observation, reward, bool(terminated), bool(truncated), {}
            case (observation, reward, terminated, truncated, info):
                return observation, reward, bool(terminated), bool(truncated), info
        raise SpaceError("step", "(observation, reward, terminated[, truncated[, info]])", f"{moment!r}"[:120])

    def close(self) -> None:
        """A lease ended; the system itself stays. `shut_down` ends it."""

    def shut_down(self) -> None:
        """Call the owner's `close`."""
        if self._close is not None:
            self._close()


def _takes_argument(function: Callable[..., Any]) -> bool:
    import inspect

    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have no signature
        return False
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
