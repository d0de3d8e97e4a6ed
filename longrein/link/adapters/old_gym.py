"""Environments of OpenAI's gym before 0.26: four values from `step`, one from `reset`, a `seed` method. By duck-typing.

No package of gym is imported: whoever serves such an environment has it imported already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
from gymnasium import spaces

from longrein.errors import SpaceError
from longrein.link.adapters.gymnasium import EnvAdapter


class OldGymEnv(gymnasium.Env[Any, Any]):
    """Such an environment behind Gymnasium's interface; attributes that are not Gymnasium's reach it by Call."""

    def __init__(self, env: Any) -> None:
        self.old = env
        self.observation_space = space_of(env.observation_space)
        self.action_space = space_of(env.action_space)
        self.metadata = {"render_modes": list((getattr(env, "metadata", None) or {}).get("render.modes", []))}
        self.render_mode = "rgb_array" if "rgb_array" in self.metadata["render_modes"] else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.old.seed(seed)
        first = self.old.reset()
        return first if isinstance(first, tuple) and len(first) == 2 and isinstance(first[1], dict) else (first, {})

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        moment = self.old.step(action)
        if len(moment) == 5:  # gym 0.26 has Gymnasium's five values already
            return moment  # type: ignore[no-any-return]  # foreign code's
        observation, reward, done, info = moment
        truncated = bool(done) and bool(info.get("TimeLimit.truncated", False))
        return observation, reward, bool(done) and not truncated, truncated, info

    def render(self) -> Any:
        return self.old.render(mode="rgb_array") if self.render_mode else self.old.render()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "old":
            raise AttributeError(name)
        return getattr(self.old, name)

    def close(self) -> None:
        self.old.close()


def space_of(space: Any) -> gymnasium.Space[Any]:
    """Gymnasium's space for one of gym's, recognised by its class's name. Raises SpaceError."""
    if isinstance(space, gymnasium.Space):
        return space
    match type(space).__name__:
        case "Box":
            return spaces.Box(space.low, space.high, space.shape, space.dtype)
        case "Discrete":
            return spaces.Discrete(int(space.n), start=int(getattr(space, "start", 0)))
        case "MultiBinary":
            return spaces.MultiBinary(space.n)
        case "MultiDiscrete":
            return spaces.MultiDiscrete(space.nvec)
        case "Tuple":
            return spaces.Tuple([space_of(member) for member in space.spaces])
        case "Dict":
            return spaces.Dict({key: space_of(member) for key, member in space.spaces.items()})
    raise SpaceError("space", "one of gym's or Gymnasium's", f"{type(space).__module__}.{type(space).__qualname__}")


def as_gymnasium(thing: Any) -> gymnasium.Env[Any, Any] | None:
    """The thing itself if it is Gymnasium's, wrapped if it is gym's, None if it is neither."""
    if isinstance(thing, gymnasium.Env):
        return thing
    wanted = ("reset", "step", "close", "observation_space", "action_space")
    return OldGymEnv(thing) if all(hasattr(thing, name) for name in wanted) else None


def adapt_old_gym(thing: Any, make: Callable[[], Any], num_envs: int) -> EnvAdapter | None:
    """The adapter for an environment of gym; None for other things, PettingZoo's among them."""
    if hasattr(thing, "possible_agents") or hasattr(thing, "num_envs"):
        return None
    first = as_gymnasium(thing)
    if first is None:
        return None
    others = (as_gymnasium(make()) for _ in range(num_envs - 1))
    return EnvAdapter([first, *(env for env in others if env is not None)])
