"""What this machine can serve, as a table to look at."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from longrein.errors import SpecError
from longrein.link.makers import Maker, install, kinds, nearest, open_options

EXAMPLES = 3


def show(kind: str | None = None, console: Console | None = None) -> None:
    """Print each kind with a few names, or all the names of one. Raises SpecError for a kind that there is not."""
    console = console or Console()
    known = kinds()
    if kind is not None and kind not in known:
        raise SpecError("kind", f"there is no kind {kind!r}", hint=nearest(kind, list(known), "kinds"))
    if kind is not None:
        _show_names(kind, known[kind], console)
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("kind", no_wrap=True)
    table.add_column("what", ratio=1)
    table.add_column("names that can be served here", ratio=1, overflow="fold")
    for one, maker in known.items():
        table.add_row(one, maker.about, _names(maker))
    console.print(table)
    console.print("longrein envs KIND lists all names of a kind; longrein serve KIND:NAME serves one.")
    console.print("Ids of Gymnasium, as CartPole-v1, are served without the kind too.")


def _names(maker: Maker) -> str:
    """How many and a few of them, or how to install what is missing."""
    try:
        module = maker.load()
        names = module.names()
    except SpecError as error:
        return f"none; {_plain(error.hint)}"
    step = max(1, len(names) // EXAMPLES)  # from all over the list: its beginning is often one game in many versions
    few = names[step // 2 :: step][:EXAMPLES]
    all_of_them = f"{len(names)}: {', '.join(few)}{', ...' if len(names) > len(few) else ''}" if names else "none found"
    return all_of_them + "".join(f"\nfor more: {_plain(install(one))}" for one in _lacking(module))


def _show_names(kind: str, maker: Maker, console: Console) -> None:
    module = maker.load()
    names = module.names()
    width = max((len(name) for name in names), default=0) + 2
    columns = max(1, console.width // width)
    table = Table.grid(padding=(0, 2))
    for start in range(0, len(names), columns):
        table.add_row(*names[start : start + columns])
    console.print(f"{maker.about}: {len(names)} names, each served as {kind}:NAME")
    console.print(table)
    console.print(f"Options that clients may pass: {', '.join(sorted(open_options(module))) or 'none'}")
    for one in _lacking(module):
        console.print(f"For more: {_plain(install(one))}")


def _lacking(module: object) -> list[str]:
    lacking = getattr(module, "lacking", None)
    return list(lacking()) if lacking else []


def _plain(text: str) -> str:
    """Text whose brackets are no markup."""
    return text.replace("[", r"\[")
