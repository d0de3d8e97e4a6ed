"""Who may connect, what they may do, how much of it, and what they are told when they may not."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import nkeys
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from environments import Counting

import longrein
from longrein.errors import (
    CapacityReached,
    ConnectError,
    ConnectionClosed,
    Forbidden,
    LeaseLost,
    SpecError,
    TooLarge,
    Unauthenticated,
    VersionMismatch,
)
from longrein.link import codec
from longrein.link import messages as m
from longrein.link.protocol import error_of
from longrein.link.transports import ConnectOptions, nats, parse_url, websocket
from longrein.link.transports.nats_broker import start_broker

TOKEN = "a-token-of-the-lab"
THINGS = [("Counting", Counting)]


@pytest.mark.parametrize("url", ["ws://0.0.0.0:0", "http://0.0.0.0:0", "ws://[::]:0"])
def test_an_open_door_is_refused(url: str) -> None:
    with pytest.raises(SpecError, match="--insecure"):
        longrein.Server(THINGS, at=url)
    with longrein.Server(THINGS, at="ws://0.0.0.0:0", insecure=True):
        pass
    with longrein.Server(THINGS, at="ws://0.0.0.0:0", token=TOKEN):
        pass


@pytest.mark.parametrize("at", ["ws://127.0.0.1:0", "http://127.0.0.1:0", "memory://guarded"])
def test_a_token_is_asked_for(at: str) -> None:
    with longrein.Server(THINGS, at=at, token=TOKEN) as server:
        for wrong in (None, "another-token", TOKEN[:-1], TOKEN + "x"):
            with pytest.raises(Unauthenticated):
                longrein.connect(server.urls[0], token=wrong, wait=1)
        env = longrein.connect(server.urls[0], token=TOKEN)
        env.reset()
        assert env.step(1)[0][0] == 1
        env._client.break_line()
        assert env.step(1)[0][0] == 2


def test_a_token_is_asked_for_on_a_broker() -> None:
    with start_broker() as broker, longrein.Server(THINGS, at=f"{broker.url}/arm", token=TOKEN) as server:
        with pytest.raises(Unauthenticated):
            longrein.connect(server.urls[0], wait=1)
        env = longrein.connect(server.urls[0], token=TOKEN)
        env.reset()
        env.step(1)


def test_scopes_are_held(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# tokens\nonly-stepping open stepper\nall-of-it-all open,render,call boss\nonly-calling call\n")
    with longrein.Server(THINGS, at="ws://127.0.0.1:0", token_file=file) as server:
        stepper = longrein.connect(server.urls[0], token="only-stepping", render_mode="ansi")
        stepper.reset()
        stepper.step(1)
        with pytest.raises(Forbidden, match="Call"):
            stepper.get_attr("length")
        with pytest.raises(Forbidden, match="Render"):
            stepper.render()
        stepper.step(1)
        with pytest.raises(Forbidden, match="may not open"):
            longrein.connect(server.urls[0], token="only-calling")
        boss = longrein.connect(server.urls[0], token="all-of-it-all")
        assert boss.get_attr("length") == 1_000_000


@pytest.mark.parametrize(
    ("text", "problem"), [("", "no token"), ("short", "shorter than 8"), ("long-enough flying x", "no such scope")]
)
def test_a_bad_token_file_says_why(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(SpecError, match=problem):
        longrein.Server(THINGS, at="ws://127.0.0.1:0", token_file=file)


def test_a_lease_is_not_for_another_token(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("token-of-one open one\ntoken-of-other open other\n")
    with longrein.Server(THINGS, at="ws://127.0.0.1:0", token_file=file) as server:
        env = longrein.connect(server.urls[0], token="token-of-one")
        env.reset()
        line = websocket.connect(parse_url(server.urls[0])[0], ConnectOptions(token="token-of-other"))
        lease = env._client._sheet.lease
        for request in (m.Hello("", 0, 0, [1]), m.Resume(lease, 2, 0, 1), m.Step(lease, 1, 2), m.Close(lease, 1, 2)):
            line.send(codec.encode(request))
        answers = [codec.decode_reply(line.receive(5.0) or b"")[0] for _ in range(4)]
        assert [getattr(answer, "code", "") for answer in answers[1:]] == ["unauthenticated"] * 3
        assert env.step(1)[0][0] == 1


def shake_hands(url: str, origin: str) -> str:
    host, _, port = url.removeprefix("ws://").partition(":")
    with socket.create_connection((host, int(port)), 5) as sock:
        sock.sendall(
            f"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nOrigin: {origin}\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        return sock.recv(200).decode().split("\r\n")[0]


def test_pages_of_other_origins_are_turned_away() -> None:
    with longrein.Server(THINGS, at="ws://127.0.0.1:0", allowed_origins=["https://lab.example"]) as server:
        assert "403" in shake_hands(server.urls[0], "https://evil.example")
        assert "101" in shake_hands(server.urls[0], "https://lab.example")


# ----------------------------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An authority, a server's certificate and a client's, for this run alone."""
    folder = tmp_path_factory.mktemp("tls")
    now = datetime.datetime.now(datetime.UTC)
    made: dict[str, Path] = {}

    def make(name: str, issuer: tuple[x509.Name, Any] | None) -> tuple[x509.Name, Any]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer[0] if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(issuer is None, None), critical=True)
        )
        if issuer is not None:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
        made[name] = folder / f"{name}.pem"
        made[f"{name}.key"] = folder / f"{name}.key"
        made[name].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        made[f"{name}.key"].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return subject, key

    authority = make("ca", None)
    make("server", authority)
    make("client", authority)
    return made


@pytest.mark.parametrize("scheme", ["wss", "https"])
def test_tls_and_client_certificates(scheme: str, certificates: dict[str, Path]) -> None:
    of_server = {"certificate": certificates["server"], "key": certificates["server.key"]}
    with longrein.Server(THINGS, at=f"{scheme}://127.0.0.1:0", **of_server) as server:
        with pytest.raises(ConnectError, match=r"TLS|certificate"):
            longrein.connect(server.urls[0], wait=0.2)
        env = longrein.connect(server.urls[0], ca=certificates["ca"])
        env.reset()
        assert [env.step(n)[0][0] for n in range(20)] == list(range(1, 21))
        env.close()
    with longrein.Server(THINGS, at=f"{scheme}://127.0.0.1:0", client_ca=certificates["ca"], **of_server) as server:
        with pytest.raises(ConnectError):
            longrein.connect(server.urls[0], ca=certificates["ca"], wait=0.2)
        mine = {"certificate": certificates["client"], "key": certificates["client.key"]}
        env = longrein.connect(server.urls[0], ca=certificates["ca"], **mine)
        env.reset()
        env.step(1)


def test_tls_without_a_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="needs a certificate"):
        longrein.Server(THINGS, at="wss://127.0.0.1:0")
    with pytest.raises(SpecError, match="cannot be used"):
        longrein.Server(THINGS, at="wss://127.0.0.1:0", certificate=tmp_path / "none.pem")
    with pytest.raises(SpecError, match="cannot be used"):
        longrein.connect("wss://127.0.0.1:1", ca=tmp_path / "none.pem")


def test_a_broker_with_users_and_tls(certificates: dict[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(
        f'authorization {{ user: robot, password: "secret" }}\n'
        f'tls {{ cert_file: "{certificates["server"]}", key_file: "{certificates["server.key"]}" }}\n'
    )
    context = ssl.create_default_context(cafile=str(certificates["ca"]))
    assert context.check_hostname
    with start_broker(0, "-c", str(config)) as broker:
        right = {"user": "robot", "password": "secret"}
        url = broker.url.replace("nats://", "tls://") + "/arm"
        with pytest.raises(Unauthenticated):
            longrein.connect(url, credentials={"user": "robot", "password": "wrong"}, ca=certificates["ca"], wait=1)
        with pytest.raises(ConnectError):
            longrein.connect(url, credentials=right, wait=0.2)
        with longrein.Server(THINGS, at=url, credentials=right, ca=certificates["ca"]) as server:
            env = longrein.connect(server.urls[0], credentials=right, ca=certificates["ca"])
            env.reset()
            assert [env.step(n)[0][0] for n in range(20)] == list(range(1, 21))


def test_a_broker_with_nkeys(tmp_path: Path) -> None:
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    config = tmp_path / "nats.conf"
    config.write_text(
        f"authorization {{ users: [ {{ nkey: {nkeys.from_seed(bytearray(seed)).public_key.decode()} }} ] }}\n"
    )
    file = tmp_path / "seed"
    file.write_bytes(bytes(seed))
    with (
        start_broker(0, "-c", str(config)) as broker,
        longrein.Server(THINGS, at=f"{broker.url}/arm", credentials={"nkey_seed": str(file)}) as server,
    ):
        with pytest.raises(Unauthenticated):
            longrein.connect(server.urls[0], wait=1)
        env = longrein.connect(server.urls[0], credentials={"nkey_seed": bytes(seed).decode()})
        env.reset()
        env.step(1)


def test_servers_on_a_broker_are_discovered() -> None:
    with start_broker() as broker, longrein.Server(THINGS, at=f"{broker.url}/arm") as server:
        (found,) = nats.discover(parse_url(f"{broker.url}/arm")[0], ConnectOptions())
        assert found["name"] == "arm"
        assert found["metadata"]["environments"] == "Counting"
        assert found["metadata"]["instance"] == server.instance


def test_a_broker_with_users() -> None:
    with start_broker(0, "--user", "robot", "--pass", "secret") as broker:
        right = {"user": "robot", "password": "secret"}
        with longrein.Server(THINGS, at=f"{broker.url}/arm", credentials=right) as server:
            with pytest.raises(Unauthenticated):
                longrein.connect(server.urls[0], wait=1)
            env = longrein.connect(server.urls[0], credentials=right)
            env.reset()
            env.step(1)
        with pytest.raises(Unauthenticated):
            longrein.Server(THINGS, at=f"{broker.url}/arm").start()


# -------------------------------------------------------------------------------------------------------------- limits


def test_limits_are_refused_each_with_its_own_error() -> None:
    limits = longrein.Limits(max_envs_per_lease=4, max_leases_per_client=2, max_message_bytes=4096)
    with longrein.Server(THINGS, at="ws://127.0.0.1:0", token=TOKEN, limits=limits) as server:
        url = server.urls[0]
        with pytest.raises(TooLarge, match="5 environments"):
            longrein.connect_vec(url, num_envs=5, token=TOKEN)
        envs = [longrein.connect(url, token=TOKEN) for _ in range(2)]
        with pytest.raises(CapacityReached, match="of one client"):
            longrein.connect(url, token=TOKEN)
        envs[0].reset()
        with pytest.raises((TooLarge, ConnectionClosed, ConnectError)):
            longrein.connect_vec(url, num_envs=1, token=TOKEN, text="x" * 10_000, reconnect=0.3, wait=0.3)
        assert envs[0].step(1)[0][0] == 1


def test_a_brokers_limit_is_an_error_and_not_a_timeout(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text("max_payload: 8192\n")

    def large() -> Any:
        env = Counting(render_mode="rgb_array")
        env.render = lambda: np.zeros((100, 100, 3), np.uint8)  # type: ignore[method-assign]
        return env

    with (
        start_broker(0, "-c", str(config)) as broker,
        longrein.Server([("large", large)], at=f"{broker.url}/arm") as server,
    ):
        env = longrein.connect(server.urls[0], render_mode=None)
        env.render_mode = "rgb_array"
        env.reset()
        with pytest.raises(TooLarge, match="8192"):
            env.render()
        with pytest.raises(TooLarge, match="8192"):
            env.reset(options={"text": "x" * 10_000})
        env.step(1)


def test_idle_leases_are_reaped_and_say_why() -> None:
    limits = longrein.Limits(idle_seconds=0.4)
    with longrein.Server(THINGS, at="ws://127.0.0.1:0", limits=limits) as server:
        env = longrein.connect(server.urls[0])
        env.reset()
        deadline = time.monotonic() + 5
        while server.load and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(LeaseLost, match="idle for more than"):
            env.step(1)


# ------------------------------------------------------------------------------------------------ what is plainly wrong


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("127.0.0.1:5000", "scheme"),
        ("ftp://127.0.0.1/x", "'ftp' is not one that longrein speaks"),
        ("ws://", "no host"),
        ("ws://127.0.0.1:99999/x", "port"),
        ("ws://127.0.0.1:1/x?token=abc", "secret does not belong in a URL"),
        ("ws://user:pass@127.0.0.1:1/x", "secret does not belong in a URL"),
        ("nats://127.0.0.1:4222/", "names no service"),
        ("ws+unix://", "no socket"),
        ("memory://nobody", "no server of this process"),
        ("ws://no-such-host.invalid/x", "no address"),
        ("ws+unix:///nowhere/at/all", "nothing listens"),
    ],
)
def test_a_wrong_url_says_what_is_wrong(url: str, reason: str) -> None:
    with pytest.raises(ConnectError, match=reason):
        longrein.connect(url, wait=0.1)


def test_no_server_says_how_long_was_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(ConnectError, match=r"nothing listens at 127\.0\.0\.1:\d+.*tried for \d") as raised:
        longrein.connect(f"ws://127.0.0.1:{port}", wait=0.5)
    assert "longrein serve" in str(raised.value)
    assert 0.4 < time.monotonic() - started < 3


def test_a_port_in_use_says_so() -> None:
    with longrein.Server(THINGS, at="ws://127.0.0.1:0") as server:
        for scheme in ("ws", "http"):
            with pytest.raises(ConnectError, match=r"in use|already"):
                longrein.Server(THINGS, at=server.urls[0].replace("ws", scheme)).start()


def test_versions_that_do_not_match_say_so() -> None:
    with longrein.Server(THINGS, at="ws://127.0.0.1:0") as server:
        line = websocket.connect(parse_url(server.urls[0])[0], ConnectOptions())
        line.send(codec.encode(m.Hello("", 0, 0, [2, 3])))
        fault = codec.decode_reply(line.receive(5.0) or b"")[0]
        assert fault.code == "version"
    assert isinstance(error_of(fault, ""), VersionMismatch)


def test_the_command_line_says_what_is_wrong_in_one_line() -> None:
    for words, reason in (
        (["serve", "NoSuchEnv-v7"], "NoSuchEnv"),
        (["serve", "nowhere.py:make"], "no such file"),
        (["serve", "CartPole-v1", "--at", "ws://0.0.0.0:0"], "--insecure"),
        (["serve", "CartPole-v1", "--option", "x"], "key=value"),
        (["ping", "ws://127.0.0.1:1"], "nothing listens"),
    ):
        command = [sys.executable, "-m", "longrein.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, words
        assert reason in done.stderr, words
        assert "Traceback" not in done.stderr, words


def test_check_and_ping_tell_from_the_command_line() -> None:
    with longrein.Server(["CartPole-v1"], at="ws://127.0.0.1:0") as server:
        for command, word in (("check", "passed"), ("ping", "p99")):
            words = [
                sys.executable,
                "-m",
                "longrein.cli",
                command,
                server.urls[0],
                *(["--seconds", "0.2"] if command == "ping" else []),
            ]
            done = subprocess.run(words, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stdout + done.stderr
            assert word in done.stdout


def test_health_and_metrics_are_beside_http() -> None:
    with longrein.Server(THINGS, at="http://127.0.0.1:0") as server:
        env = longrein.connect(server.urls[0])
        env.reset()
        for _ in range(5):
            env.step(1)

        def page(path: str) -> str:
            with urllib.request.urlopen(server.urls[0] + path, timeout=5) as answer:
                return str(answer.read().decode())

        assert page("/healthz")
        assert page("/readyz")
        metrics = page("/metrics")
        assert "longrein_steps_total 5.0" in metrics
        assert "longrein_leases 1.0" in metrics
        assert json.loads(page("/openapi.json"))["openapi"].startswith("3.")
