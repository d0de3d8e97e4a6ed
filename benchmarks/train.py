"""Training speed beside other packages and plain loops: the same environment, net, batches and updates.

    make peers
    .venv/bin/python benchmarks/train.py                 # all cases, in turn
    .venv/bin/python benchmarks/train.py --rounds 0      # only the table and the picture, of what is measured already

Each contestant runs in a process of its own on one thread, in turn, A B C A B C ..., and from its own virtual
environment. What counts are the processor's seconds in the second half of each training, so that imports, compilation
and other work on the machine are not in it. Each round has a seed of its own. Printed: medians, and ours as a ratio to
each. Drawn: docs/images/train_speed.png, what each learns meanwhile.
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
from pictures import color, figure, lines, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers"
RESULTS = HERE / "train_results.json"
PICTURE = HERE.parent / "docs" / "images" / "train_speed.png"

PPO = {"algorithm": "ppo", "env": "CartPole-v1", "hidden": [64, 64], "activation": "tanh", "gamma": 0.99,
       "lambda_": 0.95, "lr": 3e-4, "rollout_steps": 128, "epochs": 4}  # fmt: skip
NATIVE, UNSHARED = "longrein, native environments", "longrein, two torsos"
CASES: dict[str, dict[str, Any]] = {
    "PPO, CartPole, 8 environments": PPO | {
        "num_envs": 8, "minibatch_size": 256, "env_steps": 40_960, "also": {NATIVE: {"native": True}},
    },
    "PPO, CartPole, 64 environments": PPO | {
        "num_envs": 64, "minibatch_size": 2048, "env_steps": 131_072, "also": {NATIVE: {"native": True}},
    },
    "PPO, Pong frames, 8 environments": PPO | {
        "env": "Pong frames", "hidden": [512], "activation": "relu", "lr": 2.5e-4, "shared": True, "num_envs": 8,
        "minibatch_size": 256, "env_steps": 2_048, "also": {NATIVE: {"native": True}, UNSHARED: {"shared": False}},
    },
    "A2C, CartPole, 8 environments": {
        "algorithm": "a2c", "env": "CartPole-v1", "hidden": [64, 64], "activation": "tanh", "gamma": 0.99,
        "lambda_": 1.0, "lr": 7e-4, "rollout_steps": 5, "num_envs": 8, "env_steps": 40_000,
        "also": {NATIVE: {"native": True}},
    },
    "DQN, CartPole, an update of 64 each 4 steps": {
        "algorithm": "dqn", "env": "CartPole-v1", "hidden": [64, 64], "activation": "relu", "gamma": 0.99, "lr": 1e-3,
        "capacity": 50_000, "batch_size": 64, "train_every": 4, "num_envs": 1, "env_steps": 10_000,
        "explore_steps": 2_000, "target_every": 500,
    },
    "SAC, Pendulum, an update of 256 each step": {
        "algorithm": "sac", "env": "Pendulum-v1", "hidden": [256, 256], "activation": "relu", "gamma": 0.99, "lr": 1e-3,
        "capacity": 50_000, "batch_size": 256, "train_every": 1, "num_envs": 1, "env_steps": 2_400, "last": 5,
    },
}  # fmt: skip
SB3 = "Stable-Baselines3"
CONTESTANTS = ("longrein", SB3, "SBX", "Tianshou", "plain loop")
MEMORY_TARGET = 0.8  # ours, of Stable-Baselines3's
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1") | {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
}
Run = dict[str, Any]


def last_of(case: dict[str, Any]) -> int:
    """Of how many training returns a point of the curve is the mean."""
    return int(case.get("last", 20))


def target_of(who: str, case: dict[str, Any]) -> float | None:
    """How many times theirs ours is to be, at least."""
    if who == "plain loop":
        return 1.3 if case["algorithm"] == "ppo" else None
    return {SB3: 2.0, "SBX": 1.0}.get(who)


def python_of(package: str) -> Path:
    """The interpreter of a package's own virtual environment."""
    python = PEERS / package / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{python} is not there: make peers")
    return python


def command(contestant: str, case: dict[str, Any]) -> list[str | Path] | None:
    """What runs a contestant in a case; None where it has no such algorithm."""
    own = HERE / "contestants"
    told = json.dumps({key: value for key, value in case.items() if key != "also"})
    if contestant == SB3:
        return [python_of("sb3"), own / "sb3.py", "sb3", told]
    if contestant == "SBX":
        return None if case["algorithm"] == "a2c" else [python_of("sbx"), own / "sb3.py", "sbx", told]
    if contestant == "Tianshou":
        return [python_of("tianshou"), own / "ts.py", told]
    script = f"plain_{case['algorithm']}.py" if contestant == "plain loop" else "ours.py"
    return [sys.executable, own / script, told]


def measure(line: list[str | Path]) -> Run:
    """Run it on one thread: what it printed last."""
    done = subprocess.run(line, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, line))}\n{done.stderr}")
    told: Run = json.loads(done.stdout.splitlines()[-1])
    return told


def main(
    rounds: Annotated[int, typer.Option(help="How many times each contestant runs; 0 shows what was measured.")] = 3,
    only: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    again: Annotated[bool, typer.Option(help="Measure anew, rather than go on where it was stopped.")] = False,
) -> None:
    """Run them all, then print the table and draw the picture."""
    cases = {name: case for name, case in CASES.items() if only.lower() in name.lower()}
    found: dict[str, dict[str, list[Run]]] = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    found |= {name: {} for name in cases if again or name not in found}
    planned = [
        (name, contestant, seed)
        for name, case in cases.items()
        for seed in range(1, rounds + 1)
        for contestant in ("longrein", *case.get("also", {}), *CONTESTANTS[1:])
    ]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(planned))
        for name, contestant, seed in planned:
            progress.update(task, advance=1, description=f"{name}: {contestant}")
            case = cases[name]
            own = case.get("also", {}).get(contestant, {}) | {"seed": seed, "last": last_of(case)}
            line = command(contestant, case | own)
            if line is not None and len(found[name].get(contestant, ())) < seed:
                found[name].setdefault(contestant, []).append(measure(line))
                kept = {name: found[name] for name in CASES if found.get(name)}
                RESULTS.write_text(json.dumps({"made": time.strftime("%Y-%m-%d %H:%M"), "runs": kept}) + "\n")
    Console(width=150).print(table({name: by for name, by in found.items() if by and name in cases}))
    draw({name: found[name] for name in CASES if found.get(name)})


def rate(runs: list[Run]) -> float:
    """Env steps a second of a processor, the median: what other work on the machine takes is not in it."""
    return float(np.median([run["env_steps"] / run["busy"] for run in runs]))


def megabytes(runs: list[Run]) -> float:
    """Peak memory, the median."""
    return float(np.median([run["megabytes"] for run in runs]))


def table(found: dict[str, dict[str, list[Run]]]) -> Table:
    """Ours beside each, and whether the targets are met, if need be where environments step as one array."""
    beside = ("ours is", "target", "met")
    shown = Table("case", "who", "env steps/s", *beside, "peak MB", *beside, "return")
    for name, by in found.items():
        ours = [by[who] for who in ("longrein", NATIVE) if who in by]
        for who, runs in by.items():
            faster = [rate(own) / rate(runs) for own in ours]
            smaller = megabytes(by["longrein"]) / megabytes(runs)
            aim = target_of(who, CASES[name])
            other = who in CONTESTANTS[1:]
            ways = zip(("yes", "native"), faster, strict=False)
            met = next((said for said, ratio in ways if ratio >= (aim or 0)), "no")
            ends = [run["curve"][-1][1] for run in runs if run["curve"][-1][1] is not None]
            shown.add_row(
                name, who, f"{rate(runs):,.0f}",
                ", native ".join(f"{ratio:.2f}x" for ratio in faster) if other else "",
                f"{aim}x" if aim else "", met if aim else "",
                f"{megabytes(runs):,.0f}", f"{smaller:.2f}x" if other else "",
                f"{MEMORY_TARGET}x" if who == SB3 else "",
                "" if who != SB3 else "yes" if smaller <= MEMORY_TARGET else "no",
                " ".join(f"{end:.0f}" for end in ends),
            )  # fmt: skip
    return shown


def draw(found: dict[str, dict[str, list[Run]]]) -> None:
    """Returns over env steps, a panel for each case in which episodes end, the mean over rounds."""
    told = {name: by for name, by in found.items() if by["longrein"][0]["curve"][-1][1] is not None}
    handles: dict[str, Any] = {}
    sheet = figure(len(told))
    for axes, (name, by) in zip(sheet.panels, told.items(), strict=False):
        for who, runs in by.items():
            if who not in CONTESTANTS:  # longrein in other ways, which learns the same
                continue
            values = np.array([[value for _, value in run["curve"]] for run in runs], float)  # None becomes NaN
            some = ~np.isnan(values).any(0)
            steps = np.array([at for at, _ in runs[0]["curve"]])[some]
            lines(axes, steps, values[:, some], color(CONTESTANTS.index(who)), who, handles)
        axes.set_title(name, fontsize=10, fontweight="bold", loc="left")
        axes.set_xlabel("env steps, all environments together", fontsize=9)
        axes.set_ylabel(f"return, mean of the last {last_of(CASES[name])}", fontsize=9)
    save(sheet, PICTURE, handles)


if __name__ == "__main__":
    typer.run(main)
