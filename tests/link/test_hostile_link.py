"""No step is lost or doubled, whatever the link does. An environment that counts its own steps is the witness."""

from __future__ import annotations

import random
from collections.abc import Iterator

import hostile
import numpy as np
import pytest
from environments import Counting

import longrein
from longrein.link import transports

SCHEDULES = 1000
STEPS = 30


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[longrein.Server]:
    monkeypatch.setitem(transports.TABLE, "hostile", transports.Transport("hostile", ("hostile",)))
    with longrein.Server([("Counting", Counting)], at="memory://hostile-link") as server:
        yield server


def connect(**options: float) -> longrein.RemoteEnv:
    return longrein.connect(
        "hostile://hostile-link/Counting", silence=0.001, pause=0.001, reconnect=30.0, wait=30.0, **options
    )


def demon_of(seed: int) -> hostile.Demon:
    """Each seed is another mixture, from a gentle link to one that mangles three messages in ten."""
    draw = random.Random(seed)
    worst = draw.choice([0.02, 0.1, 0.3])
    parts = [draw.random() for _ in range(4)]
    drop, double, late, cut = (worst * part / sum(parts) for part in parts)
    return hostile.Demon(seed, drop, double, late, cut)


def test_no_step_is_lost_or_doubled_in_a_thousand_random_schedules(server: longrein.Server) -> None:
    done = dict.fromkeys(hostile.Demon(0).done, 0)
    for seed in range(SCHEDULES):
        hostile.demon = demon_of(seed)
        env = connect()
        env.reset(seed=seed)
        for number in range(1, STEPS + 1):
            action = seed * 100 + number
            observation, reward, *_, info = env.step(action)
            assert observation.tolist() == [number, action, number], f"schedule {seed}, step {number}"
            assert reward == number
            assert info == {"total": number}
        env.close()
        for name, count in hostile.demon.done.items():
            done[name] += count
    assert min(done.values()) > SCHEDULES / 2, f"the demon was idle: {done}"
    assert server.counts["repeated_answers"] > SCHEDULES / 10
    assert server.counts["resumes"] > SCHEDULES / 10


@pytest.mark.timeout(200)
def test_vector_environments_keep_their_rows_in_random_schedules(server: longrein.Server) -> None:
    for seed in range(100):
        hostile.demon = demon_of(seed)
        env = longrein.connect_vec(
            "hostile://hostile-link/Counting",
            num_envs=4,
            envs_per_lease=2,
            silence=0.001,
            pause=0.001,
            reconnect=30.0,
            wait=30.0,
        )
        env.reset(seed=seed)
        for number in range(1, 11):
            actions = np.arange(4) + 10 * number
            observations, *_ = env.step(actions)
            assert observations.tolist() == [[number, action, number] for action in actions], f"schedule {seed}"
        env.close()


def test_send_and_recv_keep_their_rows_in_random_schedules(server: longrein.Server) -> None:
    for seed in range(60):
        hostile.demon = demon_of(seed)
        env = longrein.connect_vec(
            "hostile://hostile-link/Counting",
            num_envs=4,
            envs_per_lease=1,
            silence=0.001,
            pause=0.001,
            reconnect=30.0,
            wait=30.0,
        )
        env.reset(seed=seed)
        taken = np.zeros(4, int)
        env.send(np.arange(4), range(4))
        for _ in range(12):
            observations, *_, infos = env.recv(min_ready=2)
            ids = infos["env_id"]
            taken[ids] += 1
            assert observations[:, 0].tolist() == taken[ids].tolist(), f"schedule {seed}"
            assert observations[:, 1].tolist() == ids.tolist()
            env.send(ids, ids)
        env.close()
