"""How fast is the link? Medians of interleaved rounds, each as a ratio to a blocking TCP ping-pong of the same bytes.

`python benchmarks/link.py` runs every case; `--peers` also sets up and runs OpenEnv, dm_env_rpc and Gymnasium's
AsyncVectorEnv beside it, each peer in a virtual environment of its own under .peers/.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np
import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import longrein
from longrein.link.transports.nats_broker import start_broker

HERE = Path(__file__).parent
PEERS = HERE.parent / ".peers"
PINS = {"openenv": ["openenv==0.10.0", "openenv-core==0.3.0"], "dm_env_rpc": ["dm-env-rpc==1.1.7", "numpy"]}
ASK_BYTES = 48  # a step of CartPole, as docs/concepts/protocol.md counts it
TELL_BYTES = 80  # its answer
PIXEL_BYTES = 8 * 84 * 84 * 4 + 128

Rate = Callable[[float], float]  # runs for so many seconds, and gives units per second


@dataclass
class Row:
    """One line of the table."""

    case: str
    rate: float
    unit: str
    against: str
    ratio: float
    target: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.target if self.unit == "MB" else self.ratio >= self.target


# ----------------------------------------------------------------------------------------------- the floor and servers


def _floor_server(sock: socket.socket) -> None:
    """Answers each message of a frame (two lengths: asked, to answer) with so many bytes."""
    line, _ = sock.accept()
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answers: dict[int, bytes] = {}
    buffer = bytearray(1 << 16)
    while True:
        got = line.recv_into(buffer)
        if not got:
            os._exit(0)
        _, size = struct.unpack_from("<II", buffer)
        if size not in answers:
            answers[size] = struct.pack("<I", size - 4) + bytes(size - 4)
        line.sendall(answers[size])


class Floor:
    """A blocking TCP ping-pong with Nagle off, in two processes."""

    def __init__(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self.process = os.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _floor_server(listening)
        self.line = socket.create_connection(listening.getsockname())
        self.line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.close()

    def rate(self, seconds: float, ask: int = ASK_BYTES, tell: int = TELL_BYTES) -> float:
        """Round trips per second."""
        message = struct.pack("<II", ask, tell) + bytes(ask - 8)
        buffer = bytearray(tell)
        view = memoryview(buffer)
        line, count, started = self.line, 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(20):
                line.sendall(message)
                have = 0
                while have < tell:
                    have += line.recv_into(view[have:])
            count += 20
        return count / (time.perf_counter() - started)

    def close(self) -> None:
        self.line.close()
        os.waitpid(self.process, 0)


@contextlib.contextmanager
def served(factory: str, *at: str, extra: tuple[str, ...] = ()) -> Iterator[tuple[list[str], psutil.Process]]:
    """A server process for one of the null environments; the URLs at which it really listens."""
    command = [sys.executable, "-m", "longrein.cli", "serve", f"{HERE / 'null_envs.py'}:{factory}", "--quiet", *extra]
    process = subprocess.Popen(
        [*command, *(word for url in at for word in ("--at", url))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        urls = [process.stdout.readline().split()[-1] for _ in at]
        yield urls, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def peer(name: str, size: int = 4) -> Iterator[Rate]:
    """A peer's server and client, each in a process of the peer's virtual environment."""
    python, script, port = PEERS / name / "bin" / "python", HERE / "peers" / f"{name}_null.py", free_port()
    words = [str(python), str(script)]
    server = subprocess.Popen(
        [*words, "serve", str(port), str(size)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    client = None
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            time.sleep(0.1)
        client = subprocess.Popen(
            [*words, "step", str(port), str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert client.stdin is not None
        assert client.stdout is not None
        if client.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the peer {name} did not start")

        def rate(seconds: float) -> float:
            client.stdin.write(f"{seconds}\n")
            client.stdin.flush()
            return float(client.stdout.readline())

        yield rate
    finally:
        for process in (client, server):
            if process is not None:
                process.kill()
                process.wait()


def set_up_peers() -> None:
    """Make the peers' virtual environments where they are missing."""
    for name, pins in PINS.items():
        stamp = PEERS / name / ".made"
        if not stamp.exists():
            print(f"setting up {name}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", PEERS / name], check=True)
            subprocess.run([PEERS / name / "bin" / "python", "-m", "pip", "-q", "install", *pins], check=True)
            stamp.touch()


# ------------------------------------------------------------------------------------------------------------- rates


def steps_of(env: Any, action: Any, per_step: int = 1) -> Rate:
    """Environment steps per second of a loop over `env.step`."""

    def rate(seconds: float) -> float:
        step, count, started = env.step, 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(10):
                step(action)
            count += 10
        return per_step * count / (time.perf_counter() - started)

    return rate


def as_ready(env: longrein.RemoteVectorEnv, min_ready: int) -> Rate:
    """Environment steps per second when each is sent on as soon as it is ready."""

    def rate(seconds: float) -> float:
        env.send(np.ones(env.num_envs, np.int64))
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            *_, infos = env.recv(min_ready)
            ids = infos["env_id"]
            count += len(ids)
            env.send(np.ones(len(ids), np.int64), ids)
        elapsed = time.perf_counter() - started
        env.recv(sum(len(part.asked) for part in env._parts if part.asked is not None))
        return count / elapsed

    return rate


def medians(rates: dict[str, Rate], seconds: float, rounds: int, tell: Callable[[], None]) -> dict[str, float]:
    """Each in turn, A B C A B C ..., after a short warm-up: what each did in the middle round."""
    found: dict[str, list[float]] = {name: [] for name in rates}
    for rate in rates.values():
        rate(0.3)
    for _ in range(rounds):
        for name, rate in rates.items():
            found[name].append(rate(seconds))
            tell()
    return {name: statistics.median(values) for name, values in found.items()}


# -------------------------------------------------------------------------------------------------------------- cases


def single(floor: Floor, seconds: float, rounds: int, peers: bool, tell: Callable[[], None]) -> list[Row]:
    """One client, one environment, over each transport."""
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(start_broker())
        path = f"/tmp/longrein-bench-{os.getpid()}"
        at = ("ws://127.0.0.1:0", f"ws+unix://{path}", "http://127.0.0.1:0", f"{broker.url}/bench")
        urls, _ = stack.enter_context(served("tiny", *at))
        names = ("websocket", "unix", "http", "nats")
        rates: dict[str, Rate] = {"floor": floor.rate}
        for name, url in zip(names, urls, strict=True):
            env = stack.enter_context(contextlib.closing(longrein.connect(url)))
            env.reset(seed=0)
            rates[name] = steps_of(env, 1)
        vec = stack.enter_context(contextlib.closing(longrein.connect_vec(urls[0], num_envs=64)))
        vec.reset(seed=0)
        rates["vector of 64"] = steps_of(vec, np.ones(64, np.int64), 64)
        if peers:
            rates["OpenEnv"] = stack.enter_context(peer("openenv"))
            rates["dm_env_rpc"] = stack.enter_context(peer("dm_env_rpc"))
            local = gymnasium.vector.AsyncVectorEnv([_tiny])
            stack.callback(local.close)
            local.reset(seed=0)
            rates["AsyncVectorEnv(1)"] = steps_of(local, np.ones(1, np.int64))
        found = medians(rates, seconds, rounds, tell)
        floor_rate, ws = found["floor"], found["websocket"]
        rows = [
            Row("floor: blocking TCP", floor_rate, "round trips/s", "itself", 1.0, 1.0),
            Row("WebSocket, one client", ws, "steps/s", "floor", ws / floor_rate, 0.6),
            Row("unix socket, one client", found["unix"], "steps/s", "WebSocket", found["unix"] / ws, 1.2),
            Row("HTTP, one client", found["http"], "steps/s", "floor", found["http"] / floor_rate, 0.4),
            Row("NATS, one client", found["nats"], "steps/s", "floor", found["nats"] / floor_rate, 0.12),
            Row(
                "64 environments, one lease",
                found["vector of 64"],
                "env steps/s",
                "WebSocket",
                found["vector of 64"] / ws,
                20,
            ),
        ]
        for name, target in (("OpenEnv", 10), ("dm_env_rpc", 10), ("AsyncVectorEnv(1)", 2)):
            if name in found:
                rows.append(
                    Row(
                        f"WebSocket beside {name}",
                        ws,
                        "steps/s",
                        f"{name}: {found[name]:,.0f}",
                        ws / found[name],
                        target,
                    )
                )
        return rows


def _tiny() -> Any:
    sys.path.insert(0, str(HERE))
    import null_envs

    return null_envs.tiny()


def many_leases(floor: Floor, seconds: float, rounds: int, peers: bool, tell: Callable[[], None]) -> list[Row]:
    """32 leases from one client process, each sent on as soon as it is ready."""
    with (
        served("tiny", "ws://127.0.0.1:0") as (urls, _),
        contextlib.closing(longrein.connect_vec(urls[0], num_envs=32, envs_per_lease=1)) as env,
    ):
        env.reset(seed=0)
        found = medians({"floor": floor.rate, "leases": as_ready(env, 8)}, seconds, rounds, tell)
    ratio = found["leases"] / found["floor"]
    return [Row("32 leases, one client process", found["leases"], "steps/s", "floor", ratio, 1.0)]


def pixels(floor: Floor, seconds: float, rounds: int, peers: bool, tell: Callable[[], None]) -> list[Row]:
    """8 environments of 84x84x4 uint8 in one lease."""
    with contextlib.ExitStack() as stack:
        urls, _ = stack.enter_context(served("pixels", "ws://127.0.0.1:0"))
        env = stack.enter_context(contextlib.closing(longrein.connect_vec(urls[0], num_envs=8)))
        env.reset(seed=0)
        rates = {
            "floor": lambda s: floor.rate(s, 120, PIXEL_BYTES),
            "link": steps_of(env, np.ones(8, np.int64)),
        }
        if peers:
            rates["OpenEnv"] = stack.enter_context(peer("openenv", 84 * 84 * 4))
        found = medians(rates, seconds, rounds, tell)
        scale = PIXEL_BYTES / 1e6
        rows = [Row("8 x 84x84x4 uint8", found["link"] * scale, "MB/s", "floor", found["link"] / found["floor"], 0.5)]
        if peers:
            each = 8 * found["link"]
            rows.append(
                Row(
                    "84x84x4 beside OpenEnv",
                    each,
                    "env steps/s",
                    f"OpenEnv: {found['OpenEnv']:,.1f}",
                    each / found["OpenEnv"],
                    200,
                )
            )
        return rows


def first_ready(floor: Floor, seconds: float, rounds: int, peers: bool, tell: Callable[[], None]) -> list[Row]:
    """64 leases, one in ten environments 20 times slower: the first 16 that are ready, against waiting for all."""
    with (
        served("slow_some", "ws://127.0.0.1:0") as (urls, _),
        contextlib.closing(longrein.connect_vec(urls[0], num_envs=64, envs_per_lease=1)) as env,
    ):
        env.reset(seed=0)
        rates = {"all": steps_of(env, np.ones(64, np.int64), 64), "first": as_ready(env, 16)}
        found = medians(rates, max(seconds, 1.0), rounds, tell)
    return [
        Row(
            "recv(min_ready=16) of 64",
            found["first"],
            "env steps/s",
            f"all: {found['all']:,.0f}",
            found["first"] / found["all"],
            4,
        )
    ]


def memory(floor: Floor, seconds: float, rounds: int, peers: bool, tell: Callable[[], None]) -> list[Row]:
    """What 1,000 open idle leases of a null environment cost the server."""
    extra = ("--max-leases", "2000")
    with served("tiny", "ws://127.0.0.1:0", extra=extra) as (urls, process):
        with contextlib.closing(longrein.connect(urls[0])) as warm:
            warm.reset(seed=0)
        before = process.memory_info().rss
        envs = [longrein.connect(urls[0]) for _ in range(1000)]
        for env in envs:
            env.reset(seed=0)
        time.sleep(1.0)
        grown = (process.memory_info().rss - before) / 1e6
        for env in envs:
            env.close()
    return [Row("memory of 1,000 idle leases", grown, "MB", "an empty server", grown, 50)]


def show(rows: list[Row]) -> None:
    """The table."""
    table = Table("case", "rate", "unit", "against", "ratio", "target", "met")
    for row in rows:
        table.add_row(
            row.case,
            f"{row.rate:,.0f}",
            row.unit,
            row.against,
            f"{row.ratio:.3f}" if row.ratio < 0.1 else f"{row.ratio:.2f}",
            f"{row.target:g}",
            "[green]yes[/]" if row.met else "[red]no[/]",
        )
    Console(width=130).print(table)


CASES = {"single": single, "leases": many_leases, "pixels": pixels, "ready": first_ready, "memory": memory}


def main(
    case: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(CASES)}.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of each round.")] = 0.7,
    rounds: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 5,
    peers: Annotated[bool, typer.Option(help="Run the peers too, and set them up where they are missing.")] = True,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Print the link's figures beside their targets."""
    if peers:
        set_up_peers()
    floor = Floor()
    rows: list[Row] = []
    try:
        with Progress(transient=True) as progress:
            for name in case or CASES:
                task = progress.add_task(name, total=None)
                rows += CASES[name](floor, seconds, rounds, peers, lambda task=task: progress.advance(task))
                progress.remove_task(task)
    finally:
        floor.close()
    show(rows)
    if out is not None:
        about = {"date": time.strftime("%Y-%m-%d %H:%M"), "python": platform.python_version(), "cores": os.cpu_count()}
        out.write_text(json.dumps({"about": about, "rows": [asdict(row) | {"met": row.met} for row in rows]}, indent=1))


if __name__ == "__main__":
    typer.run(main)
