"""The examiner: is what a server serves an honest environment, and how quick is the line? It uses the front door."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.utils.env_checker import data_equivalence
from rich.console import Console
from rich.table import Table

from longrein.errors import Error, LocalProtocolError, SpaceError
from longrein.link import messages as m
from longrein.link.env import RemoteEnv, connect
from longrein.link.vectors import connect_vec


@dataclass(frozen=True)
class Finding:
    """What the examiner found at one point."""

    point: str
    passed: bool
    text: str


@dataclass(frozen=True)
class Latency:
    """How long one kind of request takes: milliseconds at percentiles, and how many fit in a second."""

    what: str
    p50: float
    p90: float
    p99: float
    most: float
    per_second: float


class Fault(AssertionError):
    """A point that was not passed; it never leaves this module."""


def examine(url: str, *, steps: int = 300, **options: Any) -> list[Finding]:
    """Examine the environment at a URL. Raises ConnectError and its kin when there is none to examine."""
    env = connect(url, **options)
    findings = []
    try:
        for point, test in _POINTS.items():
            findings.append(_try(point, lambda test=test: test(env, steps, url, options)))  # type: ignore[misc]  # bound now
    finally:
        env.close()
    return findings


def _try(point: str, test: Callable[[], str]) -> Finding:
    try:
        return Finding(point, True, test())
    except (Fault, Error) as error:
        return Finding(point, False, str(error).partition("\n--- far side")[0])


def _demand(condition: bool, text: str) -> None:
    if not condition:
        raise Fault(text)


def _spaces(env: RemoteEnv, steps: int, url: str, options: dict[str, Any]) -> str:
    return f"{env.observation_space} -> {env.action_space}"


def _reset(env: RemoteEnv, steps: int, url: str, options: dict[str, Any]) -> str:
    observation, info = env.reset(seed=1)
    _demand(observation in env.observation_space, f"the first observation is outside its space: {observation!r}"[:300])
    _demand(isinstance(info, dict), f"info is a {type(info).__name__}")
    return "the first observation lies in its space"


def _steps(env: RemoteEnv, steps: int, url: str, options: dict[str, Any]) -> str:
    env.action_space.seed(0)
    env.reset(seed=2)
    ends = cuts = 0
    for number in range(steps):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        _demand(
            observation in env.observation_space, f"observation {number} is outside its space: {observation!r}"[:300]
        )
        _demand(bool(np.all(np.isfinite(reward))), f"reward {number} is {reward}")
        if terminated or truncated:
            ends, cuts = ends + terminated, cuts + truncated
            env.reset()
    return f"{steps} steps, all observations in their space; {ends} episodes ended, {cuts} were cut off"


def _seeding(env: RemoteEnv, steps: int, url: str, options: dict[str, Any]) -> str:
    if env.remote_spec.get("nondeterministic"):
        return "the environment says that it is not deterministic: not compared"
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(min(steps, 50))]
    first, second = _play(env, 3, actions), _play(env, 3, actions)
    _demand(data_equivalence(first, second, exact=True), "the same seed and actions gave two different episodes")
    return "the same seed and actions give the same episode, bit for bit"


def _play(env: RemoteEnv, seed: int, actions: list[Any]) -> list[Any]:
    seen = [env.reset(seed=seed)[0]]
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        seen.append((observation, reward, terminated, truncated))
        if terminated or truncated:
            break
    return seen


def _termination(env: RemoteEnv, steps: int, url: str, options: dict[str, Any]) -> str:
    env.reset(seed=4)
    for _ in range(max(steps, 1000)):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            break
    else:
        return f"no episode ended within {max(steps, 1000)} steps: not seen"
    try:
        env.step(env.action_space.sample())
    except LocalProtocolError:
        env.reset()
        return "a step after the end is refused, a reset helps"
    raise Fault("a step after the end of an episode was taken")


def _autoreset(env: RemoteEnv, steps: int, url: str, options: dict[str, Any]) -> str:
    seen = []
    for mode in ("next_step", "same_step"):
        vec = connect_vec(url, num_envs=2, autoreset=mode, **options)
        try:
            vec.reset(seed=5)
            vec.action_space.seed(5)
            for _ in range(steps):
                _, _, terminated, truncated, infos = vec.step(vec.action_space.sample())
                ended = terminated | truncated
                if ended.any():
                    if mode == "same_step":
                        _demand(
                            "final_obs" in infos, "an episode ended under same-step autoreset without its final_obs"
                        )
                    else:
                        _, reward, *_ = vec.step(vec.action_space.sample())
                        _demand(
                            not np.any(reward[ended]), "the step after an end under next-step autoreset had a reward"
                        )
                    seen.append(mode)
                    break
        finally:
            vec.close()
    return f"as declared in mode {' and '.join(seen)}" if seen else f"no episode ended within {steps} steps: not seen"


def _errors(env: RemoteEnv, steps: int, url: str, options: dict[str, Any]) -> str:
    env.reset(seed=6)
    space = env.action_space
    if isinstance(space, Discrete):
        wrong: Any = int(space.start) + int(space.n)
    elif isinstance(space, Box):
        wrong = np.full((*space.shape, 2), 0, space.dtype)
    else:
        wrong = object()
    client = env._client
    try:
        client.ask(m.Step, [["nonsense"]], region=b"\xff" * 64)
    except (SpaceError, Error):
        pass
    else:
        raise Fault("a nonsensical action was taken")
    try:
        env.step(wrong)
    except SpaceError:
        env.reset()
        env.step(space.sample())
        return "wrong actions are refused, and the environment goes on"
    raise Fault(f"the action {wrong!r} was taken")


_POINTS: dict[str, Callable[[RemoteEnv, int, str, dict[str, Any]], str]] = {
    "spaces": _spaces,
    "reset": _reset,
    "steps": _steps,
    "seeding": _seeding,
    "termination": _termination,
    "autoreset": _autoreset,
    "errors": _errors,
}


def show(findings: list[Finding]) -> None:
    """Print the findings as a table."""
    table = Table("point", "", "what was found")
    for finding in findings:
        table.add_row(finding.point, "[green]passed[/]" if finding.passed else "[red]FAULT[/]", finding.text)
    Console().print(table)


def measure(url: str, *, seconds: float = 2.0, **options: Any) -> list[Latency]:
    """Time the bare line and steps of the environment, one after the other."""
    env = connect(url, **options)
    try:
        env.reset(seed=0)
        action = env.action_space.sample()

        def step() -> None:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

        pings = [_timed("ping", seconds, env.ping)] if isinstance(env, RemoteEnv) else []  # a dialect has no ping
        return [*pings, _timed("step", seconds, step)]
    finally:
        env.close()


def _timed(what: str, seconds: float, request: Callable[[], Any]) -> Latency:
    times = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        request()
        times.append(time.perf_counter() - started)
    p50, p90, p99, most = (float(value) * 1e3 for value in np.percentile(times, [50, 90, 99, 100]))
    return Latency(what, p50, p90, p99, most, len(times) / sum(times))


def show_latencies(url: str, latencies: list[Latency]) -> None:
    """Print the times as a table."""
    table = Table("request", "p50 ms", "p90 ms", "p99 ms", "most ms", "per second", title=url)
    for row in latencies:
        figures = [f"{value:.3f}" for value in (row.p50, row.p90, row.p99, row.most)]
        table.add_row(row.what, *figures, f"{row.per_second:,.0f}")
    Console().print(table)
