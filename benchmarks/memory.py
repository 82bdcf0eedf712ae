"""Peak memory of one training step on T5-small's shape: ours, the reference code's way, PEFT's prompt tuning.

    python benchmarks/memory.py                  print the table, write results/memory.json
    python benchmarks/memory.py --device cuda

The typical batch of `train_step` (16 rows, texts of 70 tokens on average, ACCEPT). Each side runs in fresh processes,
which take one step: on the CPU the most resident memory minus what was resident before the step (the model, libraries
and all), on CUDA `max_memory_allocated` minus what was allocated. Beside it the bytes that autograd keeps for the way
back, which do not depend on the allocator.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import figure, finish, ratio, run_script, spread
from models import Loop, build, text_lengths, texts, typical_batch
from peers import Peft, Reference
from train_step import ANSWER, plan

MIB = 2**20
SIDES = ("ours", "reference", "peft")
ROUNDS = 5
MEAN = 70


def step_of(side: str, quick: bool, device: str) -> tuple[Callable[[], Any], Any]:
    """Return one side's training step and its model, ready to run."""
    size = plan(quick)
    mean = size["means"][-1] if quick else MEAN
    lengths = text_lengths(size["rows"], mean, size["source"])
    chosen = typical_batch(lengths, size["batch"])[0]
    rows = texts(lengths, ANSWER, size["model"].vocab_size)
    model = build(size["model"], device)
    if side == "peft":
        peft = Peft(model, size["vectors"])
        return lambda: peft.step(rows.pick(chosen)), peft.model
    loop = Loop(model, [size["method"]], rows, [chosen], device)
    if side == "ours":
        return loop.step, model
    # On the same model, whose hooks must be off: a second one would be resident as well.
    loop.model.prompt_adapter.enabled = False
    reference = Reference(model, model, size["source"], size["target"])
    return lambda: reference.step(rows.pick(chosen)), model


def one_step(side: str, quick: bool, device: str) -> dict[str, int]:
    """Return the bytes of one step in this process, which has taken none before."""
    step, model = step_of(side, quick, device)
    if device.startswith("cuda"):
        finish(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        finish(device)
        peak = torch.cuda.max_memory_allocated()
    else:
        before = resident()
        step()
        peak = most_resident()
    return {"peak": max(peak - before, 0), "kept": kept_bytes(step, model), "before": before}


def resident() -> int:
    """Return the bytes that are resident now; where that cannot be read, the most so far."""
    place = Path("/proc/self/statm")
    if not place.exists():
        return most_resident()
    return int(place.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def most_resident() -> int:
    """Return the most bytes that were ever resident."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def kept_bytes(step: Callable[[], Any], model: torch.nn.Module) -> int:
    """Return the bytes that a step keeps for the way back, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values())


def apart(side: str, options: Namespace) -> dict[str, int]:
    """Take one step in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--side", side, "--device", options.device]
    command += ["--threads", str(torch.get_num_threads()), *(["--quick"] if options.quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {side}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: Namespace) -> dict[str, Any]:
    """Run the sides in turns, each time in a fresh process."""
    found: dict[str, list[dict[str, int]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds or (1 if options.quick else ROUNDS)):
        for side in SIDES:
            # Quick runs show that both ways of starting work, and no memory worth the name.
            here = options.quick and side != SIDES[0]
            found[side].append(one_step(side, True, options.device) if here else apart(side, options))
    ours = found["ours"]
    rows = [
        {
            "side": side,
            "peak_mib": spread([one["peak"] / MIB for one in each]),
            "kept_mib": spread([one["kept"] / MIB for one in each]),
            "peak_to_ours": ratio([one["peak"] for one in each], [max(one["peak"], 1) for one in ours]),
            "kept_to_ours": ratio([one["kept"] for one in each], [one["kept"] for one in ours]),
        }
        for side, each in found.items()
    ]
    return {"rows": rows}


NAMES = {"ours": "ours", "reference": "the reference way", "peft": "PEFT's prompt tuning, 100 vectors"}


def table(record: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and cells."""
    cells = [
        [
            NAMES[row["side"]],
            figure(row["peak_mib"], 0),
            figure(row["peak_to_ours"]) + " x",
            figure(row["kept_mib"], 0),
            figure(row["kept_to_ours"]) + " x",
        ]
        for row in record["rows"]
    ]
    return ("", "MiB at the peak of a step", "of ours", "MiB kept for the way back", "of ours "), cells


def add_side(parser: ArgumentParser) -> None:
    """Add the option by which this script calls itself."""
    parser.add_argument("--side", choices=SIDES, help="take one step of one side and print its bytes")


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print and write; return the record."""
    return run_script("memory", __doc__, measure, table, arguments, add_side)


def child(arguments: Sequence[str]) -> None:
    """Take one step and print its bytes."""
    parser = ArgumentParser()
    add_side(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(json.dumps(one_step(options.side, options.quick, options.device)))


if __name__ == "__main__":
    if "--side" in sys.argv:
        child(sys.argv[1:])
    else:
        main(sys.argv[1:])
