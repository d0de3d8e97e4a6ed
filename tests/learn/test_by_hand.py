"""What actors and critics compute by hand is what autograd gives for the same networks."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from learn import synthetic
from torch import Tensor, nn

from longrein.learn import losses
from longrein.learn.algorithms import sac, td3
from longrein.learn.bounded import SquashedGaussian
from longrein.learn.critics import set_gradients
from longrein.learn.ensemble import Ensemble
from longrein.learn.replay import Memory
from longrein.learn.torsos import Net

SEEN = Box(-1, 1, (3,))
BOX, CHOICES = Box(-2.0, 2.0, (2,)), Discrete(3)
NETS = [Net(hidden=(16, 24), activation="relu"), Net(hidden=(16, 24), activation="tanh"), Net(hidden=())]


def gradients(module: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


def close(got: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def by_autograd(algorithm: Any) -> Any:
    """A copy that has no chain."""
    other = copy.deepcopy(algorithm)
    other.policy.chain = None
    for name in ("critics", "targets", "target_critics"):
        if hasattr(other, name):
            getattr(other, name).chains = []
    if hasattr(other, "target_policy"):
        other.target_policy.chain = None
    return other


def made(module: Any, net: Net, space: gymnasium.Space[Any]) -> Any:
    config = module.Config(net=net, memory=Memory(500, 64, 64), warmup_steps=0)
    algorithm = module.build(config, SEEN, space, 0)
    assert algorithm.policy.chain is not None
    assert len(algorithm.critics.chains) == 2
    with torch.no_grad():  # a policy that is worth something, and deviations on both sides of the limits
        algorithm.policy.head.weight.mul_(100.0)
        if module is sac and space is BOX:
            algorithm.policy.head.bias.copy_(torch.tensor([0.0, 0.5, 1.5, -1.0]))
    return algorithm


@pytest.mark.parametrize("net", NETS, ids=str)
@pytest.mark.parametrize(("module", "space"), [(sac, BOX), (sac, CHOICES), (td3, BOX)])
def test_an_update_is_that_of_autograd(module: Any, space: gymnasium.Space[Any], net: Net) -> None:
    one = made(module, net, space)
    two = by_autograd(one)
    for algorithm in (one, two):
        rows = synthetic.batch(32, 4, actions=2 if space is BOX else -3)
        algorithm.replay.add(rows)
        # A step of SGD tells of the gradient itself, where Adam's would tell of its sign.
        parameters = list(algorithm.policy.parameters())
        parameters += [algorithm.log_alpha] if module is sac else []
        algorithm.policy_optimizer = torch.optim.SGD(parameters, lr=0.1)
        algorithm.critic_optimizer = torch.optim.SGD(algorithm.critics.parameters(), lr=0.1)
    for _ in range(4):
        torch.testing.assert_close(one._step(), two._step(), rtol=1e-4, atol=1e-5, equal_nan=True)
    close(gradients(one.policy), gradients(two.policy))
    close(gradients(one.critics), gradients(two.critics))
    if module is sac:
        torch.testing.assert_close(one.log_alpha, two.log_alpha)
    assert torch.equal(one.generator.get_state(), two.generator.get_state())


@pytest.mark.parametrize("net", NETS, ids=str)
def test_the_slope_of_the_lower_critic(net: Net) -> None:
    critics = Ensemble(SEEN, net, inputs=2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    seen, action = torch.randn(50, 3, generator=generator), torch.randn(50, 2, generator=generator).requires_grad_()
    q = critics(seen, action).squeeze(-1).amin(0)
    (wanted,) = torch.autograd.grad(q.sum(), action)
    there = critics.there(seen, action.detach())
    lower = there.output.squeeze(-1).argmin(0)
    assert 0 < int(lower.sum()) < 50
    torch.testing.assert_close(there.slope(lower, 2), wanted)
    only = there.slope(torch.ones(50, dtype=torch.int64), 2)  # no row for the first
    (wanted,) = torch.autograd.grad(critics(seen, action)[1].sum(), action)
    torch.testing.assert_close(only, wanted)
    assert all(parameter.grad is None for parameter in critics.parameters())


def test_a_draw_goes_back_as_autograd_does() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_std = (torch.randn(40, 3, generator=generator).requires_grad_() for _ in range(2))
    drawn = SquashedGaussian(mean, log_std).draw(generator)
    by_action = torch.randn(40, 3, generator=generator)
    loss = (by_action * drawn.action).sum() + 0.7 * drawn.log_prob.sum()
    wanted = torch.autograd.grad(loss, (mean, log_std))
    with torch.no_grad():
        close(list(drawn.back(by_action, torch.tensor(0.7))), list(wanted))


def test_the_slope_of_the_critics_loss() -> None:
    # 0.5 / 2 * ((1 - 3)^2 + 0.5 (2 - 4)^2): by the values (1 - 3) / 2 and 0.5 (2 - 4) / 2
    slope = losses.ensemble_value_slope(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.5]))
    assert slope.tolist() == [[-1.0, -0.5]]


@pytest.mark.parametrize("net", [Net(hidden=(16,), layer_norm=True), Net(hidden=(16,), activation="elu")], ids=str)
def test_other_networks_are_left_to_autograd(net: Net) -> None:
    critics = Ensemble(SEEN, net, generator=torch.Generator().manual_seed(0))
    assert critics.chains == []
    for _ in range(2):  # nothing is left of the first time
        set_gradients(critics, torch.ones(4, 3), torch.ones(4), torch.ones(4))
    wanted = torch.autograd.grad(
        losses.ensemble_value_loss(critics(torch.ones(4, 3)).squeeze(-1), torch.ones(4), torch.ones(4)),
        list(critics.parameters()),
    )
    close(gradients(critics), list(wanted))
