"""Tiny untrained policies of every algorithm, for tests of what happens to a policy once it is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

from longrein.lab.records import as_plain
from longrein.lab.saved_policy import About, SavedPolicy
from longrein.learn import algorithms

SEEN = Box(-np.inf, np.inf, (4,), np.float32)
CHOICE = Discrete(3, start=2)
TORQUE = Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
BOUNDED = ("sac", "td3", "crossq")  # those that act in a Box


def make(
    name: str,
    settings: Mapping[str, Any] | None = None,
    seen: gymnasium.Space[Any] = SEEN,
    done: gymnasium.Space[Any] | None = None,
    seed: int = 3,
) -> SavedPolicy:
    """An untrained policy with 16 units."""
    if done is None:
        done = TORQUE if name in BOUNDED else CHOICE
    config_class, build = algorithms.load(name)
    net = {} if name == "random" else {"net": {"hidden": [16], **(settings or {}).get("net", {})}}
    rest = {key: value for key, value in (settings or {}).items() if key != "net"}
    config = algorithms.config_from(config_class, {**net, **rest})
    policy = build(config, seen, done, seed).policy
    return SavedPolicy(policy, About(name, as_plain(config), seen, done, "Tiny-v0", 12))


CASES: list[tuple[str, dict[str, Any], Any, Any]] = [
    *((name, {}, SEEN, None) for name in algorithms.TABLE),
    ("acer", {}, SEEN, TORQUE),
    ("sac", {}, SEEN, CHOICE),
    ("ppo", {"normalise_observation": True}, SEEN, TORQUE),
    ("ppo", {}, SEEN, MultiDiscrete([3, 2])),
    ("a2c", {}, SEEN, MultiBinary(3)),
    ("ppo", {}, SEEN, Dict({"push": TORQUE, "which": CHOICE})),
    ("ppo", {}, Dict({"there": Discrete(4), "at": SEEN, "action_mask": MultiBinary(3)}), CHOICE),
    ("dqn", {"noisy": "factorised", "dueling": True, "distribution": "c51"}, SEEN, None),
    ("dqn", {"distribution": "qr"}, Box(0, 255, (36, 36, 3), np.uint8), None),
    *((name, {"net": {"recurrent": kind, "recurrent_size": 8}}, SEEN, None)
      for name, kind in (("ppo", "gru"), ("ppo", "lstm"), ("impala", "lstm"), ("a3c", "gru"))),
]  # fmt: skip
"""(algorithm, settings, observation space, action space): every algorithm, and what else a file must say."""


def name_of(case: tuple[str, dict[str, Any], Any, Any]) -> str:
    """For pytest."""
    name, settings, seen, done = case
    parts = [name, *(f"{k}={v}" for k, v in settings.items() if k != "net"), *settings.get("net", {}).values()]
    parts += [type(space).__name__ for space in (seen, done) if space not in (SEEN, None)]
    return "-".join(map(str, parts))


def observations(space: gymnasium.Space[Any], count: int, seed: int = 0) -> list[Any]:
    """Some elements, masks with at least one choice each."""
    space.seed(seed)
    found = [space.sample() for _ in range(count)]
    for one in found:
        if isinstance(one, dict) and "action_mask" in one:
            one["action_mask"][0] = 1
    return found
