"""`longrein run` without arguments: a server in another process, PPO on it over the link, and proof that it learned."""

from __future__ import annotations

import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from longrein.errors import RoleDied, RunError, SpecError
from longrein.lab import actor, session
from longrein.lab.records import create_run
from longrein.lab.session import SessionResult, SessionSettings
from longrein.learn import algorithms

TRANSPORTS = {
    "websocket": "ws://127.0.0.1:0",
    "http": "http://127.0.0.1:0",
    "nats": "nats://{broker}/demo-{pid}",
}
"""Where the server listens, by what `at` says."""

PPO_CARTPOLE: dict[str, Any] = {
    # From rl-baselines3-zoo's settings for CartPole-v1: half the epochs at twice the learning rate take as many env
    # steps in 60 % of the time, and schedules that end above 0 still learn when a slow seed needs more than 70,000.
    # docs/algorithms/ppo.md has the numbers.
    "rollout_steps": 32,
    "minibatch_size": 256,
    "epochs": 10,
    "gamma": 0.98,
    "lambda_": 0.9,
    "lr": {"linear": [2e-3, 2e-4, 70_000]},
    "clip": {"linear": [0.2, 0.1, 70_000]},
}
_START_SECONDS = 30.0
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed."""

    session: SessionResult
    """What came of the training."""
    run: Path
    """The run folder."""
    url: str
    """Where the environments were."""

    @property
    def solved(self) -> bool:
        """Whether the target was reached."""
        return self.session.solved


def run_demo(
    at: str = "websocket",
    *,
    env: str = "CartPole-v1",
    num_envs: int = 8,
    target: float = 475.0,
    max_env_steps: int = 200_000,
    seed: int = 0,
    data: str = "data",
    console: Console | None = None,
) -> DemoResult:
    """Train PPO on `num_envs` far environments over one lease until the last 100 training returns average `target`.

    at: websocket, http or nats, for which a server process (and a broker) is started on this machine, and ended again
    whatever happens; or the URL of a server that runs already. data: where the run folder goes.
    Raises SpecError for an unknown `at`, RoleDied when the server does not start, LinkError when it is lost for good.
    """
    console = console or Console()
    config_class, _ = algorithms.load("ppo")
    config = algorithms.config_from(config_class, PPO_CARTPOLE)
    settings = SessionSettings(
        f"PPO on {env}", "ppo", config, seed=seed, num_envs=num_envs, max_env_steps=max_env_steps, target=target
    )
    run = create_run(Path(data), f"ppo_{env.lower()}", {"env": env, "at": at, "session": settings})
    with ExitStack() as stack:
        url = at if "://" in at else stack.enter_context(_serving(env, at, run / "server.log"))
        console.print(f"[bold]{env}[/bold] served at [cyan]{url}[/cyan]; training PPO on {num_envs} environments")
        named = replace(settings, title=f"PPO on {env} over {url}")
        show = stack.enter_context(_progress(console, max_env_steps, target))
        result = session.run_session(named, run, lambda count: actor.connect(url, count), show)
    console.print(_table(result, target))
    for name, path in (("graph", result.graph), ("run folder", run)):
        console.print(f"{name}: {path}", soft_wrap=True, highlight=False)  # whole in any width, to be copied
    return DemoResult(result, run, url)


@contextmanager
def _serving(env: str, at: str, log: Path) -> Iterator[str]:
    """A server process (with a broker first, where one is needed): the URL of its environment."""
    if at not in TRANSPORTS:
        raise SpecError("at", f"{at!r} is no transport", hint="one of " + ", ".join(TRANSPORTS) + ", or a server's URL")
    with ExitStack() as stack:
        broker = stack.enter_context(actor.nats_broker()) if at == "nats" else ""
        listen = TRANSPORTS[at].format(broker=broker.partition("://")[2], pid=os.getpid())
        command = [sys.executable, "-m", "longrein.cli", "serve", env, "--at", listen, "--quiet"]
        url = stack.enter_context(server_process(command, log))
        yield f"{url.rstrip('/')}/{env}"


@contextmanager
def server_process(command: Sequence[str], log: Path) -> Iterator[str]:
    """Run a command that prints "listening on URL": the URL, once it does. The process is ended on the way out.

    log: a file for the process's error stream. Raises RoleDied when it ends, or says nothing for 30 seconds.
    """
    with log.open("wb") as errors:
        # A session of its own: the terminal's Ctrl-C is for us, and the server is needed until we have finished.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    try:
        yield _listening(process, log)
    finally:
        _stop(process)


def _listening(process: subprocess.Popen[bytes], log: Path) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + _START_SECONDS
    text = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            piece = os.read(process.stdout.fileno(), 4096)
            if not piece:
                break  # it closed its output: it has ended
            text += piece
            for line in text.split(b"\n")[:-1]:
                if line.startswith(b"listening on "):
                    return line.removeprefix(b"listening on ").decode().strip()
    if process.poll() is None and (left <= 0):
        raise RunError(f"the server did not listen within {_START_SECONDS:g} s", hint=f"see {log}")
    said = log.read_text(errors="replace").strip().splitlines()
    raise RoleDied("server", process.wait(), hint=said[-1] if said else "it said nothing")


def _stop(process: subprocess.Popen[bytes]) -> None:
    # SIGINT closes at once; SIGTERM would wait for leases that nobody will come back for.
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


@contextmanager
def _progress(console: Console, max_env_steps: int, target: float) -> Iterator[Any]:
    """A live line: steps, return, steps/s and the time to the last step that may be spent."""
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("[bold]{task.completed:>7,.0f}[/bold] steps"),
        BarColumn(),
        TextColumn("return [bold]{task.fields[mean]}[/bold] of {task.fields[target]:g}"),
        TextColumn("{task.fields[rate]:>6,.0f} steps/s"),
        TextColumn("at most"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=max_env_steps, mean="-", target=target, rate=0.0)

        def show(now: session.Progress) -> None:
            mean = "-" if math.isnan(now.mean_return) else f"{now.mean_return:5.1f}"
            rate = now.env_steps / max(now.seconds, 1e-9)
            progress.update(task, completed=now.env_steps, mean=mean, rate=rate)

        yield show


def _table(result: SessionResult, target: float) -> Table:
    verdict = {
        "solved": "[bold green]solved[/bold green]",
        "interrupted": "[yellow]interrupted[/yellow]",
    }.get(result.status, f"[red]{result.status}, target not reached[/red]")
    table = Table(title=f"PPO: {verdict}", show_header=False, title_justify="left")
    table.add_column(style="dim")
    table.add_column()
    table.add_row("environment steps", f"{result.env_steps:,}")
    table.add_row("seconds", f"{result.seconds:.1f}")
    table.add_row("steps per second", f"{result.env_steps / max(result.seconds, 1e-9):,.0f}")
    mean = "-" if math.isnan(result.training_mean) else f"{result.training_mean:.1f}"
    table.add_row("training return, mean of last 100", f"{mean} (target {target:g})")
    if result.evaluation:
        score = f"{np.mean(result.evaluation):.1f} ± {np.std(result.evaluation):.1f}"
        table.add_row(f"evaluation, {len(result.evaluation)} fresh seeds", score)
    if result.restarts:
        table.add_row("environments lost and replaced", str(result.restarts))
    return table
