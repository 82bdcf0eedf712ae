"""`softprompts demo`: three methods at one budget on two small tasks, offline, in about three minutes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from softprompts.progress import make_progress, say
from softprompts.show import plain, table

TASKS = ("demo/mood", "demo/request")
SHARED: dict[str, Any] = {
    "seed": 1,
    "data.max_source_tokens": 64,
    "train.steps": 150,
    "train.batch_size": 8,
    "train.eval_every": 50,
    "train.prompt_rate": 0.3,
    "train.offset_rate": 5e-3,
    "method.budget_tokens": 40,
}
"""Settings of every run: one budget of 40 free vectors, texts of up to 64 tokens."""
METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {},
    "dept": {"method.prompt_length": 20, "method.offset_positions": 64},
    "accept": {"method.prompt_length": 20, "method.offset_positions": 64},
}
"""What each method needs beside them: DePT and ACCEPT spend half of the budget on the offset."""
SHOWN = ("demo/mood", "accept")
"""The run that the last lines of the demo try out."""
TEXT = "The soup was cold and the waiter was rude."


def run_demo(out: Path, console: Console) -> dict[str, Any]:
    """Train all methods on all tasks into folders of `out` and return the scores, the baselines first."""
    from softprompts.config import resolve
    from softprompts.train import train

    records = {}
    for task in TASKS:
        for method, own in METHODS.items():
            folder = run_folder(out, task, method)
            # The bare backbone is the same for all methods of a task.
            untuned = method == next(iter(METHODS))
            values = {"task": task, "method.name": method, "eval.untuned": untuned, **SHARED, **own}
            with make_progress(console, f"{task} {method}") as progress:
                record = train(resolve(None, values.items()), folder, overwrite=True, progress=progress)
            records[task, method] = record
            scores = record["scores"]["test"]
            say(console, f"{task} {method}: accuracy {scores['accuracy']:.4f} (n={scores['n']})")
    baseline = {task: records[task, next(iter(METHODS))]["baselines"] for task in TASKS}
    rows = [
        {"name": name, "num_trainable": 0, "scores": {task: baseline[task][key] for task in TASKS}}
        for name, key in (("majority class", "majority"), ("untuned backbone", "untuned"))
    ]
    rows += [
        {
            "name": method,
            "num_trainable": records[TASKS[0], method]["num_trainable"],
            "scores": {task: records[task, method]["scores"]["test"] for task in TASKS},
        }
        for method in METHODS
    ]
    return {"rows": rows, "folder": str(out), "next": next_commands(out)}


def run_folder(out: Path, task: str, method: str) -> Path:
    """Return where the demo keeps one run."""
    return out / f"{task.split('/')[-1]}-{method}"


def next_commands(out: Path) -> list[str]:
    """Return three commands worth trying after the demo."""
    return [
        shlex.join(["softprompts", "predict", str(run_folder(out, *SHOWN)), TEXT]),
        "softprompts train --data FILE.csv --input TEXT_COLUMN --target LABEL_COLUMN --method accept",
        "softprompts explain accept",
    ]


def show_demo(console: Console, result: Mapping[str, Any]) -> None:
    """Print the demo's table and what to try next."""
    first = result["rows"][0]["scores"]
    columns = ["", "parameters", *(f"{task} (n={scores['n']})" for task, scores in first.items())]
    rows = [
        [row["name"], row["num_trainable"], *(scores["accuracy"] for scores in row["scores"].values())]
        for row in result["rows"]
    ]
    table(console, columns, rows, "accuracy on the test split, embedded backbone t5-nano, one seed")
    plain(console, "Next:")
    for command in result["next"]:
        plain(console, f"  {command}")
