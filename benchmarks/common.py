"""What all measurements share: options, threads, interleaved timing, ratios with their spread, the record, the table.

Every figure is a ratio between sides that were timed in turns in one process, so that whatever else the machine does
hits all of them; its spread is over the rounds, each of which gives one ratio.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
THREADS = 2
GEMM = 2048
"""Rows, columns and depth of the large product that shows what the machine can do."""
QUIET = 0.05
"""Part of the processors that other processes may take before it is said."""
PRODUCTS = 4
"""Products of one call: a single one is over too soon to be timed well."""
CALLS = {"cpu": 1, "cuda": 20}
"""Calls of every side in a turn: on an accelerator one is over too soon."""
WARMUP = {"cpu": 1, "cuda": 3}
"""Turns before those that count."""
FIELDS = ("benchmark", "quick", "device", "threads", "machine", "versions", "others_share", "skipped", "checks", "rows")
"""What every record has."""

Columns = Sequence[str]
Cells = Sequence[Sequence[str]]
Measure = Callable[[argparse.Namespace], dict[str, Any]]
Table = Callable[[Mapping[str, Any]], tuple[Columns, Cells]]


def run_script(
    name: str,
    text: str,
    measure: Measure,
    table: Table,
    arguments: Sequence[str],
    extra: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
    rounds: bool = True,
) -> dict[str, Any]:
    """Parse, measure, print, write; return the record.

    Args:
        name: of the benchmark and of its file of results.
        text: docstring of the script, for `--help`.
        measure: returns `rows`, `checks` and `skipped` of the record, and what else it has to say.
        table: makes columns and cells of a record.
        arguments: of the command line.
        extra: adds options of its own.
        rounds: whether sides take turns, so that their number can be chosen.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, help=f"where the record goes (results/{name}.json, or {name}.cuda.json; --quick: nowhere)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, one round: whether it runs, not how fast")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help=f"of the CPU (default {THREADS}, --quick: 1)")
    if rounds:
        parser.add_argument("--rounds", type=int, help="turns of every side, beside those to warm up")
    extra(parser)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device; leave it out")
    if options.device == "cpu" and torch.cuda.is_available():
        # Training takes the accelerator that it sees.
        parser.error(
            "--device cpu: a CUDA device is visible; hide it with CUDA_VISIBLE_DEVICES=, or take --device cuda"
        )
    # Two threads on tiny products wait for each other more than they compute.
    with threads(options.threads or (1 if options.quick else THREADS)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # from inside transformers and PEFT
        warnings.filterwarnings("ignore", message="Position ids are not supported")  # which PEFT's generate makes
        about = header(name, options)
        before = processor_seconds()
        target = options.json or (None if options.quick else place(name, options.device))

        def keep(found: Mapping[str, Any]) -> dict[str, Any]:
            record = {**about, "others_share": others_share(before), "skipped": {}, "checks": {}, **found}
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            return record

        options.keep = keep  # for measurements of many minutes, which may be stopped
        options.earlier = earlier(target, about)
        record = keep(measure(options))
    print(plain(*table(record)))
    for what, reason in record["skipped"].items():
        print(f"not measured: {what} ({reason})")
    if (record["others_share"] or 0.0) > QUIET:
        print(f"the machine was not quiet: other processes took {record['others_share']:.0%} of it")
    return record


def earlier(target: Path | None, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record that is there, if it is of the same machine and releases as `about`."""
    if target is None or not target.exists():
        return None
    try:
        record = json.loads(target.read_text(encoding="utf-8"))
    except ValueError:  # cut short
        return None
    return record if {key: record.get(key) for key in about} == about else None


def place(name: str, device: str = "cpu") -> Path:
    """Return where a record is kept: one of each device."""
    return RESULTS / (f"{name}.json" if device == "cpu" else f"{name}.{device}.json")


def header(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what is known before measuring. No names of hosts and no paths."""
    return {
        "benchmark": name,
        "quick": options.quick,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "machine": machine(options.device),
        "versions": versions(),
    }


def machine(device: str) -> dict[str, Any]:
    """Return what the machine is, as far as speed goes."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else []
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = named.get("flags", named.get("Features", "")).split()
    return {
        "system": platform.system(),
        "processor": named.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "vector_units": [flag for flag in flags if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd")],
        "accelerator": torch.cuda.get_device_name() if device.startswith("cuda") else None,
    }


def versions() -> dict[str, str]:
    """Return the releases that were measured."""
    import peft
    import transformers

    import softprompts

    modules = {"softprompts": softprompts, "peft": peft, "transformers": transformers, "torch": torch}
    return {**{name: module.__version__ for name, module in modules.items()}, "python": platform.python_version()}


def processor_seconds() -> tuple[float, float, float] | None:
    """Return seconds so far: all processors in all, those in use or taken away, those used here. None if unknown."""
    place = Path("/proc/stat")
    if not place.exists():
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = [int(tick) for tick in place.read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    own = os.times()
    return (
        sum(ticks) / os.sysconf("SC_CLK_TCK"),
        (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"),
        own.user + own.system + own.children_user + own.children_system,
    )


def others_share(before: tuple[float, float, float] | None) -> float | None:
    """Return which part of the processors other processes took since `before`, None if unknown."""
    after = processor_seconds()
    if before is None or after is None or after[0] <= before[0]:
        return None
    whole, used, own = (now - then for now, then in zip(after, before, strict=True))
    return round(max(used - own, 0.0) / whole, 3)


def no_bf16(device: str) -> str | None:
    """Return why bf16 is not measured, None if the device has units for it."""
    from softprompts.backbone import cpu_bf16

    if device == "cuda":
        return None if torch.cuda.is_bf16_supported(including_emulation=False) else "this GPU emulates it"
    return None if cpu_bf16() else "this CPU has neither avx512_bf16 nor amx_bf16 and would emulate it"


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with that many threads inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def finish(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleaved(
    sides: Mapping[str, Callable[[], Any]], rounds: int, device: str, warmup: int | None = None
) -> dict[str, list[float]]:
    """Return the seconds of every side in every round. The sides take turns, every second round backwards."""
    warmup, calls = WARMUP[device] if warmup is None else warmup, CALLS[device]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warmup, rounds):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        gc.collect()
        for name in names:
            finish(device)
            begun = time.perf_counter()
            for _ in range(calls):
                sides[name]()
            finish(device)
            if number >= 0:
                seconds[name].append((time.perf_counter() - begun) / calls)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return n, median, quartiles and extremes."""
    ordered = sorted(values)
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    found = {"median": statistics.median(ordered), "q1": low, "q3": high, "min": ordered[0], "max": ordered[-1]}
    return {"n": len(ordered), **{key: float(f"{value:.4g}") for key, value in found.items()}}


def ratio(upper: Sequence[float], lower: Sequence[float]) -> dict[str, float]:
    """Return the spread of the rounds' ratios."""
    return spread([one / other for one, other in zip(upper, lower, strict=True)])


def product(rows: int, depth: int, columns: int, device: str, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    """Return `PRODUCTS` matrix products to be timed, the last side of a comparison: the machine's own limit."""
    left = torch.randn(rows, depth, device=device, dtype=dtype)
    right = torch.randn(depth, columns, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(PRODUCTS):
            left @ right

    return multiply


def rate(rows: int, depth: int, columns: int, seconds: Sequence[float]) -> list[float]:
    """Return multiply-adds per second of `product`, round by round."""
    return [PRODUCTS * rows * depth * columns / second for second in seconds]


def limit_share(work: int, rates: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Return which part of the time `work` multiply-adds take at the rates of the same rounds."""
    return ratio([work / each for each in rates], seconds)


def best_share(work: int, rates: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Return the same at the best rate of all rounds: what the machine can do when nothing disturbs it."""
    return spread([work / max(rates) / each for each in seconds])


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    scale = float(other.detach().abs().max()) or 1.0
    return float((one.detach() - other.detach()).abs().max()) / scale


def figure(found: Mapping[str, float] | None, digits: int = 2, factor: float = 1.0) -> str:
    """Write a median with its quartiles."""
    if found is None:
        return ""
    median, low, high = (f"{found[key] * factor:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} ({low}-{high})"


def plain(columns: Columns, cells: Cells) -> str:
    """Return a table for a terminal."""
    rows = [list(columns), *(list(row) for row in cells)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def markdown(columns: Columns, cells: Cells) -> str:
    """Return the same for a page."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(["---", *["--:"] * (len(columns) - 1)]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"
