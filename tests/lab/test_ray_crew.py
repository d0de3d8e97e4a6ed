"""Ray actors: as one process to the bit in turns, replaced on another machine, clear errors, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab import far_envs
from lab.test_crew import assert_same, saved, settings, table

from longrein.errors import RunError, SpecError
from longrein.lab import modes, ray_cluster, records
from longrein.lab.experiment import open_world
from longrein.lab.session import Progress, run_session
from longrein.lab.spec import EnvSpec, from_plain
from longrein.lab.topology import Topology, check

pytest.importorskip("ray")


pytestmark = pytest.mark.usefixtures("undrawn")


def topology(**changes: Any) -> Topology:
    return Topology(engine="ray", **{"actors": 1} | changes)


def ray_processes(of: int) -> list[psutil.Process]:
    """Those that a process has started, and what they have."""
    names = ("raylet", "gcs_server", "ray::", "default_worker.py", "ray/")
    found = []
    for process in psutil.Process(of).children(recursive=True):
        try:
            if any(name in part for part in process.cmdline()[:3] for name in names):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def wait_until_gone(processes: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(processes, seconds)
    assert alive == []


# ----------------------------------------------------------------------------------------------- started by ourselves


def test_a_ray_actor_that_takes_turns_is_as_one_process(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    here = run_session(settings("ppo"), tmp_path / "here", far_envs.walks)
    opens = lambda count: far_envs.walks(count)  # noqa: E731  # what only this process knows
    there = run_session(settings("ppo", topology=topology(ahead=0)), tmp_path / "there", opens)
    assert (here.status, here.env_steps, here.episodes) == (there.status, there.env_steps, there.episodes)
    assert here.evaluation == there.evaluation
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])
    assert table(here.folder / "episodes.csv") == table(there.folder / "episodes.csv")
    rows = records.read_table(there.folder / "metrics.csv")
    assert set(rows["actor_lag"]) == {0.0}
    assert ray_processes(os.getpid()) == []
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


LEARNER = """
import sys
from pathlib import Path
from functools import partial
sys.path.insert(0, {tests!r})
from lab import far_envs, test_crew
from longrein.lab.session import run_session
from longrein.lab.topology import Topology

if __name__ == "__main__":
    asked = test_crew.settings("dqn", max_env_steps=10**9, evaluation_episodes=0,
                               topology=Topology(actors=1, engine="ray"))
    print(run_session(asked, Path({run!r}), partial(far_envs.noted, {pids!r})).status)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_ray_outlives_its_session(tmp_path: Path, number: signal.Signals) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    script = tmp_path / "trains.py"
    script.write_text(LEARNER.format(tests=str(Path(__file__).parents[1]), run=str(tmp_path / "run"), pids=str(pids)))
    file = tmp_path / "run" / "session_3" / "checkpoint.pt"
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 100
        while not file.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ray = ray_processes(process.pid)
        names = {one.pid: " ".join(one.cmdline()[:3]) for one in ray}
        assert {"raylet", "gcs_server"} <= {Path(name.split()[0]).name for name in names.values()}
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)  # as a terminal does
        said, _ = process.communicate(timeout=60)
        assert said.decode().strip() == ("" if number == signal.SIGKILL else "interrupted")
        agents = [one for one in ray if "Agent" in names[one.pid]]  # look for a while for the head that is dead, too
        wait_until_gone([one for one in ray if one not in agents], 20.0)
        wait_until_gone(agents, 90.0 if number == signal.SIGKILL else 10.0)
        assert not any(psutil.pid_exists(int(path.name)) for path in pids.iterdir())
    finally:
        process.kill()


# --------------------------------------------------------------------------------------------------------- addresses


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def of(listening: socket.socket) -> str:
    return f"127.0.0.1:{listening.getsockname()[1]}"


def test_an_address_where_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = of(closed)
    for way in (address, f"ray://{address}"):
        begun = time.monotonic()
        with pytest.raises(RunError, match=f"the Ray cluster at {way} cannot be reached"):
            run_session(settings("dqn", topology=topology(address=way)), tmp_path / way[:3], far_envs.walks)
        assert time.monotonic() - begun < 10


def test_a_dry_run_asks_the_cluster(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = of(closed)
    plain = {
        "agent": {"algorithm": {"name": "dqn"}}, "env": {"id": "CartPole-v1", "num_envs": 4},
        "meta": {"topology": {"actors": 2, "engine": "ray", "address": address}},
    }  # fmt: skip
    with pytest.raises(RunError, match=f"{address} cannot be reached"):
        modes.dry_run(from_plain("far", plain), "train", tmp_path)


def test_an_address_that_does_not_answer(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "REACH_SECONDS", 0.3)
    with pytest.raises(RunError, match=r"cannot be reached, tried for 0\.3 s at most: timed out"):
        ray_cluster.reach(of(listener))
    monkeypatch.setenv("RAY_ADDRESS", of(listener))
    with pytest.raises(RunError, match=of(listener)):
        ray_cluster.reach("auto")


def test_an_address_of_something_else(listener: socket.socket) -> None:
    def serve() -> None:
        line, _ = listener.accept()
        with line:
            line.recv(100)
            line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(RunError, match="is no Ray cluster"):
        ray_cluster.reach(of(listener))
    thread.join()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"address": "somewhere"}, "'somewhere' is no address of a Ray cluster"),
        ({"actors": 10_000}, "this machine has"),
        ({"actor_cpus": 0.0}, "must be above 0"),
        ({"inference": "central"}, "a copy of the policy each"),
        ({"actors": 0, "hogwild": 2}, "hogwild workers share memory"),
        ({"engine": "processes", "address": "auto"}, "goes with Ray actors"),
    ],
)
def test_what_does_not_go_with_ray_is_refused(asked: dict[str, Any], says: str) -> None:
    algorithm = "a3c" if "hogwild" in asked else "impala"
    with pytest.raises(SpecError, match=says):
        check(Topology(**{"engine": "ray", "actors": 1} | asked), algorithm, 10_000, 1)


# -------------------------------------------------------------------------------------------------- several machines


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ |= ray_cluster.QUIET
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def acting(pids: Path) -> list[int]:
    return [int(path.name) for path in pids.iterdir() if psutil.pid_exists(int(path.name))]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_actors_of_two_machines_and_one_that_is_killed(tmp_path: Path, cluster: Any) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    machines: list[int] = []
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        alive = acting(pids)
        if not machines and len(alive) == 2:
            machines.extend(psutil.Process(pid).ppid() for pid in alive)
        if progress.env_steps >= 1000 * (len(killed) + 1) and len(killed) < 2 and len(alive) == 2:
            killed.append(alive[len(killed) % 2])
            os.kill(killed[-1], signal.SIGKILL)

    asked = settings("impala", max_env_steps=8000, evaluation_episodes=0,
                     topology=topology(actors=2, address=cluster.address))  # fmt: skip
    result = run_session(asked, tmp_path, partial(far_envs.noted, str(pids)), kill)
    assert result.status == "budget spent"
    assert len(set(machines)) == 2, "each has an actor"
    assert len(killed) == 2
    rows = records.read_table(result.folder / "metrics.csv")
    assert rows["actors_replaced"][-1] == 2
    episodes = table(result.folder / "episodes.csv")
    assert all((row["length"], float(row["return"])) == ("100", 100.0) for row in episodes), "no half, no double steps"
    assert result.episodes * 100 <= result.env_steps + 2 * 4 * 100
    assert acting(pids) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_actors_that_take_turns_are_as_processes(tmp_path: Path, cluster: Any) -> None:
    class Killed(BaseException):
        pass

    def die(progress: Progress) -> None:
        if progress.env_steps >= 500:
            raise Killed

    here = run_session(settings("dqn", topology=Topology(actors=2, ahead=0)), tmp_path / "here", far_envs.walks)
    asked = settings("dqn", topology=topology(actors=2, ahead=0, address=cluster.address))
    with pytest.raises(Killed):
        run_session(asked, tmp_path / "there", far_envs.walks, die)
    there = run_session(asked, tmp_path / "there", far_envs.walks, resume=True)
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])
    assert table(here.folder / "episodes.csv") == table(there.folder / "episodes.csv")
    names = set(records.read_table(there.folder / "metrics.csv"))
    assert names == set(records.read_table(here.folder / "metrics.csv")), "what is measured is the same"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_machine_that_is_lost(tmp_path: Path, cluster: Any) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    spare: list[Any] = []
    whole: list[int] = []
    lost = cluster.add_node(num_cpus=1)

    def remove(progress: Progress) -> None:
        if progress.env_steps >= 1000 and not spare:
            spare.append(cluster.add_node(num_cpus=1))
            cluster.remove_node(lost, allow_graceful=False)
        if spare and len(acting(pids)) == 3 and progress.processes["actors_replaced"] == 1:
            whole.append(progress.env_steps)
            if whole[-1] > whole[0] + 3000:
                os.kill(os.getpid(), signal.SIGINT)

    asked = settings("impala", max_env_steps=10**6, evaluation_episodes=0,
                     topology=topology(actors=3, address=cluster.address), num_envs=6)  # fmt: skip
    result = run_session(asked, tmp_path, partial(far_envs.wide, str(pids)), remove)
    cluster.remove_node(spare[0])
    assert result.status == "interrupted"
    assert len({int(path.name) for path in pids.iterdir()}) == 4, "one was replaced"
    episodes = table(result.folder / "episodes.csv")
    assert all((row["length"], float(row["return"])) == ("100", 100.0) for row in episodes), "no half, no double steps"
    assert acting(pids) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_keeps_an_actor_from_working_is_said_as_it_is(tmp_path: Path, cluster: Any) -> None:
    there = topology(address=cluster.address, ahead=0)
    with pytest.raises(SpecError, match=r"3 actors of 1 processors each have no room in the cluster.* 1 on .*1 on "):
        run_session(settings("dqn", num_envs=6, topology=topology(actors=3, address=cluster.address)),
                    tmp_path / "a", far_envs.walks)  # fmt: skip
    for opens, said in ((far_envs.broken, "there is no such game here"), (far_envs.doomed, "it never works")):
        with pytest.raises(RunError, match=said) as raised:
            run_session(settings("dqn", topology=there), tmp_path / said[:5], opens)
        assert "RayTaskError" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_environment_in_a_file_of_the_working_folder(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("import gymnasium\n\ndef make():\n    return gymnasium.make('CartPole-v1')\n")
    monkeypatch.chdir(tmp_path)
    opens = partial(open_world, EnvSpec(id="mine.py:make", num_envs=4))
    here = run_session(settings("dqn"), tmp_path / "here", opens)
    there = run_session(settings("dqn", topology=topology(address=cluster.address, ahead=0)), tmp_path / "there", opens)
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])
