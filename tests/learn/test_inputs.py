"""Action masks, actions in parts, and the user's own functions and networks, from the space to what is learnt."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from learn import probes
from learn.training import train
from torch import nn

from longrein.errors import SpecError
from longrein.lab.actor import Actor
from longrein.lab.records import as_plain
from longrein.learn.algorithms import TABLE, config_from, load
from longrein.learn.algorithms.ppo import PPO, Config
from longrein.learn.distributions import RULED_OUT, Categorical, MultiCategorical, action_form
from longrein.learn.inputs import Inputs
from longrein.learn.networks import members
from longrein.learn.rollout import Rollout
from longrein.learn.torsos import Image, Net, encode, make_torso


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------- masks


def test_a_masked_choice_is_the_choice_among_the_others() -> None:
    logits = torch.tensor([[0.3, 5.0, -1.0, 2.0]])
    mask = torch.tensor([[True, False, True, True]])
    masked = action_form(Discrete(4)).distribution(logits, None, mask)
    others = Categorical(logits[:, [0, 2, 3]])
    assert masked.entropy().item() == pytest.approx(others.entropy().item())
    assert masked.log_prob(torch.tensor([3])).item() == pytest.approx(others.log_prob(torch.tensor([2])).item())
    assert masked.mode().item() == 3
    draws = torch.cat([masked.sample(torch.Generator().manual_seed(seed)) for seed in range(500)])
    assert set(draws.tolist()) == {0, 2, 3}
    assert masked.log_prob(torch.tensor([1])).exp().item() == 0.0


def test_a_mask_of_several_choices_lies_beside_their_options() -> None:
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[False, True, True, False, True]])
    masked = action_form(MultiDiscrete([2, 3])).distribution(logits, None, mask)
    # One option is left of the first choice, two of the second.
    assert masked.entropy().item() == pytest.approx(Categorical(logits[:, [2, 4]]).entropy().item())
    assert masked.sample()[0, 0].item() == 1


def test_a_masked_logit_has_no_gradient_and_nothing_is_nan() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    masked = action_form(Discrete(3)).distribution(logits, None, mask)
    assert masked.entropy().tolist() == pytest.approx([math.log(2), math.log(3)])  # nothing left: uniform over all
    (masked.entropy().sum() + masked.log_prob(torch.tensor([0, 0])).sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2] == 0
    assert torch.tensor(RULED_OUT).isfinite()


SEEN = Box(-1.0, 1.0, (2,), np.float32)


@pytest.mark.parametrize("mask", [MultiBinary(3), Box(0, 1, (3,), np.int8), Box(0.0, 1.0, (3,), np.float64)], ids=str)
def test_a_mask_is_the_end_of_the_encoded_row(mask: gymnasium.Space[Any]) -> None:
    inputs = Inputs(Dict(observation=SEEN, action_mask=mask), Net(), action_form(Discrete(3)))
    assert inputs.space == SEEN
    batch = {
        "observation": np.array([[0.5, -0.5], [1, 0]], np.float32),
        "action_mask": np.array([[1, 0, 1], [0, 0, 1]], mask.dtype),
    }
    encoded = inputs.encode(batch)
    assert encoded.tolist() == [[0.5, -0.5, 1, 0, 1], [1, 0, 0, 0, 1]]
    seen, allowed = inputs.split(torch.from_numpy(encoded))
    assert seen.tolist() == [[0.5, -0.5], [1, 0]]
    assert allowed is not None
    assert allowed.tolist() == [[True, False, True], [False, False, True]]


def test_a_mask_beside_an_image_and_beside_several_members() -> None:
    image = Box(0, 255, (4, 5, 3), np.uint8)
    form = action_form(Tuple([Discrete(2), MultiBinary(4), MultiDiscrete([2, 2])]))
    assert form.num_choices == 2 + 4, "MultiBinary is not masked"
    inputs = Inputs(Dict(observation=image, action_mask=MultiBinary(6)), Net(), form)
    pixels = np.arange(2 * 60, dtype=np.uint8).reshape(2, 4, 5, 3)
    encoded = inputs.encode({"observation": pixels, "action_mask": np.ones((2, 6), np.int8)})
    assert encoded.shape == (2, 66)
    seen, _ = inputs.split(torch.from_numpy(encoded).unsqueeze(0))
    assert torch.equal(seen[0], torch.from_numpy(pixels).float())
    several = Inputs(Dict(a=SEEN, action_mask=MultiBinary(6), b=Discrete(2)), Net(), form)
    assert several.space == Dict(a=SEEN, b=Discrete(2))


def test_a_mask_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match="4 numbers, the actions have 3"):
        Inputs(Dict(observation=SEEN, action_mask=MultiBinary(4)), Net(), action_form(Discrete(3)))
    with pytest.raises(SpecError, match="action_mask"):
        Inputs(Dict(observation=SEEN, action_mask=Discrete(3)), Net(), action_form(Discrete(3)))


class Ruled(probes.Probe):
    """Eight options; those allowed change at each step, and the highest of them is right. A wrong one raises."""

    observation_space = Dict(observation=Box(0, 1, (1,)), action_mask=Box(0, 1, (8,), np.int8))  # type: ignore[assignment]  # wider than Probe's
    action_space = Discrete(8)

    def observation(self) -> Any:
        self.allowed = np.zeros(8, np.int8)
        self.allowed[self.np_random.choice(8, 3, replace=False)] = 1
        return {"observation": np.zeros(1, np.float32), "action_mask": self.allowed}

    def step(self, action: Any) -> Any:
        assert self.allowed[action], "a masked action was taken"
        right = action == np.flatnonzero(self.allowed)[-1]
        self.time += 1
        return self.observation(), float(right), self.time == 10, False, {}


@pytest.mark.parametrize("recurrent", ["none", "gru"])
def test_masked_actions_are_never_taken_and_the_others_are_learnt(recurrent: str) -> None:
    settings = {
        "rollout_steps": 32, "minibatch_size": 64, "epochs": 6, "lr": 5e-3, "gamma": 0.5,
        "net": {"hidden": [16], "recurrent": recurrent, "recurrent_size": 8},
    }  # fmt: skip
    trained = train("ppo", settings, Ruled, env_steps=20_000, num_envs=8, target=9.0, window=50)
    assert trained.reached is not None, trained  # a policy that does not know the order gets 3.3


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_with_masks_the_first_minibatch_has_ratio_one(mode: AutoresetMode) -> None:
    class Short(Ruled):
        def step(self, action: Any) -> Any:
            observation, reward, _, _, infos = super().step(action)
            return observation, reward, self.time == 3, False, infos

    # In next-step mode the filler row's action is ignored, so that it may be one that is masked by then.
    envs = SyncVectorEnv([Short] * 4, autoreset_mode=mode)
    algorithm = PPO(Config(rollout_steps=16, epochs=1, minibatch_size=64, normalise_observation=True),
                    envs.single_observation_space, envs.single_action_space, 0)  # fmt: skip
    actor = Actor(envs, algorithm.policy, seed=0, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        rollout = Rollout(16)
        for transition in actor.collect(16):
            rollout.add(transition)
        measured = algorithm.update(rollout.take())
        assert measured["approx_kl"] == pytest.approx(0.0, abs=1e-8)
        assert measured["entropy"] == pytest.approx(math.log(3), rel=0.05), "three options are left"


# ----------------------------------------------------------------------------------------------- actions in parts

PARTS = (Discrete(3, start=1), Box(-0.5, 0.5, (2,), np.float32), MultiDiscrete([2, 3]), MultiBinary(2))
SPACES: list[gymnasium.Space[Any]] = [
    Tuple(PARTS),
    Dict(a=PARTS[0], b=PARTS[1]),
    Tuple([Discrete(2), Discrete(3)]),
    Dict(move=Tuple([Discrete(2), Dict(x=Box(-1, 1, (1,)), y=MultiBinary(2))]), speak=Discrete(4)),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_logs_and_entropies_of_parts_add(space: gymnasium.Space[Any]) -> None:
    form = action_form(space)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(7, form.num_parameters, generator=generator)
    log_std = torch.randn(form.num_deviations, generator=generator) * 0.1 if form.num_deviations else None
    whole = form.distribution(numbers, log_std)
    action = whole.sample(generator)
    assert action.shape == (7, form.width)
    floats = form.num_deviations > 0
    assert action.dtype == form.dtype == (torch.float32 if floats else torch.int64)
    parts = members(space)
    log_prob, entropy = torch.zeros(7), torch.zeros(7)
    at = number = deviation = 0
    for part in map(action_form, parts):
        piece = action[:, at : at + part.width].to(part.dtype)
        stds = log_std[deviation : deviation + part.num_deviations] if log_std is not None else None
        one = part.distribution(numbers[:, number : number + part.num_parameters], stds)
        log_prob += one.log_prob(piece.squeeze(-1) if part.single else piece)
        entropy += one.entropy()
        at, number = at + part.width, number + part.num_parameters
        deviation += part.num_deviations
    assert (at, number, deviation) == (form.width, form.num_parameters, form.num_deviations)
    torch.testing.assert_close(whole.log_prob(action), log_prob)
    torch.testing.assert_close(whole.entropy(), entropy)
    best = whole.mode()
    assert (whole.log_prob(best) >= log_prob).all()


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_parts_reach_a_vector_environment_as_it_takes_them(space: gymnasium.Space[Any]) -> None:
    class Anything(probes.Probe):
        action_space = space

        def step(self, action: Any) -> Any:
            assert space.contains(action), action
            self.time += 1
            return self.observation(), 0.5, self.time == 3, False, {}

    envs = probes.vector(Anything, 3)
    algorithm = PPO(Config(rollout_steps=8), envs.single_observation_space, envs.single_action_space, 0)
    (batch,) = probes.batches(envs, algorithm, 1)
    assert batch.action.shape == (8, 3, action_form(space).width)
    assert algorithm.update(batch)["minibatches"] == 4


def test_a_goal_that_needs_every_part_is_reached() -> None:
    class Goal(probes.Probe):
        """Reward for each part that is as the observation asks: a Dict with a Tuple, a MultiDiscrete and a Box."""

        observation_space = Box(-1.0, 1.0, (1,), np.float32)
        action_space = Dict(  # type: ignore[assignment]  # wider than Probe's
            pick=MultiDiscrete([3, 2]), move=Tuple([Discrete(4, start=-1), Box(-2.0, 2.0, (1,), np.float32)])
        )

        def first(self) -> float:
            return float(self.np_random.choice([-1.0, 1.0]))

        def step(self, action: Any) -> Any:
            sign = self.seen > 0
            step, force = action["move"]
            reward = float(step == (2 if sign else -1)) + max(0.0, 1.0 - abs(float(force[0]) - self.seen))
            reward += float(action["pick"][0] == (2 if sign else 1)) + float(action["pick"][1] == int(sign))
            return self.observation(), reward, True, False, {}

    settings = {
        "rollout_steps": 16, "minibatch_size": 64, "epochs": 6, "lr": {"linear": [1e-2, 1e-3, 15_000]}, "gamma": 0.5,
        "net": {"hidden": [32]},
    }  # fmt: skip
    # 4 is perfect; a sum that drops or confuses a part's log-probability stays below 3.4.
    trained = train("ppo", settings, Goal, env_steps=20_000, num_envs=16, target=3.6, window=200)
    assert trained.reached is not None, trained


def test_a_wrong_part_is_named() -> None:
    with pytest.raises(SpecError, match="Text"):
        action_form(Tuple([Discrete(2), Text(3)]))


# ----------------------------------------------------------------------------------------------------- own functions


def halves(observation: Any) -> Any:
    return np.concatenate([np.atleast_1d(part) for part in observation.values()])[:2] / 2


def letters(observation: str) -> Any:
    return np.array([len(observation), observation.count("a")], np.float32)


def test_state_to_input_is_asked_before_encoding() -> None:
    space = Dict(a=Box(-1, 1, (1,)), b=Box(-1, 1, (3,)))
    inputs = Inputs(space, Net(state_to_input=halves), action_form(Discrete(2)))
    assert inputs.space.shape == (2,)
    batch = {"a": np.array([[0.2], [0.4]], np.float32), "b": np.array([[1, 0, 0], [-1, 0, 0]], np.float32)}
    assert inputs.encode(batch).tolist() == pytest.approx(np.array([[0.1, 0.5], [0.2, -0.5]]))
    random = space.np_random.bit_generator.state
    Inputs(space, Net(state_to_input=halves), action_form(Discrete(2)))
    assert space.np_random.bit_generator.state == random, "the space's random numbers are not ours to draw"


def test_state_to_input_opens_spaces_that_no_network_takes() -> None:
    inputs = Inputs(Text(5), Net(state_to_input=letters), action_form(Discrete(2)))
    assert inputs.encode(("abba", "c")).tolist() == [[4, 2], [1, 0]]
    nested = Tuple([Discrete(2), Dict(t=Text(5))])
    own = Net(state_to_input=lambda seen: np.array([seen[0], len(seen[1]["t"])]))
    inputs = Inputs(nested, own, action_form(Discrete(2)))
    assert inputs.encode((np.array([1, 0]), {"t": ("abc", "")})).tolist() == [[1, 3], [0, 0]]
    with pytest.raises(SpecError, match="state_to_input"):
        Inputs(Text(5), Net(state_to_input=lambda text: text), action_form(Discrete(2)))


def test_state_to_input_leaves_the_mask_alone() -> None:
    space = Dict(observation=Text(5), action_mask=MultiBinary(2))
    inputs = Inputs(space, Net(state_to_input=letters), action_form(Discrete(2)))
    encoded = inputs.encode({"observation": ("aa", "b"), "action_mask": np.array([[1, 0], [0, 1]], np.int8)})
    assert encoded.tolist() == [[2, 2, 1, 0], [1, 0, 0, 1]]


# --------------------------------------------------------------------------------------------------------------- scale


def scaled(space: gymnasium.Space[Any], observation: Any) -> Any:
    return Inputs(space, Net(rescale_observation=True), action_form(Discrete(2))).encode(observation)


def test_boxes_are_brought_to_one_by_their_bounds() -> None:
    car = Box(np.array([-1.2, -0.07], np.float32), np.array([0.6, 0.07], np.float32))
    rows = np.array([[-1.2, 0.07], [-0.3, 0.0], [0.6, -0.035]], np.float32)
    assert scaled(car, rows) == pytest.approx(np.array([[-1, 1], [0, 0], [1, -0.5]]), abs=1e-6)
    assert scaled(car, rows).dtype == np.float32
    wrapped = gymnasium.wrappers.RescaleObservation(gymnasium.make("Pendulum-v1"), np.float32(-1), np.float32(1))
    seen, _ = wrapped.reset(seed=3)
    plain, _ = wrapped.env.reset(seed=3)
    assert scaled(wrapped.env.observation_space, plain[None])[0] == pytest.approx(seen, abs=1e-6)


def test_only_numbers_of_boxes_are_rescaled() -> None:
    space = Dict(
        choice=Discrete(3), eye=Box(0, 255, (2, 2, 1), np.uint8), level=Box(0.0, 10.0, (2,)),
        stuck=Box(5.0, 5.0, (1,)), action_mask=MultiBinary(2),
    )  # fmt: skip
    batch = {
        "choice": np.array([1]), "eye": np.full((1, 2, 2, 1), 200, np.uint8), "level": np.array([[0.0, 7.5]]),
        "stuck": np.array([[5.0]]), "action_mask": np.array([[1, 0]], np.int8),
    }  # fmt: skip
    assert scaled(space, batch).tolist() == [[0, 1, 0, 200, 200, 200, 200, -1, 0.5, 0, 1, 0]]
    image = Box(0, 255, (36, 36, 1), np.uint8)
    assert scaled(image, np.zeros((1, 36, 36, 1), np.uint8)).dtype == np.uint8, "images stay small"


def test_numbers_without_bounds_are_not_rescaled() -> None:
    for high in (np.inf, np.finfo(np.float32).max):
        with pytest.raises(SpecError, match=r"net\.rescale_observation.* without bounds"):
            Inputs(Box(-high, high, (2,)), Net(rescale_observation=True), action_form(Discrete(2)))
    with pytest.raises(SpecError, match=r"net\.rescale_observation"):  # what a function gives has none that we know of
        Inputs(Text(5), Net(state_to_input=letters, rescale_observation=True), action_form(Discrete(2)))


@pytest.mark.parametrize("name", sorted(TABLE.keys() - {"random", "acer"}))
def test_a_policy_sees_what_was_rescaled(name: str) -> None:
    config_class, build = load(name)
    space, action_space = Box(0.0, 100.0, (1,)), Box(-1.0, 1.0, (1,)) if name in ("td3", "crossq") else Discrete(2)
    algorithm = build(config_class(net=Net((8,), rescale_observation=True)), space, action_space, 0)
    assert algorithm.policy.encode(np.array([[0.0], [50.0], [100.0]])).tolist() == [[-1], [0], [1]]


class Linear(nn.Module):
    def __init__(self, outputs: int, value_shape: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.body = nn.Linear(1, 16)
        self.policy, self.critic = nn.Linear(16, outputs), nn.Linear(16, 1)
        self.value_shape = value_shape

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(observation).tanh()
        return self.policy(features), self.critic(features).reshape(-1, *self.value_shape)


@pytest.mark.parametrize("value_shape", [(), (1,)])
def test_a_model_of_ones_own_learns(value_shape: tuple[int, ...]) -> None:
    net = Net(model_maker=lambda seen, actions: Linear(int(actions.n), value_shape))
    settings = {"rollout_steps": 32, "minibatch_size": 64, "lr": 5e-3, "gamma": 0.8, "net": net}
    envs = probes.vector(probes.Imitate)
    before = torch.get_rng_state()
    algorithm = PPO(Config(**settings), envs.single_observation_space, envs.single_action_space, 0)
    again = PPO(Config(**settings), envs.single_observation_space, envs.single_action_space, 0)
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(algorithm.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b), "the same seed gives the same weights"
    probes.batches(envs, algorithm, 30)
    rows = np.array([[-1.0], [1.0]], np.float32)
    assert algorithm.policy.act(rows, deterministic=True)[0].tolist() == [0, 1]


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_model_gives_means_or_means_and_deviations(outputs: int) -> None:
    envs = probes.vector(probes.Aim)
    net = Net(model_maker=lambda seen, actions: Linear(outputs))
    settings = {"rollout_steps": 32, "minibatch_size": 64, "lr": 3e-3, "gamma": 0.8, "net": net}
    algorithm = PPO(Config(**settings), envs.single_observation_space, envs.single_action_space, 0)
    assert ("net.log_std" in algorithm.policy.state_dict()) == (outputs == 1)
    probes.batches(envs, algorithm, 40)
    assert algorithm.policy.act(np.zeros((1, 1), np.float32), True)[0].item() == pytest.approx(0.5, abs=0.2)


def test_a_model_that_does_not_fit_is_refused() -> None:
    spaces = (probes.Imitate.observation_space, probes.Imitate.action_space, 0)
    for maker, said in (
        (lambda seen, actions: Linear(3), r"\(2, 3\).*for 2 observations"),
        (lambda seen, actions: nn.Linear(1, 2), "Tensor"),
        (lambda seen, actions: "no module", "gave str"),
        ("nowhere.at_all:maker", "is not found"),
        ("gymnasium:no_such_maker", "is not found"),
    ):
        with pytest.raises(SpecError, match=said):
            PPO(Config(net=Net(model_maker=maker)), *spaces)
    with pytest.raises(SpecError, match="recurrent"):
        PPO(Config(net=Net(model_maker=lambda seen, actions: Linear(2), recurrent="gru")), *spaces)


def test_functions_by_name_come_back_from_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("someones_networks")
    vars(module).update(features=lambda seen: nn.Linear(1, 8), halves=halves)
    module.features.__module__, module.features.__qualname__ = "someones_networks", "features"
    monkeypatch.setitem(sys.modules, "someones_networks", module)
    plain = as_plain(Config(net=Net(feature_maker=module.features)))
    assert plain["net"]["feature_maker"] == "someones_networks:features"
    config = config_from(Config, plain)
    algorithm = PPO(config, probes.Imitate.observation_space, probes.Imitate.action_space, 0)
    assert algorithm.policy.net.actor.in_features == 8  # type: ignore[union-attr]  # it is a PolicyValue


def test_images_are_seen_by_convolutions() -> None:
    class Bright(probes.Probe):
        """One step; the half that is bright says which action is right."""

        observation_space = Box(0, 255, (36, 36, 3), np.uint8)

        def first(self) -> float:
            return float(self.np_random.choice([-1.0, 1.0]))

        def observation(self) -> Any:
            image = np.zeros((36, 36, 3), np.uint8)
            image[:, 18:] = 255 if self.seen > 0 else 0
            image[:, :18] = 0 if self.seen > 0 else 255
            return image

        def step(self, action: Any) -> Any:
            return self.observation(), 1.0 if (action == 1) == (self.seen > 0) else -1.0, True, False, {}

    settings = {
        "rollout_steps": 8, "minibatch_size": 32, "epochs": 2, "lr": 1e-3, "gamma": 0.5, "shared": True,
        "net": {"hidden": [32]},
    }  # fmt: skip
    trained = train("ppo", settings, Bright, env_steps=1_500, num_envs=8, target=0.9, window=50)
    assert trained.reached is not None, trained
    observation = trained.algorithm.policy.encode(np.zeros((2, 36, 36, 3), np.uint8))
    assert observation.dtype == np.uint8, "pixels are stored as they are"
    settings["net"] = {"hidden": [32], "image": "resnet", "recurrent": "lstm", "recurrent_size": 16}
    train("ppo", settings, Bright, env_steps=64, num_envs=8)
    with pytest.raises(SpecError, match="normalise_observation"):
        PPO(Config(normalise_observation=True), Bright.observation_space, Bright.action_space, 0)


def test_a_small_grid_is_seen_by_a_convolution_whatever_its_type() -> None:
    cells = np.random.default_rng(0).random((5, 10, 10, 4)) < 0.3
    grid, picture = Box(0, 1, (10, 10, 4), np.bool_), Box(0, 255, (10, 10, 4), np.uint8)
    net = Net(hidden=(8,), activation="relu", image="minatar")
    seen = []
    for space, given in ((grid, cells), (picture, cells.astype(np.uint8) * 255)):
        torso = make_torso(space, net, torch.Generator().manual_seed(0))
        assert torso.size == 8
        seen.append(torso(torch.as_tensor(encode(space, given))))
    torch.testing.assert_close(*seen)
    layer = next(part for part in torso.modules() if isinstance(part, nn.Conv2d))
    assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (4, 16, (3, 3))
    moved = np.roll(cells, 1, axis=1)  # what is seen depends on where it is
    assert not torch.allclose(seen[1], torso(torch.as_tensor(encode(picture, moved.astype(np.uint8) * 255))))
    row = make_torso(Box(-1, 1, (7,)), net)  # no image: as with any other
    assert row(torch.zeros(2, 7)).shape == (2, 8)
    with pytest.raises(SpecError, match="too small for minatar"):
        make_torso(Box(0, 1, (2, 2, 1), np.bool_), net)


def test_an_image_is_the_same_with_its_channels_first_or_last_and_is_left_as_it_was() -> None:
    first = np.random.default_rng(0).integers(0, 256, (3, 4, 40, 36), np.uint8)
    seen = []
    for pixels in (first, np.moveaxis(first, 1, -1)):
        torso = make_torso(Box(0, 255, pixels.shape[1:], np.uint8), Net(hidden=(8,)), torch.Generator().manual_seed(0))
        eye = next(part for part in torso.modules() if isinstance(part, Image))
        seen.append(eye.convolutions(torch.as_tensor(first).float() / 255).flatten(1))
        for given in (torch.as_tensor(pixels.copy()), torch.as_tensor(pixels.copy()).float().flatten(1)):
            before = given.clone()
            seen.append(eye(given))
            assert torch.equal(given, before)
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0])


def test_several_masked_choices_at_once() -> None:
    masked = MultiCategorical(torch.tensor([[0.0, RULED_OUT, 1.0, 2.0]]), (2, 2))
    assert masked.mode().tolist() == [[0, 1]]
