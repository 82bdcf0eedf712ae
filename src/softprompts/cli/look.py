"""Verbs that show what there is: list, explain."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from softprompts.cli.options import Debug, Json, Set, app
from softprompts.errors import UsageError, suggest


@app.command(name="list")
def list_(
    what: Annotated[str | None, typer.Argument(metavar="methods|tasks|models", help="Default: all three.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List methods, tasks and models."""
    from softprompts.catalog import LISTS
    from softprompts.show import emit, show_lists

    if what is not None and what not in LISTS:
        raise UsageError(f"cannot list '{what}'{suggest(what, LISTS)} (known: {', '.join(LISTS)})")
    emit({name: make() for name, make in LISTS.items() if what in (None, name)}, as_json, show_lists)


@app.command()
def explain(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A method, first+second, a task, or train|data|model|eval.")
    ],
    width: Annotated[int, typer.Option(min=1, help="Model width for which sizes are computed.")] = 768,
    settings: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain a method with its settings and sizes, a task, or a group of settings."""
    from softprompts.arguments import assignments
    from softprompts.catalog import explain as look_up
    from softprompts.config import insert
    from softprompts.show import emit, show_explanation

    own: dict[str, Any] = {}
    for key, value in assignments(settings):
        insert(own, key.removeprefix("method."), value)
    emit(look_up(name, width, own), as_json, show_explanation)
