"""The command line: one small function a command, each calling one function of the library."""

from __future__ import annotations

import json
import logging
import sys
import time
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
    from longrein.lab import benchmark
    from longrein.lab import spec as specs

    for file in files:
        for name, source in specs.read(file).items():
            load = benchmark.load if benchmark.is_benchmark(source) else specs.load
            print(f"{file}: {name}: right, {load(file, name).fingerprint}")


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


@spec_app.command("schema")
def schema_of_specs() -> None:
    """Print the JSON Schema of spec files, for an editor that completes and checks them."""
    from longrein.lab.spec_schema import spec_schema

    print(json.dumps(spec_schema(), indent=1))


@spec_app.command("import")
def import_specs(
    file: Annotated[Path, typer.Argument(help="A spec file of SLM-Lab, of 2018.")],
    to: Annotated[Path | None, typer.Option(help="The file to write, rather than the screen.")] = None,
    episode_steps: Annotated[int, typer.Option(help="Env steps of an episode, where the spec counts episodes.")] = 200,
) -> None:
    """Turn a spec file of SLM-Lab into ours, and say what could not be taken over."""
    from longrein.lab.spec_import import imported

    found = imported(file, episode_steps=episode_steps)
    for note in found.notes:
        print(note, file=sys.stderr)
    if to is None:
        print(found.yaml, end="")
    else:
        found.write(to)


@app.command()
def run(
    spec_file: Annotated[Path | None, typer.Argument(help="A file of specs; without one the demo runs.")] = None,
    name: Annotated[str | None, typer.Argument(help="Which spec, where the file has several.")] = None,
    mode: Annotated[str, typer.Argument(help="train; dev, one short session; search; enjoy; benchmark.")] = "train",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value in place of the spec's.")] = None,
    processes: Annotated[int | None, typer.Option(help="Sessions at once; as many as there are processors.")] = None,
    at: Annotated[str, typer.Option(help="Over what to train: websocket, http or nats.")] = "websocket",
    seed: Annotated[int, typer.Option(help="Seed of the training; evaluation has seeds of its own.")] = 0,
    env_steps: Annotated[int, typer.Option(help="Most environment steps to spend.")] = 200_000,
    data: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("data"),
    address: Annotated[str, typer.Option(help="Of a Ray cluster, for search; this machine without it.")] = "",
    resume: Annotated[Path | None, typer.Option(help="Go on with this run's folder, a search's too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, say what would run, train nothing.")] = False,
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
    if dry_run:
        return _dry_run(spec_file, name, mode, set_ or [], data)
    if resume is not None or mode == "search":
        raise typer.Exit(_search(spec_file, name, set_ or [], data, processes, address, resume))
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
    record: Annotated[Path | None, typer.Option(help="A folder for a video of each episode.")] = None,
    noise: Annotated[bool, typer.Option(help="Act as in training, with its exploration.")] = False,
) -> None:
    """Play what a run learned."""
    from longrein.lab import modes

    modes.enjoy(run, episodes=episodes, url=url, render=render, record=record, noise=noise)


DataFolder = Annotated[Path, typer.Option(help="Where run folders are.")]
RunNames = Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Names of run folders.")]


@app.command()
def runs(
    data: DataFolder = Path("data"),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """List the runs that are there: status, sessions, returns and fitness."""
    from longrein.lab import overview

    found = overview.overviews(data)
    if as_json:
        print(json.dumps([run.plain for run in found], indent=2))
    else:
        overview.show(found)


@app.command()
def schedule(
    file: Annotated[Path, typer.Argument(help='{"spec file": {"spec name": "mode"}}.')] = Path(
        "config/experiments.json"
    ),
    data: DataFolder = Path("data"),
    side_by_side: Annotated[int, typer.Option(min=1, help="Entries that run at once.")] = 1,
    processes: Annotated[int | None, typer.Option(help="Sessions at once, of each entry.")] = None,
    again: Annotated[bool, typer.Option(help="Run finished entries once more.")] = False,
    stop_on_failure: Annotated[bool, typer.Option(help="Start nothing more when an entry fails.")] = False,
) -> None:
    """Run several specs, in a row or side by side. What is finished is not run again; a failure ends no other."""
    from longrein.lab.modes import run_entries

    raise typer.Exit(
        run_entries(
            file, data, side_by_side=side_by_side, processes=processes, again=again, stop_on_failure=stop_on_failure
        )
    )


@app.command()
def stop(
    run: RunNames = None,
    data: DataFolder = Path("data"),
    wait: Annotated[float, typer.Option(help="Seconds to wait for them to end.")] = 60.0,
) -> None:
    """End running experiments as Ctrl-C does: they finish their folders. Without a name all of them, and schedules."""
    from longrein.lab import overview, processes

    folders = [overview.run_named(data, one) for one in run] if run else processes.running(data)
    told = processes.stop(folders, wait=wait)
    for one in told:
        print(f"{one.folder}: {one.says}")
    if not told:
        print(f"nothing runs in {data}")
    raise typer.Exit(0 if all(one.ended for one in told) else 1)


@app.command()
def clear(
    run: RunNames = None,
    data: DataFolder = Path("data"),
    older_than: Annotated[str, typer.Option(help="Only runs unchanged for so long: 30m, 12h, 7d, 2w.")] = "",
    unfinished: Annotated[bool, typer.Option(help="Only runs that did not come to their end.")] = False,
    all_: Annotated[bool, typer.Option("--all", help="All runs.")] = False,
    yes: Annotated[bool, typer.Option(help="Do not ask.")] = False,
) -> None:
    """Remove run folders: by name, by age, or unfinished ones. It shows them and asks; running ones stay."""
    from longrein.lab import clearing

    if not (run or older_than or unfinished or all_):
        raise SpecError("clear", "names no run", hint="give names, --older-than 7d, --unfinished or --all")
    age = clearing.seconds_of(older_than) if older_than else None
    found = clearing.candidates(data, run or [], older_than=age, unfinished=unfinished)
    clearing.show(found)
    if found and (yes or typer.confirm(f"remove {len(found)} of the runs in {data}?")):
        for one in found:
            clearing.remove(data, one.run.folder)
            print(f"removed {one.run.folder}")


@app.command()
def sync(
    to: Annotated[str, typer.Argument(metavar="DEST", help="A folder, or a URL that fsspec knows.")],
    data: DataFolder = Path("data"),
    watch: Annotated[float | None, typer.Option(help="Again every so many seconds, until Ctrl-C.")] = None,
) -> None:
    """Copy new and changed run files elsewhere. Nothing is removed there; cut off, it goes on where it was."""
    from longrein.lab.sync import Destination

    destination = Destination(data, to)
    while True:
        done = destination.sync()
        print(f"{to}: {done.copied} files copied, {done.bytes:,} bytes; {done.skipped} were there", flush=True)
        if watch is None:
            return
        time.sleep(watch)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, sessions or benchmarks.")],
) -> None:
    """Draw a run's graphs again and write its report.html, from its files alone."""
    from longrein.lab.report import write

    for run in runs:
        print(write(run))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, of whose sessions the best is taken, or a session's.")],
    file: Annotated[Path, typer.Argument(help="Where the policy goes, as policy.safetensors.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Also its graph, beside it, as policy.onnx.")] = False,
    body: Annotated[str | None, typer.Option(help="Whose, as 0.1.0, where a session has several bodies.")] = None,
) -> None:
    """Write what a run learned to one file, which acts without the lab: see longrein.load_policy."""
    from longrein.lab.export import policy_of
    from longrein.lab.saved_policy import save_policy

    saved = policy_of(run, body=body)
    save_policy(file, saved.policy, saved.about)
    print(f"{file}: {saved.about.algorithm}, trained on {saved.about.env or 'an unnamed environment'}")
    if onnx:
        from longrein.lab.onnx_graph import save_onnx

        save_onnx(file.with_suffix(".onnx"), saved)
        print(file.with_suffix(".onnx"))


@app.command()
def act(
    policy: Annotated[Path, typer.Argument(help="What `longrein export` wrote, or a run's or a session's folder.")],
    at: Annotated[list[str], typer.Option(help="URL to listen at; port 0 takes a free one. May be repeated.")],
    body: Annotated[str | None, typer.Option(help="Whose, as 0.1.0, where a session has several bodies.")] = None,
    batch: Annotated[int, typer.Option(help="Most rows that are answered together.")] = 256,
    wait: Annotated[float, typer.Option(help="Longest that a request waits for others, in seconds.")] = 0.002,
    seed: Annotated[int, typer.Option(help="Of the choices of clients that ask for noise.")] = 0,
    max_sessions: Annotated[int, typer.Option(help="Most sessions at once.")] = 1024,
    max_rows: Annotated[int, typer.Option(help="Most rows that one session may hold.")] = 4096,
    idle: Annotated[float, typer.Option(help="Seconds without a request after which a session is closed.")] = 1800.0,
    max_message_mb: Annotated[int, typer.Option(help="Longest message taken, in MiB.")] = 64,
    token_file: TokenFile = None,
    insecure: Annotated[bool, typer.Option(help="Listen beyond this machine without a token.")] = False,
    certificate: Annotated[Path | None, typer.Option(help="Certificate for wss:// and https://.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="Take only clients whose certificate this authority signed.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="Authority of a broker's certificate.")] = None,
    credentials: Annotated[
        Path | None, typer.Option(help="JSON file with a broker's user, password, token, ...")
    ] = None,
    quiet: Annotated[bool, typer.Option(help="Only warnings.")] = False,
) -> None:
    """Serve a policy: observations in, actions out, over WebSocket, HTTP and NATS. See longrein.connect_policy."""
    from longrein.lab.acting import policy_server
    from longrein.lab.export import policy_of
    from longrein.link.server import Limits

    _log_to_stderr(logging.WARNING if quiet else logging.INFO)
    limits = Limits(max_message_mb * 2**20, max_sessions, max_sessions, max_rows, idle_seconds=idle)
    server = policy_server(
        policy_of(policy, body=body), at, max_rows=batch, max_wait=wait, seed=seed, token_file=token_file,
        insecure=insecure, certificate=certificate, key=key, client_ca=client_ca, ca=ca,
        credentials=_json_file(credentials), limits=limits,
    )  # fmt: skip
    with server:
        for url in server.urls:
            print(f"listening on {url}", flush=True)
        server.wait()


def _run_spec(file: Path, name: str | None, mode: str, changes: list[str], data: Path, processes: int | None) -> int:
    from longrein.lab import benchmark
    from longrein.lab import spec as specs
    from longrein.lab.modes import run_benchmark, run_mode

    if mode == "benchmark":
        return run_benchmark(benchmark.load(file, name, specs.override_pairs(changes)), data, processes)
    return run_mode(specs.load(file, name, specs.override_pairs(changes)), mode, data, processes)


def _dry_run(file: Path | None, name: str | None, mode: str, changes: list[str], data: Path) -> None:
    from longrein.lab import benchmark, modes
    from longrein.lab import spec as specs

    if file is None:
        raise SpecError("dry-run", "needs a file of specs", hint="longrein run spec/demo.yaml --dry-run")
    if mode == "benchmark":
        asked = benchmark.load(file, name, specs.override_pairs(changes))
        for entry, _ in asked.specs:
            print(f"{entry.label}: {entry.env_steps:,} env steps from each of the seeds {list(asked.seeds)}")
        return
    modes.dry_run(specs.load(file, name, specs.override_pairs(changes)), mode, data)


def _search(
    file: Path | None, name: str | None, changes: list[str], data: Path, processes: int | None, address: str,
    resume: Path | None,
) -> int:  # fmt: skip
    from longrein.lab import spec as specs
    from longrein.lab.modes import ending_like_ctrl_c, resume_run
    from longrein.lab.search import resume_mode, search_mode

    if resume is not None and not (resume / "experiment.json").exists():
        return resume_run(resume, processes)
    with ending_like_ctrl_c():
        if resume is not None:
            return resume_mode(resume, processes, address)
        if file is None:
            raise SpecError("run", "search needs a file of specs", hint="longrein run spec/search.yaml NAME search")
        return search_mode(specs.load(file, name, specs.override_pairs(changes)), data, processes, address)


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
