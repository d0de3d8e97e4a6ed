"""Returns and advantages against brute force over every later step, and against sums worked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longrein.learn.returns import continues, discounted_returns, gae, n_step_returns, quick_gae

Case = dict[str, Tensor]


def random_case(seed: int, steps: int, envs: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def flags(share: float) -> Tensor:
        return torch.rand(steps, envs, generator=generator) < share

    def numbers() -> Tensor:
        return torch.randn(steps, envs, generator=generator, dtype=torch.float64)

    return {
        "reward": numbers(),
        "terminated": flags(0.2),
        "truncated": flags(0.2),
        "valid": ~flags(0.15),
        "value": numbers(),
        "next_value": numbers(),
    }


def one_step(case: Case, t: int, b: int, gamma: float) -> float:
    """r + gamma V(s'), without V(s') where the MDP ended."""
    successor = 0.0 if case["terminated"][t, b] else gamma * float(case["next_value"][t, b])
    return float(case["reward"][t, b]) + successor


def last_of(case: Case, t: int, b: int) -> int:
    """The last row of the run of rows that t begins: an end of episode, a row before an invalid one, or the last."""
    steps = len(case["reward"])
    while t + 1 < steps and not case["terminated"][t, b] and not case["truncated"][t, b] and case["valid"][t + 1, b]:
        t += 1
    return t


def brute_gae(case: Case, gamma: float, lambda_: float) -> Tensor:
    out = torch.zeros_like(case["reward"])
    for t in range(len(out)):
        for b in range(out.shape[1]):
            if case["valid"][t, b]:
                for k in range(t, last_of(case, t, b) + 1):
                    delta = one_step(case, k, b, gamma) - float(case["value"][k, b])
                    out[t, b] += (gamma * lambda_) ** (k - t) * delta
    return out


def brute_n_step(case: Case, gamma: float) -> Tensor:
    out = torch.zeros_like(case["reward"])
    for t in range(len(out)):
        for b in range(out.shape[1]):
            if case["valid"][t, b]:
                last = last_of(case, t, b)
                for k in range(t, last):
                    out[t, b] += gamma ** (k - t) * float(case["reward"][k, b])
                out[t, b] += gamma ** (last - t) * one_step(case, last, b, gamma)
    return out


cases = st.builds(random_case, st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 3))
shares = st.sampled_from([0.0, 0.5, 0.9, 1.0])


@settings(max_examples=60, deadline=None)
@given(cases, shares, shares)
def test_gae_is_the_sum_over_later_td_errors(case: Case, gamma: float, lambda_: float) -> None:
    torch.testing.assert_close(gae(**case, gamma=gamma, lambda_=lambda_), brute_gae(case, gamma, lambda_))


@settings(max_examples=60, deadline=None)
@given(cases, shares)
def test_n_step_return_is_the_bootstrapped_sum(case: Case, gamma: float) -> None:
    given_ = {name: tensor for name, tensor in case.items() if name != "value"}
    torch.testing.assert_close(n_step_returns(**given_, gamma=gamma), brute_n_step(case, gamma))


@given(cases, shares)
@settings(max_examples=30, deadline=None)
def test_lambda_one_is_the_n_step_return_less_the_value(case: Case, gamma: float) -> None:
    # Needs V(s'_t) = V(s_{t+1}) inside an episode, as a real rollout has it.
    case["next_value"][:-1] = torch.where(
        case["terminated"] | case["truncated"], case["next_value"], case["value"].roll(-1, 0)
    )[:-1]
    given_ = {name: tensor for name, tensor in case.items() if name != "value"}
    expected = (n_step_returns(**given_, gamma=gamma) - case["value"]).masked_fill(~case["valid"], 0.0)
    torch.testing.assert_close(gae(**case, gamma=gamma, lambda_=1.0), expected)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).unsqueeze(1)


def flags(*ones: int) -> Tensor:
    return torch.tensor(ones).bool().unsqueeze(1)


def test_gae_by_hand() -> None:
    # gamma = 0.5, lambda = 0.5, so the trace decays by 0.25.
    # t=2 (cut by the rollout): 3 + 0.5*6 - 2 = 4
    # t=1 (truncated):          2 + 0.5*8 - 4 = 2, and nothing of t=2
    # t=0:                      1 + 0.5*4 - 2 = 1, and 0.25 * 2 = 1.5
    advantage = gae(
        column(1, 2, 3), flags(0, 0, 0), flags(0, 1, 0), flags(1, 1, 1), column(2, 4, 2), column(4, 8, 6),
        gamma=0.5, lambda_=0.5,
    )  # fmt: skip
    assert advantage.squeeze(1).tolist() == [1.5, 2.0, 4.0]


def test_termination_wins_over_truncation() -> None:
    # Both at once: 2 + 0 - 4 = -2, the successor's 8 does not count.
    advantage = gae(column(2), flags(1), flags(1), flags(1), column(4), column(8), gamma=0.5, lambda_=0.5)
    assert advantage.item() == -2.0


def test_an_invalid_row_is_worth_nothing_and_cuts_the_row_before() -> None:
    nan = float("nan")
    given_ = (flags(0, 0, 0), flags(0, 0, 0), flags(1, 0, 1))
    advantage = gae(column(1, nan, 3), *given_, column(0, nan, 0), column(4, nan, 6), gamma=0.5, lambda_=0.5)
    # t=0: 1 + 0.5*4 = 3, t=2: 3 + 0.5*6 = 6, whatever stands in between.
    assert advantage.squeeze(1).tolist() == [3.0, 0.0, 6.0]


def test_discounted_returns_by_hand() -> None:
    # Second episode: 4; 2 + 0.5*4 = 4. First: 1 + 0.5*2 = 2, done there.
    returns = discounted_returns(column(1, 2, 2, 4), flags(0, 1, 0, 0), gamma=0.5)
    assert returns.squeeze(1).tolist() == [2.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize("kind", ["truncated", "terminated"])
def test_a_time_limit_does_not_shorten_the_value_of_an_endless_task(kind: str) -> None:
    # Reward 1 for ever, stopped every 5 steps: V = 1 / (1 - 0.9) = 10 when the stop is a truncation,
    # and less when it is mistaken for an end.
    ends = (torch.arange(20) % 5 == 4).unsqueeze(1)
    never = torch.zeros_like(ends)
    terminated, truncated = (ends, never) if kind == "terminated" else (never, ends)
    value = 0.0
    for _ in range(300):
        v = torch.full((20, 1), value)
        target = gae(torch.ones(20, 1), terminated, truncated, ~never, v, v, gamma=0.9, lambda_=0.8) + v
        value = float(target.mean())
    assert value == pytest.approx(10.0, rel=1e-3) if kind == "truncated" else value < 6.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        gae(
            column(1, 2), flags(0, 0), flags(0, 0), flags(1, 1), column(1, 2), column(1),
            gamma=0.9, lambda_=0.9,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
def test_gae_by_numpy_is_gae(seed: int, lambda_: float) -> None:
    case = random_case(seed, 7, 3)
    case |= {name: case[name].float() for name in ("reward", "value", "next_value")}
    case["reward"][~case["valid"]] = torch.nan
    goes_on = continues(case["terminated"] | case["truncated"], case["valid"])
    case["next_value"][:-1] = torch.where(goes_on[:-1], case["value"][1:], case["next_value"][:-1])
    names = ("reward", "terminated", "valid", "value", "next_value")
    quick = quick_gae(
        **{name: case[name].numpy() for name in names}, goes_on=goes_on.numpy(), gamma=0.9, lambda_=lambda_
    )
    assert quick.dtype == "float32"
    torch.testing.assert_close(torch.from_numpy(quick), gae(**case, gamma=0.9, lambda_=lambda_))
    if lambda_ == 1.0:  # what a2c relies on
        value = case.pop("value")
        returns = n_step_returns(**case, gamma=0.9)
        torch.testing.assert_close((torch.from_numpy(quick) + value)[case["valid"]], returns[case["valid"]])
