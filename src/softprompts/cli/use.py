"""Verbs that use what was learned: eval, predict, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompts.cli.options import (
    Data,
    Debug,
    Inputs,
    Json,
    Kind,
    Labels,
    Model,
    Protocol,
    Run,
    Set,
    Target,
    Task,
    app,
)

if TYPE_CHECKING:
    from softprompts.trained import Trained


@app.command(name="eval")
def eval_(
    run: Run,
    split: Annotated[str, typer.Option(metavar="test|validation", help="Which rows to score.")] = "test",
    protocol: Protocol = None,
    scoring: Annotated[
        str | None, typer.Option(metavar="rank|generate", help="Rank the label words, or let the model write.")
    ] = None,
    task: Task = None,
    data: Data = None,
    inputs: Inputs = None,
    target: Target = None,
    labels: Labels = None,
    kind: Kind = None,
    model: Model = None,
    settings: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a trained prompt again, on the data it was trained for or on others of the task."""
    from softprompts.arguments import assignments, given, which_data

    named = {"data.protocol": protocol, "eval.scoring": scoring, "model.name": model}
    chosen = which_data(task, data, inputs, target, labels, kind) + given(named)
    trained = _open(run, chosen + assignments(settings))

    from softprompts.progress import make_progress
    from softprompts.show import emit, messages, show_scores

    with make_progress(messages(), "scoring") as progress:
        found = trained.evaluate(split, advance=progress.advance, note=progress.note)
    result = {
        "run": str(run),
        "task": trained.task.name,
        "protocol": trained.protocol,
        "split": split,
        "scoring": found.scoring,
        "scores": found.scores,
    }
    emit(result, as_json, show_scores)


@app.command()
def predict(
    run: Run,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts; none = lines of stdin.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A txt file of one text per line, or a table with the input columns."),
    ] = None,
    task: Task = None,
    data: Data = None,
    inputs: Inputs = None,
    target: Target = None,
    labels: Labels = None,
    kind: Kind = None,
    model: Model = None,
    settings: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer texts; prints one JSON object per line."""
    import json

    from softprompts.arguments import assignments, given, read_texts, which_data

    rows = read_texts(texts or [], file)
    chosen = which_data(task, data, inputs, target, labels, kind) + given({"model.name": model})
    trained = _open(run, chosen + assignments(settings))

    from softprompts.progress import make_progress
    from softprompts.show import messages
    from softprompts.tasks.own import texts_to_examples

    with make_progress(messages(), "answering") as progress:
        answers = trained.predict(rows, advance=progress.advance, note=progress.note)
    sources = [example.source for example in texts_to_examples(trained.task, rows, trained.protocol)]
    meaning = dict(zip(trained.task.label_words or (), trained.task.label_names or (), strict=False))
    results = []
    for row, source, answer in zip(rows, sources, answers, strict=True):
        line = {"text": row if isinstance(row, str) else source, "prediction": answer}
        if meaning.get(answer, answer) != answer:
            line["label"] = meaning[answer]
        results.append(line)
    if as_json:
        print(json.dumps({"run": str(run), "predictions": results}, ensure_ascii=False))
    else:
        for line in results:
            print(json.dumps(line, ensure_ascii=False))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A run, an adapter, or a PEFT checkpoint.")],
    to: Annotated[str, typer.Option(metavar="prompt-tuning|embeds|baked|softprompts", help="What to make of it.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty folder.")],
    model: Annotated[str | None, typer.Option(help="Backbone in place of the one that the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(metavar="fp32|bf16", help="Precision of a baked folder.")] = "fp32",
    task_id: Annotated[int | None, typer.Option(metavar="N", help="Which task of a multitask checkpoint.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Take a prompt elsewhere: to plain PEFT, as embeddings, or baked into a model folder; or bring one in."""
    from softprompts.export import export as carry_out
    from softprompts.show import emit, show_export

    emit(carry_out(source, to, out, model, dtype, task_id), as_json, show_export)


def _open(run: Path, overrides: list[tuple[str, Any]]) -> Trained:
    from softprompts.trained import open_trained

    trained = open_trained(run, overrides)
    if trained.record.get("status", "done") != "done":
        print(f"note: {run} is not finished; this is its best adapter so far", file=sys.stderr)
    for note in trained.notes:
        print(note, file=sys.stderr)
    return trained
