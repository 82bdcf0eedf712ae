"""The command line: verbs, and errors as one line. Imports nothing heavy before a verb needs it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompts.errors import SoftPromptsError, UsageError, suggest

if TYPE_CHECKING:
    from softprompts.config import RunSettings
    from softprompts.trained import Trained

SETTING = "Any setting; may be repeated."
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment of other libraries, unless the user has set it."""
INTERRUPTED = 130
PIPE_CLOSED = 141
_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""click's base of usage errors; typer carries its own copy of click from some version on."""

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

_what = partial(typer.Option, rich_help_panel="What to learn")
_how = partial(typer.Option, rich_help_panel="How to learn it")
_where = partial(typer.Option, rich_help_panel="Where it goes")
_on = partial(typer.Option, rich_help_panel="What to use it on, if not on what the adapter says")

Task = Annotated[str | None, _on(help="A task of 'softprompts list tasks'.")]
Data = Annotated[str | None, _on(metavar="PATH", help="Own data, as for train.")]
Inputs = Annotated[str | None, _on("--input", metavar="COL,COL", help="Own data: input columns.")]
Target = Annotated[str | None, _on(metavar="COL", help="Own data: target column.")]
Labels = Annotated[str | None, _on(metavar="0=no,1=yes", help="Own data: the word for each label.")]
Kind = Annotated[str | None, _on(metavar="classes|text|number", help="Own data: what the target is.")]
Model = Annotated[str | None, _on(help="Backbone in place of the one that the adapter names.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from softprompts import __version__

        print(f"softprompts {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Soft prompts for frozen language models."""


@app.command()
def train(
    file: Annotated[Path | None, typer.Argument(metavar="RUN.toml", help="Settings file; options go over it.")] = None,
    task: Annotated[str | None, _what(help="A task of 'softprompts list tasks'.")] = None,
    data: Annotated[str | None, _what(metavar="PATH", help="Own data: a file, a folder of splits, a hub id.")] = None,
    inputs: Annotated[str | None, _what("--input", metavar="COL,COL", help="Own data: input columns.")] = None,
    target: Annotated[str | None, _what(metavar="COL", help="Own data: target column.")] = None,
    labels: Annotated[str | None, _what(metavar="0=no,1=yes", help="Own data: the word for each label.")] = None,
    kind: Annotated[str | None, _what(metavar="classes|text|number", help="Own data: what the target is.")] = None,
    protocol: Annotated[str | None, _what(metavar="clean|paper", help="Splits, templates and metrics.")] = None,
    shots: Annotated[int | None, _what(help="Train on this many examples in total.")] = None,
    method: Annotated[str | None, _how(help="A method, or first+second; default accept.")] = None,
    model: Annotated[str | None, _how(help="A folder or hub id; default the embedded t5-nano.")] = None,
    prompt_from: Annotated[str | None, _how(metavar="DIR", help="Adapter whose prompt is the start.")] = None,
    offset_from: Annotated[str | None, _how(metavar="DIR", help="Adapter whose offset is the start.")] = None,
    seed: Annotated[int | None, _how(help="Seed of the start and of the data order.")] = None,
    seeds: Annotated[str | None, _how(metavar="1,2,3", help="One run per seed, then mean and sd.")] = None,
    settings: Annotated[list[str] | None, _how("-s", metavar="KEY=VALUE", help=SETTING)] = None,
    out: Annotated[Path | None, _where(metavar="DIR", help="Default: runs/TASK-METHOD-seedN.")] = None,
    resume: Annotated[bool, _where("--resume", help="Go on with a stopped run.")] = False,
    overwrite: Annotated[bool, _where("--overwrite", help="Replace an earlier run.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a prompt on a task or on your own data."""
    from softprompts.arguments import assignments, default_folder, given, seed_list, which_data
    from softprompts.config import RunSettings, resolve

    if file is not None and file.suffix != ".toml" and not file.exists():
        raise UsageError(f"{file} is not a settings file; for a task write --task {file}, for own data --data {file}")
    named = {
        "data.protocol": protocol,
        "data.shots": shots,
        "method.name": method,
        "method.prompt_from": prompt_from,
        "method.offset_from": offset_from,
        "model.name": model,
        "seed": seed,
    }
    overrides = which_data(task, data, inputs, target, labels, kind) + given(named) + assignments(settings)
    if seeds is not None:
        if any(key == "seed" for key, _ in overrides):
            raise UsageError("--seed and --seeds cannot both be given; leave one out")
        many = {number: resolve(file, [*overrides, ("seed", number)]) for number in seed_list(seeds)}
        _train_seeds(many, out, resume, overwrite, as_json)
        return
    if resume and file is None and not overrides:
        from softprompts.results import read_record

        if out is None:
            raise UsageError("--resume needs the run to go on with; name its folder with --out DIR")
        chosen = RunSettings(**read_record(out)["settings"])
    else:
        chosen = resolve(file, overrides)
    folder = out or default_folder(chosen, f"-seed{chosen.seed}")

    from softprompts.show import emit, show_run

    emit(_train_one(chosen, folder, resume, overwrite), as_json, show_run)


def _train_one(settings: RunSettings, out: Path, resume: bool, overwrite: bool, label: str = "") -> dict[str, Any]:
    from softprompts.results import check_folder

    check_folder(out, resume, overwrite)  # before the seconds that the imports take

    from softprompts.progress import make_progress
    from softprompts.show import messages
    from softprompts.train import train as train_run

    with make_progress(messages(), label) as progress:
        record = train_run(settings, out, resume=resume, overwrite=overwrite, progress=progress)
    return {"folder": str(out), **record}


def _train_seeds(runs: dict[int, RunSettings], out: Path | None, resume: bool, overwrite: bool, as_json: bool) -> None:
    from statistics import mean, stdev

    from softprompts.arguments import default_folder
    from softprompts.results import check_folder
    from softprompts.show import emit, show_runs

    out = out or default_folder(next(iter(runs.values())), "")
    folders = {seed: out / f"seed-{seed}" for seed in runs}
    for folder in folders.values():
        check_folder(folder, resume, overwrite)
    records = [_train_one(runs[seed], folders[seed], resume, overwrite, f"seed {seed}") for seed in runs]
    summary: dict[str, dict[str, Any]] = {"validation": {}, "test": {}}
    for split, metrics in summary.items():
        for metric in records[0]["scores"][split]:
            if metric not in ("n", "invalid"):
                values = [record["scores"][split][metric] for record in records]
                sd = stdev(values) if len(values) > 1 else None
                metrics[metric] = {"mean": mean(values), "sd": sd, "n": len(values)}
    emit({"folder": str(out), "runs": records, "summary": summary}, as_json, show_runs)


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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="An earlier demo there is replaced.")] = Path("runs/demo"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train three methods on two small tasks, offline, in about three minutes."""
    from softprompts.demo import run_demo, show_demo
    from softprompts.show import emit, messages

    emit(run_demo(out, messages()), as_json, show_demo)


def _open(run: Path, overrides: list[tuple[str, Any]]) -> Trained:
    from softprompts.trained import open_trained

    trained = open_trained(run, overrides)
    if trained.record.get("status", "done") != "done":
        print(f"note: {run} is not finished; this is its best adapter so far", file=sys.stderr)
    for note in trained.notes:
        print(note, file=sys.stderr)
    return trained


# ----------------------------------------------------------------------------------------- errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; errors are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    debug = "--debug" in arguments
    try:
        with _quiet(debug), _first_process_speaks():
            command = typer.main.get_command(app)
            with command.make_context("softprompts", list(arguments)) as context:
                command.invoke(context)
            sys.stdout.flush()
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return _fail(f"stopped{_way_on(arguments)}", INTERRUPTED, word="")
    except BrokenPipeError:
        # What is still buffered must not fail again when Python flushes it on the way out.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(*_explain_error(error, debug))


def _explain_error(error: Exception, debug: bool) -> tuple[str, int]:
    if isinstance(error, SoftPromptsError):
        return str(error), error.exit_code
    if isinstance(error, _CLICK_ERROR):
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "softprompts"
        problem = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        problem = problem[:1].lower() + problem[1:] + ("" if problem.endswith("?") else ";")
        return f"{problem} '{path} --help' shows what there is", 2
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk{_at(error)}; free some, then go on with --resume", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{_at(error)}", 1
    hint = "" if debug else "; run again with --debug for the traceback"
    return f"unexpected {type(error).__name__}: {error}{hint}", 1


def _fail(message: str, code: int, word: str = "error: ") -> int:
    print(word + " ".join(message.split()), file=sys.stderr)
    return code


def _at(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


def _way_on(arguments: list[str]) -> str:
    """Say how to resume what Ctrl-C stopped: the same command with --resume."""
    if arguments[0] != "train":
        return ""
    again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    return f"; go on with: {shlex.join(['softprompts', *again, '--resume'])}"


@contextlib.contextmanager
def _first_process_speaks() -> Iterator[None]:
    """Under a launcher of several processes, let only the first one print."""
    if int(os.environ.get("RANK", "0")) == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Keep other libraries' warnings and advice off the user's terminal, unless debugging."""
    if debug:
        yield
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
