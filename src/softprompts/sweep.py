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
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from softprompts import results
from softprompts.config import RunSettings, flat, insert, merged, resolve_tree
from softprompts.errors import Diverged, UsageError
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
    """Return the runs of a sweep file, with the overrides on top of it: also in the place of its lists.

    Raises:
        UsageError: no lists, or settings or tasks that cannot be used.
    """
    from softprompts.tasks import get_task

    given = list(overrides)
    tree = merged(file, given)
    lists = {named(key, values): values for key, values in flat(tree.pop("sweep", {})).items()}
    for key, value in given:
        if key.partition(".")[0] == "method" and "method" in lists:
            raise UsageError(f"-s {key}=... and the sweep's list of whole methods exclude each other; leave one out")
        for setting, each in flat({key: value}).items():
            if setting in lists:
                lists[setting] = each if isinstance(each, list) else [each]
    if not lists or not all(isinstance(values, list) and values for values in lists.values()):
        raise UsageError(f"{file} sweeps over nothing; give lists under [sweep], for example seed = [1, 2, 3]")
    planned = []
    for values in itertools.product(*lists.values()):
        own, chosen = deepcopy(tree), dict(zip(lists, values, strict=True))
        for key, value in chosen.items():
            insert(own, key, value)
        settings = resolve_tree(own)
        for task in settings.tasks:
            get_task(task)  # an unknown one would end the sweep half-way
        planned.append(Planned(folder_name(chosen), settings, chosen))
    names = [run.name for run in planned]
    if len(set(names)) < len(names):
        raise UsageError(f"{file} names the same run twice: {next(n for n in names if names.count(n) > 1)}")
    return planned


def named(key: str, values: Any) -> str:
    """Return the setting of a list: methods may be given by their names alone, or as whole tables."""
    names = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return "method.name" if key == "method" and names else key


def folder_name(values: dict[str, Any]) -> str:
    """Return a folder name such as `prompt_rate-0.3_seed-1`."""
    parts = []
    for key, value in values.items():
        short = key.removesuffix(".name").rpartition(".")[2]
        parts.append(f"{short}-{value}")
    return re.sub(r"[^\w.+=-]+", "-", "_".join(parts))


def groups(planned: Sequence[Planned], most: int) -> list[list[Planned]]:
    """Return the runs in groups that share a backbone, in the order of the plan.

    A model that answers through a head trains one run at a time: the head belongs to one prompt. So do all runs of
    several processes.
    """
    found: list[list[Planned]] = []
    most = 1 if several_processes() else most
    for run in planned:
        home = next((g for g in found if len(g) < most and fits(g[0].settings, run.settings)), None)
        if home is None or has_head(run.settings):
            found.append([run])
        else:
            home.append(run)
    return found


def several_processes() -> bool:
    """Whether this process is one of several that train together; told by what launched them."""
    return any(int(os.environ.get(name, "1")) > 1 for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))


def interrupted(planned: Sequence[Planned], out: Path) -> list[list[Planned]]:
    """Return the groups that a stopped sweep was training, each as it was: their common state knows its members."""
    found = []
    for run in planned:
        state = out / run.name / results.STATE
        if state.exists():
            with suppress(SafetensorError), safe_open(state, "pt") as file:
                names = set(file.metadata())
                found.append([run, *(other for other in planned if other.name in names and other is not run)])
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
    # What is done stays as it is; what was stopped goes on in the company that it had.
    records = {} if overwrite else {run.name: finished(out / run.name, run.settings) for run in planned}
    done = sum(record is not None for record in records.values())
    if done and progress is not None:
        progress.note(f"{done} of {len(planned)} runs are done")
    stopped = [] if overwrite else interrupted(planned, out)
    # What has diverged may have left a state too.
    stopped = [group for group in stopped if any(records[run.name] is None for run in group)]
    held = {run.name for group in stopped for run in group}
    fresh = [run for run in planned if run.name not in held and records.get(run.name) is None]
    for group in [*stopped, *groups(fresh, most)]:
        begun = any((out / run.name / name).exists() for run in group for name in results.BEGINNINGS)
        drop = Halving(ROUNDS) if halving and len(group) > 1 else None
        if halving and drop is None and progress is not None:
            progress.note(f"{group[0].name} trains alone: there is nothing to halve")
        try:
            records |= run_group(
                group, out, halving=drop, resume=begun and not overwrite, overwrite=overwrite, progress=progress
            )
        except UsageError as error:
            raise UsageError(f"{', '.join(run.name for run in group)}: {error}") from None
        except Diverged as error:
            if progress is not None:
                progress.note(f"{group[0].name}: {error}")
            records[group[0].name] = results.read_record(out / group[0].name)
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
    """Return the record of a run that is done, None if it must be run; to diverge is an end too.

    Raises:
        UsageError: the folder holds a run with other settings.
    """
    if not (folder / results.RECORD).exists():
        return None
    record = results.read_record(folder)
    if RunSettings(**record["settings"]) != settings:
        raise UsageError(f"{folder} was run with other settings; take --overwrite, or another --out")
    diverged = str(record.get("error")).startswith(f"{Diverged.__name__}:")
    return record if diverged or record["status"] in ("done", "dropped") else None


def summary(planned: Sequence[Planned], records: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Return every run's scores, the means over seeds and draws, and each task's best setting by validation score.

    `n` counts the runs of a mean, and `sd` is their sample standard deviation. Where runs were dropped, those settings
    that have most of theirs are compared: the mean of the survivors alone would flatter.
    """
    rows = []
    for run in planned:
        record = records[run.name]
        assert record is not None, "every run was done, or failed"
        scores, metric = record.get("scores", {}), record.get("metric", {})  # a run that failed may have none
        row = {
            "run": run.name,
            "values": run.values,
            "status": record["status"],
            "steps": record.get("steps_done"),
            "validation": scores.get("validation", {}).get(metric.get("select")),
            "test": scores.get("test", {}).get(metric.get("report")),
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
    for entry in sorted(settings, key=lambda entry: (-entry["n"], -entry["validation"]["mean"])):
        best.setdefault(tuple(entry["values"].get(name) for name in SCORED), entry)
    return {"runs": rows, "settings": settings, "best_by_validation": list(best.values())}
