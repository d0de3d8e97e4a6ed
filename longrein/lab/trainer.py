"""drlbox's arguments, and what of ours each of them means: arguments in, a spec out. Runs nothing.

The names and their meanings are drlbox's; where drlbox did something else than it said, what it said is done, and
docs/guides/from-drlbox.md says so. What has no counterpart here is refused with what to do instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import gymnasium
import numpy as np
from torch import nn

from longrein.errors import SpecError
from longrein.lab.spec import Spec, from_plain, nearest
from longrein.learn import algorithms
from longrein.learn.distributions import action_form
from longrein.learn.inputs import Inputs
from longrein.learn.torsos import Net, named

EnvMaker = Callable[[], "gymnasium.Env[Any, Any]"]

TRAINED = ("a3c", "acer", "impala", "dqn")
"""drlbox's algorithms. Every other one of ours takes those arguments that it has a setting for."""


@dataclass(frozen=True)
class Arguments:
    """What `make_trainer` takes beside the algorithm, with drlbox's defaults."""

    env_maker: EnvMaker | str | None = None
    """Makes one environment, called without arguments; or an id, or a URL where it is served."""
    state_to_input: Any = None
    """One observation -> the array that the network sees in its place."""
    load_model: Any = None
    """Begin with the weights of a file that `longrein export` wrote, or of a run's or a session's folder."""
    load_model_custom: Mapping[str, Any] | None = None
    """The makers of that model, by name, where they cannot be found by their own: {"feature_maker": ...}."""
    verbose: bool = False
    """Print the spec, and how far it is."""
    feature_maker: Any = None
    """Observation space -> module [N, ...] -> features [N, F], or a pair of them, the policy's and the value's."""
    model_maker: Any = None
    """Environment -> module [N, ...] -> (numbers of the policy [N, P], values [N]); of dqn action values [N, A]."""
    num_parallel: int | None = None
    """Processes that act, each in `batch_size` environments; None: one a processor. 1: all is done in this process."""
    port_begin: int = 2220
    """Of no use here: no ports are opened."""
    discount: float = 0.99
    """Per env step."""
    train_steps: int = 1_000_000
    """Env steps of all actors together."""
    rollout_maxlen: int = 32
    """Env steps of one rollout, and the most that a return is summed over before its bootstrap."""
    batch_size: int = 1
    """Rollouts of each actor in one update."""
    online_learning: bool = True
    """Whether fresh rollouts are learnt from, beside those of the memory."""
    replay_type: str | None = None
    """None, uniform or prioritized; uniform unless it is given for acer and impala."""
    replay_ratio: float = 4
    """Updates from the memory for each from fresh rollouts, on average."""
    replay_priority_type: str | None = "differential"
    """What prioritized replay goes by: differential or error."""
    replay_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """maxlen and minlen, in rollouts of each actor (1000 and 100), alpha, beta, eps, evict_rule (oldest, sample)."""
    optimizer: str = "adam"
    """By name, or kfac."""
    opt_clip_norm: float = 40.0
    """Global norm to which gradients are clipped."""
    opt_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """learning_rate (1e-4), epsilon (1e-4), beta1, beta2, momentum, decay; of kfac its own."""
    noisynet: str | None = None
    """None, ig (independent noise) or fg (factorised), in the head."""
    save_dir: Any = None
    """The folder of run folders; None: data."""
    save_interval: int = 10_000
    """Env steps between checkpoints."""
    catch_signal: bool = False
    """Of no use here: Ctrl-C and SIGTERM always end training with its folder complete."""
    a3c_entropy_weight: float = 1e-2
    """Of the entropy bonus."""
    acer_trunc_max: float = 10.0
    """The most that a ratio may weigh the policy's gradient with."""
    acer_kl_weight: float = 0.0
    """Of the KL to the average policy; above 0 it takes the trust region's place."""
    acer_soft_update_ratio: float = 0.05
    """Share of the way that the average policy goes at each update."""
    impala_trunc_rho_max: float = 1.0
    """Of V-trace."""
    impala_trunc_c_max: float = 1.0
    """Of V-trace."""
    dqn_double: bool = True
    """Whether the online network chooses what the target network values."""
    dqn_dueling: bool = False
    """Whether value and advantages have streams of their own."""
    policy_eps_start: float = 1.0
    """Probability of any action at the beginning."""
    policy_eps_end: float = 0.01
    """And at the end."""
    policy_eps_decay_steps: int = 1_000_000
    """Env steps of all actors together in which it falls."""
    sync_target_interval: float = 1000.0
    """Updates between copies of the target network."""
    kfac_inv_upd_interval: int = 10
    """Updates between decompositions, of kfac."""


OWN = {"a3c_": ("a3c", "acer", "impala", "a2c", "acktr"), "acer_": ("acer",), "impala_": ("impala",),
       "dqn_": ("dqn",), "policy_eps_": ("dqn",), "sync_target_": ("dqn",)}  # fmt: skip
"""Beginnings of arguments that belong to some algorithms only."""


def arguments_from(algorithm: str, given: Mapping[str, Any]) -> tuple[str, Arguments]:
    """The algorithm's name as the table has it, and its arguments. Raises SpecError for names that are none."""
    name = algorithm.lower()
    algorithms.load(name)
    known = [one.name for one in fields(Arguments)]
    for argument in given:
        if argument not in known:
            raise SpecError(argument, "make_trainer has no such argument", hint=nearest(argument, known))
        for beginning, owners in OWN.items():
            if argument.startswith(beginning) and name not in owners:
                raise SpecError(argument, f"{name} does not use it", hint=f"leave it out; {', '.join(owners)} do")
    arguments = Arguments(**given)
    if arguments.env_maker is None:
        raise SpecError("env_maker", "is missing", hint="env_maker=lambda: gymnasium.make('CartPole-v1')")
    for count in ("num_parallel", "train_steps", "rollout_maxlen", "batch_size", "save_interval"):
        value = getattr(arguments, count)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise SpecError(count, f"must be a whole number, at least 1, got {value!r}")
    return name, arguments


def spec_of(
    name: str, arguments: Arguments, given: Mapping[str, Any], net: tuple[Mapping[str, Any], bool], label: str
) -> Spec:
    """The spec that the arguments ask for.

    given: those that were given, whose values hold for algorithms that drlbox has not. net: of `own_net`.
    label: what the spec calls the environment: an id, a URL, or where its maker stands. Raises SpecError.
    """
    actors = arguments.num_parallel or os.cpu_count() or 1
    num_envs = actors * arguments.batch_size
    config_class, _ = algorithms.load(name)
    takes = {one.name for one in fields(config_class)}
    asked = _Asked(name, takes, arguments, given, num_envs, actors)
    settings = asked.settings()
    own, shared = net
    if shared and "shared" in takes:
        settings["shared"] = True
    agent: dict[str, Any] = {"algorithm": {"name": name, **settings}}
    if own:
        agent["net"] = dict(own)
    memory = asked.memory()
    if memory:
        agent["memory"] = memory
    where = {"url": label} if "://" in label else {"id": label}
    return from_plain(
        f"{name}_{_short(label)}",
        {
            "agent": agent,
            "env": {**where, "num_envs": num_envs},
            "meta": {
                "env_steps": arguments.train_steps,
                "checkpoint_every": arguments.save_interval,
                **asked.topology(),
            },
        },
    )


@dataclass(frozen=True)
class _Asked:
    """The arguments of one call, and what the algorithm can take of them."""

    name: str
    takes: set[str]
    arguments: Arguments
    given: Mapping[str, Any]
    num_envs: int
    actors: int

    @property
    def replay_type(self) -> str | None:
        """None, uniform or prioritized."""
        if "replay_type" not in self.given and self.name in ("acer", "impala"):
            return "uniform"
        if self.arguments.replay_type not in (None, "uniform", "prioritized"):
            raise SpecError("replay_type", f"{self.arguments.replay_type!r} is none",
                            hint="None, 'uniform' or 'prioritized'")  # fmt: skip
        return self.arguments.replay_type

    @property
    def rows(self) -> int:
        """Env steps of one update from fresh rollouts."""
        return self.num_envs * self.arguments.rollout_maxlen

    def holds(self, argument: str) -> bool:
        """Whether an argument's value counts: always for drlbox's algorithms, for others where it was given."""
        return self.name in TRAINED or argument in self.given

    def settings(self) -> dict[str, Any]:
        """The algorithm's settings."""
        one = self.arguments
        found: dict[str, Any] = {} if one.online_learning else self._offline()
        self._put(found, "discount", "gamma", one.discount)
        if self.name == "dqn":
            found["rollout_steps"] = one.rollout_maxlen
            found |= self._dqn()
        else:
            self._put(found, "rollout_maxlen", "rollout_steps", one.rollout_maxlen)
        self._put(found, "opt_clip_norm", "max_grad_norm", one.opt_clip_norm)
        if self.name in OWN["a3c_"]:
            self._put(found, "a3c_entropy_weight", "entropy_weight", one.a3c_entropy_weight)
        if self.name == "acer":
            found |= {"truncation": one.acer_trunc_max, "kl_weight": one.acer_kl_weight,
                      "average_decay": 1.0 - one.acer_soft_update_ratio}  # fmt: skip
            if one.acer_kl_weight > 0:
                found["trust_region"] = None
        if self.name == "impala":
            found |= {"rho_clip": one.impala_trunc_rho_max, "c_clip": one.impala_trunc_c_max}
        if self.name in ("acer", "impala"):
            found |= self._replay()
        elif self.name != "dqn" and (self.replay_type is not None or "replay_ratio" in self.given):
            raise SpecError("replay_type", f"{self.name} learns from fresh rollouts only",
                            hint="leave it out; acer, impala and dqn have a memory")  # fmt: skip
        return found | self._optimizer() | self._noise()

    def topology(self) -> dict[str, Any]:
        """`meta.topology`, where there are several actors: as drlbox, workers that share weights where they can."""
        if self.actors == 1 or not self.holds("num_parallel"):
            return {}
        able = algorithms.abilities(self.name)
        if able.shares_weights:
            return {"topology": {"hogwild": self.actors}}
        return {"topology": {"actors": self.actors, "ahead": 1 if able.tolerates_lag else 0}}

    @property
    def learners(self) -> int:
        """Processes that learn, with a memory each."""
        return self.actors if "hogwild" in self.topology().get("topology", {}) else 1

    def memory(self) -> dict[str, Any]:
        """The section `memory`, empty where the algorithm has none."""
        known: dict[str, Any] = {"maxlen": 1000, "minlen": 100, "alpha": 0.6, "beta": 0.4, "eps": 1e-8,
                                 "evict_rule": "oldest"}  # fmt: skip
        for key in self.arguments.replay_kwargs:
            if key not in known:
                raise SpecError(f"replay_kwargs.{key}", "there is no such key", hint=nearest(key, known))
        if self.name not in TRAINED or self.name == "a3c" or (self.name != "dqn" and self.replay_type is None):
            if self.arguments.replay_kwargs:
                raise SpecError("replay_kwargs", "there is no memory", hint="replay_type='uniform'")
            return {}
        rollout = self.arguments.rollout_maxlen
        kwargs = known | dict(self.arguments.replay_kwargs)
        if kwargs["evict_rule"] not in ("oldest", "sample"):
            raise SpecError("replay_kwargs.evict_rule", f"{kwargs['evict_rule']!r} is none", hint="oldest or sample")
        # drlbox counts rollouts, and each actor had a memory of its own.
        kept, least = (int(kwargs[key]) * rollout * self.actors // self.learners for key in ("maxlen", "minlen"))
        memory = {
            "capacity": kept, "min_size": least, "prioritized": self.replay_type == "prioritized",
            "eviction": {"oldest": "oldest", "sample": "sampled"}[kwargs["evict_rule"]],
        }  # fmt: skip
        if self.replay_type == "prioritized":
            memory |= {"alpha": kwargs["alpha"], "beta": kwargs["beta"], "epsilon": kwargs["eps"]}
        if self.name != "dqn":
            return memory | {"batch_size": self.num_envs // self.learners}
        memory |= {"batch_size": self.rows, "n_steps": rollout, "combined": self.arguments.online_learning}
        if self.replay_type is None:  # the newest rollouts alone, each learnt from once
            memory |= {"capacity": self.rows, "min_size": self.rows, "combined": False}
        return memory

    def _offline(self) -> dict[str, Any]:
        """Settings with which only the memory is learnt from."""
        if self.name not in ("acer", "impala", "dqn"):
            raise SpecError("online_learning", f"{self.name} learns from fresh rollouts only",
                            hint="leave it out; acer, impala and dqn can learn from their memory alone")  # fmt: skip
        if self.replay_type is None:
            raise SpecError("online_learning", "without it and without a memory there is nothing to learn from",
                            hint="replay_type='uniform'")  # fmt: skip
        return {} if self.name == "dqn" else {"epochs": 0}

    def _put(self, found: dict[str, Any], argument: str, setting: str, value: Any) -> None:
        if setting in self.takes:
            if self.holds(argument):
                found[setting] = value
        elif argument in self.given:
            raise SpecError(argument, f"{self.name} has no setting {setting!r}", hint="leave it out")

    def _replay(self) -> dict[str, Any]:
        if self.replay_type is None:
            return {"replay_ratio": 0.0}
        return {"replay_ratio": float(self.arguments.replay_ratio), "priority": self._priority()}

    def _priority(self) -> str:
        kind = self.arguments.replay_priority_type or "error"
        if kind not in ("differential", "error"):
            raise SpecError("replay_priority_type", f"{kind!r} is none", hint="'differential' or 'error'")
        return kind

    def _dqn(self) -> dict[str, Any]:
        one = self.arguments
        if self.given.get("replay_priority_type") == "differential":
            raise SpecError("replay_priority_type", "dqn's priorities are TD errors, which is what the slope of its "
                            "loss is up to 1", hint="'error'")  # fmt: skip
        self._priority()
        updates = float(one.online_learning) + (float(one.replay_ratio) if self.replay_type is not None else 0.0)
        per_step = updates / self.rows
        return {
            "double": one.dqn_double,
            "dueling": one.dqn_dueling,
            "updates_per_step": per_step,
            "target_update": "periodic",
            "target_every": max(1, round(one.sync_target_interval / per_step)),
            "epsilon": {"linear": [one.policy_eps_start, one.policy_eps_end, one.policy_eps_decay_steps]},
        }

    def _optimizer(self) -> dict[str, Any]:
        one = self.arguments
        if not isinstance(one.optimizer, str):
            raise SpecError("optimizer", f"is a {type(one.optimizer).__name__}, and its weights are not made yet",
                            hint="its name, as 'adam', and its keywords in opt_kwargs")  # fmt: skip
        if one.optimizer.lower() == "kfac":
            return self._kfac()
        kwargs = dict(one.opt_kwargs)
        found: dict[str, Any] = {}
        lr = kwargs.pop("learning_rate", None)
        if lr is not None or self.name in TRAINED:
            self._need("lr", "opt_kwargs.learning_rate")
            found["lr"] = 1e-4 if lr is None else lr
        if "optimizer" not in self.takes:
            if one.optimizer.lower() != "adam":
                raise SpecError("optimizer", f"{self.name} has Adam", hint="leave it out")
            if kwargs:
                raise SpecError(f"opt_kwargs.{next(iter(kwargs))}", f"{self.name}'s Adam has settings of its own",
                                hint="only learning_rate can be given")  # fmt: skip
            return found
        if self.holds("optimizer") or kwargs:
            found |= {"optimizer": one.optimizer.lower(), "optimizer_settings": _in_torch(one.optimizer, kwargs)}
        return found

    def _kfac(self) -> dict[str, Any]:
        names = {"learning_rate": "lr", "cov_ema_decay": "statistics_decay", "damping": "damping",
                 "norm_constraint": "kl_clip", "momentum": "momentum"}  # fmt: skip
        for key in self.arguments.opt_kwargs:
            if key not in names:
                raise SpecError(f"opt_kwargs.{key}", "kfac has no such keyword", hint=nearest(key, names))
        found = {names[key]: value for key, value in self.arguments.opt_kwargs.items()}
        found["inverse_every"] = self.arguments.kfac_inv_upd_interval
        if self.name == "acktr":
            return found
        self._need("natural", "optimizer")
        return {"natural": found}

    def _noise(self) -> dict[str, Any]:
        kinds = {"ig": "independent", "fg": "factorised"}
        kind = self.arguments.noisynet
        if kind is None:
            return {}
        if kind not in kinds:
            raise SpecError("noisynet", f"{kind!r} is none", hint="None, 'ig' or 'fg'")
        if "noisy" not in self.takes:
            raise SpecError("noisynet", f"{self.name} has no noisy layers", hint="leave it out; dqn has them")
        return {"noisy": kinds[kind]}

    def _need(self, setting: str, argument: str) -> None:
        if setting not in self.takes:
            raise SpecError(argument, f"{self.name} has no setting {setting!r}", hint="leave it out")


def _in_torch(optimizer: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """TensorFlow's keywords of an optimizer as torch names them."""
    names = {"epsilon": "eps", "momentum": "momentum", "decay": "alpha"}
    found: dict[str, Any] = {}
    for key, value in kwargs.items():
        if key in names:
            found[names[key]] = value
        elif key not in ("beta1", "beta2"):
            raise SpecError(f"opt_kwargs.{key}", "there is no such keyword",
                            hint=nearest(key, ["learning_rate", *names, "beta1", "beta2"]))  # fmt: skip
    if "beta1" in kwargs or "beta2" in kwargs:
        found["betas"] = (kwargs.get("beta1", 0.9), kwargs.get("beta2", 0.999))
    if "eps" not in found and optimizer.lower() == "adam":
        found["eps"] = 1e-4
    return found


# ------------------------------------------------------------------------------------------------------------ networks


def own_net(
    name: str,
    arguments: Mapping[str, Any],
    env: gymnasium.Env[Any, Any] | None,
    spaces: tuple[gymnasium.Space[Any], gymnasium.Space[Any]],
) -> tuple[dict[str, Any], bool]:
    """The net's settings of drlbox's feature_maker, model_maker and state_to_input; and whether the torso is shared.

    env: what model_maker is shown; None where it is made elsewhere. spaces: what is seen and what is done.
    Raises SpecError where the algorithm has no use for one.
    """
    feature_maker, model_maker, convert = (
        arguments.get(key) for key in ("feature_maker", "model_maker", "state_to_input")
    )
    net: dict[str, Any] = {}
    if convert is not None and name != "acer":  # acer's is a wrapper: see `shown`
        net["state_to_input"] = convert
    if model_maker is not None:
        if name == "acer":
            raise SpecError("model_maker", "acer's policy and critic are heads of its own",
                            hint="feature_maker: all but the last layer")  # fmt: skip
        if env is None:
            raise SpecError("model_maker", "it is shown the environment, and that is elsewhere",
                            hint="feature_maker, which is shown the observation space")  # fmt: skip
        return net | {"model_maker": lambda seen, done: model_maker(env)}, False
    if feature_maker is None:
        return net, False
    maker = named(feature_maker, "feature_maker")
    space = Inputs(spaces[0], Net(**net), action_form(spaces[1])).space
    features = maker(space)
    if not isinstance(features, tuple):
        return net | {"feature_maker": feature_maker}, True
    if len(features) != 2 or name == "dqn":
        raise SpecError("feature_maker", f"gives {len(features)} modules, {name} takes {1 if name == 'dqn' else 2}",
                        hint="one; dqn_dueling=True splits what comes of it" if name == "dqn" else "")  # fmt: skip
    return net | {"feature_maker": _in_turn(maker)}, False


def _in_turn(maker: Callable[[gymnasium.Space[Any]], Any]) -> Callable[[gymnasium.Space[Any]], nn.Module]:
    """Gives the policy's module of a pair, then the value's, and so on: in the order in which torsos are made."""
    waiting: list[nn.Module] = []

    def make(space: gymnasium.Space[Any]) -> nn.Module:
        if waiting:
            return waiting.pop()
        first, second = maker(space)
        waiting.append(second)
        return first  # type: ignore[no-any-return]  # the torso checks that it is a module

    return make


def shown(env: gymnasium.Env[Any, Any], name: str, convert: Any) -> gymnasium.Env[Any, Any]:
    """The environment as its policy sees it: of acer, whose networks convert nothing, with state_to_input around it."""
    if convert is None or name != "acer":
        return env
    function = named(convert, "state_to_input")
    space = Inputs(env.observation_space, Net(state_to_input=convert), action_form(env.action_space)).space
    dtype = space.dtype
    return gymnasium.wrappers.TransformObservation(env, lambda one: np.asarray(function(one), dtype), space)


def _short(label: str) -> str:
    """A short name of the environment, for folders."""
    text = label.rpartition("/")[2].rpartition(":")[2]
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in text).strip("_").lower() or "env"
