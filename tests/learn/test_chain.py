"""A chain of linear layers gives what its modules and autograd give, wherever its weights lie."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from longrein.learn.chain import Chain
from longrein.learn.distributions import Categorical, action_form, quick_categorical
from longrein.learn.exploration import quick_epsilon_greedy
from longrein.learn.networks import orthogonal
from longrein.learn.optimizers import FlatParameters
from longrein.learn.policy_value import make_policy_value
from longrein.learn.torsos import Net, make_torso

SPACE = Box(-1.0, 1.0, (5,), np.float32)


class Whole(nn.Module):
    """A torso, a head, and the chain through both."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.torso = make_torso(SPACE, net, generator)
        self.head = orthogonal(self.torso.size, 3, 1.0, generator)
        self.chain = Chain.of(self.torso, self.head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.torso(x))  # type: ignore[no-any-return]


def chain_of(whole: Whole) -> Chain:
    assert whole.chain is not None
    return whole.chain


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), (16,), (16, 16)])
@pytest.mark.parametrize("rows", [1, 7, 20_000])  # by NumPy, and by torch
def test_it_gives_what_its_modules_give(activation: str, hidden: tuple[int, ...], rows: int) -> None:
    whole = Whole(Net(hidden=hidden, activation=activation))
    x = 3.0 * torch.randn(rows, 5, generator=torch.Generator().manual_seed(1))
    chain = chain_of(whole)
    assert chain.few(rows) == (rows < 100)
    torch.testing.assert_close(chain(x), whole(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_way_back_is_that_of_autograd(activation: str) -> None:
    whole = Whole(Net(hidden=(16, 16), activation=activation))
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    whole(x).square().mean().backward()
    by_autograd = [parameter.grad.clone() for parameter in whole.parameters()]  # type: ignore[union-attr]
    for parameter in whole.parameters():
        parameter.grad = None
    there = chain_of(whole).there(x)
    there.output.square().mean().backward()  # type: ignore[no-untyped-call]
    there.back()
    for parameter, gradient in zip(whole.parameters(), by_autograd, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), (16,), (16, 16)])
def test_the_way_back_of_few_rows_is_that_of_autograd(activation: str, hidden: tuple[int, ...]) -> None:
    whole = Whole(Net(hidden=hidden, activation=activation))
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    whole(x).square().mean().backward()
    by_autograd = [parameter.grad.clone() for parameter in whole.parameters()]  # type: ignore[union-attr]
    for ready in (False, True):  # gradients that are still to be made, then those of a whole
        for parameter in whole.parameters():
            parameter.grad = None
        if ready:
            FlatParameters(whole.parameters())
        there = chain_of(whole).there_of_few(x.numpy())
        there.back(2.0 * there.output / there.output.size)
        for parameter, gradient in zip(whole.parameters(), by_autograd, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_gradients_land_where_flat_parameters_have_them() -> None:
    whole = Whole(Net(hidden=(16,)))
    flat = FlatParameters(whole.parameters())
    there = chain_of(whole).there(torch.ones(4, 5))
    there.output.sum().backward()  # type: ignore[no-untyped-call]
    there.back()
    assert whole.head.bias.grad is not None
    assert whole.head.bias.grad.tolist() == [4.0, 4.0, 4.0]  # of each of four rows, 1
    assert flat.gradient[-3:].tolist() == [4.0, 4.0, 4.0]


def test_it_sees_weights_that_change_and_weights_that_move() -> None:
    whole = Whole(Net(hidden=(16,)))
    x = torch.ones(2, 5)
    chain_of(whole)(x)  # it has looked at its weights now
    flat = FlatParameters(whole.parameters())  # which moves them
    for _ in range(2):
        with torch.no_grad():
            flat.whole.add_(0.1)
        torch.testing.assert_close(chain_of(whole)(x), whole(x).detach())
    with torch.no_grad():
        whole.head.bias.data = torch.full((3,), 7.0)
    torch.testing.assert_close(chain_of(whole)(x), whole(x).detach())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_a_copy_looks_at_its_own_weights(copied: object) -> None:
    whole = Whole(Net(hidden=(16,)))
    x = torch.ones(2, 5)
    before = chain_of(whole)(x)
    other = copied(whole)  # type: ignore[operator]
    with torch.no_grad():
        other.head.bias.add_(1.0)
    torch.testing.assert_close(chain_of(other)(x), before + 1.0)
    torch.testing.assert_close(chain_of(whole)(x), before)


@pytest.mark.parametrize("net", [Net(layer_norm=True), Net(activation="elu")])
def test_other_layers_are_no_chain(net: Net) -> None:
    assert Whole(net).chain is None


def test_large_layers_are_left_to_torch() -> None:
    assert not chain_of(Whole(Net(hidden=(256, 256)))).few(1)


def test_the_quick_choice_is_that_of_the_distribution() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    slow = Categorical(logits)
    action, log_prob = quick_categorical(logits.numpy(), torch.Generator().manual_seed(3))
    assert action.tolist() == slow.sample(torch.Generator().manual_seed(3)).tolist()
    np.testing.assert_allclose(log_prob, slow.log_prob(torch.from_numpy(action)).numpy(), rtol=1e-5)


def test_quick_epsilon_greedy_takes_the_best_and_all_others_as_often_as_it_should() -> None:
    value = np.tile(np.float32([0.0, 2.0, 1.0]), (30_000, 1))
    assert (quick_epsilon_greedy(value, 0.0) == 1).all()
    taken = quick_epsilon_greedy(value, 0.6, torch.Generator().manual_seed(0))
    # 0.2 each of any, and 0.4 more of the best; three deviations of a share of 0.2 of 30,000 are 0.007
    np.testing.assert_allclose(np.bincount(taken) / 30_000, [0.2, 0.6, 0.2], atol=0.009)


def test_a_loss_on_passes_moves_a_policy_and_its_value_as_autograd_does() -> None:
    network = make_policy_value(SPACE, Discrete(2), action_form(Discrete(2)), Net(hidden=(8,)))
    x = torch.randn(10, 5, generator=torch.Generator().manual_seed(1))
    found = []
    for evaluate in (lambda rows: (*network.evaluate(rows), ()), network.evaluate_apart):
        network.zero_grad()
        numbers, value, passes = evaluate(x)
        (numbers.square().mean() + value.square().mean()).backward()
        for one in passes:
            one.back()
        found.append([parameter.grad.clone() for parameter in network.parameters()])  # type: ignore[union-attr]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
