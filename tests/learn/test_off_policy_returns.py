"""V-trace, Retrace and Q^opc against brute force over every later step, and against sums worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longrein.learn.returns import gae, n_step_returns, retrace, vtrace

Case = dict[str, Tensor]
MASKS = ("reward", "terminated", "truncated", "valid")


def random_case(seed: int, steps: int, envs: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def flags(share: float) -> Tensor:
        return torch.rand(steps, envs, generator=generator) < share

    def numbers() -> Tensor:
        return torch.randn(steps, envs, generator=generator, dtype=torch.float64)

    return {
        "reward": numbers(),
        "terminated": flags(0.15),
        "truncated": flags(0.15),
        "valid": ~flags(0.15),
        "value": numbers(),
        "next_value": numbers(),
        "log_ratio": numbers(),
    }


cases = st.builds(random_case, st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 3))
shares = st.sampled_from([0.0, 0.5, 0.9, 1.0])
clips = st.sampled_from([0.5, 1.0, 2.0, math.inf])


def last_of(case: Case, t: int, b: int) -> int:
    """The last row of the run of rows that t begins: an end of episode, a row before an invalid one, or the last."""
    steps = len(case["reward"])
    while t + 1 < steps and not case["terminated"][t, b] and not case["truncated"][t, b] and case["valid"][t + 1, b]:
        t += 1
    return t


def one_step(case: Case, t: int, b: int, gamma: float, successor: float | None = None) -> float:
    """r + gamma V(s'), without V(s') where the MDP ended."""
    worth = float(case["next_value"][t, b]) if successor is None else successor
    return float(case["reward"][t, b]) + (0.0 if case["terminated"][t, b] else gamma * worth)


def brute_vtrace(case: Case, gamma: float, lambda_: float, rho_clip: float, c_clip: float) -> tuple[Tensor, Tensor]:
    """Equation 1 of the paper as it stands there: for each t a sum over k >= t of products over i from t to k - 1."""
    v, q = torch.zeros_like(case["reward"]), torch.zeros_like(case["reward"])
    steps, envs = v.shape
    for b in range(envs):
        for t in reversed(range(steps)):
            if not case["valid"][t, b]:
                continue
            last = last_of(case, t, b)
            v[t, b] = case["value"][t, b]
            for k in range(t, last + 1):
                product = 1.0
                for i in range(t, k):
                    product *= gamma * lambda_ * min(c_clip, math.exp(case["log_ratio"][i, b]))
                rho = min(rho_clip, math.exp(case["log_ratio"][k, b]))
                v[t, b] += product * rho * (one_step(case, k, b, gamma) - float(case["value"][k, b]))
            q[t, b] = one_step(case, t, b, gamma, None if last == t else float(v[t + 1, b]))
    return v, q


def brute_retrace(case: Case, gamma: float, trace: Tensor) -> Tensor:
    """Q + sum_k gamma^(k-t) (product of c from t + 1 to k) delta_k, as Munos et al. have it."""
    out = torch.zeros_like(case["reward"])
    for b in range(out.shape[1]):
        for t in range(len(out)):
            if not case["valid"][t, b]:
                continue
            out[t, b] = case["value"][t, b]
            for k in range(t, last_of(case, t, b) + 1):
                product = math.prod(float(trace[i, b]) for i in range(t + 1, k + 1))
                delta = one_step(case, k, b, gamma) - float(case["value"][k, b])
                out[t, b] += gamma ** (k - t) * product * delta
    return out


def retraced(case: Case, trace: Tensor, gamma: float) -> Tensor:
    masks = {name: case[name] for name in MASKS}
    return retrace(**masks, action_value=case["value"], next_value=case["next_value"], trace=trace, gamma=gamma)


@settings(max_examples=80, deadline=None)
@given(cases, shares, shares, clips, clips)
def test_vtrace_is_the_sum_of_the_paper(
    case: Case, gamma: float, lambda_: float, rho_clip: float, c_clip: float
) -> None:
    settings_ = {"gamma": gamma, "lambda_": lambda_, "rho_clip": rho_clip, "c_clip": c_clip}
    for ours, brute in zip(vtrace(**case, **settings_), brute_vtrace(case, **settings_), strict=True):
        torch.testing.assert_close(ours, brute)


@settings(max_examples=40, deadline=None)
@given(cases, shares, shares)
def test_on_policy_vtrace_is_gae(case: Case, gamma: float, lambda_: float) -> None:
    case["log_ratio"].zero_()
    v, _ = vtrace(**case, gamma=gamma, lambda_=lambda_)
    advantage = gae(**{k: x for k, x in case.items() if k != "log_ratio"}, gamma=gamma, lambda_=lambda_)
    torch.testing.assert_close(v, (advantage + case["value"]).masked_fill(~case["valid"], 0.0))


def consistent(case: Case) -> Case:
    """V(s'_t) = V(s_{t+1}) inside an episode, as a real rollout has it."""
    inside = ~(case["terminated"] | case["truncated"])[:-1]
    case["next_value"][:-1] = torch.where(inside, case["value"][1:], case["next_value"][:-1])
    return case


@settings(max_examples=40, deadline=None)
@given(cases, shares)
def test_on_policy_vtrace_with_lambda_one_is_the_n_step_return(case: Case, gamma: float) -> None:
    case = consistent(case)
    case["log_ratio"].zero_()
    v, q = vtrace(**case, gamma=gamma)
    expected = n_step_returns(**{name: case[name] for name in MASKS}, next_value=case["next_value"], gamma=gamma)
    torch.testing.assert_close(v, expected)
    torch.testing.assert_close(q, expected)


@settings(max_examples=80, deadline=None)
@given(cases, shares, shares)
def test_retrace_is_the_sum_of_the_paper(case: Case, gamma: float, lambda_: float) -> None:
    trace = lambda_ * case["log_ratio"].exp().clamp(max=1.0)
    torch.testing.assert_close(retraced(case, trace, gamma), brute_retrace(case, gamma, trace))


@settings(max_examples=40, deadline=None)
@given(cases, shares)
def test_on_policy_retrace_is_the_return_of_expected_values(case: Case, gamma: float) -> None:
    # With c = 1 and V(s') = Q(s_{t+1}, a_{t+1}) (a policy that never varies) all corrections telescope.
    case = consistent(case)
    expected = n_step_returns(**{name: case[name] for name in MASKS}, next_value=case["next_value"], gamma=gamma)
    torch.testing.assert_close(retraced(case, torch.ones_like(case["reward"]), gamma), expected)


@settings(max_examples=40, deadline=None)
@given(cases, shares, st.floats(0.0, 1.0))
def test_retrace_is_the_recursion_of_acer(case: Case, gamma: float, root: float) -> None:
    # Wang et al., algorithm 2: Q <- r + gamma Q; target = Q; Q <- c (Q - Q_theta) + V. One episode that is cut.
    for name in ("terminated", "truncated"):
        case[name].zero_()
    case["valid"].fill_(True)
    trace = case["log_ratio"].mul(root).exp().clamp(max=1.0)
    expected = torch.empty_like(case["reward"])
    carried = case["next_value"][-1]
    for t in reversed(range(len(expected))):
        expected[t] = case["reward"][t] + gamma * carried
        if t > 0:
            carried = trace[t] * (expected[t] - case["value"][t]) + case["next_value"][t - 1]
    torch.testing.assert_close(retraced(case, trace, gamma), expected)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(1)


def flags(*ones: int) -> Tensor:
    return torch.tensor(ones).bool().unsqueeze(1)


def by_hand(**changed: Any) -> Case:
    return {
        "reward": column(1, 2, 3),
        "terminated": flags(0, 0, 0),
        "truncated": flags(0, 1, 0),
        "valid": flags(1, 1, 1),
        "value": column(2, 4, 2),
        "next_value": column(4, 8, 6),
        "log_ratio": column(math.log(0.5), math.log(4), 0.0),
    } | changed


def test_vtrace_by_hand() -> None:
    # gamma 0.5, clips 1: rho = c = (0.5, 1, 1).
    # t=2 (cut by the rollout): 2 + 1*(3 + 0.5*6 - 2) = 6;      q = 3 + 0.5*6 = 6
    # t=1 (truncated):          4 + 1*(2 + 0.5*8 - 4) = 6;      q = 2 + 0.5*8 = 6, nothing of t=2
    # t=0: delta = 0.5*(1 + 0.5*4 - 2) = 0.5;  2 + 0.5 + 0.5*0.5*(6 - 4) = 3;  q = 1 + 0.5*6 = 4
    v, q = vtrace(**by_hand(), gamma=0.5)
    assert v.squeeze(1).tolist() == pytest.approx([3.0, 6.0, 6.0])
    assert q.squeeze(1).tolist() == pytest.approx([4.0, 6.0, 6.0])
    # Terminated as well: 4 + 1*(2 - 4) = 2, q = 2; and t=0: 2.5 + 0.25*(2 - 4) = 2, q = 1 + 0.5*2 = 2.
    v, q = vtrace(**by_hand(terminated=flags(0, 1, 0)), gamma=0.5)
    assert v.squeeze(1).tolist() == pytest.approx([2.0, 2.0, 6.0])
    assert q.squeeze(1).tolist() == pytest.approx([2.0, 2.0, 6.0])


def test_retrace_by_hand() -> None:
    # gamma 0.5, c = min(1, rho) = (0.5, 1, 1): c_0 has no part in anything.
    # t=2: 3 + 0.5*6 = 6.  t=1: 2 + 0.5*8 = 6.  t=0: 1 + 0.5*(4 + 1*(6 - 4)) = 4.
    case = by_hand()
    trace = case["log_ratio"].exp().clamp(max=1.0)
    assert retraced(case, trace, 0.5).squeeze(1).tolist() == pytest.approx([4.0, 6.0, 6.0])
    # Half the trace at t=1: 1 + 0.5*(4 + 0.5*(6 - 4)) = 3.5.
    assert retraced(case, trace * column(1, 0.5, 1), 0.5)[0].item() == pytest.approx(3.5)


def test_an_invalid_row_is_worth_nothing_and_cuts_the_row_before() -> None:
    nan = float("nan")
    case = by_hand(
        truncated=flags(0, 0, 0), valid=flags(1, 0, 1), reward=column(1, nan, 3), value=column(2, nan, 2),
        next_value=column(4, nan, 6), log_ratio=column(0, math.inf, 0),
    )  # fmt: skip
    v, q = vtrace(**case, gamma=0.5)
    # t=0: 1 + 0.5*4 = 3, t=2: 3 + 0.5*6 = 6, whatever stands in between.
    assert v.squeeze(1).tolist() == [3.0, 0.0, 6.0]
    assert q.squeeze(1).tolist() == [3.0, 0.0, 6.0]
    assert retraced(case, case["log_ratio"].exp(), 0.5).squeeze(1).tolist() == [3.0, 0.0, 6.0]


@pytest.mark.parametrize("kind", ["truncated", "terminated"])
def test_a_time_limit_does_not_shorten_the_value_of_an_endless_task(kind: str) -> None:
    # As for GAE: 1 / (1 - 0.9) = 10 where the stop is a truncation, less where it is mistaken for an end.
    ends = (torch.arange(20) % 5 == 4).unsqueeze(1)
    never = torch.zeros_like(ends)
    terminated, truncated = (ends, never) if kind == "terminated" else (never, ends)
    values = [0.0, 0.0]
    ones, half = torch.ones(20, 1), torch.full((20, 1), math.log(0.5))
    for _ in range(400):
        v, q = (torch.full((20, 1), value) for value in values)
        masks = (ones, terminated, truncated, ~never)
        values[0] = float(vtrace(*masks, v, v, half, gamma=0.9)[0].mean())
        values[1] = float(retrace(*masks, q, q, half.exp(), gamma=0.9).mean())
    for value in values:
        assert value == pytest.approx(10.0, rel=1e-3) if kind == "truncated" else value < 6.0


def test_rlax_agrees() -> None:
    rlax = pytest.importorskip("rlax")
    case = random_case(0, 8, 1)
    case["valid"].fill_(True)
    case["truncated"].zero_()
    case = consistent(case)
    column_ = {name: tensor[:, 0].numpy() for name, tensor in case.items()}
    discount = 0.9 * ~column_["terminated"]
    errors = rlax.vtrace(
        column_["value"], column_["next_value"], column_["reward"], discount, torch.exp(case["log_ratio"])[:, 0].numpy()
    )
    v, _ = vtrace(**case, gamma=0.9)
    torch.testing.assert_close(v[:, 0] - case["value"][:, 0], torch.tensor(errors, dtype=torch.float64))


def test_shapes_must_agree() -> None:
    case = by_hand(log_ratio=column(0))
    with pytest.raises(ValueError, match="shapes differ"):
        vtrace(**case, gamma=0.9)
    with pytest.raises(ValueError, match="shapes differ"):
        retraced(case, case["log_ratio"], 0.9)
