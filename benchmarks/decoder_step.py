"""A training step of a decoder-only model with 100 prompt vectors, ours against PEFT's prompt tuning.

    python benchmarks/decoder_step.py                  print the table, write results/decoder_step.json
    python benchmarks/decoder_step.py --device cuda

A Llama shape (width 512, 6 layers, 8 heads, vocabulary 8,000) with random weights; 16 rows of 40 tokens, the loss on
the last 4. Both train 100 free vectors from the same start. Ours is the step of `softprompts train`: the prompt goes
through the model once per step, and only the logits of the targets are computed. PEFT puts the prompt before every row
and gets `labels`, as its examples do; no row needs padding.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from common import (
    GEMM,
    best_share,
    difference,
    figure,
    interleaved,
    limit_share,
    product,
    rate,
    ratio,
    run_script,
    spread,
)
from models import LLAMA, TINY_LLAMA, Loop, build, texts
from peers import Peft
from work import llama_step

from softprompts.registry import method_config

BATCH, TEXT, ANSWER, PROMPT, ROUNDS = 16, 40, 4, 100, 8


def plan(quick: bool) -> dict[str, Any]:
    """Return sizes, full or tiny."""
    if quick:
        return {"model": TINY_LLAMA, "batch": 3, "text": 8, "prompt": 12, "rounds": 1, "gemm": 64}
    return {"model": LLAMA, "batch": BATCH, "text": TEXT, "prompt": PROMPT, "rounds": ROUNDS, "gemm": GEMM}


def measure(options: Namespace) -> dict[str, Any]:
    """Compare loss and gradient, then time both sides in turns."""
    size, device = plan(options.quick), options.device
    config, batch, text, prompt = size["model"], size["batch"], size["text"], size["prompt"]
    rows = texts([text - ANSWER] * batch, ANSWER, config.vocab_size)
    method = method_config("prompt_tuning", {"prompt_length": prompt})
    loop = Loop(build(config, device), [method], rows, [range(batch)], device)
    peft = Peft(build(config, device), prompt)
    checks = agreement(loop, peft, rows)
    shape: tuple[int, int, int] = (size["gemm"],) * 3
    own = (prompt + batch * text, config.hidden_size, config.intermediate_size)
    seconds = interleaved(
        {
            "ours": loop.step,
            "peft": lambda: peft.step(rows),
            "big": product(*shape, device),
            "own": product(*own, device),
        },
        options.rounds or size["rounds"],
        device,
    )
    ours, work = seconds["ours"], llama_step(config, batch, prompt, text, ANSWER)
    row = {
        "batch": batch,
        "text": text,
        "prompt": prompt,
        "seconds": spread(ours),
        "peft_seconds": spread(seconds["peft"]),
        "faster_than_peft": ratio(seconds["peft"], ours),
        "multiply_adds": work,
        "peft_multiply_adds": llama_step(config, batch, prompt, text, prompt + text, shared=False),
        "share_of_limit": limit_share(work, rate(*shape, seconds["big"]), ours),
        "share_of_best": best_share(work, rate(*shape, seconds["big"]), ours),
        "share_of_own_limit": limit_share(work, rate(*own, seconds["own"]), ours),
        "gigamacs_per_second": {
            "big": spread([each / 1e9 for each in rate(*shape, seconds["big"])]),
            "own": spread([each / 1e9 for each in rate(*own, seconds["own"])]),
        },
    }
    return {"rows": [row], "checks": checks}


def agreement(loop: Loop, peft: Peft, rows: Any) -> dict[str, float]:
    """Return how far loss and gradient are apart from the same start."""
    mine = next(iter(loop.members[0].parameters.values()))
    with torch.no_grad():
        peft.table.copy_(mine)
    loop.model.eval()
    peft.model.eval()
    ours, theirs = loop.losses()[0], peft.loss(rows)
    ours.backward()
    theirs.backward()
    assert mine.grad is not None and peft.table.grad is not None
    found = {"loss": difference(ours, theirs), "gradients": difference(mine.grad, peft.table.grad)}
    mine.grad = peft.table.grad = None
    return found


def table(record: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and cells."""
    columns = ("step", "ms a step", "PEFT takes", "of it by arithmetic", "limit: share of our time",
               "at its best rate", "at our shapes")  # fmt: skip
    cells = [
        [
            f"{row['batch']} rows of {row['text']} tokens, P={row['prompt']}",
            figure(row["seconds"], 0, 1000),
            figure(row["faster_than_peft"]) + " x",
            f"{row['peft_multiply_adds'] / row['multiply_adds']:.2f} x",
            figure(row["share_of_limit"], 0, 100) + " %",
            figure(row["share_of_best"], 0, 100) + " %" if "share_of_best" in row else "",  # not in older records
            figure(row["share_of_own_limit"], 0, 100) + " %",
        ]
        for row in record["rows"]
    ]
    return columns, cells


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print and write; return the record."""
    return run_script("decoder_step", __doc__, measure, table, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
