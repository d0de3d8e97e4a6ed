"""Real Unity players of ML-Agents 0.2 as environments: their agents as a vector environment, or as PettingZoo's.

1. A player is one scene. All its agents step together, and only the whole scene can be reset. There is no seed.
2. An agent whose episode ends is reset by the engine within that step: what it then shows is already the next episode
   (same-step autoreset). What it saw last of the old one never leaves the engine; the observation before stands for it.
3. The protocol does not tell a time limit of an agent from a termination. `max_episode_steps` does: an end at that many
   steps or later is a truncation. (An agent's count begins one step later at its own reset than at the scene's.)
4. The scene's own limit ends all episodes at once; that is a truncation, and the scene is reset at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from longrein.errors import RunError, SpaceError, SpecError
from longrein.link import makers
from longrein.link.adapters import BatchMoment, Info, Turn
from longrein.link.makers.unity_player import Player, found_players, player_file

OPTIONS = frozenset({"max_episode_steps"})
"""What any client may pass; all else is for the server's owner."""
BY_HAND = "by-hand"
"""In place of a player's name: start nothing, and wait for a player that is started by hand."""


def names() -> list[str]:
    """The players that `make` finds by name."""
    return sorted(found_players())


def check(name: str) -> None:
    """Raises SpecError for a player that is not there."""
    if name == BY_HAND:
        return
    if name.lower() not in names() and not Path(name).expanduser().is_file():
        raise makers.unknown("unity", name, names())
    player_file(name)


def make(
    name: str,
    num_envs: int,
    autoreset: str,
    *,
    view: str = "auto",
    behaviour: str = "",
    actions: int = 0,
    max_episode_steps: int = 0,
    base_port: int = 0,
    worker_id: int = 0,
    train_mode: bool = True,
    startup_seconds: float = 60.0,
) -> UnityVector | UnityParallel:
    """Start the player `name`, one of `names()` or the path of a file, or wait for one that is started BY_HAND.

    view: "vector" (the agents of one behaviour are the environments), "parallel" (all agents, as PettingZoo has them)
    or "auto": vector where one behaviour has agents. behaviour: which one, for the vector view.
    actions: how many discrete actions there really are, where the player declares another number (3dball does).
    max_episode_steps: the player's own limit, see rule 3. base_port: 0 takes a free port, another has worker_id added.
    train_mode: False runs at the speed of a watched game. startup_seconds: until the player must have connected; one
    that is started by hand is told the port, `base_port`, by its argument `--port`.

    Raises SpecError where this cannot be, ConnectError where the player does not answer in `startup_seconds`.
    """
    if view not in ("auto", "vector", "parallel"):
        raise SpecError("view", f"{view!r} is none of auto, vector, parallel")
    if name == BY_HAND and not base_port:
        raise SpecError("base_port", "no port to wait at", hint="base_port=5005, and start the player with --port 5005")
    file = None if name == BY_HAND else player_file(name)
    title = name if file is None else file.stem.lower()
    player = Player(file, title, base_port and base_port + worker_id, train_mode, startup_seconds)
    try:
        peopled = [brain for brain, facts in player.behaviours.items() if facts["agents"]]
        if view == "parallel" or (view == "auto" and len(peopled) != 1 and not behaviour):
            return UnityParallel(player, peopled, actions, max_episode_steps)
        if not behaviour and len(peopled) != 1:
            raise SpecError("behaviour", f"several have agents: {', '.join(peopled)}", hint="name one of them")
        vector = UnityVector(player, behaviour or peopled[0], actions, max_episode_steps)
        if (num_envs, autoreset) != (vector.num_envs, vector.autoreset):
            raise SpecError(
                "num_envs" if num_envs != vector.num_envs else "autoreset",
                f"{vector.behaviour} has {vector.num_envs} agents, and the engine resets each as its episode ends",
                hint=f"connect with num_envs={vector.num_envs} and autoreset='same_step', or serve view='parallel'",
            )
        return vector
    except BaseException:
        player.close()
        raise


# --------------------------------------------------------------------------------------------------------- the views


class Controls:
    """What a client may read and call."""

    def __init__(self, player: Player) -> None:
        self._player = player

    @property
    def parameters(self) -> dict[str, float]:
        """The reset parameters in force."""
        return self._player.parameters

    @property
    def behaviours(self) -> dict[str, dict[str, Any]]:
        return self._player.behaviours

    @property
    def log_path(self) -> str:
        """The player's log, on the machine where it runs; it goes with the player."""
        return self._player.log_path

    def set_parameters(self, **values: float) -> None:
        """Change reset parameters; in force from the next reset on."""
        known = self._player.parameters
        for key, value in values.items():
            if key not in known:
                raise SpecError(f"parameters.{key}", f"this player has {', '.join(known) or 'no parameters'}")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise SpecError(f"parameters.{key}", f"{value!r} is no number")
        self._player.pending |= values

    def configure(self, train_mode: bool) -> None:
        """Train (as fast as it goes) or not (as fast as a game is watched); in force from the next reset on."""
        self._player.train_mode = bool(train_mode)


class _View:
    """What the two views share: a player, its frames, its controls."""

    num_envs = 1

    def __init__(self, player: Player, max_episode_steps: int) -> None:
        self._player = player
        self._controls = Controls(player)
        self._limit = max_episode_steps or np.inf
        cameras = any(facts["cameras"] for facts in player.behaviours.values())
        self.metadata: dict[str, Any] = {"name": player.name, "render_modes": ["rgb_array"] if cameras else []}
        self.spec: dict[str, Any] = {
            "id": player.name,
            "max_episode_steps": max_episode_steps or None,
            "reward_threshold": None,
            "nondeterministic": True,
            "render_mode": "rgb_array" if cameras else None,
            "has_state": False,
        }

    def attribute(self, index: int) -> Controls:
        return self._controls

    def close(self) -> None:
        self._player.close()

    def _frame(self, brain: str, row: int) -> NDArray[np.uint8]:
        cameras = self._player.infos[brain].observations
        if not cameras:
            raise RunError(f"{brain} has no camera", hint="nothing else can be rendered of a headless player")
        frame = np.asarray(cameras[0][row] * 255.0).astype(np.uint8)
        return np.broadcast_to(frame, (*frame.shape[:2], 3)).copy()

    def _restart(self, options: dict[str, Any] | None) -> None:
        """Reset the scene. options: "parameters", as for `set_parameters`."""
        options = options or {}
        if not np.all(options.get("reset_mask", True)):
            raise SpaceError("reset_mask", "all environments", "some", hint="a player resets its scene as a whole")
        self._controls.set_parameters(**options.get("parameters", {}))
        self._player.reset()

    def _ends(self, brain: str, steps: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """terminated, truncated of the agents of one behaviour; `steps` of their episodes."""
        done = np.asarray(self._player.infos[brain].local_done, bool)
        late = steps >= self._limit
        if self._player.over:
            return np.zeros_like(done), np.ones_like(done)
        return done & ~late, done & late


class UnityVector(_View):
    """The agents of one behaviour, as a vector environment."""

    kind = "batch"
    autoreset = "same_step"
    reward_shape: tuple[int, ...] = ()

    def __init__(self, player: Player, behaviour: str, actions: int = 0, max_episode_steps: int = 0) -> None:
        super().__init__(player, max_episode_steps)
        facts = player.behaviours.get(behaviour)
        if not facts or not facts["agents"]:
            raise SpecError("behaviour", f"{behaviour!r} has no agents here; known: {', '.join(player.behaviours)}")
        self.behaviour = behaviour
        self.num_envs: int = facts["agents"]
        self.observation_space: gymnasium.Space[Any] = _observation_space(behaviour, facts)
        self.action_space: gymnasium.Space[Any] = _action_space(facts, actions)
        self._observations = player.states(behaviour)
        self._steps = np.zeros(self.num_envs, np.int64)

    def reset(self, seeds: list[int | None] | None, options: dict[str, Any] | None) -> tuple[Any, Info]:
        self._restart(options)
        self._observations = self._player.states(self.behaviour)
        self._steps[:] = 0
        return self._observations, {}

    def step(self, actions: Any) -> BatchMoment:
        self._player.step({self.behaviour: np.asarray(actions)})
        self._steps += 1
        terminated, truncated = self._ends(self.behaviour, self._steps)
        rewards = np.asarray(self._player.infos[self.behaviour].rewards, np.float64)
        before = self._observations
        if self._player.over:
            self._player.reset()
        self._observations = self._player.states(self.behaviour)
        ended = terminated | truncated
        self._steps[ended] = 0
        return BatchMoment(self._observations, rewards, terminated, truncated, _final(before, ended))

    def render(self, index: int) -> Any:
        return self._frame(self.behaviour, index)


class UnityParallel(_View):
    """All agents, as a PettingZoo parallel environment. An agent lives for one episode; its body then gets zeros."""

    kind = "parallel"

    def __init__(self, player: Player, behaviours: list[str], actions: int = 0, max_episode_steps: int = 0) -> None:
        super().__init__(player, max_episode_steps)
        known = {brain: player.behaviours[brain] for brain in behaviours}
        self._seats = {f"{b}-{row}": (b, row) for b, facts in known.items() for row in range(facts["agents"])}
        if not self._seats:
            raise SpecError("env", f"{player.name} has no agents that a trainer controls")
        self.possible_agents = list(self._seats)
        seen = {brain: _observation_space(brain, facts) for brain, facts in known.items()}
        done = {brain: _action_space(facts, actions) for brain, facts in known.items()}
        self.observation_spaces: dict[str, gymnasium.Space[Any]] = {a: seen[b] for a, (b, _) in self._seats.items()}
        self.action_spaces: dict[str, gymnasium.Space[Any]] = {a: done[b] for a, (b, _) in self._seats.items()}
        self._alive: list[str] = []
        self._observations: dict[str, Any] = {}
        self._steps = 0

    def reset(self, seed: int | None, options: dict[str, Any] | None) -> Turn:
        self._restart(options)
        self._alive, self._steps = list(self._seats), 0
        self._observations = self._look()
        return Turn(self._alive, self._observations, {}, {}, {}, {agent: {} for agent in self._alive})

    def step(self, actions: dict[str, Any]) -> Turn:
        player, alive = self._player, self._alive
        batches = {brain: player.idle(brain) for brain in player.behaviours}
        for agent, action in actions.items():
            brain, row = self._seats[agent]
            batches[brain][row] = action
        player.step(batches)
        self._steps += 1
        ends = {brain: self._ends(brain, np.full(len(batch), self._steps)) for brain, batch in batches.items()}
        now, rewards, terminated, truncated = self._look(), {}, {}, {}
        for agent in alive:
            brain, row = self._seats[agent]
            rewards[agent] = float(player.infos[brain].rewards[row])
            terminated[agent], truncated[agent] = (bool(flags[row]) for flags in ends[brain])
            if terminated[agent] or truncated[agent]:
                now[agent] = self._observations[agent]  # rule 2
        self._alive, self._observations = [a for a in alive if not (terminated[a] or truncated[a])], now
        return Turn(self._alive, now, rewards, terminated, truncated, {agent: {} for agent in alive})

    def render(self, index: int) -> Any:
        return self._frame(*next(iter(self._seats.values())))

    def _look(self) -> dict[str, Any]:
        states = {brain: self._player.states(brain) for brain in self._player.behaviours}
        return {agent: states[self._seats[agent][0]][self._seats[agent][1]] for agent in self._alive}


def _observation_space(brain: str, facts: dict[str, Any]) -> gymnasium.Space[Any]:
    if not facts["state_size"]:
        raise SpecError("behaviour", f"{brain} has no state vector", hint="a headless player's cameras show nothing")
    if facts["state_type"] == "discrete":
        return Box(0, facts["state_size"] - 1, (1,), np.float32)
    return Box(-np.inf, np.inf, (facts["state_size"],), np.float32)


def _action_space(facts: dict[str, Any], actions: int) -> gymnasium.Space[Any]:
    if facts["action_type"] == "discrete":
        return Discrete(actions or facts["actions"])
    return Box(-1.0, 1.0, (facts["actions"],), np.float32)


def _final(before: NDArray[np.float32], ended: NDArray[np.bool_]) -> Info:
    """Gymnasium's vector info for the episodes that ended, see rule 2."""
    if not ended.any():
        return {}
    observations = np.full(len(ended), None, dtype=object)
    for row in np.flatnonzero(ended):
        observations[row] = before[row]
    return {"final_obs": observations, "_final_obs": ended, "final_info": {}, "_final_info": ended}
