"""Training speed beside Stable-Baselines3, SBX and a plain loop: the same environment, net, batches and updates.

    make peers
    .venv/bin/python benchmarks/train.py

Each contestant runs in a process of its own on one thread, in turn, A B C A B C ...; what counts is the second half of
each training, so that imports and compilation are not in it. Printed: medians, and ours as a ratio to each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
RESULTS = HERE / "train_results.json"

_PPO = {"algorithm": "ppo", "env": "CartPole-v1", "hidden": [64, 64], "activation": "tanh", "gamma": 0.99,
        "lambda_": 0.95, "lr": 3e-4, "rollout_steps": 128, "epochs": 4}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "PPO, CartPole, 8 environments": _PPO | {"num_envs": 8, "minibatch_size": 256, "env_steps": 60_000},
    "PPO, CartPole, 64 environments": _PPO | {"num_envs": 64, "minibatch_size": 2048, "env_steps": 130_000},
    "A2C, CartPole, 8 environments": {
        "algorithm": "a2c", "env": "CartPole-v1", "hidden": [64, 64], "activation": "tanh", "gamma": 0.99,
        "lambda_": 1.0, "lr": 7e-4, "rollout_steps": 5, "num_envs": 8, "env_steps": 60_000,
    },
    "DQN, CartPole, an update of 64 each 4 steps": {
        "algorithm": "dqn", "env": "CartPole-v1", "hidden": [64, 64], "activation": "relu", "gamma": 0.99, "lr": 1e-3,
        "capacity": 50_000, "batch_size": 64, "train_every": 4, "num_envs": 1, "env_steps": 12_000,
    },
    "SAC, Pendulum, an update of 256 each step": {
        "algorithm": "sac", "env": "Pendulum-v1", "hidden": [256, 256], "activation": "relu", "gamma": 0.99, "lr": 1e-3,
        "capacity": 50_000, "batch_size": 256, "train_every": 1, "num_envs": 1, "env_steps": 2_400,
    },
}  # fmt: skip
TARGETS = {"Stable-Baselines3": 2.0, "SBX": 1.0, "plain loop": 1.3}


def command(contestant: str, case: dict[str, Any]) -> list[str | Path] | None:
    """What runs a contestant in a case; None where it has no such algorithm."""
    text = json.dumps(case)
    if contestant == "longrein":
        return [sys.executable, HERE / "contestants" / "ours.py", text]
    if contestant == "plain loop":
        return [sys.executable, HERE / "contestants" / "plain.py", text] if case["algorithm"] == "ppo" else None
    if contestant == "SBX" and case["algorithm"] == "a2c":
        return None
    package = "sbx" if contestant == "SBX" else "sb3"
    return [PEERS, HERE / "contestants" / "sb3.py", package, text]


def main(
    rounds: Annotated[int, typer.Option(help="How many times each contestant runs.")] = 3,
    only: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
) -> None:
    """Run them all, and print the table."""
    if not PEERS.exists():
        raise SystemExit("the other packages are not there: make peers")
    one_thread = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    one_thread |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    cases = {name: case for name, case in CASES.items() if only.lower() in name.lower()}
    contestants = ("longrein", *TARGETS)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases) * rounds * len(contestants))
        for name, case in cases.items():
            for _ in range(rounds):
                for contestant in contestants:
                    progress.update(task, advance=1, description=f"{name}: {contestant}")
                    line = command(contestant, case)
                    if line is None:
                        continue
                    output = subprocess.run(line, env=one_thread, check=True, capture_output=True, text=True).stdout
                    found.setdefault(name, {}).setdefault(contestant, []).append(json.loads(output.splitlines()[-1]))
    table = Table("case", "who", "env steps/s", "ours is", "target", "met", "peak MB", "return at the end")
    for name, by in found.items():
        rate = {who: float(np.median([run["env_steps"] / run["seconds"] for run in runs])) for who, runs in by.items()}
        for who, runs in by.items():
            ratio = rate["longrein"] / rate[who]
            target = TARGETS.get(who)
            table.add_row(
                name, who, f"{rate[who]:,.0f}", f"{ratio:.2f}x" if target else "", f"{target}x" if target else "",
                ("yes" if ratio >= target else "no") if target else "",
                f"{np.median([run['megabytes'] for run in runs]):,.0f}",
                " ".join(f"{run['return']:.0f}" for run in runs if run["return"] is not None),
            )  # fmt: skip
    Console(width=140).print(table)
    earlier = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    made = {"made": time.strftime("%Y-%m-%d %H:%M"), "runs": earlier | found}
    RESULTS.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
