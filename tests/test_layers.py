"""Imports go one way, and what must not be known is not imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "longrein"
FILES = {".".join(("longrein", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}

# Who may import whom, by the longest prefix that fits; errors may be imported by all.
MAY: dict[str, tuple[str, ...]] = {
    "longrein.errors": (),
    "longrein.learn": ("longrein.learn",),
    "longrein.lab": ("longrein.learn", "longrein.lab"),
    "longrein.lab.actor": ("longrein.learn", "longrein.lab", "longrein.link", "longrein"),
    # A file of a policy says its spaces as the link does; a policy that is served is where both meet once more.
    "longrein.lab.export": ("longrein.learn", "longrein.lab", "longrein.link.spaces"),
    "longrein.lab.saved_policy": (
        "longrein.learn",
        "longrein.lab",
        "longrein.link.spaces",
        "longrein.link.observations",
    ),
    "longrein.lab.onnx_graph": ("longrein.learn", "longrein.lab", "longrein.link.spaces"),
    "longrein.lab.acting": ("longrein.learn", "longrein.lab", "longrein.link.server"),
    "longrein.front": ("longrein.lab", "longrein.learn", "longrein.link.env"),
    "longrein.cli": ("longrein.link", "longrein.lab"),
    "longrein": ("longrein.link",),
    "longrein.link.messages": (),
    "longrein.link.spaces": (),
    "longrein.link.codec": ("longrein.link.messages",),
    "longrein.link.protocol": ("longrein.link.messages", "longrein.link.codec"),
    "longrein.link.access": ("longrein.link.transports",),
    "longrein.link.metrics": (),
    "longrein.link.transports": ("longrein.link.transports",),
    "longrein.link.transports.http_openapi": (
        "longrein.link.messages",
        "longrein.link.protocol",
        "longrein.link.transports",
    ),
    "longrein.link.adapters": ("longrein.link.adapters",),
    "longrein.link.makers": ("longrein.link.makers", "longrein.link.adapters"),
    "longrein.link.served": ("longrein.link.adapters", "longrein.link.makers"),
    "longrein.link.host": (
        "longrein.link.codec",
        "longrein.link.spaces",
        "longrein.link.messages",
        "longrein.link.adapters",
    ),
    "longrein.link.observations": ("longrein.link.spaces",),
    "longrein.link.policy_host": (
        "longrein.link.host",
        "longrein.link.codec",
        "longrein.link.spaces",
        "longrein.link.observations",
        "longrein.link.messages",
        "longrein.link.adapters",
    ),
    "longrein.link.policy": (
        "longrein.link.client",
        "longrein.link.messages",
        "longrein.link.spaces",
        "longrein.link.observations",
    ),
    "longrein.link.workers": ("longrein.link.host", "longrein.link.codec", "longrein.link.messages"),
    "longrein.link.server": tuple(
        f"longrein.link.{name}"
        for name in (
            "access",
            "codec",
            "dialects",
            "host",
            "messages",
            "metrics",
            "policy_host",
            "protocol",
            "served",
            "transports",
            "workers",
        )
    ),
    "longrein.link.client": tuple(f"longrein.link.{name}" for name in ("codec", "messages", "protocol", "transports")),
}
CLIENTS = tuple(f"longrein.link.{name}" for name in ("client", "codec", "messages", "spaces"))
MAY["longrein.link.attributes"] = CLIENTS
MAY |= {
    f"longrein.link.{name}": (*CLIENTS, "longrein.link.attributes", "longrein.link.dialects")
    for name in ("env", "vector", "multiagent")
}
MAY["longrein.link.elastic"] = (*CLIENTS, "longrein.link.vector")
MAY["longrein.link.vectors"] = ("longrein.link.vector", "longrein.link.elastic", "longrein.link.dialects")
MAY["longrein.link.check"] = (*CLIENTS, "longrein.link.env", "longrein.link.vectors")

LISTENING = tuple(
    f"longrein.link.{name}" for name in ("codec", "dialects", "messages", "protocol", "spaces", "transports")
)
MAY["longrein.link.dialects"] = (*LISTENING, "longrein.link.client")
MAY["longrein.link.fleet"] = tuple(f"longrein.link.{name}" for name in ("dialects", "served", "server", "transports"))

NEVER = {
    "longrein.link": {"torch", "pickle", "tensorboard", "matplotlib"},
    "longrein.learn": {
        "socket",
        "subprocess",
        "multiprocessing",
        "asyncio",
        "threading",
        "pathlib",
        "gymnasium.vector",
    },
}


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file, but for what only types need."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def rule_of(module: str) -> tuple[str, ...]:
    """The rule with the longest prefix."""
    fitting = [name for name in MAY if module == name or module.startswith(name + ".")]
    return MAY[max(fitting, key=len)]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    allowed = (*rule_of(module), "longrein.errors")
    for name in imports_of(MODULES[module]):
        if name.split(".")[0] == "longrein":
            assert any(name == one or name.startswith(one + ".") for one in allowed), f"{module} imports {name}"
        for prefix, forbidden in NEVER.items():
            if module.startswith(prefix):
                assert not any(name == one or name.startswith(one + ".") for one in forbidden), (
                    f"{module} imports {name}"
                )


def test_there_are_no_circles() -> None:
    graph = {m: {n for n in imports_of(p) if n in MODULES and n != m} for m, p in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' -> '.join((*above, module))}"
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())
