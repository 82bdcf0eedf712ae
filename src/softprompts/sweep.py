"""Many runs from one settings file: every combination of the lists under `[sweep]`, sharing backbones where they fit.

task = "glue/rte"
[train]
steps = 3000
[sweep]
seed = [1, 2, 3]
"train.prompt_rate" = [0.3, 0.4, 0.5]
"method.name" = ["prompt_tuning", "accept"]
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompts import results
from softprompts.config import RunSettings, flat, insert, merged, resolve_tree
from softprompts.errors import UsageError
from softprompts.population import Halving, fits

if TYPE_CHECKING:
    from softprompts.loop import Progress

MEMBERS = 8
"""Runs that share a backbone unless told otherwise: beyond, memory grows and little time is left to win."""
ROUNDS = (2, 4, 6)
"""Evaluations after which `halving` drops the worse half."""
REPEATED = ("seed", "data.shot_seed")
"""Lists that repeat a setting instead of changing it: training seeds, and draws of few shots."""
SCORED = ("task", "data.path", "data.protocol")
"""Lists that change what is scored: the best setting is found for each of their values."""


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    name: str
    """Of its folder: what distinguishes it."""
    settings: RunSettings
    values: dict[str, Any]
    """Its value of every list."""


def plan(file: Path, overrides: Iterable[tuple[str, Any]] = ()) -> list[Planned]:
    """Return the runs of a sweep file, with the overrides on top of it.

    Raises:
        UsageError: no lists, or settings that cannot be used.
    """
    tree = merged(file, overrides)
    lists = flat(tree.pop("sweep", {}))
    if not lists or not all(isinstance(values, list) and values for values in lists.values()):
        raise UsageError(f"{file} sweeps over nothing; give lists under [sweep], for example seed = [1, 2, 3]")
    planned = []
    for values in itertools.product(*lists.values()):
        own, chosen = deepcopy(tree), dict(zip(lists, values, strict=True))
        for key, value in chosen.items():
            insert(own, key, value)
        planned.append(Planned(folder_name(chosen), resolve_tree(own), chosen))
    names = [run.name for run in planned]
    if len(set(names)) < len(names):
        raise UsageError(f"{file} names the same run twice: {next(n for n in names if names.count(n) > 1)}")
    return planned


def folder_name(values: dict[str, Any]) -> str:
    """Return a folder name such as `prompt_rate-0.3_seed-1`."""
    parts = []
    for key, value in values.items():
        short = key.removesuffix(".name").rpartition(".")[2]
        parts.append(f"{short}-{value}")
    return re.sub(r"[^\w.+=-]+", "-", "_".join(parts))


def groups(planned: Sequence[Planned], most: int) -> list[list[Planned]]:
    """Return the runs in groups that share a backbone, in the order of the plan.

    A model that answers through a head trains one run at a time: the head belongs to one prompt.
    """
    found: list[list[Planned]] = []
    for run in planned:
        home = next((g for g in found if len(g) < most and fits(g[0].settings, run.settings)), None)
        if home is None or has_head(run.settings):
            found.append([run])
        else:
            home.append(run)
    return found


def has_head(settings: RunSettings) -> bool:
    """Whether the backbone answers through a head; what cannot be loaded says so when it is loaded."""
    if settings.model.head == "classification":
        return True
    import transformers

    from softprompts.backbone import answer_kind, embedded_path

    try:
        config = transformers.AutoConfig.from_pretrained(
            embedded_path(settings.model.name), revision=settings.model.revision
        )
        return answer_kind(config, settings.model.head) == "classification"
    except (OSError, ValueError):
        return False


def run_sweep(
    planned: Sequence[Planned],
    out: Path,
    *,
    most: int = MEMBERS,
    halving: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run what is not done yet, each into its folder under `out`, and return the summary.

    Raises:
        UsageError: settings, data or folders that cannot be used.
    """
    records: dict[str, dict[str, Any]] = {}
    for group in groups(planned, most):
        if not overwrite:
            done = {run.name: finished(out / run.name, run.settings) for run in group}
            records |= {name: record for name, record in done.items() if record is not None}
            # Without a common state, what is done stays as it is; with one, the group goes on as a whole.
            if not (out / group[0].name / results.STATE).exists() or None not in done.values():
                group = [run for run in group if done[run.name] is None]
        if group:
            begun = any((out / run.name / name).exists() for run in group for name in results.BEGINNINGS)
            drop = Halving(ROUNDS) if halving and len(group) > 1 else None
            resume = begun and not overwrite
            records |= run_group(group, out, halving=drop, resume=resume, overwrite=overwrite, progress=progress)
    return summary(planned, records)


def run_group(
    group: Sequence[Planned],
    out: Path,
    *,
    halving: Halving | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Train one of the `groups` together and return the records by name."""
    from softprompts.train import train_together

    made = train_together(
        [run.settings for run in group],
        [out / run.name for run in group],
        resume=resume,
        overwrite=overwrite,
        halving=halving,
        progress=progress,
    )
    return {run.name: record for run, record in zip(group, made, strict=True)}


def finished(folder: Path, settings: RunSettings) -> dict[str, Any] | None:
    """Return the record of a run that is done, None if it must be run.

    Raises:
        UsageError: the folder holds a run with other settings.
    """
    if not (folder / results.RECORD).exists():
        return None
    record = results.read_record(folder)
    if RunSettings(**record["settings"]) != settings:
        raise UsageError(f"{folder} was run with other settings; take --overwrite, or another --out")
    return record if record["status"] in ("done", "dropped") else None


def summary(planned: Sequence[Planned], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return every run's scores, the means over seeds and draws, and each task's best setting by validation score.

    `n` counts the runs of a mean, and `sd` is their sample standard deviation.
    """
    rows = []
    for run in planned:
        record = records[run.name]
        scores = record["scores"]
        row = {
            "run": run.name,
            "values": run.values,
            "status": record["status"],
            "steps": record["steps_done"],
            "validation": scores["validation"].get(record["metric"]["select"]),
            "test": scores.get("test", {}).get(record["metric"]["report"]),
        }
        rows.append(row)
    means: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done":
            key = tuple((name, str(value)) for name, value in row["values"].items() if name not in REPEATED)
            means.setdefault(key, []).append(row)
    settings = []
    for key, same in means.items():
        entry: dict[str, Any] = {"values": dict(key), "n": len(same)}
        for split in ("validation", "test"):
            values = [row[split] for row in same]
            sd = statistics.stdev(values) if len(values) > 1 else None
            entry[split] = {"mean": statistics.mean(values), "sd": sd}
        settings.append(entry)
    best: dict[tuple, dict[str, Any]] = {}
    for entry in settings:
        scored = tuple(entry["values"].get(name) for name in SCORED)
        if scored not in best or entry["validation"]["mean"] > best[scored]["validation"]["mean"]:
            best[scored] = entry
    return {"runs": rows, "settings": settings, "best_by_validation": list(best.values())}
