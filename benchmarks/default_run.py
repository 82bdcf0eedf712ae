"""What a default run spends on evaluating, and what a search for rates adds: real runs, nothing set but the task.

    python benchmarks/default_run.py                                   demo/request: about ten minutes on two cores
    python benchmarks/default_run.py --task glue/qqp --task squad  other tasks; SOFTPROMPTS_DATA names their folder

Trains ACCEPT on the embedded t5-nano for the default 1,000 steps, as `softprompts train --task TASK` does, and takes
the seconds of training and of evaluating (validation on the way, test split and bare backbone at the end) from the
run's record: one run per task. With `--search N` (default 8; 0 = none) the first task's run is preceded by a search
among N candidates, and a run with search is compared with the run without.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import run_script

from softprompts.config import RunSettings, resolve
from softprompts.search import find
from softprompts.tasks import get_task
from softprompts.train import train

TASKS = ("demo/request",)
SEARCH = 8
QUICK = {"train.steps": 2, "train.batch_size": 2, "data.train_limit": 8, "data.validation_limit": 4,
         "data.test_limit": 4, "method.prompt_length": 4, "method.budget_tokens": 8}  # fmt: skip


def options_of(parser: argparse.ArgumentParser) -> None:
    """Add what this measurement alone can be told."""
    parser.add_argument(
        "--task", action="append", help="a task of `softprompts list tasks`; may be given several times"
    )
    parser.add_argument("--search", type=int, default=SEARCH, help="candidates of the first task's search; 0 = none")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train on every task, after a search on the first."""
    tasks = [get_task(name).name for name in options.task or TASKS]  # a wrong name is known before the first run
    rows = []
    for number, task in enumerate(tasks):
        settings = resolve(None, [("task", task), *(QUICK.items() if options.quick else ())])
        with tempfile.TemporaryDirectory() as folder:
            # The search is tried with real sizes alone: two steps leave nothing to search with.
            count = 0 if number or options.quick else options.search
            rows.append(one_run(settings, Path(folder), count))
            print(f"{task}: {rows[-1]}", file=sys.stderr, flush=True)
    return {"rows": rows}


def one_run(settings: RunSettings, folder: Path, candidates: int) -> dict[str, Any]:
    """Return what a run did and cost, and what a search before it took."""
    searched = find(settings, candidates, folder / "searched")[1]["seconds"] if candidates else None
    record = train(settings, folder / "run")
    cost, scores = record["cost"], record["scores"]
    return {
        "task": record["task"],
        "scoring": record["scoring"],
        "steps": record["steps_done"],
        "train_seconds": cost["train_seconds"],
        "eval_seconds": cost["eval_seconds"],
        "eval_share": round(cost["eval_seconds"] / cost["seconds"], 4),
        "validation_rows": scores["validation"]["n"],
        "test_rows": scores["test"]["n"],
        "of_test_rows": record["data"]["sizes"]["test"],
        "untuned_rows": record["baselines"]["untuned"]["n"],
        "candidates": candidates or None,
        "search_seconds": searched,
        "with_search": round(1 + searched / cost["seconds"], 3) if searched else None,
    }


def table(record: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and cells."""
    cells = [
        [
            f"{row['task']} ({row['scoring']})",
            f"{row['train_seconds'] + row['eval_seconds']:.0f}",
            f"{row['eval_share']:.1%}",
            f"{row['validation_rows']:,}",
            f"{row['test_rows']:,} of {row['of_test_rows']:,}",
            f"{row['untuned_rows']:,}",
            f"{row['with_search']:.2f} x ({row['candidates']} candidates)" if row["with_search"] else "",
        ]
        for row in record["rows"]
    ]
    columns = ("task", "s a run", "of it evaluating", "validation rows, each time", "test rows", "untuned rows",
               "with a search")  # fmt: skip
    return columns, cells


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print and write; return the record."""
    return run_script("default_run", __doc__, measure, table, arguments, options_of)


if __name__ == "__main__":
    main(sys.argv[1:])
