"""The best return that Pendulum-v1 has, and what a discount alone costs: what the table's rows can be measured by.

    python benchmarks/pendulum.py

Finite-horizon value iteration on a grid of angles and angular velocities, and the greedy controller played from where
episodes begin: from random starts, and from those of the table's evaluation episodes. Then stationary controllers that
are the best for a discount gamma, played for 200 steps without it. No learning, one thread, some six minutes.
"""

from __future__ import annotations

import gymnasium
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from longrein.lab.session import evaluation_seeds

ANGLES, VELOCITIES, STEPS, FASTEST = 301, 241, 200, 8.0
TORQUES = np.linspace(-2, 2, 21)
FINE = np.linspace(-2, 2, 81)
Array = NDArray[np.float64]


def step(angle: Array, velocity: Array, torque: float | Array) -> tuple[Array, Array, Array]:
    """Reward, and where it goes: the equations of gymnasium's pendulum, angles from -pi to pi."""
    reward = -(angle**2 + 0.1 * velocity**2 + 0.001 * torque**2)
    velocity = np.clip(velocity + (15 * np.sin(angle) + 3 * torque) * 0.05, -FASTEST, FASTEST)
    return reward, wrapped(angle + 0.05 * velocity), velocity


def wrapped(angle: Array) -> Array:
    return (angle + np.pi) % (2 * np.pi) - np.pi


def at(values: Array, angle: Array, velocity: Array) -> Array:
    """Values between the points of the grid, whose last row of angles is its first."""
    rows = (angle + np.pi) / (2 * np.pi) * (ANGLES - 1)
    columns = (velocity + FASTEST) / (2 * FASTEST) * (VELOCITIES - 1)
    between: Array = map_coordinates(values, [rows, columns], order=1, mode="nearest")
    return between


def iterated(gamma: float, times: int) -> list[Array]:
    """Values of each point of the grid with 0, 1, ... steps to go."""
    angle, velocity = np.meshgrid(
        np.linspace(-np.pi, np.pi, ANGLES), np.linspace(-FASTEST, FASTEST, VELOCITIES), indexing="ij"
    )
    moves = [step(angle, velocity, torque) for torque in TORQUES]
    values = [np.zeros((ANGLES, VELOCITIES))]
    for _ in range(times):
        best = np.full_like(values[0], -np.inf)
        for reward, *there in moves:
            np.maximum(best, reward + gamma * at(values[-1], *there), out=best)
        values.append(best)
    return values


def played(values: list[Array], gamma: float, angle: Array, velocity: Array) -> Array:
    """Returns without discount of greedy episodes, one for each start. values: what is left after each step."""
    total = np.zeros(len(angle))
    for after in values:
        worth = []
        for torque in FINE:
            reward, *there = step(angle, velocity, torque)
            worth.append(reward + gamma * at(after, *there))
        reward, angle, velocity = step(angle, velocity, FINE[np.argmax(worth, 0)])
        total += reward
    return total


def starts(seed: int, episodes: int) -> tuple[Array, Array]:
    """Where the evaluation episodes of a session of this seed begin."""
    env = gymnasium.make("Pendulum-v1")
    seen = [env.reset(seed=one)[0] for one in evaluation_seeds(seed, episodes)]
    cosine, sine, velocity = np.array(seen, np.float64).T
    return np.arctan2(sine, cosine), velocity


def main() -> None:
    """Print it."""
    generator = np.random.default_rng(0)
    anywhere = generator.uniform(-np.pi, np.pi, 5000), generator.uniform(-1, 1, 5000)
    values = iterated(1.0, STEPS)[-2::-1]
    returns = played(values, 1.0, *anywhere)
    error = returns.std() / np.sqrt(len(returns))
    print(f"the best controller, 5,000 random starts: {returns.mean():.1f}, give or take {error:.1f}")
    print(f"one such episode deviates by {returns.std():.0f}")
    for seed in range(4):
        returns = played(values, 1.0, *starts(seed, 1000))
        first, mean = returns[:100].mean(), returns.mean()
        print(f"its evaluation episodes at seed {seed}: the first 100 {first:.1f}, 1,000 {mean:.1f}")
    for gamma in (0.9, 0.95, 0.98, 0.99):
        mean = played(iterated(gamma, 500)[-1:] * STEPS, gamma, *anywhere).mean()
        print(f"the best controller for gamma {gamma}: {mean:.1f}")


if __name__ == "__main__":
    main()
