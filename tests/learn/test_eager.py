"""Optimizers without torch.compile beside torch's own: the same numbers, and saves that go from one to the other."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from longrein.learn.arrays import Views, as_arrays
from longrein.learn.eager import Adam, Eager, quick_adam
from longrein.learn.optimizers import FlatParameters, make_optimizer, optimizer_classes, set_lr

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SHAPES = ((5, 3), (5,), ())


def parameters(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=dtypes[number % len(dtypes)]))
        for number, shape in enumerate(SHAPES)
    ]


def steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], count: int, seed: int = 0) -> None:
    """Steps along drawn gradients, at a rate that changes; the last parameter gets none every third time."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        optimizer.zero_grad()
        for p in params[: 2 if number % 3 == 0 else 3]:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 10.0 ** (number % 5 - 2)
        set_lr(optimizer, 0.01 / (1 + number))
        optimizer.step()


@pytest.mark.parametrize(
    "settings",
    [{}, {"eps": 1.5e-4}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True},
     {"fused": False}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
)  # fmt: skip
def test_adam_steps_as_torchs_does(settings: dict[str, Any]) -> None:
    settings = {"fused": True} | settings
    if "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters:  # older versions
        settings.pop("decoupled_weight_decay", None)
    ours, theirs = parameters(), parameters()
    steps(Adam(ours, lr=0.1, **settings), ours, 100)
    steps(torch.optim.Adam(theirs, lr=0.1, **settings), theirs, 100)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ours[0], parameters()[0], atol=0.01)


@pytest.mark.parametrize("settings", [{}, {"eps": 1.5e-4, "betas": (0.5, 0.9)}, {"amsgrad": True}])
def test_quick_adam_steps_as_torchs_does(settings: dict[str, Any]) -> None:
    ours, theirs = parameters()[:1], parameters()[:1]
    quick = Adam(ours, lr=0.1, fused=True, **settings)
    views = Views(as_arrays)
    other = torch.optim.Adam(theirs, lr=0.1, **settings)
    for number in range(60):
        gradient = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(number)) * 10.0 ** (
            number % 5 - 2
        )
        ours[0].grad, theirs[0].grad = gradient.clone(), gradient.clone()
        set_lr(quick, 0.1 / (1 + number))
        set_lr(other, 0.1 / (1 + number))
        quick_adam(quick, views)
        other.step()
        if number == 30:  # what is loaded lies elsewhere
            quick.load_state_dict(copy.deepcopy(quick.state_dict()))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
    saved, expected = quick.state_dict()["state"][0], other.state_dict()["state"][0]
    assert float(saved["step"]) == 60
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(saved[name], expected[name], rtol=1e-4, atol=1e-6)


def test_adam_takes_numbers_of_two_types() -> None:
    ours, theirs = parameters((torch.float32, torch.float64)), parameters((torch.float32, torch.float64))
    steps(Adam(ours, lr=0.1, fused=True), ours, 10)
    steps(torch.optim.Adam(theirs, lr=0.1, fused=True), theirs, 10)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_adam_begins_with_a_step_of_its_rate() -> None:
    # m / (1 - 0.9) = 4 and sqrt(v / (1 - 0.999)) = 4: a step of lr, whatever the gradient.
    parameter = nn.Parameter(torch.tensor([1.0]))
    parameter.grad = torch.tensor([4.0])
    Adam([parameter], lr=0.25, fused=True).step()
    assert parameter.item() == pytest.approx(0.75)


@pytest.mark.parametrize("name", sorted(set(optimizer_classes()) - {"rmsprop_tf"}))
def test_each_by_name_steps_as_torchs_does(name: str) -> None:
    kind = next(value for key, value in vars(torch.optim).items() if key.lower() == name)
    ours, theirs = parameters(), parameters()
    steps(make_optimizer(name, ours, 0.1), ours, 20)
    steps(kind(theirs, lr=0.1), theirs, 20)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_torchs_adam_saved_goes_on_in_ours_and_back() -> None:
    def made(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return Adam(params, lr=0.5, fused=True)

    def torchs(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.1, betas=(0.8, 0.9), eps=1e-3, fused=True)

    def interrupted(first: Make, second: Make) -> list[nn.Parameter]:
        params = parameters()
        before = first(params)
        steps(before, params, 7, seed=1)
        after = second(params)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        steps(after, params, 7, seed=2)
        return params

    def same(ones: list[nn.Parameter], others: list[nn.Parameter]) -> bool:
        return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))

    assert same(interrupted(torchs, torchs), interrupted(torchs, made))
    assert same(interrupted(made, made), interrupted(made, torchs))
    assert not same(interrupted(made, made), interrupted(torchs, made))  # the saved settings are not those of `made`


def test_saves_have_torchs_names() -> None:
    ours, theirs = parameters(), parameters()
    one, other = Adam(ours, lr=0.1, fused=True), torch.optim.Adam(theirs, lr=0.1, fused=True)
    steps(one, ours, 2)
    steps(other, theirs, 2)
    saved, expected = one.state_dict(), other.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert {key: set(state) for key, state in saved["state"].items()} == {
        key: set(state) for key, state in expected["state"].items()
    }


def test_zeroed_gradients_stay_views_of_the_whole() -> None:
    layer = nn.Linear(2, 1)
    flat = FlatParameters(layer.parameters())
    optimizer = Adam(layer.parameters(), lr=0.1, fused=True)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert not flat.gradient.any()
    layer(torch.ones(1, 2)).sum().backward()
    assert flat.gradient.tolist() == [1.0, 1.0, 1.0]
    optimizer.zero_grad()
    assert layer.weight.grad is None


def test_a_closure_is_evaluated_with_gradients() -> None:
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = Adam([parameter], lr=0.5, fused=True)

    def loss() -> float:
        optimizer.zero_grad()
        value = parameter.square().sum()
        value.backward()
        return value.item()

    assert optimizer.step(loss) == 9.0
    assert parameter.item() == pytest.approx(2.5)


def test_every_optimizer_by_name_is_one_of_these() -> None:
    assert all(issubclass(kind, Eager) for kind in optimizer_classes().values() if inspect.isclass(kind))
