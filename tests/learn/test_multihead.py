"""Heads of their own, a torso in common: what an environment's loss moves, and that two tasks are learnt at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import nn

from longrein.errors import SpecError
from longrein.learn.multihead import Ends, MultiHead
from longrein.learn.torsos import Net, encode

ENDS = {
    "CartPole-v1": Ends(Box(-1, 1, (4,)), 2),
    "ale.pong/1": Ends(Box(0, 255, (36, 36, 3), np.uint8), 6),
    "taxi": Ends(Dict(where=Discrete(5), what=Box(0, 1, (2,))), 3),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def network(seed: int = 0) -> MultiHead:
    return MultiHead(ENDS, Net((32, 16), activation="relu"), width=24, generator=torch.Generator().manual_seed(seed))


def observations(rows: int = 3) -> dict[str, torch.Tensor]:
    found = {}
    for name, end in ENDS.items():
        end.observation_space.seed(1)
        samples = [end.observation_space.sample() for _ in range(rows)]
        if isinstance(end.observation_space, Dict):
            batch = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
        else:
            batch = np.stack(samples)
        found[name] = torch.from_numpy(encode(end.observation_space, batch))
    return found


def test_each_environment_gets_its_own_outputs() -> None:
    net = network()
    rows = observations()
    outputs = net(rows)
    assert {name: tuple(out.shape) for name, out in outputs.items()} == {
        name: (3, e.outputs) for name, e in ENDS.items()
    }
    for name in ENDS:
        torch.testing.assert_close(net.of(name)(rows[name]), outputs[name])
    some = {"taxi": rows["taxi"], "CartPole-v1": rows["CartPole-v1"][:1]}
    again = net(some)
    assert list(again) == ["taxi", "CartPole-v1"]
    torch.testing.assert_close(again["CartPole-v1"], outputs["CartPole-v1"][:1])


def test_a_loss_moves_the_torso_and_its_own_heads_only() -> None:
    net = network()
    net(observations())["taxi"].square().sum().backward()
    moved = {name for name, parameter in net.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert {name.split(".")[0] for name in moved} == {"heads", "torso", "tails"}
    assert all(name.split(".")[1] == "2" for name in moved if not name.startswith("torso"))
    assert all(f"torso.{layer}.weight" in moved for layer in (0, 2))


def test_the_same_generator_gives_the_same_network() -> None:
    before = torch.get_rng_state()
    one, two, other = network(1), network(1), network(2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_two_tasks_are_learnt_together() -> None:
    generator = torch.Generator().manual_seed(0)
    ends = {"sum": Ends(Box(-1, 1, (3,)), 1), "product": Ends(Box(-1, 1, (2,)), 1)}
    net = MultiHead(ends, Net((32,)), width=32, generator=generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    a, b = torch.rand(256, 3, generator=generator) * 2 - 1, torch.rand(256, 2, generator=generator) * 2 - 1
    targets = {"sum": a.sum(1, keepdim=True), "product": b.prod(1, keepdim=True)}
    for _ in range(600):
        outputs = net({"sum": a, "product": b})
        loss = sum(nn.functional.mse_loss(outputs[name], target) for name, target in targets.items())
        assert isinstance(loss, torch.Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SpecError, match="at least one"):
        MultiHead({}, Net())
    with pytest.raises(SpecError, match="recurrent"):
        MultiHead(ENDS, Net(recurrent="lstm"))
    with pytest.raises(SpecError, match="8 features"):
        MultiHead({"a": ENDS["CartPole-v1"]}, Net(feature_maker=lambda space: nn.Linear(4, 8)))
    with pytest.raises(KeyError, match="has heads for CartPole-v1"):
        network().of("pong")
