"""A policy as an ONNX graph: encoded observations in, what it computes and its deterministic action out.

Knows how each policy of the table says what it does; runs nothing but the check that the graph does the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import RunError, SpecError
from longrein.lab.saved_policy import About, SavedPolicy
from longrein.learn import policy_value
from longrein.learn.action_values import ValuePolicy
from longrein.learn.actor_critic import ActorCriticPolicy
from longrein.learn.algorithms import acer_policies, crossq, ppo, sac, td3
from longrein.learn.bounded import BoundedForm
from longrein.learn.inputs import Inputs
from longrein.learn.noisy import quiet
from longrein.learn.policy_value import PolicyValue
from longrein.learn.torsos import zeros
from longrein.link import spaces

OPSET = 18
ROWS = 5  # of the comparison: another number than the graph is traced with


class Graph(nn.Module):
    """What is exported: (observation[, state]) -> (what the policy computes, action[, next_state])."""

    said: str  # the name of the first output

    def __init__(self, policy: nn.Module, action_space: gymnasium.Space[Any]) -> None:
        super().__init__()
        self.policy = policy
        self.said, self._say, self.state_size = _way_of(policy)
        self._to_env = _to_env(policy, action_space)
        self.inputs: Inputs | None = getattr(policy, "inputs", None)  # ACER's policies, which take no masks, have none
        scale = None if self.inputs is None else self.inputs.scale
        self._scale = None if scale is None else [torch.from_numpy(array) for array in scale]

    def forward(self, observation: Tensor, state: Tensor | None = None) -> tuple[Tensor, ...]:
        """Observations [N, ...], encoded but not rescaled, and states [N, S] of a recurrent policy."""
        if self._scale is not None:
            centre, per_unit = self._scale
            observation = (observation - centre) * per_unit
        said, stored, next_state = self._say(observation, state)
        action = self._to_env(stored)
        return (said, action) if next_state is None else (said, action, next_state)


Say = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]
"""(encoded observations, state) -> (numbers, deterministic actions as they are stored, next state or None)."""


def save_onnx(path: Path, saved: SavedPolicy) -> None:
    """Write the graph of a policy to one file, and hold it against the policy on random observations.

    Inputs: `observation` [N, ...], encoded as `policy.encode` does it but not rescaled, and `state` [N, S] of a
    recurrent policy.
    Outputs: `action_values` [N, A], `parameters` [N, P] of the action's distribution, or `squashed` [N, K] in [-1, 1];
    `action` as the environment takes it; `next_state`. The file's metadata say the rest as JSON.
    Raises SpecError for a policy without a graph, RunError when the graph does not do what the policy does.
    """
    policy, about = saved.policy, saved.about
    if not isinstance(policy, nn.Module):
        raise SpecError("onnx", f"the policy of {about.algorithm!r} is no torch.nn.Module")
    graph = Graph(policy, saved.action_space).eval()
    example = _observations(saved, graph, 2)
    inputs = {"observation": torch.from_numpy(example)}
    if graph.state_size:
        inputs["state"] = torch.zeros(2, graph.state_size)
    outputs = [graph.said, "action"] + (["next_state"] if graph.state_size else [])
    _require("onnx", "onnxscript")
    nets = [module for module in policy.modules() if isinstance(module, ValuePolicy)]
    with contextlib.ExitStack() as stack:
        for net in nets:
            stack.enter_context(quiet(net.net))
        stack.enter_context(_without_chatter())
        program = torch.onnx.export(
            graph, tuple(inputs.values()), dynamo=True, opset_version=OPSET, input_names=list(inputs),
            output_names=outputs, dynamic_shapes=tuple({0: "rows"} for _ in inputs), verbose=False,
        )  # fmt: skip
    assert program is not None, "a program comes back where no file is named"
    program.model.metadata_props.update(_metadata(about, policy))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(beside), external_data=False)
        _compare(beside, saved, graph)
        beside.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error}") from error
    finally:
        if beside.exists():
            beside.unlink()


def _way_of(policy: nn.Module) -> tuple[str, Say, int]:
    """The name of what the policy computes, how it does, and the size of its state: 0 where it has none."""
    if isinstance(policy, ValuePolicy):
        return "action_values", lambda seen, _: _best(policy.values(seen)), 0
    if isinstance(policy, ActorCriticPolicy | ppo.Policy):
        net = policy.net
        size = net.state_size if isinstance(net, PolicyValue) else 0
        return "parameters", _of_policy_value(policy), size
    if isinstance(policy, acer_policies.Choices):
        return "parameters", lambda seen, _: _best(policy.statistics(seen)), 0
    if isinstance(policy, acer_policies.Continuous):
        return "parameters", lambda seen, _: _same(policy.statistics(seen)), 0
    if isinstance(policy, td3.Policy):
        return "squashed", lambda seen, _: _same(policy(seen)), 0
    if isinstance(policy, crossq.Policy):
        return "squashed", lambda seen, _: _same(policy.distribution(seen).mode()), 0
    if isinstance(policy, sac.Policy):
        if policy.form is not None:
            return "squashed", lambda seen, _: _same(policy.distribution(*policy.inputs.split(seen)).mode()), 0
        return "parameters", lambda seen, _: _likeliest(policy.distribution(*policy.inputs.split(seen))), 0
    raise SpecError("onnx", f"{type(policy).__module__}.{type(policy).__qualname__} has no graph",
                    hint="the table's policies have one, but for random's; leave --onnx out")  # fmt: skip


def _best(values: Tensor) -> tuple[Tensor, Tensor, None]:
    return values, values.argmax(-1), None


def _same(numbers: Tensor) -> tuple[Tensor, Tensor, None]:
    return numbers, numbers, None


def _likeliest(distribution: Any) -> tuple[Tensor, Tensor, None]:
    return distribution.log_probs, distribution.mode(), None


def _of_policy_value(policy: ActorCriticPolicy | ppo.Policy) -> Say:
    def say(observation: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        split = policy.split if isinstance(policy, ppo.Policy) else policy.inputs.split
        seen, mask = split(observation)
        numbers, next_state = policy.net.act(seen, state)
        distribution = policy_value.distribution(policy.net, policy.form, numbers, mask)
        return numbers, distribution.mode(), next_state

    return say


def _to_env(policy: nn.Module, space: gymnasium.Space[Any]) -> Callable[[Tensor], Tensor]:
    """What `policy.for_env` does to stored actions, in torch."""
    if isinstance(space, Discrete):
        first = int(space.start)
        return lambda stored: stored + first
    if isinstance(space, MultiDiscrete):
        firsts, shape = torch.as_tensor(space.start), space.nvec.shape
        return lambda stored: stored.reshape(-1, *shape) + firsts
    if isinstance(space, MultiBinary):
        form = space.shape
        return lambda stored: stored.reshape(-1, *form).to(torch.int8)
    if isinstance(space, Box):
        low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
        if isinstance(getattr(policy, "form", None), BoundedForm):
            return lambda stored: _scaled(stored.reshape(-1, *space.shape), low, high)
        if isinstance(policy, acer_policies.Continuous):
            middle, width = policy.middle, policy.width
            return lambda stored: (middle + width * stored).reshape(-1, *space.shape).to(low.dtype).clamp(low, high)
        return lambda stored: stored.reshape(-1, *space.shape).to(low.dtype).clamp(low, high)
    raise SpecError("onnx", f"actions of {space} are several, and a graph gives one tensor",
                    hint="longrein export without --onnx")  # fmt: skip


def _scaled(action: Tensor, low: Tensor, high: Tensor) -> Tensor:
    share = 0.5 * (action.double() + 1.0)  # float64, as BoundedForm has it
    return (low.double() + share * (high.double() - low.double())).to(low.dtype).clamp(low, high)


# ----------------------------------------------------------------------------------------------------------- the check


def _compare(path: Path, saved: SavedPolicy, graph: Graph) -> None:
    """Run the graph where onnxruntime is installed. Raises RunError unless its actions are those of the policy."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        logging.getLogger(__name__).warning("onnxruntime is not installed: the graph was not held against the policy")
        return
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    encoded = _observations(saved, graph, ROWS)
    state = None
    given = {"observation": encoded}
    if graph.state_size:
        state = np.random.default_rng(1).normal(size=(ROWS, graph.state_size)).astype(np.float32)
        given["state"] = state
    found = dict(zip([one.name for one in session.get_outputs()], session.run(None, given), strict=True))
    seen = encoded if graph.inputs is None else graph.inputs.rescaled(encoded)
    stored, next_state = saved.decide(seen, True, state)
    expected = np.asarray(saved.policy.for_env(stored))
    same = found["action"].dtype.kind == expected.dtype.kind and np.allclose(found["action"], expected, 1e-4, 1e-4)
    if not same or (next_state is not None and not np.allclose(found["next_state"], next_state, 1e-4, 1e-4)):
        raise RunError(f"the graph does {found['action'].tolist()} where the policy does {expected.tolist()}",
                       hint="a maker of your own that does otherwise when it is traced?")  # fmt: skip


def _observations(saved: SavedPolicy, graph: Graph, rows: int) -> NDArray[Any]:
    """Some observations, encoded but not rescaled; always the same."""
    rng, inputs = np.random.default_rng(0), graph.inputs
    if inputs is None:
        return _numbers(zeros(saved.observation_space, rows).numpy(), rng)
    seen = _numbers(zeros(inputs.space, rows).numpy(), rng)
    if not inputs.choices:
        return seen
    return np.concatenate([seen.reshape(rows, -1).astype(np.float32), np.ones((rows, inputs.choices), np.float32)], 1)


def _numbers(like: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    if like.dtype == np.uint8:
        return rng.integers(0, 256, like.shape, np.uint8)
    return rng.normal(size=like.shape).astype(np.float32)


def _metadata(about: About, policy: nn.Module) -> dict[str, str]:
    log_std = getattr(policy, "log_std", None) if not isinstance(policy, ppo.Policy) else policy.net.log_std
    plain = {
        "algorithm": about.algorithm,
        "config": about.config,
        "observation_space": spaces.describe(about.observation_space),
        "action_space": spaces.describe(about.action_space),
        "log_std": None if log_std is None else [round(float(one), 9) for one in log_std.detach().reshape(-1)],
        "encoding": "one image stays uint8; all else is one flat float32 row, choices one-hot, members in order",
    }
    return {name: json.dumps(value, default=str) for name, value in plain.items() if value is not None}


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise SpecError("onnx", f"needs the package {package!r}", hint="pip install 'longrein[onnx]'")


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """The exporter tells of packages that it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
