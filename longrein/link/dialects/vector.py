"""Many environments of older systems as one vector environment: all steps are sent before the first is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from longrein.errors import SpecError
from longrein.link.dialects import Dialect

MODES: Final = {mode.name.lower(): mode for mode in AutoresetMode}


class DialectVectorEnv(SyncVectorEnv):
    """Gymnasium's SyncVectorEnv, whose sub-environments do their work at the same time."""

    def step(self, actions: Any) -> Any:
        # Under next-step autoreset the environments whose episode ended are reset, and the others stepped.
        due = self._autoreset_envs if self.autoreset_mode is AutoresetMode.NEXT_STEP else [False] * self.num_envs
        each = gymnasium.vector.utils.iterate(self.action_space, actions)
        for env, action, over in zip(self.envs, each, due, strict=True):
            inner: Any = env
            if over:
                inner.post_reset(None)
            else:
                inner.post_step(action)
        return super().step(actions)


def connect_vec(
    dialect: Dialect, urls: Sequence[str], num_envs: int | None, *, autoreset: str = "next_step", **options: Any
) -> DialectVectorEnv:
    """urls: one server over which `num_envs` are spread as the dialect can, or one URL for each environment."""
    if autoreset not in MODES:
        raise SpecError("autoreset", f"{autoreset!r} is none of {', '.join(MODES)}")
    module = dialect.load()
    places = list(urls) if num_envs is None or len(urls) == num_envs > 1 else module.spread(urls[0], num_envs)
    if num_envs is not None and len(urls) > 1 and len(urls) != num_envs:
        raise SpecError("num_envs", f"{num_envs} environments over {len(urls)} URLs", hint="give one URL for each")
    made: list[gymnasium.Env[Any, Any]] = []
    try:
        made.extend(module.connect(place, **options) for place in places)
    except BaseException:
        for env in made:
            env.close()
        raise
    return DialectVectorEnv([partial(_given, env) for env in made], autoreset_mode=MODES[autoreset])


def _given(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    return env
