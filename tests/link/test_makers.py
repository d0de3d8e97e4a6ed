"""What other packages make can be served by its kind and name, stepped over a WebSocket, and looked at."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import env_url
from gymnasium.vector import AutoresetMode
from rich.console import Console

import longrein
from longrein.errors import Forbidden, RemoteEnvError, SpecError
from longrein.link import makers
from longrein.link.makers import Maker, listing
from longrein.link.served import serve_list

Serve = Callable[..., longrein.Server]
INSTALLED = [kind for kind, maker in makers.TABLE.items() if maker.installed]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet_place")]


@pytest.fixture
def quiet_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No screen, and a folder for what packages write into the current one."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server on a WebSocket: `serve("atari:pong", **options)`."""
    servers: list[longrein.Server] = []

    def start(*things: Any, **options: Any) -> longrein.Server:
        servers.append(longrein.Server(list(things), at="ws://127.0.0.1:0", **options).start())
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def step_through(env: Any, steps: int, seed: int = 0) -> int:
    """Step a far environment at random, and check what comes; how many episodes ended."""
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    assert env.observation_space.contains(observation)
    ends = 0
    for _ in range(steps):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert np.isfinite(reward)
        if terminated or truncated:
            ends += 1
            observation, _ = env.reset()
    assert env.observation_space.contains(observation)
    return ends


def look(env: Any, folder: Path, name: str) -> Any:
    """Write the frame as a picture, and check that it is one."""
    plt = pytest.importorskip("matplotlib.image")
    frame = np.asarray(env.render())
    assert frame.ndim == 3
    assert frame.shape[2] == 3
    assert frame.dtype == np.uint8
    assert frame.min() != frame.max(), f"{name} shows one colour"
    plt.imsave(folder / f"{name}.png", frame)
    assert (folder / f"{name}.png").stat().st_size > 100
    return frame


# ------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("kind", INSTALLED)
def test_each_installed_kind_keeps_the_contract(kind: str) -> None:
    module = makers.load(kind)
    assert all(isinstance(option, str) for option in makers.open_options(module))
    assert module.names() == sorted(set(module.names()))
    assert module.names() or kind == "unity"  # Unity's players are files of the user's
    if module.names():
        makers.check(kind, module.names()[0])


@pytest.mark.parametrize("kind", makers.TABLE)
def test_a_missing_extra_says_what_installs_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dataclasses.replace(makers.TABLE[kind], needs="no_such_package")
    monkeypatch.setitem(makers.TABLE, kind, absent)
    with pytest.raises(SpecError, match="no_such_package") as caught:
        longrein.Server([f"{kind}:anything"], at="ws://127.0.0.1:0")
    assert absent.how in str(caught.value)
    assert absent.hint or f"pip install 'longrein[{absent.extra}]'" == absent.how


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("HalfCheetah-v5", "mujoco", "mujoco"), ("LunarLander-v3", "Box2D", "box2d"), ("ALE/Pong-v5", "ale_py", "atari")],
)
def test_an_id_whose_package_is_missing_says_so_at_the_start(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gymnasium

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    for one in [one for one in gymnasium.registry if one.startswith("ALE/")]:
        monkeypatch.delitem(gymnasium.registry, one)
    with pytest.raises(SpecError, match=rf"pip install 'longrein\[{extra}\]'"):
        longrein.Server([name], at="ws://127.0.0.1:0")
    assert package == "ale_py" or extra in makers.load("gymnasium").lacking()  # type: ignore[attr-defined]  # optional


@pytest.mark.parametrize(
    ("wrong", "near", "package"),
    [
        ("atari:pung", "atari:pong", "ale_py"),
        ("atari:Pong", "atari:pong", "ale_py"),
        ("retro:airstriker-genesis", "retro:Airstriker-Genesis-v0", "stable_retro"),
        ("pettingzoo:tictactoe_v9", "pettingzoo:tictactoe_v3", "pettingzoo"),
        ("minatar:freewy", "minatar:freeway", "minatar"),
        ("CartPol-v1", "CartPole-v1", "gymnasium"),
        ("gymnasium:CartPol-v1", "CartPole-v1", "gymnasium"),
        ("atri:pong", "atari", "gymnasium"),
    ],
)
def test_a_wrong_name_says_what_is_near(wrong: str, near: str, package: str) -> None:
    pytest.importorskip(package)
    with pytest.raises(SpecError, match=f"Did you mean.* {near}"):
        longrein.Server([wrong], at="ws://127.0.0.1:0")
    with pytest.raises(SpecError, match=near):
        longrein.Server([("named", wrong)], at="ws://127.0.0.1:0")


def test_a_client_passes_only_options_that_are_open(serve: Serve) -> None:
    pytest.importorskip("ale_py")
    url = env_url(serve("atari:pong"))
    with pytest.raises(Forbidden, match=r"takes no option 'threads'.*--allow-option threads"):
        longrein.connect(url, threads=2)
    assert longrein.connect(url, frame_stack=2).observation_space.shape == (2, 84, 84)
    with pytest.raises(longrein.Error, match=r"frame_stack.*from 1 to 32"):
        longrein.connect(url, frame_stack=10**6)
    allowing = env_url(serve("atari:pong", allow_options=["threads"], options={"frame_stack": 1}))
    far = longrein.connect(allowing, threads=2, frame_stack=3)  # what the server fixed stays
    assert far.observation_space.shape == (1, 84, 84)


def test_another_package_adds_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "other"

        @staticmethod
        def load() -> Maker:
            return Maker("longrein.link.makers.gymnasium", "gymnasium", "classic", "Other things")

    class Points(list[Any]):
        names = frozenset({"other"})

    monkeypatch.setattr(makers, "entry_points", lambda group: Points([Point]))
    assert makers.split("other:CartPole-v1") == ("other", "CartPole-v1")
    served = serve_list(["other:CartPole-v1"])["CartPole-v1"]
    assert served.make(2, {}).num_envs == 2
    assert set(makers.kinds()) == {*makers.TABLE, "other"}


def test_two_of_one_name_are_told_apart_by_their_server() -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("minatar")
    with pytest.raises(SpecError, match=r"two things are called 'breakout'(.|\n)*\('other', 'minatar:breakout'\)"):
        serve_list(["atari:breakout", "minatar:breakout"])
    assert set(serve_list(["atari:breakout", ("small", "minatar:breakout")])) == {"breakout", "small"}


def test_the_path_of_a_file_is_served_by_its_stem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    player = tmp_path / "3DBall.x86_64"
    player.touch(0o755)
    monkeypatch.setitem(makers.TABLE, "unity", dataclasses.replace(makers.TABLE["unity"], needs="gymnasium"))
    monkeypatch.setenv("LONGREIN_UNITY_PLAYERS", str(tmp_path))
    assert set(serve_list([f"unity:{player}"])) == set(serve_list(["unity:3dball"])) == {"3dball"}
    with pytest.raises(SpecError, match="Did you mean unity:3dball"):
        serve_list(["unity:3dbal"])


def test_the_listing_names_every_kind() -> None:
    def shown(kind: str | None) -> str:
        console = Console(file=io.StringIO(), width=200)
        listing.show(kind, console)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    text = shown(None)
    assert all(kind in text for kind in makers.TABLE)
    assert all(
        makers.TABLE[kind].installed or makers.TABLE[kind].how in text.replace("\n", " ") for kind in makers.TABLE
    )
    for kind in INSTALLED:
        assert all(name in shown(kind) for name in makers.load(kind).names()[:100])
    with pytest.raises(SpecError, match="Did you mean atari"):
        shown("atary")


def test_a_kind_of_which_nothing_is_installed_is_listed_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(makers.TABLE, "atari", dataclasses.replace(makers.TABLE["atari"], needs="no_such_package"))
    console = Console(file=io.StringIO(), width=200)
    listing.show(None, console)
    assert isinstance(console.file, io.StringIO)
    assert "none; pip install 'longrein[atari]'" in console.file.getvalue()


def test_the_command_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "longrein.cli", "envs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CartPole-v1" in done.stdout


# ------------------------------------------------------------------------------------------------------------ Atari


def test_pong_is_served_and_seen(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("ale_py")
    far = longrein.connect(env_url(serve("atari:pong")), render_mode="rgb_array", max_frames=1200)
    assert far.observation_space.shape == (4, 84, 84)
    assert step_through(far, 1000) >= 2
    assert look(far, tmp_path, "pong").shape == (210, 160, 3)


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_four_pongs_are_the_same_as_one(serve: Serve, mode: str) -> None:
    """The vector environment and the single one show the same frames under the same seeds, over episodes' ends."""
    pytest.importorskip("ale_py")
    server = serve("atari:pong")
    options: dict[str, Any] = {"max_frames": 400, "noop_max": 10}
    many = longrein.connect_vec(env_url(server), num_envs=4, autoreset=mode, **options)
    one = longrein.connect(env_url(server), **options)
    seen, _ = many.reset(seed=3)
    alone, _ = one.reset(seed=4)
    assert np.array_equal(seen[1], alone)
    rng = np.random.default_rng(0)
    ends, due = 0, False
    for _ in range(250):
        actions = rng.integers(6, size=4)
        seen, rewards, terminated, truncated, infos = many.step(actions)
        over = terminated | truncated
        if due and mode == "next_step":
            alone, _ = one.reset()
            due = False
        else:
            alone, reward, *flags, _ = one.step(actions[1])
            assert rewards[1] == reward
            assert [terminated[1], truncated[1]] == flags
        if over[1]:
            ends += 1
            if mode == "same_step":
                assert np.array_equal(infos["final_obs"][1], alone)
                alone, _ = one.reset()
            due = mode == "next_step"
        if mode == "disabled" and over.any():
            assert np.array_equal(seen[1], alone)
            seen, _ = many.reset(options={"reset_mask": over})
            alone = one.reset()[0] if over[1] else alone
        assert np.array_equal(seen[1], alone)
    assert ends >= 2


def test_four_pongs_are_stepped_and_seen(serve: Serve) -> None:
    pytest.importorskip("ale_py")
    far = longrein.connect_vec(env_url(serve("atari:pong")), num_envs=4, render_mode="rgb_array", max_frames=2000)
    assert far.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    far.reset(seed=0)
    far.action_space.seed(0)
    ends = 0
    for _ in range(1000):
        observations, rewards, terminated, truncated, infos = far.step(far.action_space.sample())
        ends += int((terminated | truncated).sum())
    assert observations.shape == (4, 4, 84, 84)
    assert rewards.shape == (4,)
    assert set(infos) >= {"lives", "frame_number"}
    assert ends >= 4
    frames = far.render()
    assert frames is not None
    assert [frame.shape for frame in frames] == [(210, 160, 3)] * 4
    assert any(not np.array_equal(frames[0], frame) for frame in frames[1:])


def test_the_picture_is_the_game_that_is_observed() -> None:
    """The second emulator never leaves the first: its picture made small and grey is the newest observed frame."""
    pytest.importorskip("ale_py")
    options = {"render_mode": "rgb_array", "screen_size": 210, "max_frames": 600, "frame_skip": 3}
    env = makers.load("atari").make("breakout", 1, "disabled", **options)
    env.reset(seed=1)
    env.action_space.seed(1)
    for step in range(400):
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            observation, _ = env.reset()
        if step % 20 == 0:
            red, green, blue = np.moveaxis(env.render().astype(float), -1, 0)
            grey = 0.299 * red + 0.587 * green + 0.114 * blue  # [210, 160]
            wide = observation[-1].astype(float)  # [210, 210]
            columns = np.arange(160) * 210 // 160
            assert np.abs(wide[:, columns] - grey).mean() < 4


@pytest.mark.parametrize("frame_skip", [1, 4])
def test_the_game_is_gymnasiums(frame_skip: int) -> None:
    """Without random no-ops and sticky actions: the rewards of Gymnasium's id, and its last two frames as one."""
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("ale_py")
    plain = {"sticky": 0.0, "noop_max": 0, "fire_reset": False, "render_mode": "rgb_array"}
    ours = makers.load("atari").make("pong", 1, "disabled", frame_skip=frame_skip, **plain)
    theirs = gymnasium.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0, render_mode="rgb_array")
    ours.reset(seed=1)
    theirs.reset(seed=1)
    assert np.array_equal(ours.render(), theirs.render())
    rewards = [0.0, 0.0]
    for action in np.random.default_rng(0).integers(6, size=300):
        frames = []
        for _ in range(frame_skip):
            rewards[1] += float(theirs.step(action)[1])
            frames.append(theirs.render())
        rewards[0] += ours.step(action)[1]
        assert np.array_equal(ours.render(), np.max(frames[-2:], axis=0))
    assert rewards[0] == rewards[1]
    assert frame_skip == 1 or rewards[0] < 0  # 300 frames are less than the first point


@pytest.mark.parametrize(("option", "shape"), [
    ({"grayscale": False}, (4, 84, 84, 3)), ({"screen_size": 42}, (4, 42, 42)), ({"frame_stack": 1}, (1, 84, 84)),
])  # fmt: skip
def test_the_options_shape_what_is_seen(option: dict[str, Any], shape: tuple[int, ...]) -> None:
    pytest.importorskip("ale_py")
    env = makers.load("atari").make("pong", 1, "disabled", **option)
    assert env.observation_space.shape == env.reset(seed=0)[0].shape == shape


def test_the_options_change_the_game() -> None:
    pytest.importorskip("ale_py")
    make = makers.load("atari").make
    assert make("pong", 1, "disabled").action_space.n == 6
    assert make("pong", 1, "disabled", full_action_space=True).action_space.n == 18
    short = make("pong", 1, "disabled", max_frames=40, noop_max=0, fire_reset=False)
    short.reset(seed=0)
    flags = [short.step(0)[2:4] for _ in range(10)]
    assert flags == [(False, False)] * 9 + [(False, True)]  # 40 frames are 10 steps, and that end is a truncation
    lives = make("breakout", 1, "disabled", episodic_life=True)
    lives.reset(seed=0)
    while not (end := lives.step(0))[2]:
        pass
    assert end[4]["lives"] == 4
    raw, clipped = (make("seaquest", 1, "disabled", clip_reward=clip, sticky=0.0) for clip in (False, True))
    rewards = []
    for env in (raw, clipped):
        env.reset(seed=0)
        env.action_space.seed(0)
        rewards.append([env.step(env.action_space.sample())[1] for _ in range(300)])
    assert max(rewards[0]) > 1
    assert rewards[1] == list(np.sign(rewards[0]))
    sticky, free = (make("pong", 1, "disabled", sticky=chance, noop_max=0) for chance in (0.25, 0.0))
    ends = []
    for env in (sticky, free):
        for seed in (1, 2):
            env.reset(seed=seed)
            ends.append([env.step(2 + step % 2)[0] for step in range(60)][-1])
    assert not np.array_equal(ends[0], ends[1])
    assert np.array_equal(ends[2], ends[3])


@pytest.mark.parametrize(
    "option", [{"sticky": 1.5}, {"frame_skip": 0}, {"screen_size": True}, {"render_mode": "human"}]
)
def test_what_an_option_cannot_be_is_refused(option: dict[str, Any]) -> None:
    pytest.importorskip("ale_py")
    with pytest.raises(SpecError, match=next(iter(option))):
        makers.load("atari").make("pong", 1, "disabled", **option)


def test_an_unseeded_game_is_not_always_the_same() -> None:
    pytest.importorskip("ale_py")
    first = []
    for _ in range(6):
        env = makers.load("atari").make("pong", 1, "disabled")
        first.append(env.reset()[1]["frame_number"])  # 0 to 29 no-ops
    assert len(set(first)) > 1


@pytest.mark.parametrize(("name", "package"), [("ALE/Pong-v5", "ale_py"), ("MinAtar/Breakout-v1", "minatar")])
def test_ids_that_a_package_registers_are_served(name: str, package: str, serve: Serve) -> None:
    pytest.importorskip(package)
    for workers in ("auto", "process"):
        far = longrein.connect(env_url(serve(name, workers=workers), name), render_mode="rgb_array")
        step_through(far, 30)
        assert far.render() is not None


# ------------------------------------------------------------------------------------------------------ the others


def test_minatar_is_served_and_seen(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("minatar")
    server = serve("minatar:breakout")
    far = longrein.connect(env_url(server), render_mode="rgb_array")
    assert far.observation_space.shape == (10, 10, 4)
    assert step_through(far, 1000) > 10
    look(far, tmp_path, "minatar")
    assert far.action_space.n == 3  # type: ignore[attr-defined]  # a Discrete
    assert longrein.connect(env_url(server), full_action_space=True).action_space.n == 6  # type: ignore[attr-defined]
    limited = longrein.connect(env_url(server), max_episode_steps=2)
    limited.reset(seed=0)
    assert [limited.step(0)[3] for _ in range(2)] == [False, True]


def test_retro_is_served_and_seen_in_a_process_of_its_own(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("stable_retro")
    url = env_url(serve("retro:Airstriker-Genesis-v0", workers="process"))
    far = longrein.connect(url)
    other = longrein.connect(url, actions="discrete", max_episode_steps=5)
    assert far.observation_space.shape == (224, 320, 3)
    step_through(far, 1000)
    look(far, tmp_path, "retro")
    assert step_through(other, 20) == 4
    with pytest.raises(RemoteEnvError, match=r"'\.\./x' is unknown"):
        longrein.connect(url, state="../x")
    with pytest.raises(RemoteEnvError, match="--workers process"):
        longrein.connect_vec(url, num_envs=2)
    two = longrein.connect_vec(url, num_envs=2, envs_per_lease=1)
    assert two.reset(seed=0)[0].shape == (2, 224, 320, 3)


def test_a_second_emulator_in_one_process_says_what_to_do(serve: Serve) -> None:
    pytest.importorskip("stable_retro")
    url = env_url(serve("retro:Airstriker-Genesis-v0"))
    first = longrein.connect(url)
    with pytest.raises(RemoteEnvError, match="--workers process"):
        longrein.connect(url)
    first.close()


def test_box2d_is_served_and_seen(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("Box2D")
    far = longrein.connect(env_url(serve("LunarLander-v3")), render_mode="rgb_array")
    assert step_through(far, 1000) > 3
    look(far, tmp_path, "lunar_lander")


def test_mujoco_is_served(serve: Serve) -> None:
    pytest.importorskip("mujoco")
    far = longrein.connect(env_url(serve("HalfCheetah-v5")))
    assert step_through(far, 1000) == 1


@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_mujoco_is_seen_without_a_screen(backend: str, tmp_path: Path) -> None:
    """In a process of its own: the backend is chosen when mujoco is imported, and a missing one can end a process."""
    pytest.importorskip("mujoco")
    code = (
        "import numpy, gymnasium\n"
        "env = gymnasium.make('HalfCheetah-v5', render_mode='rgb_array'); env.reset(seed=0)\n"
        "numpy.save('frame.npy', env.render())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MUJOCO_GL": backend}, capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"MUJOCO_GL={backend} does not work here: {done.stderr.strip().splitlines()[-1:]}")
    frame = np.load(tmp_path / "frame.npy")
    assert frame.shape == (480, 480, 3)
    assert frame.min() != frame.max()


@pytest.mark.parametrize("name", ["simple_spread_v3", "pistonball_v6"])
def test_parallel_games_are_served_and_seen(serve: Serve, name: str, tmp_path: Path) -> None:
    pytest.importorskip("mpe2" if name.startswith("simple") else "pymunk")
    far = longrein.connect_parallel(env_url(serve(f"pettingzoo:{name}")), render_mode="rgb_array", max_cycles=100)
    steps = 1000 if name.startswith("simple") else 60  # twenty agents that see pictures
    for step in range(steps):
        if not far.agents:
            observations, _ = far.reset(seed=step)
        observations, *_ = far.step({agent: far.action_space(agent).sample() for agent in far.agents})
    assert set(observations) == set(far.possible_agents)
    look(far, tmp_path, name)


def test_games_in_turn_are_served_and_seen(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("pettingzoo.classic.tictactoe_v3")
    far = longrein.connect_aec(env_url(serve("pettingzoo:tictactoe_v3")), render_mode="rgb_array")
    rng = np.random.default_rng(0)
    steps = 0
    while steps < 1000:
        far.reset(seed=steps)
        for _ in far.agent_iter():
            observation, _, terminated, truncated, _ = far.last()
            steps += 1
            far.step(None if terminated or truncated else int(rng.choice(np.flatnonzero(observation["action_mask"]))))
    far.reset()
    far.step(4)
    look(far, tmp_path, "tictactoe")


def test_the_api_of_a_game_can_be_chosen(serve: Serve) -> None:
    pytest.importorskip("mpe2")
    server = serve("pettingzoo:simple_spread_v3", "pettingzoo:tictactoe_v3")
    in_turn = longrein.connect_aec(env_url(server, "simple_spread_v3"), api="aec")
    in_turn.reset(seed=0)
    assert in_turn.agent_selection == "agent_0"
    with pytest.raises(longrein.Error, match="the agents act in turn"):
        longrein.connect_parallel(env_url(server, "tictactoe_v3"), api="parallel")
    with pytest.raises(Forbidden, match="takes no option 'N'"):
        longrein.connect_parallel(env_url(server, "simple_spread_v3"), N=10_000)


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
def test_envpool_is_a_vector_environment_with_seeds(serve: Serve, mode: str) -> None:
    pytest.importorskip("envpool")
    server = serve("envpool:CartPole-v1")
    far = longrein.connect_vec(env_url(server), num_envs=4, autoreset=mode)
    first = far.reset(seed=5)[0].copy()
    assert np.array_equal(first, far.reset(seed=5)[0])
    assert np.array_equal(first[1:], far.reset(seed=6)[0][:3])
    assert np.array_equal(longrein.connect(env_url(server)).reset(seed=5)[0], first[0])
    far.action_space.seed(0)
    ends = 0
    for _ in range(1000):
        observations, _, terminated, truncated, infos = far.step(far.action_space.sample())
        for row in np.flatnonzero(terminated | truncated):
            ends += 1
            if mode == "same_step":
                assert abs(infos["final_obs"][row][2]) > 0.2  # it fell
                assert abs(observations[row][2]) <= 0.05  # and stands again
    assert ends > 100


def test_pong_of_envpool_is_seen(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("envpool")
    far = longrein.connect(env_url(serve("envpool:Pong-v5")), render_mode="rgb_array")
    step_through(far, 1000)
    look(far, tmp_path, "envpool")
