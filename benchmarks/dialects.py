"""How fast are the wire formats of the older systems? Medians of interleaved rounds, as ratios to the TCP ping-pong.

`python benchmarks/dialects.py` runs every case. Gymie 0.5.4 itself comes from PyPI into a virtual environment of its
own under .peers/, where a Python is found that still installs it (3.7 or 3.8); one client then steps both servers.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from link import HERE, PEERS, Floor, Rate, Row, free_port, medians, served, show, steps_of
from rich.progress import Progress

import longrein
from longrein.link.transports.nats_broker import start_broker

GYMIE = "gymie==0.5.4"


def gymie(floor: Floor, seconds: float, rounds: int, tell: Callable[[], None]) -> list[Row]:
    """Our server and our client, JSON over WebSocket; beside the original server where it installs."""
    with contextlib.ExitStack() as stack:
        urls, _ = stack.enter_context(served("tiny", "ws://127.0.0.1:0/gym", extra=("--dialect", "gymie")))
        env = stack.enter_context(contextlib.closing(longrein.connect(_at(urls[0], "ws", "gymie", "/tiny"))))
        env.reset()
        rates: dict[str, Rate] = {"floor": floor.rate, "ours": steps_of(env, 1)}
        python = old_python()
        if python is not None:
            port = stack.enter_context(original_gymie(python))
            cart = stack.enter_context(serving_cart_pole())
            for name, url in (("original", f"gymie://127.0.0.1:{port}/CartPole-v1"), ("our CartPole", cart)):
                other = stack.enter_context(contextlib.closing(longrein.connect(url)))
                rates[name] = episodes_of(other)
        found = medians(rates, seconds, rounds, tell)
    rows = [Row("Gymie, both ends ours", found["ours"], "steps/s", "floor", found["ours"] / found["floor"], 0.3)]
    if "original" in found:
        ratio = found["our CartPole"] / found["original"]
        against = f"Gymie 0.5.4: {found['original']:,.0f}"
        rows.append(Row("CartPole, one client, two servers", found["our CartPole"], "steps/s", against, ratio, 1.5))
    else:
        print("Gymie 0.5.4 is left out: no Python 3.7 or 3.8 was found")
    return rows


def gym_nats(floor: Floor, seconds: float, rounds: int, tell: Callable[[], None]) -> list[Row]:
    """Our agent with a responder of nats-py, in each order; and both ends ours."""
    with contextlib.ExitStack() as stack:
        broker, other = stack.enter_context(start_broker()), stack.enter_context(start_broker())
        system = subprocess.Popen(
            [sys.executable, str(HERE / "peers/gym_nats_null.py"), broker.url], stdout=subprocess.PIPE, text=True
        )
        stack.callback(system.wait)
        stack.callback(system.kill)
        assert system.stdout is not None
        system.stdout.readline()
        stack.enter_context(served("tiny", other.url, extra=("--dialect", "gym-nats")))
        rates: dict[str, Rate] = {"floor": floor.rate}
        for order in ("serial", "reads"):
            rates[order] = _nats_rate(stack, broker.url, order=order)
        rates["both"] = _nats_rate(stack, other.url)
        found = medians(rates, seconds, rounds, tell)
    names = {
        "reads": ("gym-nats agent, nats-py system", 0.035),
        "serial": ("gym-nats agent, in the original's order", 0.016),
        "both": ("gym-nats, both ends ours", 0.035),
    }
    at = found["floor"]
    return [Row(name, found[key], "steps/s", "floor", found[key] / at, goal) for key, (name, goal) in names.items()]


def multiserver(floor: Floor, seconds: float, rounds: int, tell: Callable[[], None]) -> list[Row]:
    """Our server and our client, JSON in JSON over HTTP."""
    with contextlib.ExitStack() as stack:
        urls, _ = stack.enter_context(served("tiny", "http://127.0.0.1:0", extra=("--dialect", "multiserver")))
        env = stack.enter_context(contextlib.closing(longrein.connect(_at(urls[0], "http", "multiserver", ""))))
        env.reset()
        found = medians({"floor": floor.rate, "ours": steps_of(env, 1)}, seconds, rounds, tell)
    ratio = found["ours"] / found["floor"]
    return [Row("MultiServerRL, both ends ours", found["ours"], "steps/s", "floor", ratio, 0.15)]


def _at(url: str, scheme: str, dialect: str, path: str) -> str:
    return url.replace(f"{scheme}://", f"{dialect}://").removesuffix("/gym") + path


def _nats_rate(stack: contextlib.ExitStack, url: str, **options: Any) -> Rate:
    env = stack.enter_context(contextlib.closing(longrein.connect(url.replace("nats://", "gym-nats://"), **options)))
    env.reset()
    return steps_of(env, 1)


def episodes_of(env: Any) -> Rate:
    """Steps per second of whole episodes, resets included."""

    def rate(seconds: float) -> float:
        count, started = 0, time.perf_counter()
        env.reset()
        while time.perf_counter() - started < seconds:
            _, _, terminated, truncated, _ = env.step(count % 2)
            count += 1
            if terminated or truncated:
                env.reset()
        return count / (time.perf_counter() - started)

    return rate


@contextlib.contextmanager
def serving_cart_pole() -> Iterator[str]:
    """The URL of CartPole-v1 at a Gymie server of ours."""
    command = [sys.executable, "-m", "longrein.cli", "serve", "CartPole-v1", "--dialect", "gymie", "--quiet"]
    process = subprocess.Popen([*command, "--at", "ws://127.0.0.1:0/gym"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield _at(process.stdout.readline().split()[-1], "ws", "gymie", "/CartPole-v1")
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def original_gymie(python: Path) -> Iterator[int]:
    """The port of a Gymie 0.5.4 server."""
    folder = PEERS / "gymie"
    if not (folder / ".made").exists():
        print("setting up Gymie 0.5.4", flush=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "-q", "install", GYMIE], check=True)
        (folder / ".made").touch()
    port = free_port()
    command = [folder / "bin" / "python", "-m", "gymie", "-l", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def old_python() -> Path | None:
    """A Python that Gymie 0.5.4 installs on."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for version in ("3.8", "3.7"):
        found = shutil.which(f"python{version}", path=os.environ.get("PATH", ""))
        candidates = [Path(found)] if found else []
        candidates += sorted(root.glob(f"versions/{version}.*/bin/python"))
        for python in candidates:
            if subprocess.run([python, "-c", "import ensurepip"], capture_output=True).returncode == 0:
                return python
    return None


CASES = {"gymie": gymie, "gym-nats": gym_nats, "multiserver": multiserver}


def main(
    case: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(CASES)}.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of each round.")] = 0.7,
    rounds: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 5,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Print the dialects' figures beside their targets."""
    floor = Floor()
    rows: list[Row] = []
    try:
        with Progress(transient=True) as progress:
            for name in case or CASES:
                task = progress.add_task(name, total=None)
                rows += CASES[name](floor, seconds, rounds, lambda task=task: progress.advance(task))
                progress.remove_task(task)
    finally:
        floor.close()
    show(rows)
    if out is not None:
        about = {"date": time.strftime("%Y-%m-%d %H:%M"), "python": platform.python_version(), "cores": os.cpu_count()}
        out.write_text(json.dumps({"about": about, "rows": [asdict(row) | {"met": row.met} for row in rows]}, indent=1))


if __name__ == "__main__":
    typer.run(main)
