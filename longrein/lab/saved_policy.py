"""A trained policy as one file: its weights, and all that says what they are. Knows no run and no environment.

The file is of the safetensors format. Its tensors are the policy's; its metadata (texts) are

    format              longrein.policy
    version             of this layout, 1
    algorithm, config   which policy they belong to: a name of the table, and its Config as JSON
    observation_space, action_space    as JSON, by the published schema of longrein.link.spaces
    net                 the policy's modules, for who reads the file
    normaliser          "observation" where running statistics are among the tensors, else "none"
    recurrent           "none", "gru" or "lstm"
    env, env_steps      where it was trained, and for how long; "" and 0 where nobody said
    longrein            the package's version that wrote it
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

from longrein.errors import CheckpointError, SpecError
from longrein.lab.actor import act
from longrein.lab.records import as_plain
from longrein.learn import algorithms
from longrein.learn.algorithms import Algorithm, Policy, initial_state
from longrein.learn.normalise import ObservationNormaliser
from longrein.link import spaces as link_spaces
from longrein.link.observations import as_batch, rows_of

Spaces = tuple["gymnasium.Space[Any]", "gymnasium.Space[Any]"]
"""What is seen, and what is done."""
FORMAT = "longrein.policy"
VERSION = "1"


@dataclass(frozen=True)
class About:
    """What a policy is, beside its weights."""

    algorithm: str
    """Name in the table of algorithms."""
    config: Mapping[str, Any]
    """The algorithm's settings, plain."""
    observation_space: gymnasium.Space[Any]
    """What it sees."""
    action_space: gymnasium.Space[Any]
    """What it does."""
    env: str = ""
    """Where it was trained; "" where nobody said."""
    env_steps: int = 0
    """Env steps that it learnt from."""

    @property
    def recurrent(self) -> str:
        """none, gru or lstm."""
        net = self.config.get("net")
        return str(net.get("recurrent", "none")) if isinstance(net, Mapping) else "none"


class SavedPolicy:
    """A policy that acts without the lab.

    `act` takes one observation and remembers, where the policy is recurrent, what it saw since `reset`. `act_batch`
    takes many and remembers nothing: the state is handed in and out. Used by one thread at a time.
    """

    def __init__(self, policy: Policy, about: About) -> None:
        self.policy = policy
        self.about = about
        self.observation_space = about.observation_space
        self.action_space = about.action_space
        self.recurrent = initial_state(policy, 1) is not None
        self._state = self.initial_state(1)

    def initial_state(self, rows: int) -> NDArray[np.float32] | None:
        """The state [rows, S] in which episodes begin; None where the policy is not recurrent."""
        return initial_state(self.policy, rows)

    def reset(self) -> None:
        """Begin an episode: forget what `act` saw so far."""
        self._state = self.initial_state(1)

    def act(self, observation: Any, deterministic: bool = True, generator: torch.Generator | None = None) -> Any:
        """One observation -> the action for it, as an environment takes it.

        generator: of a choice that is not deterministic; None takes torch's. Raises SpaceError for an observation
        that does not belong to the space; numbers outside its bounds pass, NaN does not.
        """
        batch = as_batch(self.observation_space, observation)
        actions, self._state = self._act(batch, deterministic, self._state, generator)
        return link_spaces.iterate(self.action_space, actions, 1)[0]

    def act_batch(
        self,
        observations: Any,
        deterministic: bool = True,
        state: NDArray[np.float32] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, NDArray[np.float32] | None]:
        """N observations as a vector environment batches them -> actions as it takes them, and the next state [N, S].

        state: what the last call gave, zeros in the rows where an episode begins; None begins all of them. It is None
        for a policy that is not recurrent. Raises SpaceError.
        """
        rows = rows_of(self.observation_space, observations)
        batch = as_batch(self.observation_space, observations, rows)
        return self._act(batch, deterministic, self.initial_state(rows) if state is None else state, generator)

    def _act(
        self,
        batch: Any,
        deterministic: bool,
        state: NDArray[np.float32] | None,
        generator: torch.Generator | None,
    ) -> tuple[Any, NDArray[np.float32] | None]:
        stored, state = self.decide(self.policy.encode(batch), deterministic, state, generator)
        return self.policy.for_env(stored), state

    def decide(
        self,
        encoded: NDArray[np.generic],
        deterministic: bool,
        state: NDArray[np.float32] | None,
        generator: torch.Generator | None = None,
    ) -> tuple[NDArray[np.generic], NDArray[np.float32] | None]:
        """Encoded observations [N, ...], as `policy.encode` gives them -> actions for `policy.for_env`, next state."""
        stored, extras = act(self.policy, encoded, state, deterministic=deterministic, generator=generator)
        return stored, extras.get("next_state")  # type: ignore[return-value]  # float32, by the policy's contract


# ------------------------------------------------------------------------------------------------------------ the file


def save_policy(path: Path, policy: Policy, about: About) -> None:
    """Write a policy to one file; who reads meanwhile sees the old one, whole. Raises CheckpointError."""
    if not isinstance(policy, nn.Module):
        raise CheckpointError(
            str(path), f"the policy of {about.algorithm!r} is no torch.nn.Module, so its weights have no names",
            hint="make it one",
        )  # fmt: skip
    # Clones: weights may be views of one long tensor, which a file of named tensors cannot say.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in policy.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "algorithm": about.algorithm,
        "config": json.dumps(as_plain(about.config)),
        "observation_space": json.dumps(link_spaces.describe(about.observation_space)),
        "action_space": json.dumps(link_spaces.describe(about.action_space)),
        "net": str(policy),
        "normaliser": "observation" if any(isinstance(m, ObservationNormaliser) for m in policy.modules()) else "none",
        "recurrent": about.recurrent,
        "env": about.env,
        "env_steps": str(about.env_steps),
        "longrein": package_version("longrein"),
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(safetensors.torch.save(tensors, metadata))
        beside.replace(path)
    except OSError as error:
        if beside.exists():
            beside.unlink()
        raise CheckpointError(str(path), f"cannot be written: {error}") from error


def load_policy(path: str | Path, **makers: Any) -> SavedPolicy:
    """A policy out of a file that `longrein export` wrote. It acts by itself: no run and no environment is needed.

    makers: feature_maker, model_maker or state_to_input, where the policy was made with functions of yours that cannot
    be found by their names. Raises CheckpointError for a file that is damaged or is none, SpecError.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    config_class, build = algorithms.load(metadata["algorithm"])
    settings = with_makers(json.loads(metadata["config"]), makers)
    about = About(
        metadata["algorithm"],
        settings,
        link_spaces.space_from(json.loads(metadata["observation_space"])),
        link_spaces.space_from(json.loads(metadata["action_space"])),
        metadata.get("env", ""),
        int(metadata.get("env_steps", "0")),
    )
    config = algorithms.config_from(config_class, settings)
    policy = build(config, about.observation_space, about.action_space, 0).policy
    assert isinstance(policy, nn.Module), "save_policy writes no other"
    try:
        policy.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            str(path), f"its weights do not fit its settings: {str(error).splitlines()[-1].strip()}",
            hint="a maker that is not the one it was trained with, or another version of longrein",
        ) from None  # fmt: skip
    return SavedPolicy(policy.requires_grad_(False), about)


def algorithm_in(path: str | Path) -> str:
    """The name of the algorithm whose policy a file holds. Raises CheckpointError."""
    return _read(Path(path))[1]["algorithm"]


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except FileNotFoundError:
        raise CheckpointError(str(path), "there is no such file", hint="longrein export RUN FILE writes one") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            str(path), f"is no file of a policy: {error}", hint="longrein export RUN FILE writes one"
        ) from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(str(path), "holds tensors, but no policy of longrein",
                              hint="longrein export RUN FILE writes one")  # fmt: skip
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            str(path), f"expected layout {VERSION}, found {metadata.get('version')}",
            hint=f"longrein {metadata.get('longrein')} wrote it",
        )  # fmt: skip
    return tensors, metadata


def with_makers(settings: Mapping[str, Any], makers: Mapping[str, Any]) -> dict[str, Any]:
    """An algorithm's settings with the makers of its net. Raises SpecError for one that is missing."""
    known = ("feature_maker", "model_maker", "state_to_input")
    for name in makers:
        if name not in known:
            raise SpecError(name, "is no maker of a net", hint="one of " + ", ".join(known))
    net = {**(settings.get("net") or {}), **makers}
    for name in known:
        if isinstance(net.get(name), str) and "<" in net[name]:  # as in module:function.<locals>.<lambda>
            raise SpecError(f"net.{name}", f"was {net[name]}, which has no name to be found by", hint=f"give {name}=")
    return {**settings, "net": net} if net else dict(settings)


def begin_with(algorithm: Algorithm, saved: SavedPolicy) -> None:
    """Give an algorithm that is new the weights of a policy; its target networks too. Raises CheckpointError."""
    weights = saved.policy.state_dict() if isinstance(saved.policy, nn.Module) else {}
    state = algorithm.state_dict()
    try:
        state["policy"] = {name: weights[name] for name in state["policy"]}
        for name, inside in (("target", "net."), ("target_policy", ""), ("average", "")):
            known = state.get(name)
            if isinstance(known, Mapping) and all(inside + key in weights for key in known):
                state[name] = {key: weights[inside + key] for key in known}
        algorithm.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            saved.about.env or "load_model", f"its weights do not fit: {str(error).splitlines()[-1].strip()}",
            hint="the same algorithm, net and spaces as it was trained with",
        ) from None  # fmt: skip
