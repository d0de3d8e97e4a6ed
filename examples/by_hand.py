"""PPO on a far environment with `link` and `learn` alone: no experiment, no process, no files.

Serve one, then train on it:

    longrein serve CartPole-v1 --at ws://127.0.0.1:5000
    python examples/by_hand.py ws://127.0.0.1:5000/CartPole-v1
"""

from __future__ import annotations

import numpy as np
import torch
import typer

import longrein
from longrein.learn.algorithms.ppo import PPO, Config
from longrein.learn.batch import Transition
from longrein.learn.rollout import Rollout
from longrein.learn.schedules import Linear


def main(url: str, num_envs: int = 8, env_steps: int = 100_000, seed: int = 0) -> None:
    """Train PPO on NUM_ENVS copies of the environment at URL, and print returns on the way."""
    torch.set_num_threads(1)  # for networks of this size, more are slower
    envs = longrein.connect_vec(url, num_envs=num_envs, autoreset="same_step")
    config = Config(
        rollout_steps=32, epochs=10, gamma=0.98, lambda_=0.9,
        lr=Linear(2e-3, 2e-4, 70_000), clip=Linear(0.2, 0.1, 70_000),
    )  # fmt: skip
    ppo = PPO(config, envs.single_observation_space, envs.single_action_space, seed)
    policy, rollout = ppo.policy, Rollout(config.rollout_steps)
    generator = torch.Generator().manual_seed(seed)
    every_row = np.ones(num_envs, np.bool_)  # with same-step autoreset, each row is a step

    returns, finished = np.zeros(num_envs), []
    observation = policy.encode(envs.reset(seed=seed)[0])
    while ppo.env_steps < env_steps:
        action, extras = policy.act(observation, generator=generator)
        raw, reward, terminated, truncated, infos = envs.step(policy.for_env(action))
        following = policy.encode(raw)
        successor = following.copy()
        returns += reward
        for env in np.flatnonzero(terminated | truncated):
            # `following` is the next episode's first observation; the true successor came beside it.
            successor[env] = policy.encode(infos["final_obs"][env][None])[0]
            finished.append(returns[env])
            returns[env] = 0.0
        reward = reward.astype(np.float32)
        rollout.add(Transition(observation, action, reward, successor, terminated, truncated, every_row, extras))
        observation = following
        if rollout.full:
            measured = ppo.update(rollout.take())
            if ppo.env_steps % 5120 == 0 and finished:
                mean, entropy = np.mean(finished[-100:]), measured["entropy"]
                print(f"{ppo.env_steps:>8,} steps  return {mean:6.1f}  entropy {entropy:.2f}", flush=True)
    envs.close()


if __name__ == "__main__":
    typer.run(main)
