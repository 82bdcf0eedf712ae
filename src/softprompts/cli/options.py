"""The options that several verbs share, and the application they belong to."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

SETTING = "Any setting; may be repeated."

app = typer.Typer(
    help="Soft prompts for frozen language models.",
    epilog="Start with: softprompts demo",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or an adapter folder alone.")]
Set = Annotated[list[str] | None, typer.Option("-s", metavar="KEY=VALUE", help=SETTING)]
Protocol = Annotated[str | None, typer.Option(metavar="clean|paper", help="Splits, templates and metrics.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show warnings, and the traceback of an error.")]

what = partial(typer.Option, rich_help_panel="What to learn")
how = partial(typer.Option, rich_help_panel="How to learn it")
where = partial(typer.Option, rich_help_panel="Where it goes")
on = partial(typer.Option, rich_help_panel="What to use it on, if not on what the adapter says")

Task = Annotated[str | None, on(help="A task of 'softprompts list tasks'.")]
Data = Annotated[str | None, on(metavar="PATH", help="Own data, as for train.")]
Inputs = Annotated[str | None, on("--input", metavar="COL,COL", help="Own data: input columns.")]
Target = Annotated[str | None, on(metavar="COL", help="Own data: target column.")]
Labels = Annotated[str | None, on(metavar="0=no,1=yes", help="Own data: the word for each label.")]
Kind = Annotated[str | None, on(metavar="classes|text|number", help="Own data: what the target is.")]
Model = Annotated[str | None, on(help="Backbone in place of the one that the adapter names.")]
