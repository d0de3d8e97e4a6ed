"""One frame of each kind of environment, drawn by a server and fetched over a WebSocket, on one sheet.

`python examples/render_environments.py docs/images/environments.png` needs the extras that it shows; what is not
installed here is left out, and said.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import typer
from PIL import Image

import longrein

SHEET = {  # what is served, and after how many random steps it is looked at
    "CartPole-v1": 8,
    "FrozenLake-v1": 3,
    "LunarLander-v3": 60,
    "HalfCheetah-v5": 60,
    "atari:pong": 90,
    "atari:ms_pacman": 120,
    "minatar:breakout": 4,
    "retro:Airstriker-Genesis-v0": 500,
    "envpool:Pong-v5": 90,
    "pettingzoo:tictactoe_v3": 5,
    "pettingzoo:chess_v6": 12,
    "pettingzoo:simple_spread_v3": 10,
    "pettingzoo:pistonball_v6": 30,
}
COLUMNS = 4


def main(
    to: Annotated[Path, typer.Argument(help="Where the picture goes.")] = Path("environments.png"),
    seed: Annotated[int, typer.Option(help="Seed of the environments and of the actions.")] = 0,
) -> None:
    """Draw the sheet."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    frames = {}
    for thing, steps in SHEET.items():
        try:
            frames[thing] = frame_of(thing, steps, seed)
        except longrein.Error as error:
            print(f"left out: {thing}: {str(error).splitlines()[0]}")
    rows = -(-len(frames) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(2.4 * COLUMNS, 2.3 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (thing, frame) in zip(axes.flat, frames.items(), strict=False):
        axis.imshow(frame)
        axis.set_title(thing, fontsize=8)
    figure.tight_layout(pad=0.4)
    figure.savefig(to, dpi=100)
    Image.open(to).convert("RGB").quantize(128).save(to, optimize=True)
    print(f"{to}: {len(frames)} environments, {to.stat().st_size / 1000:.0f} kB")


def frame_of(thing: str, steps: int, seed: int) -> Any:
    """The frame after so many random steps, in a process of the environment's own."""
    rng = np.random.default_rng(seed)
    with longrein.Server([thing], at="ws://127.0.0.1:0", workers="process") as server:
        url = server.urls[0]
        if thing.startswith("pettingzoo:"):
            env = agents(url, steps, seed, rng)
        else:
            env = longrein.connect(url, render_mode="rgb_array")
            env.reset(seed=seed)
            env.action_space.seed(seed)
            for _ in range(steps):
                _, _, terminated, truncated, _ = env.step(env.action_space.sample())
                if terminated or truncated:
                    env.reset()
        frame = env.render()
        env.close()
        return frame


def agents(url: str, steps: int, seed: int, rng: np.random.Generator) -> Any:
    """A PettingZoo environment after so many steps, whichever way its agents act."""
    try:
        env = longrein.connect_parallel(url, render_mode="rgb_array")
    except longrein.Error:  # they act in turn
        env = longrein.connect_aec(url, render_mode="rgb_array")
        env.reset(seed=seed)
        for _ in range(steps):
            observation, _, terminated, truncated, _ = env.last()
            legal = np.flatnonzero(observation["action_mask"])
            env.step(None if terminated or truncated else int(rng.choice(legal)))
        return env
    env.reset(seed=seed)
    for agent in env.agents:
        env.action_space(agent).seed(int(rng.integers(2**31)))
    for _ in range(steps):
        env.step({agent: env.action_space(agent).sample() for agent in env.agents})
    return env


if __name__ == "__main__":
    typer.run(main)
