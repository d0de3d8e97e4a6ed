"""What can be used is documented, and what is documented can be used."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import typer.main

from longrein import cli
from longrein.lab import spec as specs
from longrein.learn import algorithms
from longrein.link import client, dialects, makers, protocol, server, transports

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)


@pytest.mark.parametrize("name", transports.TABLE)
def test_every_transport_has_a_page(name: str) -> None:
    assert (ROOT / "docs" / "transports" / f"{name}.md").exists()


@pytest.mark.parametrize("kind", makers.TABLE)
def test_every_kind_of_environment_is_documented(kind: str) -> None:
    page = (ROOT / "docs/environments/index.md").read_text()
    maker = makers.TABLE[kind]
    assert f"| `{kind}` |" in page
    assert maker.hint or maker.how in page
    if maker.installed:
        missing = [option for option in makers.open_options(maker.load()) if f"`{option}`" not in TEXT]
        assert not missing, f"no page names {missing}"


@pytest.mark.parametrize("name", dialects.TABLE)
def test_every_dialect_has_a_page(name: str) -> None:
    assert f"--dialect {name}" in (ROOT / "docs" / "migration" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", algorithms.TABLE)
def test_every_algorithm_has_a_page_with_its_settings(name: str) -> None:
    page = (ROOT / "docs" / "algorithms" / f"{name}.md").read_text()
    config, _ = algorithms.load(name)
    missing = [field.name for field in dataclasses.fields(config) if f"`{field.name}`" not in page]
    assert not missing, f"docs/algorithms/{name}.md does not name {missing}"


@pytest.mark.parametrize("name", algorithms.TABLE)
def test_the_specs_that_an_algorithms_page_names_are_there(name: str) -> None:
    page = (ROOT / "docs" / "algorithms" / f"{name}.md").read_text()
    there = {spec for path in (ROOT / "spec").rglob("*.yaml") for spec in specs.read(path)}
    named = set(re.findall(r"\b\w+_(?:cartpole|pendulum|lunarlander|acrobot|mountaincar)(?:_\w+)?\b", page))
    assert named <= there, f"no such spec: {named - there}"


@pytest.mark.parametrize("name", sorted(typer.main.get_command(cli.app).commands))  # type: ignore[attr-defined]  # a group
def test_every_command_is_documented(name: str) -> None:
    assert f"`longrein {name} " in (ROOT / "docs/reference/command-line.md").read_text().replace(
        "`longrein run`", "`longrein run `"
    )


@pytest.mark.parametrize("settings", [server.Limits, client.LinkOptions])
def test_every_setting_is_documented(settings: type) -> None:
    missing = [field.name for field in dataclasses.fields(settings) if f"`{field.name}`" not in TEXT]
    assert not missing, f"{settings.__name__}: no page names {missing}"


def test_every_fault_is_in_the_protocol_page() -> None:
    page = (ROOT / "docs/concepts/protocol.md").read_text()
    assert all(f"| `{code}` |" in page for code in protocol.FAULTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_the_pages_compiles(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, str(page), "exec")


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    data = [page for page in pages if page.parts[0] == "benchmarks"]  # excluded: what a benchmark left beside its files
    assert [str(page) for page in pages if page not in data and str(page) not in navigation] == []
