"""A system that nobody wrote for reinforcement learning: the traffic lights of one crossing. No Gymnasium in it.

`python examples/existing_system.py` lets it dial out to a trainer that waits; the trainer is these lines, elsewhere:

    import longrein
    env = longrein.connect("ws+listen://127.0.0.1:6000", wait=60)
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(1)
"""

from __future__ import annotations

import random
from typing import Annotated

import numpy as np
import typer
from gymnasium.spaces import Box, Discrete

import longrein

QUEUE_LIMIT = 40.0
SECONDS_PER_STEP = 5
SHIFT_STEPS = 120  # ten minutes of traffic


class Crossing:
    """Cars come from north-south and from east-west; one direction has green. This is the existing system."""

    def __init__(self) -> None:
        self.random = random.Random()
        self.open_again(None)

    def open_again(self, seed: int | None) -> None:
        """The road is empty, and a new shift begins."""
        if seed is not None:
            self.random.seed(seed)
        self.queues = [0.0, 0.0]
        self.green = 0
        self.steps = 0
        self.rush = self.random.choice([(0.9, 0.3), (0.3, 0.9)])

    def switch(self, direction: int) -> None:
        """Give green to a direction; changing it costs the first seconds of a step."""
        open_seconds = SECONDS_PER_STEP - (2 if direction != self.green else 0)
        self.green = direction
        for way, rate in enumerate(self.rush):
            arrived = sum(self.random.random() < rate for _ in range(SECONDS_PER_STEP))
            left = 1.2 * open_seconds if way == direction else 0.0
            self.queues[way] = min(QUEUE_LIMIT, max(0.0, self.queues[way] + arrived - left))
        self.steps += 1


def as_environment(crossing: Crossing) -> longrein.System:
    """The crossing as an environment: how to begin again, how to act on it, and what is seen of it."""

    def seen() -> np.ndarray:
        return np.array([*crossing.queues, float(crossing.green)], np.float32)

    def reset(seed: int | None) -> np.ndarray:
        crossing.open_again(seed)
        return seen()

    def observe() -> tuple[np.ndarray, float, bool, bool]:
        waiting = sum(crossing.queues)
        return seen(), -waiting / 10, False, crossing.steps >= SHIFT_STEPS

    return longrein.System(
        Box(0.0, QUEUE_LIMIT, (3,), np.float32), Discrete(2), reset=reset, act=crossing.switch, observe=observe,
        name="Crossing",
    )  # fmt: skip


def main(
    to: Annotated[str, typer.Option(help="The trainer that waits.")] = "ws://127.0.0.1:6000",
    at: Annotated[str | None, typer.Option(help="Listen here instead of dialling out.")] = None,
    token: Annotated[str | None, typer.Option(help="The trainer's token.", envvar="LONGREIN_TOKEN")] = None,
) -> None:
    """Run the crossing until Ctrl-C, for whichever trainer takes it."""
    system = as_environment(Crossing())
    if at is not None:
        longrein.serve(system, at=at, token=token)
    else:
        longrein.dial(system, to=to, token=token)


if __name__ == "__main__":
    typer.run(main)
