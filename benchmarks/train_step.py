"""A training step of ACCEPT on T5-small's shape, against the reference code's way, PEFT's prompt tuning and the limit.

    python benchmarks/train_step.py                  print the table, write results/train_step.json
    python benchmarks/train_step.py --device cuda --shape t5-base

Sixteen rows, texts of 25, 70 and 200 tokens on average, targets of 2 tokens, random weights. Ours is the step of
`softprompts train` on the batch of an epoch whose padded length is nearest to the mean; PEFT gets the same rows and
the same padding, and 100 vectors, so that about as many numbers are trained; the reference way pads to 256 and 20. At
the middle length also without dropout on any side, and with 100 free vectors on both sides: the engines alone. The
limit is the multiply-adds of our step at the rates that two matrix products reach in the same rounds, and at the best
of all rounds.
"""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from common import (
    GEMM,
    best_share,
    difference,
    figure,
    interleaved,
    limit_share,
    no_bf16,
    product,
    rate,
    ratio,
    run_script,
    spread,
)
from models import QUICK_METHOD, SHAPES, TINY_T5, Loop, build, shape_option, text_lengths, texts, typical_batch
from peers import SOURCE, TARGET, Peft, Reference
from work import t5_step

from softprompts import AcceptConfig, PromptTuningConfig
from softprompts.core import MethodConfig

BATCH, ROWS, ROUNDS, ANSWER = 16, 1024, 5, 2
MEANS = (25, 70, 200)
PROMPT, BUDGET = 40, 100
"""The authors' sizes for T5-small: 40 vectors from codebooks, the budget of 100 free ones."""


def plan(quick: bool, shape: str = "t5-small") -> dict[str, Any]:
    """Return sizes, full or tiny."""
    if quick:
        method: MethodConfig = AcceptConfig(offset_positions=24, **QUICK_METHOD)
        return {"model": TINY_T5, "method": method, "batch": 3, "rows": 24, "means": (6, 12), "rounds": 1,
                "source": 24, "target": 5, "vectors": 8, "gemm": 64}  # fmt: skip
    method = AcceptConfig(prompt_length=PROMPT, budget_tokens=BUDGET, offset_positions=SOURCE)
    return {"model": SHAPES[shape], "method": method, "batch": BATCH, "rows": ROWS, "means": MEANS, "rounds": ROUNDS,
            "source": SOURCE, "target": TARGET, "vectors": BUDGET, "gemm": GEMM}  # fmt: skip


def agreement(loop: Loop, reference: Reference) -> dict[str, float]:
    """Return how far loss and gradients of both ways are apart on one batch, before any step."""
    loop.model.eval()
    reference.model.eval()
    rows = loop.members[0].splits["train"].pick(loop.members[0].chosen)
    ours, theirs = loop.losses()[0], reference.loss(rows)
    ours.backward()
    theirs.backward()
    method = loop.model.prompt_adapter.method()
    pairs = [
        (getattr(getattr(method, part).codebook, tensor), getattr(getattr(reference, part), tensor))
        for part in ("prompt", "offset")
        for tensor in ("weights", "codebooks")
    ]
    apart = max(difference(mine.grad, other.grad) for mine, other in pairs)
    for parameter in (p for pair in pairs for p in pair):
        parameter.grad = None
    return {"loss": difference(ours, theirs), "gradients": apart}


def measure(options: Namespace) -> dict[str, Any]:
    """Time every side at every mean length, in every precision that the device has."""
    size = plan(options.quick, options.shape)
    size["rounds"] = options.rounds or size["rounds"]
    reason = no_bf16(options.device)
    dtypes = {"fp32": torch.float32} | ({} if reason else {"bf16": torch.bfloat16})
    rows: list[dict[str, Any]] = []
    checks: dict[str, Any] = {}
    for name, dtype in dtypes.items():
        found, apart = one_precision(size, options.device, dtype)
        rows += [{"dtype": name, **row} for row in found]
        checks[name] = apart
    return {"shape": options.shape, "rows": rows, "checks": checks, "skipped": {"bf16": reason} if reason else {}}


def one_precision(size: Mapping[str, Any], device: str, dtype: torch.dtype) -> tuple[list[dict[str, Any]], Any]:
    """Return a row per mean length, and how far the reference way is apart from ours in numbers."""
    config, means = size["model"], size["means"]
    middle = means[len(means) // 2]
    loops = {mean: loop_of(size, mean, device, dtype) for mean in means}
    still = loop_of(size, middle, device, dtype, dropout=False)
    reference = Reference(build(config, device, dtype), loops[middle].model, size["source"], size["target"])
    peft = Peft(build(config, device, dtype), size["vectors"])
    # Rounding aside: in fp64 if speed is not what is asked.
    precise = torch.float64 if dtype == torch.float32 else dtype
    exact = loop_of(size, middle, device, precise)
    apart = agreement(exact, Reference(build(config, device, precise), exact.model, size["source"], size["target"]))
    batches = {mean: loop.members[0].splits["train"].pick(loop.members[0].chosen) for mean, loop in loops.items()}
    padded = {mean: max(map(len, each.sources)) for mean, each in batches.items()}
    own = (size["batch"] * (size["method"].prompt_length + padded[middle]), config.d_model, config.d_ff)
    big: tuple[int, int, int] = (size["gemm"],) * 3
    # The reference way takes as long for any text: one measurement serves all lengths.
    quiet = still_model(config)
    calm = Reference(build(quiet, device, dtype), loops[middle].model, size["source"], size["target"])
    smooth = Peft(build(quiet, device, dtype), size["vectors"])
    free = loop_of(size | {"method": PromptTuningConfig(prompt_length=size["vectors"])}, middle, device, dtype)
    sides: dict[str, Callable[[], Any]] = {
        "reference": partial(reference.step, batches[middle]),
        "still": still.step,
        "reference still": partial(calm.step, batches[middle]),
        "peft still": partial(smooth.step, batches[middle]),
        "free": free.step,
    }
    for mean in means:
        sides[f"ours {mean}"] = loops[mean].step
        sides[f"peft {mean}"] = partial(peft.step, batches[mean])
    sides |= {"big": product(*big, device, dtype), "own": product(*own, device, dtype)}
    seconds = interleaved(sides, size["rounds"], device)
    rates = {"big": rate(*big, seconds["big"]), "own": rate(*own, seconds["own"])}
    rows = [row_of(size, mean, padded[mean], seconds, rates) for mean in means]
    work = rows[means.index(middle)]["multiply_adds"]
    rows[means.index(middle)]["without_dropout"] = {
        **of_limit(work, seconds["still"], rates),
        "faster_than_reference": ratio(seconds["reference still"], seconds["still"]),
        "faster_than_peft": ratio(seconds["peft still"], seconds["still"]),
    }
    work = rows[means.index(middle)]["peft_multiply_adds"]
    rows[means.index(middle)]["free_vectors"] = {
        **of_limit(work, seconds["free"], rates),
        "faster_than_peft": ratio(seconds[f"peft {middle}"], seconds["free"]),
    }
    return rows, apart


def still_model(config: Any) -> Any:
    """Return a model's config without dropout."""
    still = copy.deepcopy(config)
    still.dropout_rate = 0.0
    return still


def loop_of(size: Mapping[str, Any], mean: int, device: str, dtype: torch.dtype, dropout: bool = True) -> Loop:
    """Return the training loop on the typical batch of texts of a mean length."""
    config = size["model"] if dropout else still_model(size["model"])
    lengths = text_lengths(size["rows"], mean, size["source"])
    chosen = typical_batch(lengths, size["batch"])[0]
    rows = texts(lengths, ANSWER, config.vocab_size)
    return Loop(build(config, device, dtype), [size["method"]], rows, [chosen], device)


def row_of(
    size: Mapping[str, Any],
    mean: int,
    padded: int,
    seconds: Mapping[str, Sequence[float]],
    rates: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Return all figures of texts of a mean length, padded to `padded`."""
    config, batch, prompt, vectors = size["model"], size["batch"], size["method"].prompt_length, size["vectors"]
    ours, work = seconds[f"ours {mean}"], t5_step(config, batch, prompt + padded, ANSWER)
    return {
        "text_tokens": mean,
        "padded_to": padded,
        "trained": {"ours": size["method"].num_trainable(config.d_model), "peft": vectors * config.d_model},
        "peft_seconds": spread(seconds[f"peft {mean}"]),
        "reference_seconds": spread(seconds["reference"]),
        "faster_than_reference": ratio(seconds["reference"], ours),
        "faster_than_peft": ratio(seconds[f"peft {mean}"], ours),
        "multiply_adds": work,
        "reference_multiply_adds": t5_step(config, batch, prompt + size["source"], size["target"]),
        "peft_multiply_adds": t5_step(config, batch, vectors + padded, ANSWER),
        "gigamacs_per_second": {key: spread([each / 1e9 for each in found]) for key, found in rates.items()},
        **of_limit(work, ours, rates),
    }


def of_limit(work: int, seconds: Sequence[float], rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the time of a step, and which share of it the bare arithmetic would take."""
    return {
        "seconds": spread(seconds),
        "share_of_limit": limit_share(work, rates["big"], seconds),
        "share_of_best": best_share(work, rates["big"], seconds),
        "share_of_own_limit": limit_share(work, rates["own"], seconds),
    }


def table(record: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and cells."""
    columns = ("texts of", "padded to", "ms a step", "reference way takes", "of it by arithmetic", "PEFT takes",
               "by arithmetic", "limit: share of our time", "at its best rate", "at our shapes")  # fmt: skip
    cells = []
    for row in record["rows"]:
        name = f"{row['text_tokens']} tokens, {row['dtype']}"
        faster = [
            figure(row["faster_than_reference"]) + " x",
            f"{row['reference_multiply_adds'] / row['multiply_adds']:.2f} x",
            figure(row["faster_than_peft"]) + " x",
            f"{row['peft_multiply_adds'] / row['multiply_adds']:.2f} x",
        ]
        cells.append([name, str(row["padded_to"]), figure(row["seconds"], 0, 1000), *faster, *shares(row)])
        if still := row.get("without_dropout"):
            quiet = [f"{figure(still[f'faster_than_{peer}'])} x" for peer in ("reference", "peft")]
            figures = [figure(still["seconds"], 0, 1000), quiet[0], faster[1], quiet[1], faster[3], *shares(still)]
            cells.append([f"{name}, no dropout on any side", str(row["padded_to"]), *figures])
        if free := row.get("free_vectors"):
            figures = [figure(free["seconds"], 0, 1000), "", "", figure(free["faster_than_peft"]) + " x", "1.00 x"]
            cells.append([f"{name}, 100 free vectors as PEFT", str(row["padded_to"]), *figures, *shares(free)])
    return columns, cells


def shares(found: Mapping[str, Any]) -> list[str]:
    """Write the shares of the limits."""
    keys = ("share_of_limit", "share_of_best", "share_of_own_limit")
    return [figure(found[key], 0, 100) + " %" for key in keys]


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print and write; return the record."""
    return run_script("train_step", __doc__, measure, table, arguments, shape_option)


if __name__ == "__main__":
    main(sys.argv[1:])
