"""A spec that trains in seconds, and the command line in a process of its own, as the run commands' tests need them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SPEC = """\
quick:
  agent:
    algorithm: {name: ppo, rollout_steps: 16, minibatch_size: 32, epochs: 1}
    net: {hidden: [16]}
  env: {id: CartPole-v1, num_envs: 2}
  meta: {env_steps: 200, eval: {episodes: 1}}
long:
  agent:
    algorithm: {name: ppo, rollout_steps: 16, minibatch_size: 32, epochs: 1}
    net: {hidden: [16]}
  env: {id: CartPole-v1, num_envs: 2}
  meta: {env_steps: 1000000000, eval: {episodes: 1}}
broken:
  agent: {algorithm: {name: ppo, rollout_steps: 16}}
  env: {id: "gone.py:make", num_envs: 2}
  meta: {env_steps: 200}
"""


def command(*words: str) -> list[str]:
    """The command line, as somebody would type it."""
    return [sys.executable, "-m", "longrein.cli", *words]


def longrein(folder: Path, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a folder."""
    return subprocess.run(command(*words), cwd=folder, capture_output=True, text=True, timeout=100, input=stdin)


def until(true: Callable[[], bool], seconds: float = 100.0) -> None:
    """Wait for something; fails when it does not come about."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)
