"""Results as tables on stdout, or as one JSON object."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

SPLITS = ("validation", "test")
PIPE_WIDTH = 160
"""Columns when the output is no terminal: wide enough that tables are not folded for grep."""


def output() -> Console:
    """Return the console of results."""
    return _console(sys.stdout)


def messages() -> Console:
    """Return the console of progress and notes."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    plain = Console(file=stream, highlight=False)
    return plain if plain.is_terminal else Console(file=stream, highlight=False, width=PIPE_WIDTH)


def emit(result: Mapping[str, Any], as_json: bool, render: Callable[[Console, Any], None]) -> None:
    """Print a result: as one JSON object, or the way `render` draws it."""
    if as_json:
        print(json.dumps(finite(result), ensure_ascii=False))
    else:
        render(output(), result)


def finite(value: Any) -> Any:
    """Return plain data with null for numbers that JSON does not know (NaN, infinity)."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Print a table; the columns of numbers stand on the right, texts that do not fit are folded, never cut."""
    if title:
        console.print(Text(title, style="bold"))
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        right = bool(rows) and all(isinstance(row[number], int | float) or row[number] is None for row in rows)
        drawn.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=number == 0)
    for row in rows:
        drawn.add_row(*(Text(shown(cell)) for cell in row))
    console.print(drawn)


def shown(cell: Any) -> str:
    """Write a cell: counts with thousands, fractions with four digits, nothing for None."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def plain(console: Console, text: str) -> None:
    """Print text as it is."""
    console.print(Text(text), soft_wrap=True)


# ------------------------------------------------------------------------------------------- runs


def show_run(console: Console, record: Mapping[str, Any]) -> None:
    """Print one run: its scores beside the baselines, its size and its cost."""
    if "tasks" in record:
        return show_tasks(console, record)
    scores, baselines = record["scores"], record["baselines"]
    columns = {"validation": scores["validation"], "test": scores["test"], **baselines}
    table(
        console,
        ["metric", *columns],
        [[metric, *(column.get(metric) for column in columns.values())] for metric in scores["test"]],
        f"{record['method']} on {record['task']}, {record['model']}, seed {record['seed']}, "
        f"protocol {record['protocol']}",
    )
    cost, backbone = record["cost"], record["num_backbone"]
    total = record["num_trainable"] + record["num_trainable_head"]
    head = f" ({record['num_trainable_head']:,} of them the head)" if record["num_trainable_head"] else ""
    lines = (
        ("trained", f"{total:,} parameters{head}, {total / backbone:.3%} of the backbone's {backbone:,}"),
        ("steps", f"{record['steps_done']:,}, the best at {record['best_step']:,}; {cost['seconds']:.1f} s"),
        ("adapter", f"{cost['adapter_bytes'] / 1024:,.0f} KiB in {Path(record['folder']) / 'adapter'}"),
    )
    for name, value in lines:
        plain(console, f"{name:8} {value}")


def show_tasks(console: Console, record: Mapping[str, Any]) -> None:
    """Print a run on several tasks: each one's scores beside the baselines, and the means."""
    rows: list[list[Any]] = []
    for task, own in record["tasks"].items():
        select, report = own["metric"]["select"], own["metric"]["report"]
        others = [own["baselines"].get(name, {}).get(report) for name in ("majority", "untuned")]
        scores = [own["scores"]["validation"].get(select), own["scores"]["test"].get(report)]
        rows.append([task, report, *scores, *others, own["scores"]["test"]["n"]])
    means = [record["scores"][split] for split in SPLITS]
    rows.append(["mean", "", *(scores["mean"] for scores in means), None, None, means[1]["n"]])
    title = f"{record['method']} on {len(record['tasks'])} tasks, {record['model']}, seed {record['seed']}, "
    columns = ["task", "metric", *SPLITS, "majority", "untuned", "n"]
    table(console, columns, rows, f"{title}protocol {record['protocol']}")
    plain(console, f"trained  {record['num_trainable']:,} parameters")
    plain(console, f"start of a new task: {Path(record['folder']) / 'adapter'}; tasks alone: .../tasks/TASK")


def show_runs(console: Console, result: Mapping[str, Any]) -> None:
    """Print several seeds of one run, with mean and standard deviation."""
    runs, summary = result["runs"], result["summary"]
    first = next(run for run in runs if run["status"] == "done")
    metrics = list(summary["test"])
    rows = []
    for run in runs:
        scores = run.get("scores", {}).get("test", {})  # a run whose loss was no number anymore has none
        note = "" if run["status"] == "done" else f" ({run['status']})"
        rows.append([f"seed {run['seed']}{note}", *(scores.get(metric) for metric in metrics)])
    rows.append(["mean", *(summary["test"][metric]["mean"] for metric in metrics)])
    rows.append(["sd", *(summary["test"][metric]["sd"] for metric in metrics)])
    table(
        console,
        ["test", *metrics],
        rows,
        f"{first['method']} on {first['task']}, {first['model']}, protocol {first['protocol']}: "
        f"{len(runs)} runs, n={first['scores']['test']['n']:,} test examples each",
    )
    plain(console, f"runs in {result['folder']}")


def show_sweep(console: Console, result: Mapping[str, Any]) -> None:
    """Draw the scores of a sweep: every run, the means over seeds and draws, and the best by validation."""
    names = list(result["runs"][0]["values"])
    columns = [*names, "status", "steps", "validation", "test"]
    rows = [[*row["values"].values(), *(row[key] for key in columns[len(names) :])] for row in result["runs"]]
    table(console, columns, rows)
    several = [entry for entry in result["settings"] if entry["n"] > 1]
    if several:
        names = list(several[0]["values"])
        rows = [
            [*entry["values"].values(), entry["n"], *(entry[split][key] for split in SPLITS for key in ("mean", "sd"))]
            for entry in several
        ]
        table(console, [*names, "n", "validation", "sd", "test", "sd"], rows, "Mean over seeds and draws")
    for best in result["best_by_validation"]:
        named = ", ".join(f"{key}={value}" for key, value in best["values"].items()) or "the one setting"
        plain(console, f"best on validation: {named} ({best['validation']['mean']:.4f}, n={best['n']} runs)")
    plain(console, f"runs in {result['folder']}")


def show_scores(console: Console, result: Mapping[str, Any]) -> None:
    """Print the scores of `eval`."""
    title = f"{result['task']}, {result['split']} split, protocol {result['protocol']}, scoring {result['scoring']}"
    table(console, ["metric", "score"], list(result["scores"].items()), title)


def show_export(console: Console, result: Mapping[str, Any]) -> None:
    """Print what `export` wrote, and how to use it."""
    plain(console, f"wrote {', '.join(result['files'])} to {result['out']}")
    if result["to"] == "baked":
        ids, tokens = result["prompt_ids"], result["prompt_tokens"]
        if ids:
            plain(console, f"prompt: {tokens[0]} to {tokens[-1]}, ids {ids[0]} to {ids[-1]}, before every text")
            adds = result["tokenizer_adds_prompt"]
            plain(console, f"the folder's tokenizer {'puts' if adds else 'does not put'} them there by itself")
        plain(console, f"largest difference to the prompted model: {result['difference']:.2g}")
    elif result["to"] == "prompt-tuning":
        plain(console, f"load it with plain PEFT: PeftModel.from_pretrained(model, {result['out']!r})")


# ---------------------------------------------------------------------------------------- choices


def show_lists(console: Console, lists: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print what `list` found."""
    for name, rows in lists.items():
        if name == "methods":
            widths = list(rows[0]["num_trainable"])
            columns = ["method", *(f"parameters at {width}" for width in widths), "idea"]
            cells = [[row["name"], *row["num_trainable"].values(), row["idea"]] for row in rows]
        else:
            columns = list(rows[0])
            cells = [list(row.values()) for row in rows]
            columns[0] = name.removesuffix("s")
        table(console, columns, cells)
    if "methods" in lists:
        plain(console, "'softprompts explain NAME' says more; first+second combines a prompt with an offset")


def show_explanation(console: Console, about: Mapping[str, Any]) -> None:
    """Print what `explain` found."""
    plain(console, about["text"] + "\n")
    if about["kind"] == "task":
        _show_task(console, about)
        return
    rows = [[row["name"], row["default"], row["meaning"]] for row in about["settings"]]
    table(console, ["setting (-s name=value)", "default", "meaning"], rows)
    if about["kind"] == "method":
        sizes = [
            [part, ", ".join(f"{name} {size:,}" for name, size in values.items() if name != "num_trainable"),
             values["num_trainable"]]
            for part, values in about["parts"].items()
        ]  # fmt: skip
        table(console, ["part", "sizes", "parameters"], sizes, f"at model width {about['width']}")
        plain(console, f"trainable parameters: {shown(about['num_trainable'])}")


def _show_task(console: Console, task: Mapping[str, Any]) -> None:
    for key in ("name", "version", "template", "columns", "answers", "source", "max_source_tokens"):
        value = ", ".join(task[key]) if isinstance(task[key], list) else task[key]
        if value not in (None, ""):
            plain(console, f"{key.replace('_', ' '):18} {value}")
    rows = [
        [name, ", ".join(rule["metrics"]), rule["report"], rule["select"],
         "\n".join(f"{split}: {text}" for split, text in rule["splits"].items())]
        for name, rule in task["protocols"].items()
    ]  # fmt: skip
    console.print()
    table(console, ["protocol", "metrics", "reported", "selects the checkpoint", "splits"], rows)
    for name, rule in task["protocols"].items():
        for defect, text in rule["defects"].items():
            plain(console, f"{name} protocol reproduces {defect}: {text}")
