"""What an actor does, wherever it runs: opens environments, holds a copy of the policy, plays rollouts. No channel.

Weights change at one moment only, before a rollout; where environments answer each for itself, when some are to act.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import torch
from torch import Tensor

from longrein.errors import SpecError
from longrein.lab.actor import Actor
from longrein.lab.assembly import Played, Population
from longrein.lab.channel import Arrays
from longrein.lab.first_ready import FirstReady, since
from longrein.lab.games import Games
from longrein.lab.inference import Asking
from longrein.learn import algorithms
from longrein.learn.algorithms import Policy
from longrein.learn.rollout import Rollout


@dataclass(frozen=True)
class Role:
    """What an actor is to do, whenever it lives."""

    open_world: Callable[..., Any]
    """Opens an environment with that many copies; (copies, True) lets each answer for itself."""
    copies: int
    algorithm: str
    config: Any
    first_ready: int = 0
    """Environments whose answer it waits for before it acts on; 0: it steps all of them together."""


@dataclass(frozen=True)
class Hello:
    """What an actor steps."""

    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    num_envs: int


def seeds_of_life(
    index: int, life: int, first: int, copies: int, several: bool, seed_of: Callable[..., int]
) -> tuple[int, int]:
    """Of an actor's environments, copy k with seed + k, and of its choices.

    life: 0 for one that begins with the session or at a cut, whose environments are seeded from `first` on. several:
    whether there are other actors.
    """
    path = [f"actor {index}"] if several else []
    if not life:
        return first + index * copies, seed_of("actor", *path)
    seed = seed_of("environments", f"actor {index}", f"life {life}") // 2
    return seed, seed_of("actor", *path, f"life {life}")


def policy_arrays(policy: Policy) -> Arrays:
    """Weights and buffers of a policy: views, good as long as it lives. Nothing of one that is no module of torch."""
    tensors: dict[str, Tensor] = policy.state_dict() if isinstance(policy, torch.nn.Module) else {}
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


class ActingRole:
    """One life of an actor: `begin`, then `play` as often as there is room for a rollout, then `close`.

    Opens the environments. Raises SpecError, LinkError, and whatever their maker raises.
    """

    def __init__(self, role: Role) -> None:
        # Those that are to answer each for itself must be opened so.
        self._envs = role.open_world(role.copies, True) if role.first_ready else role.open_world(role.copies)
        if isinstance(self._envs, Games):
            seats = len(self._envs.seats)
            self._envs.close()
            raise SpecError("meta.topology.actors", "goes with one agent alone in its environment, and this is a "
                            f"game of {seats} seats", hint="topology: serial")  # fmt: skip
        self.hello = Hello(self._envs.single_observation_space, self._envs.single_action_space, self._envs.num_envs)
        self._role = role
        self._restarts = 0  # environments lost and replaced, at the end of the last rollout
        self._env_steps = 0
        self._population: Population | None = None

    def begin(
        self,
        seed: int,
        draws: int | bytes,
        newest: Callable[[Arrays], int],
        asking: Callable[[Policy], Asking] | None = None,
    ) -> None:
        """Make the policy, and reset the environments, copy k with seed + k.

        draws: the seed of the policy's choices, or the state of their generator. newest: puts the newest weights into
        the policy's arrays, where they are not there yet, and says their version. asking: from the policy to one that
        asks another process; the weights of ours are of no use then, and `newest` is not called.
        """
        _, build = algorithms.load(self._role.algorithm)
        algorithm = build(self._role.config, self.hello.observation_space, self.hello.action_space, 0)
        arrays = policy_arrays(algorithm.policy)
        self._asking = None if asking is None else asking(algorithm.policy)
        if self._asking is None:
            newest(arrays)
        self._generator = torch.Generator()
        if isinstance(draws, int):
            self._generator.manual_seed(draws)
        else:
            self._generator.set_state(torch.frombuffer(bytearray(draws), dtype=torch.uint8))
        self._rollout = Rollout(algorithm.rollout_steps)
        self._ready: FirstReady | None = None
        self._newest: Callable[[], int] = partial(newest, arrays)
        if self._role.first_ready:
            self._ready = FirstReady(
                self._envs, algorithm.policy, least=self._role.first_ready, length=algorithm.rollout_steps,
                newest=self._newest, generator=self._generator,
            )  # fmt: skip
            self._actor = self._ready.actor
            self._ready.begin(self._envs.reset(seed=seed)[0])
            self._population = self._ready.population()
        else:
            policy = algorithm.policy if self._asking is None else self._asking
            self._actor = Actor(self._envs, policy, seed=None, generator=self._generator)
            self._actor.begin(self._envs.reset(seed=seed)[0])

    def play(self, columns: Arrays, cut: int | None, waited: float) -> Played:
        """Fill `columns` [T, B, ...] with the next rollout; without arrays they get them, good until the next call.

        cut: seed of the environments' reset after it; they go on as they are where it is None. waited: seconds before.
        """
        begun = time.monotonic()
        version = self._fill(columns, cut) if self._ready is None else self._ready.fill(columns)
        acting = time.monotonic() - begun
        finished = (self._actor if self._ready is None else self._ready).finished()
        episodes = tuple(since(self._env_steps, episode) for episode in finished)
        state = None if cut is None else self._generator.get_state().numpy().tobytes()
        lost, self._restarts = self._actor.restarts - self._restarts, self._actor.restarts
        self._env_steps = self._actor.env_steps
        return Played(version, episodes, lost, acting, waited, state, self._came_and_went())

    def close(self) -> None:
        """Close the environments."""
        self._envs.close()

    def _fill(self, columns: Arrays, cut: int | None) -> int:
        """With environments that are stepped together; the version that acted."""
        if columns:
            self._rollout.use(columns)
        version = self._newest() if self._asking is None else 0
        for left in range(self._rollout.length - 1, -1, -1):
            self._rollout.add(self._actor.step(cut is not None and left == 0))
        if cut is not None:
            self._actor.begin(self._envs.reset(seed=cut)[0])
        self._rollout.take()
        columns |= self._rollout.columns
        return version if self._asking is None else self._asking.rest()

    def _came_and_went(self) -> Population | None:
        """Since the last rollout."""
        had, has = self._population, None if self._ready is None else self._ready.population()
        self._population = has
        return has and had and Population(has.live, has.joined - had.joined, has.left - had.left)
