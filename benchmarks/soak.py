"""A session that is not left in peace: for half an hour roles and servers are killed, every few seconds one of them.

    python benchmarks/soak.py --minutes 30 --every 5

APPO learns CartPole whose step takes `--sleep` milliseconds, served by two servers, with two actors in processes of
their own. Killed with SIGKILL, at random: an actor (or the inference process), a server, which is started again on its
port, and now and then the session itself, which is resumed. Beside it, three sessions in peace, from other seeds and
without sleep: their scores are the band. At the end nothing of it may be left: processes, shared memory, listening
sockets, half-written files. Prints a table and writes soak_results.json.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
import yaml

from longrein.lab.channel import PREFIX
from longrein.lab.records import read_result, read_table

HERE = Path(__file__).parent
RESULTS = HERE / "soak_results.json"
SERVERS = 2
ENV = """
import time
import gymnasium

class Slow(gymnasium.Wrapper):
    def step(self, action):
        time.sleep({seconds})
        return super().step(action)

def make():
    return Slow(gymnasium.make("CartPole-v1"))
"""


def spec_of(urls: list[str], env_steps: int, topology: dict[str, Any], seed: int) -> dict[str, Any]:
    """The session's spec."""
    fall = {"linear": [2.0e-3, 1.0e-4, 150_000]}
    algorithm = {"name": "appo", "rollout_steps": 32, "epochs": 10, "gamma": 0.98, "lambda_": 0.9, "lr": fall}
    return {
        "agent": {"algorithm": algorithm, "net": {"hidden": [64, 64]}},
        "env": {"url": urls, "num_envs": 8},
        "meta": {
            "env_steps": env_steps, "max_session": 1, "seed": seed, "checkpoint_every": 10_000, "topology": topology,
        },
    }  # fmt: skip


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Servers:
    """Environments elsewhere, each on a port that it keeps."""

    def __init__(self, folder: Path, sleep_ms: float) -> None:
        folder.mkdir(exist_ok=True)
        self.file = folder / "slow.py"
        self.file.write_text(ENV.format(seconds=sleep_ms / 1000))
        self.ports = [free_port() for _ in range(SERVERS)]
        self.processes = [self._start(port) for port in self.ports]
        self.urls = [f"ws://127.0.0.1:{port}" for port in self.ports]

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "longrein.cli", "serve", f"{self.file}:make", "--at", f"ws://127.0.0.1:{port}"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self, index: int) -> None:
        """Kill one, and start it again."""
        self.processes[index].kill()
        self.processes[index].wait()
        self.processes[index] = self._start(self.ports[index])

    def close(self) -> None:
        """End all."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()


@dataclass
class Session:
    """`longrein run` in a process group of its own."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None
    seen: set[int] = field(default_factory=set)  # every process that belonged to it

    def start(self) -> None:
        """Begin, or go on from the run that is there."""
        runs = sorted((self.folder / "data").glob("soak_*"))
        what = ["--resume", str(runs[-1])] if runs else [str(self.folder / "soak.yaml"), "soak"]
        command = [sys.executable, "-m", "longrein.cli", "run", *what, "--data", str(self.folder / "data")]
        if runs:
            command = command[:-2]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def roles(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        """What the session's process started to act, choose or judge; and the session's process."""
        assert self.process is not None
        found: tuple[list[psutil.Process], list[psutil.Process]] = ([], [])
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return found
        self.seen |= {one.pid for one in below} | {self.process.pid}
        for one in below:
            try:
                parent = " ".join(one.parent().cmdline()) if one.parent() is not None else ""
                words = " ".join(one.cmdline())
            except psutil.Error:
                continue
            if "multiprocessing.forkserver" in parent:
                found[0].append(one)
            elif "spawn_main" in words:
                found[1].append(one)
        return found

    def done(self) -> bool:
        """Whether training came to its end; one that ended otherwise is started again."""
        assert self.process is not None
        if self.process.poll() is None:
            return False
        runs = sorted((self.folder / "data").glob("soak_*"))
        if runs and read_result(next(runs[-1].glob("session_*"))).get("status") in ("solved", "budget spent"):
            return True
        self.start()
        return False


def run(
    folder: Path, spec: dict[str, Any], servers: Servers, kills: random.Random | None, every: float, limit: float
) -> dict[str, Any]:
    """One session from start to end; kills: what decides who is killed, None lets it be."""
    folder.mkdir()
    (folder / "soak.yaml").write_text(yaml.safe_dump({"soak": spec}))
    session, killed, begun = Session(folder), Counter[str](), time.monotonic()
    session.start()
    next_kill, most_rss = begun + 15, 0.0
    while not session.done():
        time.sleep(0.2)
        if time.monotonic() - begun > limit:
            raise SystemExit(f"not done after {limit:.0f} s; see {folder / 'log'}")
        roles, owners = session.roles()
        if kills is None or time.monotonic() < next_kill:
            continue
        most_rss = max([most_rss, *(one.memory_info().rss for one in owners if one.is_running())])
        next_kill = time.monotonic() + every * kills.uniform(0.5, 1.5)
        what = kills.choices(("role", "server", "session"), (12, 6, 1))[0]
        if what == "server":
            servers.kill(kills.randrange(SERVERS))
        else:
            chosen = roles if what == "role" else owners
            if not chosen:
                continue
            try:
                kills.choice(chosen).send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        killed[what] += 1
    (place,) = (folder / "data").glob("soak_*/session_*")
    result, metrics = read_result(place), read_table(place / "metrics.csv")
    episodes = read_table(place / "episodes.csv")
    steps = np.asarray(episodes["env_steps"])
    return {
        "evaluation": float(np.mean(result["evaluation"])), "last": result["training_mean"],
        "env_steps": result["env_steps"], "seconds": round(time.monotonic() - begun), "killed": dict(killed),
        "replaced": float(metrics["actors_replaced"][-1]), "restarts": result["restarts"],
        "in_order": bool((np.diff(steps) >= 0).all()), "rss_mib": round(most_rss / 2**20),
        "left": left(folder, session.seen),
    }  # fmt: skip


def left(folder: Path, pids: set[int]) -> dict[str, list[str]]:
    """What a session should have taken with it."""
    time.sleep(5)
    processes = [str(pid) for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    memory = [path.name for path in Path("/dev/shm").glob(f"{PREFIX}-*") if int(path.name.split("-")[1]) in pids]
    ports = [str(c.laddr) for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.pid in pids]
    files = [str(path) for path in folder.rglob("*") if path.suffix in (".tmp", ".part") or path.name.startswith(".")]
    return {"processes": processes, "shared memory": memory, "sockets": ports, "files": files}


def main(
    minutes: Annotated[float, typer.Option(help="About how long the session is disturbed.")] = 30.0,
    every: Annotated[float, typer.Option(help="Seconds between kills, on average.")] = 5.0,
    sleep: Annotated[float, typer.Option(help="Milliseconds of an env step.")] = 5.0,
    env_steps: Annotated[int, typer.Option(help="Of a session; 0: as many as fit into the minutes.")] = 0,
    topology: Annotated[str, typer.Option(help="As in a spec.")] = "{actors: 2}",
    seed: Annotated[int, typer.Option(help="Of the kills.")] = 0,
) -> None:
    """Disturb one session, and let three in peace."""
    asked = yaml.safe_load(topology)
    # A server steps the four environments of an actor one after the other; kills take about half of the time.
    budget = env_steps or int(minutes * 60 / (sleep / 1000) / 4)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        for number in range(3):
            servers = Servers(Path(place) / "peace", 0.0)
            try:
                spec = spec_of(servers.urls, budget, asked, number + 1)
                rows[f"in peace, seed {number + 1}"] = run(Path(place) / str(number), spec, servers, None, 0, 3600)
            finally:
                servers.close()
        servers = Servers(Path(place) / "war", sleep)
        try:
            spec = spec_of(servers.urls, budget, asked, 0)
            rows["killed"] = run(Path(place) / "k", spec, servers, random.Random(seed), every, minutes * 60 * 4)
        finally:
            servers.close()
    band = [row["evaluation"] for name, row in rows.items() if name != "killed"]
    RESULTS.write_text(json.dumps({"topology": asked, "rows": rows}, indent=1))
    print("| session | evaluation | last 100 returns | env steps | minutes | killed | left behind |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        gone = ", ".join(f"{count} {what}" for what, count in row["killed"].items()) or "none"
        behind = ", ".join(f"{len(those)} {what}" for what, those in row["left"].items() if those) or "nothing"
        print(f"| {name} | {row['evaluation']:.0f} | {row['last']:.0f} | {row['env_steps']:,} | "
              f"{row['seconds'] / 60:.0f} | {gone} | {behind} |")  # fmt: skip
    clean = not any(those for row in rows.values() for those in row["left"].values())
    inside = rows["killed"]["evaluation"] >= min(band) - 5
    print(f"within the band ({min(band):.0f} to {max(band):.0f}): {inside}; nothing left: {clean}")
    raise SystemExit(0 if inside and clean else 1)


if __name__ == "__main__":
    typer.run(main)
