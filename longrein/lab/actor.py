"""Environments x policy -> transitions: the one room where link and learn meet. Knows all three autoreset modes.

What each mode asks of the actor, when an episode ends in a row at step k:
1. SAME_STEP: step k returned the next episode's first observation; the true successor is in infos["final_obs"].
2. NEXT_STEP: step k returned the true successor; step k+1 ignores the action and returns the first observation of the
   next episode. That row is filler: valid is False.
3. DISABLED: step k returned the true successor; the actor resets those environments before step k+1.
In each mode, infos["restarted"] marks an environment that was lost and replaced: the outcome of that step was never
seen, so the row is truncated and not valid, and the episode is in no statistics. infos["idle"] marks a row in which
nobody acted (a seat that is out of its game): it is not valid, and nothing else.
A cut ends all episodes after a step, from our side: their rows are truncated, and the episodes are in no statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray

from longrein.errors import ConnectError, LinkError, LinkTimeout, SpaceError, SpecError
from longrein.lab.games import Games
from longrein.learn.algorithms import Policy, RecurrentPolicy, initial_state
from longrein.learn.batch import Transition

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Episode:
    """One finished episode."""

    env: int
    """Which of the vector's environments."""
    env_steps: int
    """Env steps of all environments together when it ended."""
    length: int
    """Env steps of its own."""
    return_: float
    """Undiscounted sum of the environment's own rewards."""
    truncated: bool
    """Whether it was stopped from outside, by a time limit for instance, rather than by the task."""
    body: str = ""
    """Whose it was, as "a.e.b"; empty where there is one body."""


def connect(
    urls: str | Sequence[str],
    num_envs: int,
    *,
    options: Mapping[str, Any] | None = None,
    autoreset: str = "same_step",
    token: str | None = None,
    each: bool = False,
    elastic: bool = False,
) -> VectorEnv[Any, Any, Any]:
    """Far environments that replace themselves when they are lost; over one lease for each URL that is needed.

    options: for the environments' maker, as the server allows. Same-step autoreset costs no round trip at the end of
    an episode. each: a lease for each environment, which then answers for itself. elastic: they may come and go.
    What is served in a dialect is not replaced when it is lost. Raises LinkError, SpecError.
    """
    from longrein.link.dialects import dialect_of
    from longrein.link.vectors import connect_vec

    places = [urls] if isinstance(urls, str) else list(urls)[:num_envs]
    own: dict[str, Any] = {"on_loss": "restart"} if dialect_of(places[0]) is None else {}
    if each or elastic:
        if not own:
            raise SpecError("meta.topology.first_ready", f"what is served at {places[0]} does not answer each for "
                            "itself", hint="serve it in longrein's own protocol")  # fmt: skip
        own |= {"envs_per_lease": 1} | ({"elastic": True} if elastic else {})
    link: dict[str, Any] = {} if token is None else {"token": token}
    return connect_vec(places, num_envs, autoreset=autoreset, **own, **link, **(options or {}))


def connect_any(
    urls: str | Sequence[str], num_envs: int, options: Mapping[str, Any] | None = None
) -> VectorEnv[Any, Any, Any]:
    """As connect, all at the first URL that has so many: for where servers come and go. Raises the last one's error."""
    *others, last = [urls] if isinstance(urls, str) else urls
    for url in others:
        with suppress(LinkError):
            return connect(url, num_envs, options=options)
    return connect(last, num_envs, options=options)


def connect_games(urls: str | Sequence[str], copies: int, options: Mapping[str, Any] | None = None) -> Games:
    """Far multi-agent games, a lease each, spread over the URLs. Raises LinkError."""
    from longrein.link.multiagent import connect_parallel

    urls = [urls] if isinstance(urls, str) else urls
    opened: list[Any] = []
    try:
        for index in range(copies):
            opened.append(connect_parallel(urls[index % len(urls)], **(options or {})))
    except LinkError:
        for game in opened:
            game.close()
        raise
    return Games(opened)


def make_envs(source: str, num_envs: int, options: Mapping[str, Any]) -> VectorEnv[Any, Any, Any]:
    """Environments in this process: an id of Gymnasium, KIND:NAME or file.py:factory. Raises SpecError."""
    made = make_world(source, num_envs, options)
    if isinstance(made, Games):
        made.close()
        raise SpecError("env.id", f"{source} is a game of {len(made.seats)} seats", hint="one agent acts here alone")
    return made


def make_world(source: str, copies: int, options: Mapping[str, Any]) -> VectorEnv[Any, Any, Any] | Games:
    """As make_envs; copies of a game where several agents act at once in it."""
    from longrein.link.served import make_here

    if source.startswith("pettingzoo:"):
        options = {"api": "parallel", **options}  # some of these play in turn unless they are asked
    made = make_here(source, copies, options)
    return Games(made) if isinstance(made, list) else made


def connect_world(
    urls: str | Sequence[str], copies: int, options: Mapping[str, Any] | None = None
) -> VectorEnv[Any, Any, Any] | Games:
    """As connect, or connect_games where that is what is served. Raises LinkError, SpecError."""
    try:
        return connect(urls, copies, options=options)
    except (ConnectError, LinkTimeout):
        raise
    except (SpecError, SpaceError, LinkError) as refused:  # several of what is one world, or one world for many
        try:
            return connect_games(urls, copies, options)
        except (SpaceError, LinkError):
            raise refused from None


def described(space: gymnasium.Space[Any]) -> dict[str, Any] | None:
    """A space as plain data, from which `longrein.link.spaces` makes it again; None for one of nobody's kinds."""
    from longrein.link.spaces import describe

    try:
        return describe(space)
    except SpaceError:
        return None


@contextmanager
def nats_broker() -> Iterator[str]:
    """A NATS broker of our own on this machine, for as long as it is held: its URL. Raises LinkError."""
    from longrein.link.transports.nats_broker import start_broker

    with start_broker() as broker:
        yield broker.url


def autoreset_mode(envs: VectorEnv[Any, Any, Any] | Seats) -> AutoresetMode:
    """What a vector environment says it does at the end of an episode. Raises SpecError when it does not say."""
    mode = envs.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode):
        raise SpecError(
            "env.autoreset",
            f"the vector environment declares {mode!r} as metadata['autoreset_mode']",
            hint="guessing it wrong would train on steps that never were; set one of gymnasium.vector.AutoresetMode",
        )
    return mode


class Seats(Protocol):
    """The rows of a world that one actor acts in: a vector environment, or some seats of a multi-agent one."""

    num_envs: int
    metadata: dict[str, Any]
    single_observation_space: gymnasium.Space[Any]
    single_action_space: gymnasium.Space[Any]


class Actor:
    """A policy in a vector environment, of any autoreset mode, which it must declare; `step` gives what came of it.

    seed: of the environments' first reset; None leaves that, and `begin`, to the caller.
    generator: of the policy's choices. bodies: names of equal blocks of rows, whose episodes are told apart by them.
    In a world with others in it the caller steps the world, between `choose` and `take`.
    """

    def __init__(
        self,
        envs: VectorEnv[Any, Any, Any] | Seats,
        policy: Policy,
        *,
        seed: int | None,
        generator: torch.Generator | None = None,
        bodies: Sequence[str] = ("",),
    ) -> None:
        self.envs: Any = envs  # a VectorEnv wherever it is stepped or reset from here
        self.policy = policy
        self.generator = generator
        self.bodies = tuple(bodies)
        self.mode = autoreset_mode(envs)
        self.env_steps = 0  # valid rows so far; in a world with others, steps of that world
        self.restarts = 0  # environments that were lost and replaced
        self._copies = envs.num_envs // len(self.bodies)
        self._all = np.ones(envs.num_envs, np.bool_)
        self._episodes: list[Episode] = []
        self._chosen: tuple[NDArray[Any], dict[str, NDArray[Any]]] | None = None
        if seed is not None:
            self.begin(envs.reset(seed=seed)[0])  # type: ignore[union-attr]  # whoever gives a seed gives a VectorEnv

    def begin(self, observation: Any) -> None:
        """Go on from the first observations of new episodes, in every row."""
        count = self.envs.num_envs
        self._returns = np.zeros(count)
        self._lengths = np.zeros(count, np.int64)
        self._filler = np.zeros(count, np.bool_)  # rows whose next step only resets
        self._waiting = False  # whether there are any
        self._state = initial_state(self.policy, count)  # what a recurrent policy remembers; None: nothing
        self._observation = self.policy.encode(observation)

    def collect(self, steps: int) -> Iterator[Transition]:
        """The next `steps` vector steps, one transition each."""
        for _ in range(steps):
            yield self.step()

    def finished(self) -> list[Episode]:
        """Episodes that ended since the last call, in order."""
        episodes, self._episodes = self._episodes, []
        return episodes

    def step(self, cut: bool = False) -> Transition:
        """One vector step. After a cut the caller resets the environments, and lets us `begin`."""
        return self.take(*self.envs.step(self.choose()), cut=cut)

    def choose(self) -> Any:
        """What to do next, as the vector environment takes it: actions [B, ...]."""
        action, extras = act(self.policy, self._observation, self._state, generator=self.generator)
        self._chosen = action, extras
        return self.policy.for_env(action)

    def take(
        self,
        raw: Any,
        raw_reward: NDArray[Any],
        terminated: Bools,
        truncated: Bools,
        infos: dict[str, Any],
        *,
        played: int | None = None,
        cut: bool = False,
    ) -> Transition:
        """What came of the chosen actions, as a vector environment says it -> the transition.

        played: env steps that this was; one for each valid row where it is left out.
        """
        assert self._chosen is not None, "nothing was chosen"
        action, extras = self._chosen
        observation = self.policy.encode(raw)
        done = terminated | truncated
        reward, valid, restarted = raw_reward, self._all, None
        if self._waiting or "restarted" in infos or "idle" in infos:  # rare, and six operations on arrays
            restarted = _mask(infos, "restarted", self.envs.num_envs)
            valid, truncated = self._valid(restarted, _mask(infos, "idle", self.envs.num_envs), truncated)
            reward = np.where(valid, raw_reward, 0.0)
            done = (terminated | truncated) & ~self._filler
            self._filler = np.zeros_like(done)
            self._waiting = False
        ended = bool(done.any())
        certain = valid is self._all
        if played is None:
            played = len(valid) if certain else int(valid.sum())
        self.env_steps += played
        self._returns += reward
        self._lengths += 1 if certain else valid
        successor = observation
        if ended:
            successor, observation = self._cross(done, restarted, observation, infos)
            self._count(valid, done, truncated & ~terminated)
        if self._state is not None:
            # Zeros after an end, and after a filler row too, in which the policy still looked at the end.
            over = terminated | truncated | ~valid
            self._state = np.where(over[:, None], np.float32(0.0), extras.pop("next_state"))
        if cut:
            truncated = truncated | (valid & ~done)
        transition = Transition(
            self._observation, action, reward.astype(np.float32), successor, terminated, truncated, valid, extras
        )
        self._observation = observation
        return transition

    def _valid(self, restarted: Bools | None, idle: Bools | None, truncated: Bools) -> tuple[Bools, Bools]:
        """Which rows are steps of an environment, and which episodes were stopped: bool [B] each."""
        valid = ~self._filler
        if restarted is not None:
            self.restarts += int(restarted.sum())
            valid &= ~restarted
            truncated = truncated | restarted
        if idle is not None:
            valid &= ~idle
        return valid, truncated

    def part(self, rows: NDArray[np.int64]) -> Actor:
        """The same actor in some of the rows [K], in that order, until `join` takes in what came of it."""
        some = copy(self)
        some.envs = _Rows(len(rows), self.envs.single_observation_space)
        some._copies, some._all, some._episodes = len(rows), self._all[: len(rows)], []
        some._returns, some._lengths, some._filler = self._returns[rows], self._lengths[rows], self._filler[rows]
        some._waiting = bool(some._filler.any())
        some._observation = self._observation[rows]
        some._state = None if self._state is None else self._state[rows]
        if self._chosen is not None:
            action, extras = self._chosen
            some._chosen = action[rows], {name: array[rows] for name, array in extras.items()}
        return some

    def join(self, rows: NDArray[np.int64], some: Actor) -> None:
        """Take in what came of a `part`, in its rows."""
        self.env_steps, self.restarts = some.env_steps, some.restarts
        self._episodes += [replace(episode, env=int(rows[episode.env])) for episode in some._episodes]
        self._returns[rows], self._lengths[rows], self._filler[rows] = some._returns, some._lengths, some._filler
        self._observation[rows] = some._observation
        if self._state is not None:
            self._state[rows] = some._state
        assert some._chosen is not None, "nothing was chosen"
        action, extras = some._chosen
        if self._chosen is None:  # all rows choose before any is stepped
            self._chosen = action.copy(), {name: array.copy() for name, array in extras.items()}
            return
        self._chosen[0][rows] = action
        for name, array in extras.items():
            self._chosen[1][name][rows] = array

    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes next, but for the policy and the environments."""
        arrays = {"returns": self._returns, "lengths": self._lengths, "filler": self._filler,
                  "observation": self._observation, "state": self._state}  # fmt: skip
        return {
            "env_steps": self.env_steps,
            "restarts": self.restarts,
            "generator": None if self.generator is None else self.generator.get_state(),
            "rows": {k: None if array is None else torch.from_numpy(array.copy()) for k, array in arrays.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; where the environments could not be saved, `begin` comes after it."""
        self.env_steps, self.restarts = state["env_steps"], state["restarts"]
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        rows: dict[str, Any] = {
            name: None if tensor is None else tensor.numpy().copy() for name, tensor in state["rows"].items()
        }
        self._returns, self._lengths, self._filler = rows["returns"], rows["lengths"], rows["filler"]
        self._observation, self._state = rows["observation"], rows["state"]
        self._waiting = bool(self._filler.any())

    def _cross(
        self, done: Bools, restarted: Bools | None, observation: NDArray[Any], infos: dict[str, Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """At the end of some episodes: (true successors, what to act on next), each [B, ...]."""
        if self.mode == AutoresetMode.NEXT_STEP:
            self._filler, self._waiting = done, True
            return observation, observation
        if self.mode == AutoresetMode.SAME_STEP:
            seen = done if restarted is None else done & ~restarted  # nobody saw the others' end
            return _with_final(self.policy, self.envs.single_observation_space, observation, seen, infos), observation
        raw, _ = self.envs.reset(options={"reset_mask": done})
        first = self.policy.encode(raw)
        return observation, np.where(done.reshape(-1, *[1] * (first.ndim - 1)), first, observation)

    def _count(self, valid: Bools, done: Bools, stopped: Bools) -> None:
        """Note the episodes that ended in this step."""
        for row in np.flatnonzero(done):
            if valid[row]:
                length, total = int(self._lengths[row]), float(self._returns[row])
                block, env = divmod(int(row), self._copies)
                self._episodes.append(
                    Episode(env, self.env_steps, length, total, bool(stopped[row]), self.bodies[block])
                )
            self._returns[row] = 0.0
            self._lengths[row] = 0


@dataclass(frozen=True)
class _Rows:
    """What an actor asks of environments that others step."""

    num_envs: int
    single_observation_space: gymnasium.Space[Any]


def act(
    policy: Policy,
    observation: NDArray[np.generic],
    state: NDArray[np.float32] | None,
    *,
    deterministic: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
    """Policy.act, with its state [B, S] where it is recurrent: actions, and extras with `next_state` then."""
    if state is None:
        return policy.act(observation, deterministic, generator)
    assert isinstance(policy, RecurrentPolicy)
    return policy.act(observation, deterministic, generator, state)


def _mask(infos: dict[str, Any], key: str, num_envs: int) -> Bools | None:
    """Where a vector info says yes to `key`: bool [B], or None when it says nothing."""
    if key not in infos:
        return None
    flags = np.asarray(infos[key]).astype(np.bool_).reshape(num_envs)
    given = infos.get(f"_{key}")
    return flags if given is None else flags & np.asarray(given, np.bool_)


def _with_final(
    policy: Policy, space: gymnasium.Space[Any], observation: NDArray[Any], rows: Bools, infos: dict[str, Any]
) -> NDArray[Any]:
    """Encoded observations [B, ...] with those of `rows` replaced by what infos["final_obs"] holds."""
    if not rows.any():
        return observation
    if "final_obs" not in infos:
        raise SpecError(
            "env.autoreset",
            "same-step autoreset ended an episode without infos['final_obs']",
            hint="the true successor is lost; use next_step, or an environment that follows Gymnasium 1.1",
        )
    successor = observation.copy()
    ended = np.flatnonzero(rows)
    finals = [infos["final_obs"][row] for row in ended]
    successor[ended] = policy.encode(concatenate(space, finals, create_empty_array(space, len(ended))))
    return successor
