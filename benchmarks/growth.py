"""Time and memory as work grows, beside Stable-Baselines3 where it has the same thing.

    make peers
    .venv/bin/python benchmarks/growth.py                # all, in turn
    .venv/bin/python benchmarks/growth.py --rounds 0     # only the table and the picture, of what is measured already

PPO on CartPole with 1 to 512 environments; updates of PPO and DQN with two layers of 64 to 1,024 units; replay memories
of 10^4 to 10^6 rows. Each measurement is in a process of its own on one thread. Drawn: docs/images/growth.png.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pictures import Sheet, color, figure, lines, logarithmic, save
from rich.console import Console
from rich.table import Table
from train import PPO, SB3, Run, measure, python_of

HERE = Path(__file__).parent
RESULTS = HERE / "growth_results.json"
PICTURE = HERE.parent / "docs" / "images" / "growth.png"
OURS, PRIORITIZED = "longrein", "longrein, prioritized"
BUDGETS = {1: 5_120, 8: 20_480, 64: 65_536, 512: 131_072}  # env steps with so many environments
UNITS = (64, 128, 256, 512, 1024)
ROWS = (10_000, 100_000, 1_000_000)
PANELS = (
    ("environments", "rate", "PPO, CartPole", "env steps/s", "environments"),
    ("environments", "megabytes", "PPO, CartPole", "peak memory, MB", "environments"),
    ("ppo", "update", "A PPO update: 1,024 rows, 4 epochs of 256", "ms", "units in each of two layers"),
    ("dqn", "update", "A DQN update of 64 rows", "ms", "units in each of two layers"),
    ("replay", "sample", "Replay: draw 128 rows", "microseconds", "rows"),
    ("replay", "add", "Replay: add a row", "microseconds", "rows"),
)
Found = dict[str, dict[str, dict[str, list[Run]]]]  # part -> who -> size -> a run each round


def measurements() -> list[tuple[str, str, int, list[str | Path]]]:
    """Part, who, size, and what measures it."""
    own, theirs, here = HERE / "contestants", python_of("sb3"), sys.executable
    planned: list[tuple[str, str, int, list[str | Path]]] = []
    for count, env_steps in BUDGETS.items():
        case = PPO | {"num_envs": count, "minibatch_size": 32 * count, "env_steps": env_steps, "seed": 1, "last": 20}
        planned.append(("environments", OURS, count, [here, own / "ours.py", json.dumps(case)]))
        planned.append(("environments", SB3, count, [theirs, own / "sb3.py", "sb3", json.dumps(case)]))
    for part in ("ppo", "dqn"):
        for units in UNITS:
            told = json.dumps({"part": part, "units": units, "repeat": 60 if part == "dqn" else 2048 // units // 2 + 1})
            planned.append((part, OURS, units, [here, own / "parts_ours.py", told]))
            planned.append((part, SB3, units, [theirs, own / "parts_sb3.py", told]))
    for count in ROWS:
        for who in (OURS, SB3, PRIORITIZED):
            told = json.dumps({"part": "replay", "rows": count, "repeat": 1_000, "prioritized": who == PRIORITIZED})
            line = [theirs, own / "parts_sb3.py", told] if who == SB3 else [here, own / "parts_ours.py", told]
            planned.append(("replay", who, count, line))
    return planned


def main(
    rounds: Annotated[int, typer.Option(help="How often each is measured; 0 shows what was measured.")] = 3,
    only: Annotated[str, typer.Option(help="Only this part: environments, ppo, dqn or replay.")] = "",
    again: Annotated[bool, typer.Option(help="Measure anew, rather than go on where it was stopped.")] = False,
) -> None:
    """Measure, then print the table and draw the picture."""
    found: Found = json.loads(RESULTS.read_text())["found"] if RESULTS.exists() else {}
    for round_ in range(rounds):
        for part, who, size, line in measurements():
            runs = found.setdefault(part, {}).setdefault(who, {}).setdefault(str(size), [])
            if only not in ("", part) or (len(runs) > round_ and not again):
                continue
            del runs[round_:]
            told = measure(line)
            told.pop("curve", None)
            if part == "environments":
                told["rate"] = round(told["env_steps"] / told["busy"], 1)
            runs.append(told)
            RESULTS.write_text(json.dumps({"made": time.strftime("%Y-%m-%d %H:%M"), "found": found}) + "\n")
    Console(width=120).print(table(found))
    draw(found)


def medians(found: Found, part: str, who: str, measure_: str) -> tuple[list[int], list[float]]:
    """Sizes, and the median at each."""
    by_size = {size: runs for size, runs in found[part][who].items() if runs}
    return [int(size) for size in by_size], [
        float(np.median([run[measure_] for run in runs])) for runs in by_size.values()
    ]


def table(found: Found) -> Table:
    """A row for each part, measure and contestant."""
    shown = Table("what", "measure", "who", "at each size")
    for part, by in found.items():
        for who, by_size in by.items():
            for name in next((runs[0] for runs in by_size.values() if runs), {}):
                if name not in ("env_steps", "seconds", "busy"):
                    sizes, values = medians(found, part, who, name)
                    shown.add_row(
                        part, name, who, "   ".join(f"{s:,}: {v:,.1f}" for s, v in zip(sizes, values, strict=True))
                    )
    return shown


def draw(found: Found) -> None:
    """A panel for each measure."""
    sheet: Sheet = figure(len(PANELS))
    handles: dict[str, Any] = {}
    paint = {OURS: color(0), SB3: color(1), PRIORITIZED: color(2)}
    for axes, (part, name, title, unit, along) in zip(sheet.panels, PANELS, strict=True):
        for who in found.get(part, {}):
            sizes, _ = medians(found, part, who, name)
            runs = [[run[name] for run in found[part][who][str(size)]] for size in sizes]
            scale = 1e-3 if unit == "ms" else 1.0
            lines(axes, np.array(sizes), np.array(runs).T * scale, paint[who], who, handles, marker="o", markersize=4)
        logarithmic(axes, sizes, y=name != "megabytes")  # after all lines: it fixes the axis' lower end
        axes.set_title(title, fontsize=10, fontweight="bold", loc="left")
        axes.set_xlabel(along, fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
    save(sheet, PICTURE, handles)


if __name__ == "__main__":
    typer.run(main)
