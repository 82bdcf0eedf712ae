"""Verbs that learn: train, sweep, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompts.cli.options import SETTING, Debug, Json, Set, app, how, what, where
from softprompts.errors import SoftPromptsError, UsageError

if TYPE_CHECKING:
    from softprompts.config import RunSettings


@app.command()
def train(
    file: Annotated[Path | None, typer.Argument(metavar="RUN.toml", help="Settings file; options go over it.")] = None,
    task: Annotated[str | None, what(help="A task of 'softprompts list tasks'.")] = None,
    data: Annotated[str | None, what(metavar="PATH", help="Own data: a file, a folder of splits, a hub id.")] = None,
    inputs: Annotated[str | None, what("--input", metavar="COL,COL", help="Own data: input columns.")] = None,
    target: Annotated[str | None, what(metavar="COL", help="Own data: target column.")] = None,
    labels: Annotated[str | None, what(metavar="0=no,1=yes", help="Own data: the word for each label.")] = None,
    kind: Annotated[str | None, what(metavar="classes|text|number", help="Own data: what the target is.")] = None,
    protocol: Annotated[str | None, what(metavar="clean|paper", help="Splits, templates and metrics.")] = None,
    shots: Annotated[int | None, what(help="Train on this many examples in total.")] = None,
    method: Annotated[str | None, how(help="A method, or first+second; default accept.")] = None,
    model: Annotated[str | None, how(help="A folder or hub id; default the embedded t5-nano.")] = None,
    prompt_from: Annotated[str | None, how(metavar="DIR", help="Adapter whose prompt is the start.")] = None,
    offset_from: Annotated[str | None, how(metavar="DIR", help="Adapter whose offset is the start.")] = None,
    seed: Annotated[int | None, how(help="Seed of the start and of the data order.")] = None,
    seeds: Annotated[str | None, how(metavar="1,2,3", help="One run per seed, then mean and sd.")] = None,
    search: Annotated[
        int | None, how(metavar="N", help="First choose rates and start among N candidates; costs half a run.")
    ] = None,
    settings: Annotated[list[str] | None, how("-s", metavar="KEY=VALUE", help=SETTING)] = None,
    out: Annotated[Path | None, where(metavar="DIR", help="Default: runs/TASK-METHOD-seedN.")] = None,
    resume: Annotated[bool, where("--resume", help="Go on with a stopped run.")] = False,
    overwrite: Annotated[bool, where("--overwrite", help="Replace an earlier run.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a prompt on a task or on your own data."""
    from softprompts.arguments import assignments, default_folder, given, seed_list, which_data
    from softprompts.config import RunSettings, resolve
    from softprompts.results import check_folder, read_record

    if file is not None and file.suffix != ".toml" and not file.exists():
        raise UsageError(f"{file} is not a settings file; for a task write --task {file}, for own data --data {file}")
    named = {
        "data.protocol": protocol,
        "data.shots": shots,
        "method.name": method,
        "model.name": model,
        "seed": seed,
    }
    # Last, so that `-s method={...}` does not lose them.
    starts = given({"method.prompt_from": prompt_from, "method.offset_from": offset_from})
    overrides = which_data(task, data, inputs, target, labels, kind) + given(named) + assignments(settings) + starts
    if seeds is not None:
        if any(key == "seed" for key, _ in overrides):
            raise UsageError("--seed and --seeds cannot both be given; leave one out")
        if search is not None:
            raise UsageError("--search and --seeds cannot both be given; search once, then train the seeds with -s")
        many = {number: resolve(file, [*overrides, ("seed", number)]) for number in seed_list(seeds)}
        _train_seeds(many, out, resume, overwrite, as_json)
        return
    if resume and file is None and not overrides:
        from softprompts.search import unfinished_search

        if out is None:
            raise UsageError("--resume needs the run to go on with; name its folder with --out DIR")
        begun = unfinished_search(out)
        if begun is not None:
            chosen, search = begun
        else:
            chosen = RunSettings(**read_record(out)["settings"])
    else:
        chosen = resolve(file, overrides)
    folder = out or default_folder(chosen, f"-seed{chosen.seed}")

    from softprompts.show import emit, show_run

    check_folder(folder, resume, overwrite)  # before the seconds that the imports take

    from softprompts.progress import make_progress
    from softprompts.search import describe, find
    from softprompts.show import messages
    from softprompts.train import train as train_run

    extra = {}
    with make_progress(messages()) as progress:
        if search is not None:
            chosen, outcome = find(chosen, search, folder, resume=resume, overwrite=overwrite, progress=progress)
            progress.note(describe(outcome))
            resume, overwrite = True, False  # the search's outcome is the beginning of the run
            extra = {"search": {key: value for key, value in outcome.items() if key not in ("asked", "settings")}}
        record = train_run(chosen, folder, resume=resume, overwrite=overwrite, about=extra, progress=progress)
    emit({"folder": str(folder), **record}, as_json, show_run)


def _train_seeds(runs: dict[int, RunSettings], out: Path | None, resume: bool, overwrite: bool, as_json: bool) -> None:
    from statistics import mean, stdev

    from softprompts.arguments import default_folder
    from softprompts.results import check_folder, read_record
    from softprompts.show import emit, messages, show_runs

    out = out or default_folder(next(iter(runs.values())), "")
    folders = {seed: out / f"seed-{seed}" for seed in runs}
    for folder in folders.values():
        check_folder(folder, resume, overwrite)

    from softprompts.progress import make_progress
    from softprompts.sweep import Planned, run_sweep

    planned = [Planned(folder.name, runs[seed], {"seed": seed}) for seed, folder in folders.items()]
    with make_progress(messages(), f"{len(runs)} seeds") as progress:
        run_sweep(planned, out, overwrite=overwrite, progress=progress)
    records = [{"folder": str(folder), **read_record(folder)} for folder in folders.values()]
    done = [record for record in records if record["status"] == "done"]
    if not done:
        raise SoftPromptsError(f"no seed was left: {records[0].get('reason') or records[0].get('error')}")
    summary: dict[str, dict[str, Any]] = {"validation": {}, "test": {}}
    for split, metrics in summary.items():
        for metric in done[0]["scores"][split]:
            if metric not in ("n", "invalid"):
                values = [record["scores"][split][metric] for record in done]
                sd = stdev(values) if len(values) > 1 else None
                metrics[metric] = {"mean": mean(values), "sd": sd, "n": len(values)}
    emit({"folder": str(out), "runs": records, "summary": summary}, as_json, show_runs)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="A settings file with lists under [sweep].")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: runs/NAME of the file.")] = None,
    members: Annotated[int, typer.Option(min=1, help="Most runs that share a backbone; 1 = one after the other.")] = 8,
    halving: Annotated[bool, typer.Option("--halving", help="Drop the worse half on the way, and say so.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run again what is done.")] = False,
    settings: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train every combination of lists of settings, several at once; a stopped sweep goes on."""
    from softprompts.arguments import assignments
    from softprompts.sweep import plan, run_sweep

    planned = plan(file, assignments(settings))
    folder = out or Path("runs") / file.stem

    from softprompts.progress import make_progress
    from softprompts.show import emit, messages, show_sweep

    with make_progress(messages(), f"{len(planned)} runs") as progress:
        summary = run_sweep(planned, folder, most=members, halving=halving, overwrite=overwrite, progress=progress)
    emit({"folder": str(folder), **summary}, as_json, show_sweep)


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
