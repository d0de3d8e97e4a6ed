"""The command line: one small function a command, each calling one function of the library."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from longrein.errors import Error, SpecError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Reinforcement learning on environments that live elsewhere.",
)

TokenFile = Annotated[
    Path | None, typer.Option(help="File with the token; tokens with scopes, a line each, for serve.")
]
CaFile = Annotated[Path | None, typer.Option(help="File of the authority that signed the server's certificate.")]


@app.command()
def serve(
    env: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ENV]...",
            help="An id (CartPole-v1), KIND:NAME (atari:pong; see `longrein envs`), or a function (file.py:factory).",
        ),
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option(help="URL to listen at; port 0 takes a free one. May be repeated.")
    ] = None,
    dial: Annotated[list[str] | None, typer.Option(help="URL of a trainer that waits, to dial out to.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="key=value for the environments' makers, fixed here.")
    ] = None,
    allow_option: Annotated[
        list[str] | None, typer.Option(help="An option that clients may pass; * allows all.")
    ] = None,
    num_envs: Annotated[int, typer.Option(help="Most environments that one lease may hold.")] = 4096,
    max_leases: Annotated[int, typer.Option(help="Most leases at once.")] = 1024,
    lease_ttl: Annotated[float, typer.Option(help="Seconds that a lease outlives its lost connection.")] = 60.0,
    idle: Annotated[float, typer.Option(help="Seconds without a request after which a lease is closed.")] = 1800.0,
    step_timeout: Annotated[float, typer.Option(help="Seconds that one request may take in the environment.")] = 300.0,
    max_message_mb: Annotated[int, typer.Option(help="Longest message taken, in MiB.")] = 64,
    workers: Annotated[str, typer.Option(help="Where environments run: auto, inline, thread or process.")] = "auto",
    token_file: TokenFile = None,
    insecure: Annotated[bool, typer.Option(help="Listen beyond this machine without a token.")] = False,
    certificate: Annotated[Path | None, typer.Option(help="Certificate for wss:// and https://.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="Take only clients whose certificate this authority signed.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="Authority of a broker's or a waiting trainer's certificate.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="Origin of web pages that may connect.")] = None,
    credentials: Annotated[
        Path | None, typer.Option(help="JSON file with a broker's user, password, token, ...")
    ] = None,
    dialect: Annotated[
        str | None, typer.Option(help="Speak an older system's wire format: gymie, gym-nats or multiserver.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Servers on consecutive ports, a process each.")] = 1,
    quiet: Annotated[bool, typer.Option(help="Only warnings.")] = False,
) -> None:
    """Serve environments. What is named here is what clients may open, and nothing else.

    With `--dialect gymie` and no ENV that is every environment that Gymnasium knows here, as Gymie has it.
    """
    from longrein.link.fleet import open_server
    from longrein.link.makers import unity_setup
    from longrein.link.server import Limits

    unity_setup.move(env or [])
    _log_to_stderr(logging.WARNING if quiet else logging.INFO)
    limits = Limits(max_message_mb * 2**20, max_leases, max_leases, num_envs, lease_ttl, idle, step_timeout)
    server = open_server(
        env or [],
        at=at or [],
        dial=dial or [],
        dialect=dialect,
        count=count,
        options=_pairs(option or []),
        allow_options=allow_option or (),
        token_file=token_file,
        insecure=insecure,
        certificate=certificate,
        key=key,
        client_ca=client_ca,
        ca=ca,
        allowed_origins=allow_origin or (),
        workers=workers,
        limits=limits,
        credentials=_json_file(credentials),
    )
    with server:
        for url in server.urls:
            print(f"listening on {url}" if url not in (dial or ()) else f"dialling {url}", flush=True)
        server.wait()


@app.command()
def check(
    url: Annotated[str, typer.Argument(help="Where the environment is served.")],
    steps: Annotated[int, typer.Option(help="Steps to look at.")] = 300,
    token_file: TokenFile = None,
    ca: CaFile = None,
) -> None:
    """Examine a server: is what it serves an honest environment? Exits with 1 on a fault."""
    from longrein.link.check import examine, show

    findings = examine(url, steps=steps, token=_token(token_file), ca=ca)
    show(findings)
    raise typer.Exit(1 if any(not finding.passed for finding in findings) else 0)


@app.command()
def ping(
    url: Annotated[str, typer.Argument(help="Where the environment is served.")],
    seconds: Annotated[float, typer.Option(help="How long to measure each.")] = 2.0,
    token_file: TokenFile = None,
    ca: CaFile = None,
) -> None:
    """Measure a line: percentiles of the round trip, and steps per second."""
    from longrein.link.check import measure, show_latencies

    show_latencies(url, measure(url, seconds=seconds, token=_token(token_file), ca=ca))


@app.command()
def envs(
    kind: Annotated[str | None, typer.Argument(help="List all names of this kind, as atari.")] = None,
) -> None:
    """List what this machine can serve, and how to install what it cannot."""
    from longrein.link.makers.listing import show

    show(kind)


@app.command()
def install(
    env: Annotated[list[str], typer.Argument(metavar="KIND:NAME...", help="What to serve later, as unity:3dball.")],
) -> None:
    """Install what is needed to serve environments: Unity players here, all else by the pip command that it prints."""
    from longrein.link.makers.installing import install_all

    install_all(env)


spec_app = typer.Typer(no_args_is_help=True, help="Check and show spec files.")
app.add_typer(spec_app, name="spec")


@spec_app.command("check")
def check_specs(files: Annotated[list[Path], typer.Argument(help="Files of specs.")]) -> None:
    """Check every spec of some files; exits with 1 at the first mistake."""
    from longrein.lab import spec as specs

    for file in files:
        for name in specs.read(file):
            print(f"{file}: {name}: right, {specs.load(file, name).fingerprint}")


@spec_app.command("show")
def show_spec(
    file: Annotated[Path, typer.Argument(help="A file of specs.")],
    name: Annotated[str | None, typer.Argument(help="Which, where the file has several.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value in place of the spec's.")] = None,
) -> None:
    """Show a spec resolved, with every default."""
    from longrein.lab import spec as specs

    spec = specs.load(file, name, specs.override_pairs(set_ or []))
    print(specs.as_yaml({spec.name: spec.plain}), end="")


@app.command()
def run(
    spec_file: Annotated[Path | None, typer.Argument(help="A file of specs; without one the demo runs.")] = None,
    name: Annotated[str | None, typer.Argument(help="Which spec, where the file has several.")] = None,
    mode: Annotated[str, typer.Argument(help="train, or dev: one short session.")] = "train",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value in place of the spec's.")] = None,
    processes: Annotated[int | None, typer.Option(help="Sessions at once; as many as there are processors.")] = None,
    at: Annotated[str, typer.Option(help="Over what to train: websocket, http or nats.")] = "websocket",
    seed: Annotated[int, typer.Option(help="Seed of the training; evaluation has seeds of its own.")] = 0,
    env_steps: Annotated[int, typer.Option(help="Most environment steps to spend.")] = 200_000,
    data: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("data"),
) -> None:
    """Train what a spec says. Without a spec: serve CartPole-v1 in another process, train PPO on it over the link."""
    try:
        from longrein.lab.demo import run_demo
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("longrein"):
            raise
        raise SpecError(
            "run", f"training needs the package {error.name!r}", hint="pip install 'longrein[lab]'"
        ) from None
    if spec_file is not None:
        raise typer.Exit(_run_spec(spec_file, name, mode, set_ or [], data, processes))
    result = run_demo(at, max_env_steps=env_steps, seed=seed, data=str(data))
    raise typer.Exit(0 if result.solved else 1)


@app.command()
def enjoy(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one of its sessions'.")],
    episodes: Annotated[int, typer.Option(help="How many to play.")] = 5,
    url: Annotated[str, typer.Option(help="Play it there, rather than where it was trained.")] = "",
    render: Annotated[bool, typer.Option(help="In a window.")] = False,
    noise: Annotated[bool, typer.Option(help="Act as in training, with its exploration.")] = False,
) -> None:
    """Play what a run learned."""
    from longrein.lab import modes

    modes.enjoy(run, episodes=episodes, url=url, render=render, noise=noise)


@app.command()
def runs(data: Annotated[Path, typer.Option(help="Where run folders are.")] = Path("data")) -> None:
    """List the runs that are there."""
    from longrein.lab.modes import show_runs

    show_runs(data)


def _run_spec(file: Path, name: str | None, mode: str, changes: list[str], data: Path, processes: int | None) -> int:
    from longrein.lab import spec as specs
    from longrein.lab.modes import run_mode

    return run_mode(specs.load(file, name, specs.override_pairs(changes)), mode, data, processes)


def _pairs(texts: list[str]) -> dict[str, Any]:
    """key=value texts; a value is JSON where it is that, else the text itself."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise SpecError("option", f"{text!r} is not key=value", hint="as in --option is_slippery=false")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError:
            pairs[key] = value
    return pairs


def _json_file(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SpecError("credentials", f"cannot be read: {error}", file=str(path)) from None
    if not isinstance(found, dict):
        raise SpecError("credentials", "is no JSON object", file=str(path), hint='{"user": ..., "password": ...}')
    return {str(key): str(value) for key, value in found.items()}


def _token(path: Path | None) -> str | None:
    """The first token of a token file."""
    if path is None:
        return None
    try:
        lines = [line.split()[0] for line in path.read_text().splitlines() if line.strip() and line.strip()[0] != "#"]
    except OSError as error:
        raise SpecError("token-file", f"cannot be read: {error}") from None
    if not lines:
        raise SpecError("token-file", "holds no token", file=str(path))
    return lines[0]


def _log_to_stderr(level: int) -> None:
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")


def main() -> None:
    """The entry point: whatever goes wrong is one clear message and exit status 1, or a defect with its traceback."""
    try:
        app()
    except Error as error:
        print(f"longrein: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("longrein: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
