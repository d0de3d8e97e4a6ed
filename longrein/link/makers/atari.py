"""Atari 2600 games by ALE's native vector environment, with the usual preprocessing; each choice is an option.

1. One implementation: a single environment is the vector environment of one, so both show the same frames.
2. That interface gives no picture of the screen. With `render_mode` a second emulator in colour and full size gets the
   same seeds and actions, and so shows the same game; it costs a second emulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ale_py
import gymnasium
import numpy as np
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from longrein.errors import SpecError
from longrein.link.makers.pools import MODES, Infos, One, drawn_seeds, final_infos, seeds_of

OPTIONS = frozenset(
    {
        "frame_skip",
        "screen_size",
        "grayscale",
        "frame_stack",
        "noop_max",
        "fire_reset",
        "episodic_life",
        "clip_reward",
        "sticky",
        "full_action_space",
        "max_frames",
        "render_mode",
    }
)

_TWO_PLAYERS_ONLY = {"combat", "joust", "maze_craze", "warlords"}
_BOUNDS: dict[str, tuple[float, float]] = {  # a client may ask for these, so none may take a server's memory
    "frame_skip": (1, 60),
    "screen_size": (8, 256),
    "frame_stack": (1, 32),
    "noop_max": (0, 1000),
    "sticky": (0, 1),
    "max_frames": (1, 10_000_000),
}


def names() -> list[str]:
    """The games inside ale-py that one can play alone."""
    return sorted(set(roms.get_all_rom_ids()) - _TWO_PLAYERS_ONLY)


def make(
    name: str,
    num_envs: int,
    autoreset: str,
    *,
    frame_skip: int = 4,
    screen_size: int = 84,
    grayscale: bool = True,
    frame_stack: int = 4,
    noop_max: int = 30,
    fire_reset: bool = True,
    episodic_life: bool = False,
    clip_reward: bool = False,
    sticky: float = 0.25,
    full_action_space: bool = False,
    max_frames: int = 108_000,
    render_mode: str | None = None,
    threads: int = 0,
) -> VectorEnv[Any, Any, Any] | gymnasium.Env[Any, Any]:
    """Observations are uint8 [frame_stack, screen_size, screen_size], in colour with a last dimension of 3.

    The newest frame is the last; those from before an episode are black.

    DQN: "Human-level control through deep reinforcement learning", Mnih et al. 2015 (Nature 518).
    ALE: "Revisiting the Arcade Learning Environment", Machado et al. 2018 (arXiv:1709.06009).

    frame_skip: emulator frames for an action; the last two are joined by their maximum (DQN).
    screen_size, grayscale: side in pixels, and luminance alone (DQN). frame_stack: observed frames together (DQN).
    noop_max: a reset is followed by fewer than so many frames in which nothing is done (DQN: up to so many).
    fire_reset: FIRE at each reset where the game waits for it (of the DQN baselines since; neither paper).
    episodic_life: a lost life ends the episode, False as in ALE (DQN trained with True).
    clip_reward: to [-1, 1]; False, so that a score is a score (DQN clipped in training).
    sticky: the chance that the emulator repeats the last action instead, each frame, 0.25 as in ALE (DQN: 0).
    full_action_space: all 18 actions (ALE recommends that), or those that the game uses (DQN).
    max_frames: an episode is truncated after so many emulator frames; 108,000 are half an hour (both papers evaluated
    for 18,000, five minutes).
    render_mode: "rgb_array" for the screen in colour, see rule 2. threads: 0 takes one for each environment, up to the
    machine's cores.
    """
    given = {
        "frame_skip": frame_skip,
        "screen_size": screen_size,
        "frame_stack": frame_stack,
        "noop_max": noop_max,
        "sticky": sticky,
        "max_frames": max_frames,
    }
    for key, value in given.items():
        low, high = _BOUNDS[key]
        wanted = (int, float) if key == "sticky" else (int,)
        if isinstance(value, bool) or not isinstance(value, wanted) or not low <= value <= high:
            raise SpecError(key, f"{value!r} is no {wanted[-1].__name__} from {low} to {high}")
    if render_mode not in (None, "rgb_array"):
        raise SpecError("render_mode", f"{render_mode!r} is neither None nor 'rgb_array'")
    settings = {
        "frameskip": frame_skip,
        "img_height": screen_size,
        "img_width": screen_size,
        "grayscale": bool(grayscale),
        "stack_num": frame_stack,
        "noop_max": noop_max,
        "use_fire_reset": bool(fire_reset),
        "episodic_life": bool(episodic_life),
        "reward_clipping": bool(clip_reward),
        "repeat_action_probability": float(sticky),
        "full_action_space": bool(full_action_space),
        "max_num_frames_per_episode": max_frames,
        "num_threads": threads,
    }
    if num_envs > 1 and autoreset in MODES:
        return AtariVector(name, num_envs, MODES[autoreset], render_mode, settings)
    return One(AtariVector(name, 1, AutoresetMode.NEXT_STEP, render_mode, settings))


class AtariVector(VectorEnv[Any, Any, Any]):
    """ALE's vector environment with seeds, infos and final observations as Gymnasium has them, and with pictures."""

    def __init__(
        self, game: str, num_envs: int, mode: AutoresetMode, render_mode: str | None, settings: dict[str, Any]
    ) -> None:
        self._game = AtariVectorEnv(game, num_envs, autoreset_mode=mode, **settings)
        self._screen: AtariVectorEnv | None = None
        if render_mode is not None:
            height, width = _screen_size(game)
            screen = {"img_height": height, "img_width": width, "grayscale": False, "stack_num": 1}
            self._screen = AtariVectorEnv(game, num_envs, autoreset_mode=mode, **(settings | screen))
        self._frames: NDArray[np.uint8] | None = None
        self._same_step = mode is AutoresetMode.SAME_STEP
        self._seeded = False
        self.num_envs = num_envs
        self.single_observation_space = self._game.single_observation_space
        self.single_action_space = self._game.single_action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        fps = 60 / settings["frameskip"]
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps, "autoreset_mode": mode}
        steps = -(-settings["max_num_frames_per_episode"] // settings["frameskip"])
        self.spec = EnvSpec(f"atari:{game}", max_episode_steps=steps)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Infos | None = None
    ) -> tuple[NDArray[np.uint8], Infos]:
        """Reset all, or those of `options["reset_mask"]`."""
        super().reset(seed=seed if isinstance(seed, int) else None)
        seeds = seeds_of(seed, self.num_envs)
        if not self._seeded:  # an emulator that was never seeded is always the same one
            drawn = drawn_seeds(self.np_random, self.num_envs)
            seeds = [new if old is None else old for old, new in zip(seeds, drawn, strict=True)]
            self._seeded = True
        mask = (options or {}).get("reset_mask")
        rows = range(self.num_envs) if mask is None else np.flatnonzero(mask)
        kept = None if mask is None else {"reset_mask": np.asarray(mask, bool)}
        numbers = np.array([-1 if seeds[row] is None else seeds[row] for row in rows])  # -1: go on as it was
        observations: NDArray[np.uint8]
        observations, infos = self._game.reset(seed=numbers, options=kept)
        if self._screen is not None:
            self._frames, _ = self._screen.reset(seed=numbers, options=kept)
        return observations, _plain(infos)

    def step(
        self, actions: Any
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Infos]:
        actions = np.asarray(actions, np.int64)
        observations, rewards, terminated, truncated, found = self._game.step(actions)
        if self._screen is not None:
            self._frames = self._screen.step(actions)[0]
        infos = _plain(found)
        if self._same_step and "final_obs" in found:
            infos |= final_infos(found["final_obs"], terminated | truncated)
        return observations, rewards.astype(np.float64), terminated, truncated, infos

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """The screens, uint8 [height, width, 3] each; None before the first reset."""
        return None if self._frames is None else tuple(frame[-1] for frame in self._frames)

    def close_extras(self, **kwargs: Any) -> None:
        self._game = self._screen = None  # type: ignore[assignment]  # its threads end with the last reference


def _plain(infos: Infos) -> Infos:
    return {key: infos[key] for key in ("lives", "frame_number", "episode_frame_number")}


def _screen_size(game: str) -> tuple[int, int]:
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    emulator.loadROM(str(roms.get_rom_path(game)))
    height, width = emulator.getScreenDims()
    return int(height), int(width)
