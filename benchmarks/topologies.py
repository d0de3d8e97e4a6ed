"""What learning in several processes comes to, beside one process: curves of return over env steps.

    python benchmarks/topologies.py --only impala_cartpole

Each algorithm is trained three times from the same seed, to its target or its budget: in one process; with two actors
(or hogwild workers) on this machine; and with the same two over WebSocket, through a proxy that adds 20 ms to each
round trip. What is in topologies_results.json is not run again. Writes docs/images/topologies.png and prints the table.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from learning import curve

from longrein.lab import spec as specs
from longrein.lab.experiment import run_trial
from longrein.lab.records import read_table

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "topologies_results.json"
PICTURE = ROOT / "docs" / "images" / "topologies.png"
DELAY_MS = 20
WHERE = ("serial", "local", "remote")


@dataclass(frozen=True)
class Case:
    """An algorithm in an environment, and how it is spread."""

    file: str
    spec: str
    env: str
    topology: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the spec."""
        return self.spec


TWO = {"actors": 2}
SPREAD = {"a3c": {"hogwild": 2}, "impala": TWO, "acer": {"hogwild": 2}, "dqn": TWO, "appo": TWO}
CASES = [Case(file, f"{file}_cartpole", "CartPole-v1", topology) for file, topology in SPREAD.items()]
CASES += [Case(file, f"{file}_lunarlander", "LunarLander-v3", SPREAD[file]) for file in ("acer", "dqn", "appo")]


@contextmanager
def far(env: str) -> Iterator[str]:
    """The URL of a served environment behind the delaying proxy."""
    server = subprocess.Popen(
        [sys.executable, "-m", "longrein.cli", "serve", env, "--at", "ws://127.0.0.1:0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    proxy = None
    try:
        assert server.stdout is not None
        found = None
        while found is None:
            line = server.stdout.readline()
            assert line, "the server ended"
            found = re.search(r"ws://(127\.0\.0\.1:\d+)", line)
        proxy = subprocess.Popen(
            [sys.executable, str(HERE / "delay.py"), "--to", found[1], "--ms", str(DELAY_MS)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert proxy.stdout is not None
        yield f"ws://{proxy.stdout.readline().strip()}/{env}"
    finally:
        for process in (proxy, server):
            if process is not None:
                process.terminate()
                process.wait()


def train(case: Case, where: str, seed: int) -> dict[str, Any]:
    """One session."""
    if where == "remote":
        with far(case.env) as url:
            return measure(case, seed, {"env.url": url, "env.id": "", "meta.topology": case.topology})
    return measure(case, seed, {} if where == "serial" else {"meta.topology": case.topology})


def measure(case: Case, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """One session with these settings."""
    asked = {"meta.max_session": 1, "meta.seed": seed, **changes}
    spec = specs.load(ROOT / "spec" / f"{case.file}.yaml", case.spec, asked)
    with tempfile.TemporaryDirectory() as data:
        trial = run_trial(spec, Path(data))
        (result,) = trial.sessions
        if result is None or result.status == "interrupted":
            raise SystemExit(f"{case.name}: {trial.failures or 'interrupted'}")
        metrics = read_table(result.folder / "metrics.csv")
        steps, means = curve(result.folder, spec.meta.env_steps)
        lag = metrics.get("actor_lag")
        return {
            "status": result.status, "env_steps": result.env_steps, "seconds": round(result.seconds, 1),
            "last": means[-1] if means else None, "evaluation": float(np.mean(result.evaluation)),
            "lag": None if lag is None else float(np.nanmean(np.asarray(lag))), "curve": [steps, means],
            "fingerprint": spec.fingerprint,
        }  # fmt: skip


def draw(results: dict[str, dict[str, Any]]) -> None:
    """A panel a spec, a line a topology."""
    from matplotlib.figure import Figure

    names = sorted({key.rpartition(" ")[0] for key in results}, key=lambda name: (name.rpartition("_")[2], name))
    figure = Figure((16, 3.0 * -(-len(names) // 5)), layout="constrained")
    for index, name in enumerate(names):
        panel = figure.add_subplot(-(-len(names) // 5), 5, index + 1)
        for line, where in enumerate(WHERE):
            if (run := results.get(f"{name} {where}")) is not None:
                panel.plot(*run["curve"], linewidth=1.2, label=where, color=f"C{line}")
        panel.set_title(name, fontsize=9)
        panel.ticklabel_format(axis="x", style="sci", scilimits=(3, 3))
        panel.legend(fontsize=7)
    figure.savefig(PICTURE, dpi=80)


def main(
    only: Annotated[list[str] | None, typer.Option(help="Only these specs.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only these of serial, local and remote.")] = None,
    seed: Annotated[int, typer.Option(help="Of all sessions.")] = 0,
    at_once: Annotated[int, typer.Option(help="Sessions side by side; those that wait for a network take little.")] = 2,
) -> None:
    """Run what is missing, draw it, and print a row for each."""
    results: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wanted = [
        (case, place)
        for case in CASES if not only or case.name in only
        for place in where or WHERE if f"{case.name} {place}" not in results
    ]  # fmt: skip

    def one(case: Case, place: str) -> None:
        results[f"{case.name} {place}"] = train(case, place, seed)
        RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True))
        print(f"{case.name} {place}: done", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        for future in [pool.submit(one, *each) for each in wanted]:
            future.result()
    draw(results)
    print("| spec | where | env steps | last 100 returns | evaluation | seconds | lag |\n|---|---|---|---|---|---|---|")
    for key, run in sorted(results.items()):
        name, _, place = key.rpartition(" ")
        last, lag = ("" if run[one] is None else f"{run[one]:.1f}" for one in ("last", "lag"))
        numbers = f"{run['env_steps']:,} | {last} | {run['evaluation']:.0f} | {run['seconds']:.0f} | {lag}"
        print(f"| `{name}` | {place} | {numbers} |")


if __name__ == "__main__":
    typer.run(main)
