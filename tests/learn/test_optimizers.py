"""Optimizers by name, and RMSProp with epsilon inside the root against numbers worked by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from longrein.errors import SpecError
from longrein.learn.optimizers import (
    FlatParameters,
    RMSpropTF,
    make_optimizer,
    optimizer_classes,
    rmsprop_tf_,
    set_lr,
    state_tensors,
)


def with_gradient(value: float, gradient: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor([value]))
    parameter.grad = torch.tensor([gradient])
    return parameter


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 13.0, math.inf])
def test_clipping_by_numpy_is_clipping(max_norm: float) -> None:
    # The norm of 3, 4 and 12 is 13.
    found = []
    for quick in (False, True):
        flat = FlatParameters([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2, 1))])
        flat.gradient.copy_(torch.tensor([3.0, -4.0, 12.0]))
        norm = flat.quick_clip_(max_norm) if quick else flat.clip_(max_norm).item()
        assert norm == pytest.approx(13.0)
        found.append(flat.gradient.tolist())
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_the_norm_by_numpy_is_that_of_all_numbers() -> None:
    flat = FlatParameters([nn.Parameter(torch.zeros(20_000))])
    flat.gradient.fill_(0.5)
    assert flat.quick_clip_(1.0) == pytest.approx(0.5 * math.sqrt(20_000))
    assert flat.gradient.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_epsilon_is_inside_the_root() -> None:
    # g = 0.9 * 0 + 0.1 * 2^2 = 0.4; 1 - 0.5 * 2 / sqrt(0.4 + 0.1) = 1 - 1.41421; outside it would be 1 - 1.36557.
    parameter, average = torch.tensor([1.0]), torch.tensor([0.0])
    rmsprop_tf_([parameter], [torch.tensor([2.0])], [average], lr=0.5, alpha=0.9, eps=0.1)
    assert average.item() == pytest.approx(0.4)
    assert parameter.item() == pytest.approx(1 - math.sqrt(2))


def test_the_average_of_squares_starts_at_one() -> None:
    # First step: g = 0.9 * 1 + 0.1 * 4 = 1.3; second, with gradient -1: g = 0.9 * 1.3 + 0.1 = 1.27.
    parameter = with_gradient(1.0, 2.0)
    optimizer = RMSpropTF([parameter], lr=0.1, alpha=0.9, eps=0.0)
    optimizer.step()
    first = 1.0 - 0.1 * 2 / math.sqrt(1.3)
    assert parameter.item() == pytest.approx(first)
    parameter.grad = torch.tensor([-1.0])
    optimizer.step()
    assert parameter.item() == pytest.approx(first + 0.1 / math.sqrt(1.27))


def test_momentum_goes_over_whole_steps() -> None:
    # alpha 0 makes every step lr in the gradient's direction: 0.1, then 0.5 * 0.1 + 0.1 = 0.15.
    parameter = with_gradient(0.0, 3.0)
    optimizer = RMSpropTF([parameter], lr=0.1, alpha=0.0, eps=0.0, momentum=0.5)
    optimizer.step()
    assert parameter.item() == pytest.approx(-0.1)
    optimizer.step()
    assert parameter.item() == pytest.approx(-0.25)


def test_torchs_rmsprop_is_another() -> None:
    # Its first step is 0.1 / sqrt(0.01) = 1, whatever the gradient; with averages from 1 on it is about lr * gradient.
    other, ours = with_gradient(0.0, 0.5), with_gradient(0.0, 0.5)
    make_optimizer("RMSprop", [other], 0.1, alpha=0.99).step()
    make_optimizer("rmsprop_tf", [ours], 0.1, alpha=0.99).step()
    assert other.item() == pytest.approx(-1.0, abs=1e-3)
    assert ours.item() == pytest.approx(-0.05, abs=1e-3)


@pytest.mark.parametrize("name", sorted(optimizer_classes()))
def test_each_takes_a_step_downhill_and_goes_on_from_a_save(name: str) -> None:
    def stepped(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> float:
        for _ in range(count):
            optimizer.zero_grad()
            (parameter - 1.0).square().sum().backward()
            optimizer.step()
        return parameter.detach().sum().item()

    one = nn.Parameter(torch.full((2, 3), 5.0))
    optimizer = make_optimizer(name.upper(), [one], 0.01)
    assert stepped(one, optimizer, 2) < 30.0
    two = nn.Parameter(one.detach().clone())
    again = make_optimizer(name, [two], 0.5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert stepped(one, optimizer, 2) == stepped(two, again, 2)


def test_a_rate_set_is_the_rate_of_the_next_step() -> None:
    parameter = with_gradient(1.0, 1.0)
    optimizer = make_optimizer("sgd", [parameter], 0.5)
    set_lr(optimizer, 0.25)
    optimizer.step()
    assert parameter.item() == 0.75


def test_what_cannot_be_made_is_named() -> None:
    parameter = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(SpecError, match="did you mean 'adam'"):
        make_optimizer("adamm", parameter, 0.1)
    with pytest.raises(SpecError, match="no setting 'epsilon'"):
        make_optimizer("adam", parameter, 0.1, epsilon=1e-5)
    with pytest.raises(SpecError, match="adam: Invalid"):
        make_optimizer("adam", parameter, 0.1, eps=-1.0)
    with pytest.raises(SpecError, match="there is no optimizer 'lbfgs'"):
        make_optimizer("lbfgs", parameter, 0.1)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("rmsprop_tf", {}), ("rmsprop_tf", {"momentum": 0.9}), ("adam", {"amsgrad": True}), ("adamw", {}),
     ("rmsprop", {"centered": True}), ("sgd", {"momentum": 0.9}), ("sgd", {})],
)  # fmt: skip
def test_statistics_made_beforehand_are_those_the_first_step_would_make(name: str, settings: dict[str, float]) -> None:
    lazy, ready = with_gradient(1.0, 2.0), with_gradient(1.0, 2.0)
    one, two = (make_optimizer(name, [parameter], 0.1, **settings) for parameter in (lazy, ready))
    state_tensors(two)
    assert ready.item() == 1.0
    ready.grad = torch.tensor([2.0])
    for optimizer in (one, two, one, two):
        optimizer.step()
    assert lazy.item() == ready.item()
