"""The registry behind `calls.py`: what a call is, and how its check is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cases import EVERY, MODELS, Case, Ours, Peers

Check = Callable[[Case, Path], None]
WANTED, OUTCOMES = "wanted.json", "outcomes.json"


@dataclass(frozen=True)
class Call:
    """One row of the matrix: something that users do with a PEFT model."""

    name: str
    check: Check
    archs: tuple[str, ...]
    says: str
    """What is asserted, and why an architecture is missing."""
    processes: Literal[0, 1, 2] = 0
    """0: run where you are; else in that many new processes, without run-time shape checks (they break graphs)."""


CALLS: dict[str, Call] = {}


def call(
    name: str, says: str, archs: tuple[str, ...] = EVERY, processes: Literal[0, 1, 2] = 0
) -> Callable[[Check], Check]:
    """Decorator: add a row. The check raises AssertionError if what comes out is wrong."""

    def add(check: Check) -> Check:
        assert name not in CALLS, name
        CALLS[name] = Call(name, check, archs, says, processes)
        return check

    return add


def case_of(method: str, arch: str, start: Path | None = None) -> Case:
    """Return the case of a method, or of PEFT's own prompt tuning (`peft`), on an architecture."""
    return Peers(MODELS[arch]) if method == "peft" else Ours(MODELS[arch], method, start)


def outcome(row: Call, case: Case, folder: Path) -> str:
    """Return `ok`, `wrong: ...` or `error: ...`, in one line."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        row.check(case, folder)
    except AssertionError as error:
        return f"wrong: {first_line(error)}"
    except Exception as error:
        return f"error: {type(error).__name__}: {first_line(error)}"
    return "ok"


def first_line(error: Exception) -> str:
    """Return the beginning of an error's text."""
    return (str(error).strip().splitlines() or [""])[0][:160]


def apart(
    processes: int, wanted: Iterable[tuple[str, str, str]], folder: Path, timeout: float = 280.0
) -> dict[tuple[str, str, str], str]:
    """Run (row, method, arch) after each other in `processes` new processes; return the outcome of each.

    Raises:
        RuntimeError: the processes died.
    """
    wanted = list(wanted)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WANTED).write_text(json.dumps(wanted), encoding="utf-8")
    done = subprocess.run(
        [*start, str(here / "calls.py"), str(folder)],
        env={**os.environ, "JAXTYPING_DISABLE": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    if not (folder / OUTCOMES).is_file():
        raise RuntimeError(f"exit code {done.returncode}\n{done.stderr[-2000:]}")
    return dict(zip(wanted, json.loads((folder / OUTCOMES).read_text(encoding="utf-8")), strict=True))


def work(folder: Path) -> None:
    """What the processes of `apart` do; the first one writes the outcomes."""
    rank = os.environ.get("RANK", "0")
    outcomes = [
        outcome(CALLS[name], case_of(method, arch), folder / rank / str(number))
        for number, (name, method, arch) in enumerate(json.loads((folder / WANTED).read_text(encoding="utf-8")))
    ]
    if rank == "0":
        (folder / OUTCOMES).write_text(json.dumps(outcomes), encoding="utf-8")
