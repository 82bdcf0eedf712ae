"""What a default run spends on evaluating, and what a search for rates adds: real runs, nothing set but the task.

    python benchmarks/default_run.py                    half an hour on two cores; SOFTPROMPTS_DATA names the data
    python benchmarks/default_run.py --task squad       that one again; the others' rows in the record stay

Trains ACCEPT on the embedded t5-nano for the default 1,000 steps, as `softprompts train --task TASK` does, and takes
the seconds of training and of evaluating (validation on the way, test split and bare backbone at the end) from the
run's record: one run per task. With `--search N` (default 8; 0 = none) the run on demo/request is preceded by a
search among N candidates, and compared with the run alone (what the search loads is counted as its).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import others_share, processor_seconds, run_script

from softprompts.config import RunSettings, resolve
from softprompts.data import load_data
from softprompts.errors import UsageError
from softprompts.search import find
from softprompts.train import train

TASKS = ("demo/request", "glue/qqp", "squad")
"""A small task, one with a large test split whose words are ranked, and one whose answers are generated."""
SEARCH = 8
QUICK = {"train.steps": 2, "train.batch_size": 2, "data.train_limit": 8, "data.validation_limit": 4,
         "data.test_limit": 4, "method.prompt_length": 4, "method.budget_tokens": 8}  # fmt: skip


def options_of(parser: argparse.ArgumentParser) -> None:
    """Add what this measurement alone can be told."""
    parser.add_argument(
        "--task", action="append", help=f"a task; may be given several times (default {', '.join(TASKS)})"
    )
    parser.add_argument(
        "--search", type=int, default=SEARCH, help=f"candidates of the search before {TASKS[0]}; 0 = none"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train on every task, after a search on the demonstration's; rows of tasks that are not asked for stay."""
    skipped: dict[str, str] = {}
    plans = {task: resolve(None, [("task", task), *(QUICK.items() if options.quick else ())])
             for task in options.task or TASKS}  # fmt: skip
    for task, settings in list(plans.items()):
        try:
            load_data(settings)
        except UsageError as error:  # before the first run, not after it
            if options.task:
                raise SystemExit(f"{task}: {error}") from None
            skipped[task] = "its data are not here"
            del plans[task]
    before = (options.task and options.earlier) or {"rows": [], "skipped": {}, "others_share": None}
    skipped |= {task: reason for task, reason in before["skipped"].items() if task not in plans}
    rows = [row for row in before["rows"] if row["task"] not in plans]
    begun = processor_seconds()

    def found(skipped: Mapping[str, str]) -> dict[str, Any]:
        shares = [share for share in (before["others_share"], others_share(begun)) if share is not None]
        return {"rows": rows, "skipped": skipped, "others_share": max(shares, default=None)}

    for number, (task, settings) in enumerate(plans.items()):
        with tempfile.TemporaryDirectory() as folder:
            # The search is tried with real sizes alone: two steps leave nothing to search with.
            count = options.search if task == TASKS[0] and not options.quick else 0
            rows.append(one_run(settings, Path(folder), count))
        rows.sort(key=lambda row: (*TASKS, row["task"]).index(row["task"]))
        options.keep(found(skipped | dict.fromkeys(list(plans)[number + 1 :], "not yet")))
    return found(skipped)


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
    return run_script("default_run", __doc__, measure, table, arguments, options_of, rounds=False)


if __name__ == "__main__":
    main(sys.argv[1:])
