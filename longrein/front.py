"""Experiments from Python: run a spec and get its tables, train and judge as drlbox's users do. One engine for all.

Knows specs, trials and their files; what an algorithm does it does not know.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from longrein.errors import SpecError
from longrein.lab import records
from longrein.lab import spec as specs
from longrein.lab.experiment import TrialResult, analyse, open_envs, run_trial, session_settings
from longrein.lab.export import algorithm_of, policy_of, spaces_of
from longrein.lab.saved_policy import About, SavedPolicy, begin_with, save_policy
from longrein.lab.session import Progress, SessionResult, run_session
from longrein.lab.spec import EnvSpec, Spec, nearest
from longrein.lab.trainer import EnvMaker, arguments_from, own_net, shown, spec_of
from longrein.learn.algorithms import Algorithm
from longrein.link.env import connect

if TYPE_CHECKING:
    import pandas

OpenEnvs = Callable[[int], VectorEnv[Any, Any, Any]]
POLICY = "policy.safetensors"
"""What a session of a trainer holds beside its checkpoint: the policy as `longrein export` writes it."""


@dataclass(frozen=True)
class Trial:
    """What came of a spec: its folder, each session's result, and the tables as frames.

    Each frame has a column `session`, the session's seed, before those of the file.
    """

    spec: Spec
    """What was asked for."""
    run: Path
    """Its folder."""
    sessions: tuple[SessionResult | None, ...]
    """Each session's result, in the order of the seeds; None for one that died."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """The traceback of each session that died, by its seed."""

    @cached_property
    def episodes(self) -> pandas.DataFrame:
        """A row for each training episode that finished."""
        return self._frame("episodes.csv")

    @cached_property
    def metrics(self) -> pandas.DataFrame:
        """A row for each measurement of learning."""
        return self._frame("metrics.csv")

    @cached_property
    def evaluation(self) -> pandas.DataFrame:
        """A row for each evaluation episode."""
        return self._frame("evaluation.csv")

    def policy(self, seed: int | None = None) -> SavedPolicy:
        """What it learned: the session of a seed, or the best of all. Raises RunError, CheckpointError."""
        return policy_of(self.run if seed is None else self.run / f"session_{seed}")

    def _frame(self, name: str) -> pandas.DataFrame:
        import pandas

        frames = []
        for folder in records.sessions_of(self.run):
            if (folder / name).exists():
                text = (folder / name).read_text()
                # An unfinished last line is left out, as whoever reads a run that goes on must.
                frame = pandas.read_csv(io.StringIO(text[: text.rfind("\n") + 1]), dtype={"body": str})
                frame.insert(0, "session", int(folder.name.partition("_")[2]))
                frames.append(frame)
        return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame()


def run(
    spec: Spec | Mapping[str, Any] | str | Path,
    name: str | None = None,
    *,
    data: str | Path = "data",
    processes: int | None = None,
    on_progress: Callable[[int, Progress], None] | None = None,
    **overrides: Any,
) -> Trial:
    """Train what a spec says, all its sessions, and return what came of it.

    spec: a file of specs, of which `name` is taken; the values of one, as a file has them; or a Spec.
    overrides: by dotted key, as `**{"agent.algorithm.lr": 1e-3}`, or with two underscores for a dot: `meta__seed=3`.
    processes: sessions at once, each in a process of its own; as many as there are processors. 0 runs them in this
    one, one after the other, which a script without `if __name__ == "__main__"` needs.
    Raises SpecError, RunError; LinkError with `processes=0` only, else such an end is in `failures`.
    """
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    match spec:
        case Spec():
            if changes:
                spec = specs.resolve(specs.overridden(specs.Source(spec.name, spec.name, spec.plain, {}), changes))
        case Mapping():
            source = specs.Source(name or "spec", name or "spec", spec, {})
            spec = specs.resolve(specs.overridden(source, changes) if changes else source)
        case _:
            spec = specs.load(spec, name, changes)
    if processes == 0:
        return _run_here(spec, Path(data), lambda count: open_envs(spec.envs[0], count), on_progress)
    result = run_trial(spec, Path(data), processes=processes, on_progress=on_progress)
    return _trial(spec, result)


def _trial(spec: Spec, result: TrialResult) -> Trial:
    return Trial(spec, result.run, result.sessions, result.failures)


def _run_here(
    spec: Spec,
    data: Path,
    open_here: OpenEnvs,
    on_progress: Callable[[int, Progress], None] | None = None,
    prepare: Callable[[Algorithm], None] | None = None,
) -> Trial:
    """All sessions in this process, one after the other, until one is interrupted."""
    folder = records.create_run(
        data, spec.name, {"name": spec.name, "spec": spec.plain, "fingerprint": spec.fingerprint}
    )
    results: list[SessionResult | None] = []
    seeds = [spec.meta.seed + index for index in range(spec.meta.max_session)]
    for seed in seeds:
        settings = replace(session_settings(spec, seed), prepare=prepare)
        tell = None if on_progress is None else _told(on_progress, seed)
        results.append(run_session(settings, folder, open_here, tell))
        if results[-1] is not None and results[-1].status == "interrupted":
            break
    done = {seed: vars(result) for seed, result in zip(seeds, results, strict=False) if result is not None}
    plain = {seed: {k: v for k, v in one.items() if k not in ("folder", "graph")} for seed, one in done.items()}
    records.write_json(folder / "trial.json", {"sessions": plain, "failures": {}})
    analyse(folder, spec, play_random=False)
    return Trial(spec, folder, tuple(results) + (None,) * (len(seeds) - len(results)))


def _told(on_progress: Callable[[int, Progress], None], seed: int) -> Callable[[Progress], None]:
    return lambda progress: on_progress(seed, progress)


# ------------------------------------------------------------------------------------------------------------- drlbox


class Trainer:
    """Trains as drlbox's arguments say. `spec` is what they come to; `run` trains it, with this process as learner."""

    def __init__(self, algorithm: str, given: Mapping[str, Any]) -> None:
        self.algorithm, self.arguments = arguments_from(algorithm, given)
        one = self.arguments
        assert one.env_maker is not None
        self._maker = _maker_of(one.env_maker)
        label = one.env_maker if isinstance(one.env_maker, str) else _label(one.env_maker)
        env = None if self._maker is None else self._maker()
        if env is not None:
            spaces = env.observation_space, env.action_space
            if env.spec is not None and not isinstance(one.env_maker, str):
                label = env.spec.id
        else:
            spaces = spaces_of(EnvSpec(url=label))
            if one.state_to_input is not None and self.algorithm == "acer":
                raise SpecError("state_to_input", "acer's is put around the environment, and that is elsewhere",
                                hint="wrap the environment where it is served")  # fmt: skip
        net = own_net(self.algorithm, given, env, spaces)
        if env is not None and one.model_maker is None:
            env.close()  # else the model's maker is shown it, whenever a model is made
        self.spec = spec_of(self.algorithm, one, given, net, label)
        self._begin = None if one.load_model is None else self._loaded(net[0], spaces)

    def run(self) -> Trial:
        """Train, until the env steps are spent or Ctrl-C ends it. Raises LinkError, CheckpointError, RunError.

        With `num_parallel` above 1 a script needs `if __name__ == "__main__"`: processes are started.
        """
        one = self.arguments
        if one.verbose:
            print(specs.as_yaml({self.spec.name: self.spec.plain}), end="")
        here = self._open if self._maker is not None else partial(open_envs, self.spec.envs[0])
        kept: list[Algorithm] = []

        def prepare(algorithm: Algorithm) -> None:
            if self._begin is not None:
                begin_with(algorithm, self._begin)
            kept.append(algorithm)

        tell = _Printed() if one.verbose else None
        trial = _run_here(self.spec, Path(one.save_dir or "data"), here, tell, prepare)
        for algorithm, result in zip(kept, trial.sessions, strict=False):
            if result is not None:
                self._save(algorithm, result)
        return trial

    @property
    def _open(self) -> OpenEnvs:
        """Without this object in it, since it may go to other processes."""
        assert self._maker is not None
        return partial(_open_made, self._maker, self.algorithm, self.arguments.state_to_input)

    def _save(self, algorithm: Algorithm, result: SessionResult) -> None:
        assert self._maker is not None or self.spec.envs[0].url
        with_spaces = self._open(1) if self._maker is not None else open_envs(self.spec.envs[0], 1)
        seen, done = with_spaces.single_observation_space, with_spaces.single_action_space
        with_spaces.close()
        where = self.spec.envs[0].id or str(self.spec.envs[0].url)
        config = records.as_plain(self.spec.agents[0].config)
        save_policy(result.folder / POLICY, algorithm.policy,
                    About(self.algorithm, config, seen, done, where, result.env_steps))  # fmt: skip

    def _loaded(self, net: Mapping[str, Any], spaces: tuple[Any, Any]) -> SavedPolicy:
        custom = dict(net) | dict(self.arguments.load_model_custom or {})
        return policy_of(self.arguments.load_model, spaces, **custom)


def _open_made(maker: EnvMaker, algorithm: str, convert: Any, count: int) -> VectorEnv[Any, Any, Any]:
    make = lambda: shown(maker(), algorithm, convert)  # noqa: E731  # for each copy
    return SyncVectorEnv([make] * count, autoreset_mode=AutoresetMode.SAME_STEP)


class _Printed:
    """Prints how far training is, whenever a tenth more of an episode window is there."""

    def __init__(self) -> None:
        self._at = 0

    def __call__(self, seed: int, at: Progress) -> None:
        if at.episodes > self._at:
            self._at = at.episodes
            print(f"training step {at.env_steps}, episode {at.episodes}, mean return {at.mean_return:.2f}", flush=True)


def make_trainer(algorithm: str, **arguments: Any) -> Trainer:
    """A trainer, with drlbox's arguments: `make_trainer("a3c", env_maker=..., num_parallel=4).run()`.

    algorithm: a3c, acer, impala or dqn, in upper or lower case, or any other of the table.
    arguments: those of `longrein.lab.trainer.Arguments`; docs/guides/from-drlbox.md has what each means here.
    Raises SpecError for an argument that is unknown, that the algorithm does not use, or that cannot be had.
    """
    return Trainer(algorithm, arguments)


EVALUATED = {"ac": ("a3c", "impala", "a2c", "acktr", "ppo", "reinforce"), "acer": ("acer",),
             "dqn": ("dqn", "pqn", "sarsa", "async_q")}  # fmt: skip
"""What `make_evaluator` calls which algorithms' policies; their own names will do too."""


@dataclass(frozen=True)
class EvaluatorArguments:
    """What `make_evaluator` takes beside the algorithm, with drlbox's defaults."""

    env_maker: EnvMaker | str | None = None
    """Makes one environment; or an id, or a URL where it is served."""
    state_to_input: Any = None
    """As it was trained with."""
    load_model: Any = None
    """A file that `longrein export` or a trainer wrote, or a run's or a session's folder."""
    load_model_custom: Mapping[str, Any] | None = None
    """The makers that it was trained with, where they cannot be found by name: {"feature_maker": ...}."""
    verbose: bool = False
    """Print every argument."""
    render_timestep: int | None = None
    """Render after each so many steps."""
    render_end: bool = False
    """Render at the end of each episode."""
    num_episodes: int = 20
    """To play."""
    policy_type: str = "stochastic"
    """stochastic, as in training but for its epsilon, or greedy."""
    policy_eps: float = 0.0
    """Probability of any action in place of the policy's."""
    seed: int = 0
    """Of the episodes and of the choices; drlbox had none."""


class Evaluator:
    """Plays episodes with what was learned, as drlbox's arguments say."""

    def __init__(self, algorithm: str, given: Mapping[str, Any]) -> None:
        known = EvaluatorArguments.__dataclass_fields__
        for argument in given:
            if argument not in known:
                raise SpecError(argument, "make_evaluator has no such argument", hint=nearest(argument, known))
        one = self.arguments = EvaluatorArguments(**given)
        self.algorithm = algorithm.lower()
        for name in ("env_maker", "load_model"):
            if getattr(one, name) is None:
                raise SpecError(name, "is missing", hint="make_evaluator('ac', env_maker=..., load_model=FILE)")
        if one.policy_type not in ("stochastic", "greedy"):
            raise SpecError("policy_type", f"{one.policy_type!r} is none", hint="'stochastic' or 'greedy'")
        if not 0 <= one.policy_eps <= 1:
            raise SpecError("policy_eps", f"must lie between 0 and 1, got {one.policy_eps}")
        if one.num_episodes < 1:
            raise SpecError("num_episodes", f"must be at least 1, got {one.num_episodes}")
        self._trained = algorithm_of(one.load_model)
        if self._trained not in EVALUATED.get(self.algorithm, (self.algorithm,)):
            near = [name for name, known in EVALUATED.items() if self._trained in known]
            raise SpecError("algorithm", f"{one.load_model} holds a policy of {self._trained}",
                            hint=f"make_evaluator({(near or [self._trained])[0]!r}, ...)")  # fmt: skip

    def run(self) -> list[float]:
        """Play, print each episode's return and their mean, and return the returns.

        Raises CheckpointError, LinkError.
        """
        one = self.arguments
        if one.verbose:
            print("\n".join(f"{name} = {value!r}" for name, value in sorted(vars(one).items())))
        env = self._env()
        try:
            policy = self._policy(env)
            rng = np.random.default_rng(one.seed)
            generator = torch.Generator().manual_seed(one.seed)
            seeds = range(one.seed, one.seed + one.num_episodes)
            returns = [self._episode(env, policy, seed, rng, generator) for seed in seeds]
        finally:
            env.close()
        print(f"average episode reward: {np.mean(returns):g}")
        return returns

    def _env(self) -> gymnasium.Env[Any, Any]:
        one = self.arguments
        assert one.env_maker is not None
        maker = _maker_of(one.env_maker)
        if maker is None:
            return connect(str(one.env_maker))
        return shown(maker(), self._trained, one.state_to_input)

    def _policy(self, env: gymnasium.Env[Any, Any]) -> SavedPolicy:
        one = self.arguments
        custom = dict(one.load_model_custom or {})
        spaces = env.observation_space, env.action_space
        given = custom | ({} if one.state_to_input is None else {"state_to_input": one.state_to_input})
        net, _ = own_net(self._trained, given, env, spaces) if given else ({}, False)
        return policy_of(one.load_model, spaces, **net)

    def _episode(
        self,
        env: gymnasium.Env[Any, Any],
        policy: SavedPolicy,
        seed: int,
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> float:
        one = self.arguments
        # What a value policy explores with in training is no part of what it learned: that is policy_eps here.
        greedy = one.policy_type == "greedy" or self._trained in EVALUATED["dqn"]
        policy.reset()
        env.action_space.seed(seed)
        observation, _ = env.reset(seed=seed)
        total, steps, over = 0.0, 0, False
        while not over:
            action = policy.act(observation, greedy, generator)
            if one.policy_eps and rng.random() < one.policy_eps:
                action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            total, steps, over = total + float(reward), steps + 1, bool(terminated or truncated)
            if one.render_timestep is not None and steps % one.render_timestep == 0:
                env.render()
        if one.render_end:
            env.render()
        print(f"episode reward: {total:g}", flush=True)
        return total


def make_evaluator(algorithm: str, **arguments: Any) -> Evaluator:
    """An evaluator, with drlbox's arguments: `make_evaluator("ac", env_maker=..., load_model=FILE).run()`.

    algorithm: ac (a3c, impala and the other actor-critics), acer or dqn. arguments: those of `EvaluatorArguments`.
    Raises SpecError.
    """
    return Evaluator(algorithm, arguments)


def _maker_of(given: EnvMaker | str) -> EnvMaker | None:
    """A function that makes one environment; None where they are made elsewhere."""
    if not isinstance(given, str):
        return given
    if "://" in given:
        return None
    return lambda: gymnasium.make(given)


def _label(maker: EnvMaker) -> str:
    """What a spec calls a maker: where it stands, which also finds it again if it is a function of a module."""
    name = getattr(maker, "__qualname__", type(maker).__qualname__)
    return f"{getattr(maker, '__module__', '')}:{name}"
