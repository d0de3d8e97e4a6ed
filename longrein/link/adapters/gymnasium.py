"""Gymnasium environments to serve: copies of an `Env`, or a ready-made `VectorEnv`. Knows no wire and no lease."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, VectorEnv

from longrein.errors import SpaceError
from longrein.link.adapters import BatchMoment, Info, Moment

_MODES = {
    AutoresetMode.NEXT_STEP: "next_step",
    AutoresetMode.SAME_STEP: "same_step",
    AutoresetMode.DISABLED: "disabled",
}


def spec_of(env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any]) -> dict[str, Any]:
    """What a client may know of an environment's spec, as plain values."""
    spec = env.spec
    return {
        "id": spec.id if spec is not None else type(env.unwrapped).__name__,
        "max_episode_steps": spec.max_episode_steps if spec is not None else None,
        "reward_threshold": spec.reward_threshold if spec is not None else None,
        "nondeterministic": bool(spec.nondeterministic) if spec is not None else True,
        "render_mode": env.render_mode,
    }


def plain_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata without what only means something in its own process."""
    return {key: value for key, value in metadata.items() if key != "autoreset_mode"}


class EnvAdapter:
    """Copies of one Gymnasium environment, stepped one after the other."""

    kind = "vector"

    def __init__(self, envs: Sequence[gymnasium.Env[Any, Any]]) -> None:
        self.envs = list(envs)
        first = self.envs[0]
        self.num_envs = len(self.envs)
        self.observation_space: gymnasium.Space[Any] = first.observation_space
        self.action_space: gymnasium.Space[Any] = first.action_space
        for index, env in enumerate(self.envs[1:], 1):
            for name in ("observation_space", "action_space"):
                if getattr(env, name) != getattr(first, name):
                    raise SpaceError(
                        name,
                        f"the same space in each copy: {getattr(first, name)}",
                        f"{getattr(env, name)} in copy {index}",
                    )
        reward_space = first.get_wrapper_attr("reward_space") if first.has_wrapper_attr("reward_space") else None
        self.reward_shape: tuple[int, ...] = tuple(reward_space.shape) if reward_space is not None else ()
        self.metadata = plain_metadata(first.metadata)
        self.spec = spec_of(first)
        self._steps = [env.step for env in self.envs]
        self.step_one = self._steps[0]

    def reset(
        self, ids: Sequence[int], seeds: Sequence[int | None], options: dict[str, Any] | None
    ) -> tuple[list[Any], list[Info]]:
        observations, infos = [], []
        for index, seed in zip(ids, seeds, strict=True):
            observation, info = self.envs[index].reset(seed=seed, options=options)
            observations.append(observation)
            infos.append(info)
        return observations, infos

    def step(self, ids: Sequence[int], actions: Sequence[Any]) -> Moment:
        steps = self._steps
        if len(ids) == 1:
            observation, reward, terminated, truncated, info = steps[ids[0]](actions[0])
            return Moment([observation], [reward], [terminated], [truncated], [info])
        rows = [steps[index](action) for index, action in zip(ids, actions, strict=True)]
        return Moment(*(list(column) for column in zip(*rows, strict=True)))

    def render(self, index: int) -> Any:
        return self.envs[index].render()

    def attribute(self, index: int) -> Any:
        return self.envs[index]

    def close(self) -> None:
        envs, self.envs = self.envs, []
        for env in envs:
            env.close()


class VectorEnvAdapter:
    """A ready-made vector environment."""

    kind = "batch"

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.env = env
        self.num_envs = env.num_envs
        mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.autoreset = _MODES[AutoresetMode(mode)]
        self.observation_space = env.single_observation_space
        self.action_space = env.single_action_space
        self.reward_shape: tuple[int, ...] = ()
        self.metadata = plain_metadata(env.metadata)
        self.spec = spec_of(env)

    def reset(self, seeds: list[int | None] | None, options: dict[str, Any] | None) -> tuple[Any, Info]:
        return self.env.reset(seed=seeds, options=options)  # type: ignore[arg-type]  # Gymnasium's own take lists

    def step(self, actions: Any) -> BatchMoment:
        return BatchMoment(*self.env.step(actions))

    def render(self, index: int) -> Any:
        frames = self.env.render()
        return frames[index] if frames is not None and len(frames) else None

    def attribute(self, index: int) -> Any:
        return self.env

    def close(self) -> None:
        self.env.close()


def adapt_gymnasium(thing: Any, make: Callable[[], Any], num_envs: int) -> EnvAdapter | VectorEnvAdapter | None:
    """The adapter for a Gymnasium thing, made by `make` for the copies after the first; None for other things."""
    if isinstance(thing, VectorEnv):
        return VectorEnvAdapter(thing)
    if isinstance(thing, gymnasium.Env):
        return EnvAdapter([thing, *(make() for _ in range(num_envs - 1))])
    return None
