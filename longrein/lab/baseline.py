"""What a random policy gets in an environment, measured by playing it. Knows no spec, and of a run one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from longrein.lab.records import read_json, write_json

EPISODES = 100
"""Episodes that a baseline is the mean of at most."""
ENOUGH = 10_000
"""Env steps after which no more episodes are begun: long ones are few, and take long."""
COPIES = 10
"""Episodes that are played side by side; at least so many are played."""
_FIRST_SEED = 2**30  # among the evaluation's seeds, which training never sees; the same for every run


@dataclass(frozen=True)
class Baseline:
    """Returns of a policy that draws every action from the action space."""

    mean: float
    deviation: float
    episodes: int
    env_steps: int
    """That playing them took."""


def measure(open_envs: Callable[[int], VectorEnv[Any, Any, Any]]) -> Baseline:
    """Play the `random` algorithm, always on the same seeds.

    Raises LinkError or SpecError when the environments cannot be had, RunError when one is lost.
    """
    import torch

    from longrein.lab.evaluation import evaluate
    from longrein.learn import algorithms

    config, build = algorithms.load("random")
    returns: list[float] = []
    env_steps = 0
    generator = torch.Generator().manual_seed(0)
    with closing(open_envs(COPIES)) as envs:
        policy = build(config(), envs.single_observation_space, envs.single_action_space, 0).policy
        while len(returns) < EPISODES and env_steps < ENOUGH:
            seeds = range(_FIRST_SEED + len(returns), _FIRST_SEED + len(returns) + COPIES)
            for _, length, total in evaluate(policy, envs, seeds, deterministic=False, generator=generator):
                returns.append(total)
                env_steps += length
    return Baseline(float(np.mean(returns)), float(np.std(returns)), len(returns), env_steps)


def kept(folder: Path) -> dict[str, Baseline]:
    """The baselines that a run's folder has, by environment."""
    return {name: Baseline(**values) for name, values in read_json(folder / "baseline.json").items()}


def measure_missing(
    folder: Path,
    envs: Sequence[tuple[str, Callable[[int], VectorEnv[Any, Any, Any]]]],
    known: Mapping[str, Baseline] | None = None,
) -> dict[str, Baseline]:
    """The baselines of some environments, by name: those that the folder has not are measured, and kept there.

    known: measured already, elsewhere. Raises LinkError, SpecError or RunError as `measure`; what was measured before
    that is kept.
    """
    found = kept(folder)
    for name, open_envs in envs:
        if name not in found:
            found[name] = known[name] if known and name in known else measure(open_envs)
            write_json(folder / "baseline.json", {key: asdict(value) for key, value in found.items()})
    return found
