"""The run record: `run.json`, `steps.jsonl`, `predictions.jsonl` in the run's folder."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompts.errors import UsageError
from softprompts.files import write_text

if TYPE_CHECKING:
    from softprompts.backbone import Backbone
    from softprompts.config import RunSettings
    from softprompts.data import Rows
    from softprompts.tasks import TaskData

SCHEMA = 1
RECORD = "run.json"
STEPS = "steps.jsonl"
PREDICTIONS = "predictions.jsonl"
STATE = "state.safetensors"
ADAPTER = "adapter"
SEARCH = "search.json"
TRIALS = "search"
TASKS = "tasks"
START = "start"
OURS = (RECORD, STEPS, PREDICTIONS, ADAPTER, STATE, SEARCH, TRIALS, TASKS, START)
BEGINNINGS = (RECORD, SEARCH)
"""What tells that a folder is a run's."""


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Make sure that a run may write to `folder`; changes nothing.

    Raises:
        UsageError: something is there and neither resuming nor overwriting was asked for.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; name a folder")
    # Hidden files may be what a kill left of a file being written.
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other; leave one out")
    if not (resume or overwrite):
        raise UsageError(
            f"output folder {folder} exists and is not empty; continue it with --resume, replace it with "
            f"--overwrite, or name another with --out"
        )
    if not any((folder / name).exists() for name in BEGINNINGS):
        raise UsageError(f"{folder} is not the folder of a run ({RECORD} is missing); it is left alone, name another")


def clear_folder(folder: Path) -> None:
    """Remove the files of an earlier run, and only those."""
    for path in (*(folder / name for name in OURS), *(left for name in OURS for left in folder.glob(f".{name}.*"))):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `run.json` atomically."""
    write_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Read `run.json`.

    Raises:
        UsageError: no record, damaged, or of a newer schema.
    """
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(f"{folder} is not the folder of a run ({RECORD} is missing)") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}); train again with --overwrite") from None
    if not isinstance(record, dict) or record.get("schema", 0) > SCHEMA:
        raise UsageError(f"{path} was written by a newer version of softprompts; update the package")
    return record


def write_predictions(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per test example."""
    write_text(folder / PREDICTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_step(folder: Path, row: Mapping[str, Any]) -> None:
    """Append one line to `steps.jsonl`."""
    with (folder / STEPS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def keep_steps(folder: Path, last: int) -> None:
    """Drop the lines of steps after `last`, which a killed run had written beyond its saved state."""
    path = folder / STEPS
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= last:
                    kept.append(line + "\n")
            except ValueError:
                break  # a line cut short by the kill
        write_text(path, "".join(kept))


def new_record(
    settings: RunSettings,
    data: TaskData,
    backbone: Backbone,
    splits: Mapping[str, Rows],
    name: str,
    trained: Iterable[Any],
) -> dict[str, Any]:
    """Return the part of the run record that is known before the first step."""
    from softprompts.attach import adapters_of

    adapters = adapters_of(backbone.model)
    config = adapters.configs[name]
    trained = list(trained)
    # A baseline's count depends on the whole model, not on its width alone.
    count = (
        sum(backbone.model.get_parameter(name).numel() for name in adapters.weights)
        if config.changes_model
        else config.num_trainable(adapters.width)
    )
    return {
        "schema": SCHEMA,
        "status": "running",
        "method": config.name,
        "task": data.task.name,
        "task_version": data.task.version,
        "protocol": data.protocol,
        "metric": {"report": data.task.report_metric, "select": data.task.select_metric(data.protocol)},
        "model": backbone.name,
        "seed": settings.seed,
        "num_trainable": count,
        "num_trainable_head": sum(parameter.numel() for parameter in trained) - count,
        "num_backbone": adapters.num_backbone,
        "settings": settings.model_dump(mode="json"),
        "method_resolved": config.to_dict(),
        "data": {
            "sizes": {name: len(rows) for name, rows in splits.items()},
            "truncated": {name: rows.truncated for name, rows in splits.items()},
            "provenance": data.provenance,
            "defects": list(data.defects),
            "notes": list(data.notes),
        },
        "environment": environment(
            str(backbone.model.device),
            str(backbone.model.dtype if config.changes_model else backbone.dtype).removeprefix("torch."),
        ),
    }


def environment(device: str, dtype: str) -> dict[str, Any]:
    """Describe what a run ran on: versions, machine, precision."""
    packages = ("softprompts", "torch", "transformers", "accelerate", "datasets", "tokenizers")
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.system(),
        "machine": platform.machine(),
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def peak_memory() -> int:
    """Return the peak memory in bytes: of the accelerator since the run began, or of this process since its start."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def folder_bytes(folder: Path) -> int:
    """Return the size of the files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("[!.]*") if path.is_file())
