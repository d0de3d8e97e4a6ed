"""Stable-Retro: games of consoles. The package brings one that is free, and finds others once their ROMs are imported.

One process runs one emulator, the package's own limit: a server of several leases needs `--workers process`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import stable_retro
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import TimeLimit

from longrein.errors import RunError, SpecError
from longrein.link.makers import nearest

OPTIONS = frozenset({"state", "scenario", "actions", "observation", "players", "max_episode_steps", "render_mode"})

_ACTIONS = {
    "filtered": stable_retro.Actions.FILTERED,
    "all": stable_retro.Actions.ALL,
    "discrete": stable_retro.Actions.DISCRETE,
    "multi_discrete": stable_retro.Actions.MULTI_DISCRETE,
}
_OBSERVATIONS = {"image": stable_retro.Observations.IMAGE, "ram": stable_retro.Observations.RAM}
_ALL = stable_retro.data.Integrations.ALL


def names() -> list[str]:
    """The games whose ROM is there."""
    places = [Path(stable_retro.data.path()) / place for place in _ALL.paths]
    roms = [rom for place in places for rom in place.glob("*/rom.*") if rom.suffix in stable_retro.data.EMU_EXTENSIONS]
    return sorted({rom.parent.name for rom in roms})


def make(
    name: str,
    num_envs: int,
    autoreset: str,
    *,
    state: str = "",
    scenario: str = "",
    actions: str = "filtered",
    observation: str = "image",
    players: int = 1,
    max_episode_steps: int = 0,
    render_mode: str | None = "rgb_array",
) -> gymnasium.Env[Any, Any]:
    """state: where the game begins, one of the game's own, its usual one without; "none" is the title screen.

    scenario: what is rewarded and what ends, one of the game's own. actions: "filtered" (a bit for each button,
    impossible pairs left out), "all", "discrete" or "multi_discrete". observation: "image" uint8 [height, width, 3],
    or "ram". max_episode_steps: truncates after so many frames, 0 never.

    Raises RunError where this process runs an emulator already.
    """
    if render_mode not in (None, "rgb_array"):
        raise SpecError("render_mode", f"{render_mode!r} is neither None nor 'rgb_array'")
    data = stable_retro.data
    states = {"": stable_retro.State.DEFAULT, "none": stable_retro.State.NONE}
    states |= {one: one for one in data.list_states(name, _ALL)}
    scenarios: dict[str, str | None] = {"": None} | {one: one for one in data.list_scenarios(name, _ALL)}
    try:
        env = stable_retro.make(
            name,
            # Only what the game itself brings: a name of the package's own choice would be a path in its folders.
            state=_chosen("state", state, states),
            scenario=_chosen("scenario", scenario, scenarios),
            use_restricted_actions=_chosen("actions", actions, _ACTIONS),
            obs_type=_chosen("observation", observation, _OBSERVATIONS),
            players=int(players),
            inttype=_ALL,
            render_mode=render_mode,
        )
    except RuntimeError as error:
        if "multiple emulator" not in str(error):
            raise
        raise RunError(
            "this process runs a Retro emulator already, and it can run only one",
            hint="start the server with --workers process, and connect_vec with envs_per_lease=1",
        ) from None
    env.spec = EnvSpec(f"retro:{name}", max_episode_steps=max_episode_steps or None)
    return TimeLimit(env, max_episode_steps) if max_episode_steps else env


def _chosen(key: str, value: str, known: dict[str, Any]) -> Any:
    if value not in known:
        raise SpecError(key, f"{value!r} is unknown", hint=nearest(value, [k for k in known if k], f"{key}s"))
    return known[value]
