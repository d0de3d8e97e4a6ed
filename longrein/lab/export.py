"""What a run learned, as a policy that acts by itself. Knows run folders and checkpoints, no file of a policy."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from longrein.errors import CheckpointError, RunError
from longrein.lab import checkpoint
from longrein.lab.experiment import open_envs
from longrein.lab.records import sessions_of, spec_of
from longrein.lab.saved_policy import About, SavedPolicy, Spaces, algorithm_in, load_policy, with_makers
from longrein.lab.spec import EnvSpec, from_plain
from longrein.learn import algorithms
from longrein.link.spaces import space_from


def policy_of_run(
    folder: str | Path, spaces: Spaces | None = None, *, body: str | None = None, **makers: Any
) -> SavedPolicy:
    """What a run learned: folder is a run's, of whose sessions the best is taken, or one of its sessions'.

    The best is that of the highest mean evaluation return. body: whose, as "a.e.b"; None takes the first.
    spaces: what it sees and what it does; None takes what the checkpoint says, or asks the environments where it
    says nothing. makers: as of `load_policy`.
    Raises RunError for what is no run, CheckpointError, and LinkError when its environments cannot be reached.
    """
    folder = Path(folder)
    run = folder if (folder / "settings.json").exists() else folder.parent
    envs = _envs_of(run)
    session = best_session(run) if folder == run else folder
    path = session / "checkpoint.pt"
    entry = _entry(path, body)
    identity = entry["identity"]
    label = identity.get("bodies", ("0.0.0",))[0]
    env = envs[int(label.split(".")[1])]
    seen, done = spaces or _spaces_in(identity) or spaces_of(env)
    for name, space in (("observation_space", seen), ("action_space", done)):
        if identity[name] != str(space):
            raise CheckpointError(str(path), f"was made for {name} {identity[name]}, got {space}",
                                  hint="the environment has changed since")  # fmt: skip
    settings = with_makers(identity["config"], makers)
    config_class, build = algorithms.load(identity["algorithm"])
    algorithm = build(algorithms.config_from(config_class, settings), seen, done, 0)
    algorithm.load_state_dict(entry["state"])
    where = env.id or (env.url if isinstance(env.url, str) else ", ".join(env.url))
    return SavedPolicy(
        algorithm.policy, About(identity["algorithm"], settings, seen, done, where, int(entry["env_steps"]))
    )


def algorithm_of(source: str | Path) -> str:
    """The algorithm of an exported file, a run's folder or a session's. Raises CheckpointError, RunError."""
    path = Path(source)
    if not path.is_dir():
        return algorithm_in(path)
    session = best_session(path) if (path / "settings.json").exists() else path
    return str(_entry(session / "checkpoint.pt", None)["identity"]["algorithm"])


def _entry(path: Path, body: str | None) -> dict[str, Any]:
    """What a checkpoint holds of one body. Raises CheckpointError."""
    saved = checkpoint.load(path)
    entries: dict[str, dict[str, Any]] = {}
    for one in (saved, *saved.get("others", ())):
        for label in one["identity"].get("bodies", ("0.0.0",)):
            entries.setdefault(label, one)
    if body is not None and body not in entries:
        raise CheckpointError(str(path), f"has no body {body}", hint="one of " + ", ".join(entries))
    return entries[body] if body is not None else saved


def _spaces_in(identity: dict[str, Any]) -> Spaces | None:
    seen, done = identity.get("spaces", (None, None))
    return None if seen is None or done is None else (space_from(seen), space_from(done))


def spaces_of(env: EnvSpec) -> Spaces:
    """What is seen and what is done in an environment of a spec. Raises SpecError, LinkError."""
    with closing(open_envs(env, 1)) as envs:
        return envs.single_observation_space, envs.single_action_space


def _envs_of(run: Path) -> tuple[EnvSpec, ...]:
    """The environments that a run was trained in: of its spec, or of the demo's settings."""
    try:
        settings = json.loads((run / "settings.json").read_text())["settings"]
    except (OSError, ValueError, KeyError):
        raise RunError(f"{run} is no run", hint="longrein runs lists what is there") from None
    if "spec" not in settings and isinstance(settings.get("env"), str):
        return (EnvSpec(id=settings["env"]),)
    return from_plain(*spec_of(run)).envs


def best_session(run: Path) -> Path:
    """The session folder with the highest mean evaluation return; training return where there is none.

    Raises RunError when no session has a checkpoint.
    """
    found: list[tuple[float, float, Path]] = []
    for session in sessions_of(run):
        if not (session / "checkpoint.pt").exists():
            continue
        try:
            result = json.loads((session / "result.json").read_text())
        except (OSError, ValueError):
            result = {}
        played = [float(one) for one in result.get("evaluation") or []]
        training = result.get("training_mean")
        found.append((
            float(np.mean(played)) if played else float("-inf"),
            float(training) if training is not None else float("-inf"),
            session,
        ))  # fmt: skip
    if not found:
        raise RunError(f"{run} has no session with a checkpoint", hint="train it first")
    return max(found, key=lambda one: one[:2])[2]


def policy_of(
    source: str | Path, spaces: Spaces | None = None, *, body: str | None = None, **makers: Any
) -> SavedPolicy:
    """A policy out of an exported file, a run's folder or a session's folder. Raises CheckpointError, RunError."""
    path = Path(source)
    return policy_of_run(path, spaces, body=body, **makers) if path.is_dir() else load_policy(path, **makers)
