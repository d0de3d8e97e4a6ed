"""Our mathematics beside that of Stable-Baselines3, SB3-Contrib, RLax and Tianshou, on the same random numbers.

They live in `.venv-peers`, which `make peers` sets up: a virtual environment for each, RLax in SBX's. They answer from
processes of their own.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longrein.learn.losses import c51_projection, quantile_loss
from longrein.learn.priorities import SumTree
from longrein.learn.renorm import BatchRenorm
from longrein.learn.returns import gae, retrace, vtrace

PYTHONS = {
    name: Path(__file__).parents[2] / ".venv-peers" / name / "bin" / "python" for name in ("sb3", "sbx", "tianshou")
}
MISSING = [name for name, python in PYTHONS.items() if not python.exists()]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason="the other packages are not there: make peers"),
]
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def asked() -> Arrays:
    """Random rollouts [40, 6], distributions, priorities and batches of features."""
    draw = np.random.default_rng(3)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)  # noqa: E731
    rows = (40, 6)
    probs = draw.dirichlet(np.ones(21), 50).astype(np.float32)
    return {
        "reward": normal(*rows), "terminated": draw.random(rows) < 0.1, "value": normal(*rows),
        "last_value": normal(6), "log_ratio": 0.5 * normal(*rows), "action_value": normal(*rows),
        "support": np.linspace(-3, 3, 21).astype(np.float32), "r": normal(50), "probs": probs,
        "discount": np.where(draw.random(50) < 0.2, 0.0, 0.9).astype(np.float32),
        "quantile": normal(30, 11), "target": 2 * normal(30, 11),
        "priority": draw.random(1000), "height": draw.random(5000) * 499.0,
        "features": np.array([3.0, 4.0], np.float32).reshape(2, 1, 1) * normal(2, 2048, 5) + normal(2, 1, 5),
    }  # fmt: skip


@pytest.fixture(scope="module")
def told(asked: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    folder = tmp_path_factory.mktemp("outside")
    np.savez(folder / "questions.npz", **asked)
    script = Path(__file__).parent / "outside" / "answers.py"
    answers: Arrays = {}
    for name, python in PYTHONS.items():
        line = [python, script, name, folder / "questions.npz", folder / f"{name}.npz"]
        subprocess.run(line, check=True, timeout=300)
        answers |= np.load(folder / f"{name}.npz")
    return answers


def rollout(asked: Arrays) -> tuple[list[Tensor], Tensor, Tensor]:
    """(reward, terminated, truncated, valid), V(s) and V(s')."""
    terminated = torch.tensor(asked["terminated"])
    rows = [
        torch.tensor(asked["reward"]), terminated, torch.zeros_like(terminated), torch.ones_like(terminated)
    ]  # fmt: skip
    value = torch.tensor(asked["value"])
    return rows, value, torch.cat([value[1:], torch.tensor(asked["last_value"])[None]])


def test_gae_is_stable_baselines(asked: Arrays, told: Arrays) -> None:
    rows, value, next_value = rollout(asked)
    ours = gae(*rows, value, next_value, gamma=0.97, lambda_=0.9)
    np.testing.assert_allclose(ours.numpy(), told["gae"], rtol=1e-4, atol=1e-5)


def test_vtrace_is_rlax(asked: Arrays, told: Arrays) -> None:
    rows, value, next_value = rollout(asked)
    v, q = vtrace(*rows, value, next_value, torch.tensor(asked["log_ratio"]), gamma=0.97, lambda_=0.9)
    np.testing.assert_allclose((v - value).numpy(), told["vtrace_error"], rtol=1e-4, atol=1e-5)
    # RLax mixes lambda into what follows too: Q = r + discount ((1 - lambda) V' + lambda v').
    mixed = 0.9 * q + 0.1 * (rows[0] + 0.97 * next_value * ~rows[1])
    np.testing.assert_allclose((mixed - value)[:-1].numpy(), told["vtrace_advantage"][:-1], rtol=1e-4, atol=1e-5)


def test_retrace_is_rlax(asked: Arrays, told: Arrays) -> None:
    rows, _, next_value = rollout(asked)
    action_value = torch.tensor(asked["action_value"])
    trace = 0.9 * torch.tensor(asked["log_ratio"]).exp().clamp(max=1.0)
    ours = retrace(*rows, action_value, next_value, trace, gamma=0.97)
    np.testing.assert_allclose((ours - action_value).numpy(), told["retrace_error"], rtol=1e-4, atol=1e-5)


def test_the_c51_projection_is_rlax(asked: Arrays, told: Arrays) -> None:
    ours = c51_projection(*(torch.tensor(asked[name]) for name in ("probs", "r", "discount", "support")))
    np.testing.assert_allclose(ours.numpy(), told["c51"], rtol=1e-4, atol=1e-5)


def test_the_quantile_loss_is_sb3_contrib(asked: Arrays, told: Arrays) -> None:
    # They sum over one axis and take the mean of the rest; ours sums over quantiles, with the mean over targets.
    ours = quantile_loss(torch.tensor(asked["quantile"]), torch.tensor(asked["target"])).mean()
    np.testing.assert_allclose(ours.numpy(), told["quantile"], rtol=1e-5)


def test_the_sum_tree_is_tianshou(asked: Arrays, told: Arrays) -> None:
    tree = SumTree(len(asked["priority"]))
    tree.set(np.arange(len(asked["priority"])), asked["priority"])
    assert tree.find(asked["height"] * 0.99).max() < 1000
    np.testing.assert_array_equal(tree.find(asked["height"]), told["found"])


def test_batch_renorm_is_sb3_contrib(asked: Arrays, told: Arrays) -> None:
    # They average variances of N - 1, we deviations of N, as the paper does: the same once the averages have settled.
    layer = BatchRenorm(5, warmup=2)
    first, second = torch.tensor(asked["features"])
    for _ in range(2000):
        layer(first[None], train=True)
    trained = layer(second[None], train=True)[0]
    np.testing.assert_allclose(trained.detach().numpy(), told["renorm_trained"], rtol=3e-3, atol=3e-3)
    acting = layer(second[None])[0]
    np.testing.assert_allclose(acting.detach().numpy(), told["renorm_acting"], rtol=3e-3, atol=3e-3)
