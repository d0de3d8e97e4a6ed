"""Ray: started on this machine, or joined where it runs already, and left. Knows no role and no experiment.

Ray itself tries for minutes to reach what does not answer, so whatever has an address is asked first.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

from longrein.errors import RunError, SpecError

REACH_SECONDS = 10.0
"""How long a cluster may take to answer."""
OBJECT_STORE_BYTES = 2 * 2**30
"""Ray's shared memory on this machine, or a third of what is free. It is taken as it is used."""
STATUS = "ray status, on its first machine"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # what ends an actor is told once, by us
}
# What a client of HTTP/2 says first; a server answers with a frame of SETTINGS (RFC 9113, 3.4).
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_FRAME, _SETTINGS = 9, 4


def check_address(key: str, address: str) -> None:
    """Raise SpecError for what is no address of a cluster: "auto", HOST:PORT or ray://HOST:PORT."""
    if address != "auto" and not re.fullmatch(r"(ray://)?[^/:\s]+:\d+|(ray://)?\[[0-9a-fA-F:]+\]:\d+", address):
        raise SpecError(key, f"{address!r} is no address of a Ray cluster",
                        hint="HOST:PORT as `ray start --head` says it, ray://HOST:10001, or auto")  # fmt: skip


def reach(address: str) -> None:
    """Raise RunError, after REACH_SECONDS at most, where no Ray answers. "auto" is asked where RAY_ADDRESS says."""
    asked = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if asked == "auto":
        return  # Ray looks for its processes on this machine, which takes no time
    host, _, port = asked.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS) as line:
            if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
                return
            line.settimeout(REACH_SECONDS)
            line.sendall(_PREFACE)
            answer = line.recv(_FRAME)
    except (OSError, ValueError) as error:
        problem = f"the Ray cluster at {asked} cannot be reached, tried for {REACH_SECONDS:g} s at most: {error}"
        raise RunError(problem, hint=STATUS) from None
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise RunError(f"what listens at {asked} is no Ray cluster", hint=STATUS)


def check_room_here(key: str, count: int, cpus: float) -> None:
    """Raise SpecError where this machine has no processors for so many actors of so many each."""
    have = os.cpu_count() or 1
    if count * cpus > have:
        raise SpecError(key, f"{count} actors of {cpus:g} processors each, and this machine has {have}",
                        hint=f"fewer, or meta.topology.actor_cpus: {_floor(have / count):g}")  # fmt: skip


def check_room(key: str, count: int, cpus: float) -> None:
    """Raise SpecError where the cluster could never hold so many actors, RunError where others use it now."""
    import ray

    nodes: Mapping[str, float] = {
        node["NodeManagerAddress"] + f" ({node['NodeID'][:6]})": node["Resources"].get("CPU", 0.0)
        for node in ray.nodes()  # type: ignore[no-untyped-call]  # ray's
        if node["Alive"]
    }
    says = ", ".join(f"{cpu:g} on {name}" for name, cpu in sorted(nodes.items())) or "none"
    if sum(int(cpu / cpus + 1e-9) for cpu in nodes.values()) < count:
        total = sum(nodes.values())
        raise SpecError(key, f"{count} actors of {cpus:g} processors each have no room in the cluster, whose "
                        f"processors are {says}", hint="fewer, more machines, or meta.topology.actor_cpus: "
                        f"{max(_floor(total / count), 0.01):g}")  # fmt: skip
    free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]  # ray's
    if free + 1e-9 < count * cpus:
        problem = f"{count} actors of {cpus:g} processors each, and {free:g} are free in the cluster, of {says}"
        raise RunError(problem, hint="wait until other jobs have ended; --processes 1 runs one session at a time")


def _floor(value: float) -> float:
    return math.floor(value * 100) / 100


@contextmanager
def joined(address: str, cpus: float) -> Iterator[None]:
    """Ray, here with so many processors and for as long as this is entered, or at an address.

    Where this process has joined a cluster before, it is that one, and stays. Raises SpecError where Ray is not
    installed, RunError where it cannot be used.
    """
    os.environ |= QUIET
    try:
        import ray
    except ModuleNotFoundError:
        raise SpecError("meta.topology.engine", "needs the package 'ray'", hint="pip install 'longrein[ray]'") from None
    if ray.is_initialized():
        yield
        return
    if address:
        reach(address)
    store = int(max(min(OBJECT_STORE_BYTES, psutil.virtual_memory().available / 3), 80 * 2**20))
    here: dict[str, Any] = {"num_cpus": math.ceil(cpus), "include_dashboard": False, "object_store_memory": store}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with _signals_kept():
            ray.init(address or "local", **quiet, **({} if address else here))
    except (ConnectionError, ImportError, ValueError, RuntimeError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise RunError(f"{where} cannot be used: {error}", hint=STATUS if address else "") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it begins; whoever runs a session has its own way to hear it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
