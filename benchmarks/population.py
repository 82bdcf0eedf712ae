"""What a member of a population costs, against separate runs: 1, 2, 4 and 8 prompts on one backbone of t5-nano's shape.

    python benchmarks/population.py                  print the table, write results/population.json
    python benchmarks/population.py --device cuda --shape t5-base --dtype bf16 --members 1,4,12,36

The time of a step divided by the number of members, relative to a run alone on the same rows. With `same rows` all
members see the same batch, as in a search over rates; with `own order` each has its own, as with other seeds: there
the peer is the mean of the members' runs alone. Random weights, no dropout, ACCEPT with 20 vectors, 16 rows, texts of
70 tokens on average.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from common import difference, figure, interleaved, ratio, run_script, spread
from models import QUICK_METHOD, SHAPES, TINY_T5, Loop, build, shape_option, text_lengths, texts, typical_batch

from softprompts import AcceptConfig
from softprompts.attach import adapters_of
from softprompts.core import MethodConfig
from softprompts.data import Rows, epoch_batches

BATCH, ROWS, MEAN, ROUNDS, ANSWER = 16, 1024, 70, 15, 2
MEMBERS = "1,2,4,8"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plan(quick: bool, shape: str = "t5-nano", members: str = MEMBERS) -> dict[str, Any]:
    """Return sizes, full or tiny."""
    if quick:
        method: MethodConfig = AcceptConfig(offset_positions=24, **QUICK_METHOD)
        return {"model": TINY_T5, "method": method, "batch": 3, "rows": 24, "mean": 8, "longest": 24, "rounds": 1,
                "members": (1, 2)}  # fmt: skip
    method = AcceptConfig(prompt_length=20, budget_tokens=40)
    return {"model": SHAPES[shape], "method": method, "batch": BATCH, "rows": ROWS, "mean": MEAN, "longest": 256,
            "rounds": ROUNDS, "members": tuple(sorted({1, *map(int, members.split(","))}))}  # fmt: skip


def own_batches(lengths: Sequence[int], batch: int, members: int) -> list[list[int]]:
    """Return the first batch of each member, whose seeds are 1, 2, 3 and so on."""
    return [epoch_batches(lengths, batch, 1 + number, 0)[0] for number in range(members)]


def measure(options: Namespace) -> dict[str, Any]:
    """Time populations of every size, and each member alone, in turns."""
    size, device, dtype = plan(options.quick, options.shape, options.members), options.device, DTYPES[options.dtype]
    lengths = text_lengths(size["rows"], size["mean"], size["longest"])
    rows = texts(lengths, ANSWER, size["model"].vocab_size)
    most = max(size["members"])

    def loop(chosen: Sequence[Sequence[int]]) -> Loop:
        return Loop(build(size["model"], device, dtype), [size["method"]] * len(chosen), rows, chosen, device)

    same = [typical_batch(lengths, size["batch"])[0]] * most
    own = own_batches(lengths, size["batch"], most)
    together = {number: loop(same[:number]) for number in size["members"]}
    mixed = loop(own)
    alone = loop(own[:1])
    checks = agreement(mixed, rows, own, alone)
    sides: dict[str, Callable[[], Any]] = {f"same {number}": each.step for number, each in together.items()}
    sides["own"] = mixed.step
    sides["alone"] = lambda: each_alone(alone, own)
    seconds = interleaved(sides, options.rounds or size["rounds"], device)
    base = seconds["same 1"]
    found = [
        row("same rows", number, seconds[f"same {number}"], [second * number for second in base])
        for number in size["members"]
    ]
    found.append(row("own order", most, seconds["own"], seconds["alone"]))
    longest = [max(lengths[i] for i in batch) for batch in own]
    found[-1]["padding_alone"] = round(most * max(longest) / sum(longest), 3)
    return {"shape": options.shape, "dtype": options.dtype, "rows": found, "checks": checks}


def options_of(parser: ArgumentParser) -> None:
    """Add what this measurement alone can be told."""
    shape_option(parser, "t5-nano")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the backbone (default fp32)")
    parser.add_argument("--members", default=MEMBERS, help=f"sizes of the populations, beside 1 (default {MEMBERS})")


def row(case: str, members: int, together: Sequence[float], apart: Sequence[float]) -> dict[str, Any]:
    """Return one line: the time of a member's step against that of the same steps in separate runs."""
    return {
        "case": case,
        "members": members,
        "seconds": spread([second / members for second in together]),
        "relative_to_alone": ratio(together, apart),
    }


def each_alone(alone: Loop, batches: Sequence[Sequence[int]]) -> None:
    """Take every member's step in a run of its own, one after the other."""
    for batch in batches:
        alone.members[0].chosen = list(batch)
        alone.step()


def agreement(mixed: Loop, rows: Rows, batches: Sequence[Sequence[int]], alone: Loop) -> dict[str, float]:
    """Return how far a member's loss and gradients are from those of a run alone with its start and its rows."""
    apart = {"loss": 0.0, "gradients": 0.0}
    together = mixed.losses()
    sum(together[1:], together[0]).backward()
    for member, loss, batch in zip(mixed.members, together, batches, strict=True):
        method = adapters_of(alone.model).method()
        method.load_state_dict(adapters_of(mixed.model).method(member.name).state_dict())
        alone.members[0].chosen = list(batch)
        single = alone.losses()[0]
        single.backward()
        apart["loss"] = max(apart["loss"], difference(loss, single))
        for name, parameter in alone.members[0].parameters.items():
            assert parameter.grad is not None
            beside = member.parameters[name].grad
            assert beside is not None
            apart["gradients"] = max(apart["gradients"], difference(beside, parameter.grad))
            parameter.grad = None
    for member in mixed.members:
        for parameter in member.parameters.values():
            parameter.grad = None
    return apart


def table(record: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and cells."""
    cells = [
        [
            f"{row['members']}, {row['case']}",
            figure(row["seconds"], 0, 1000),
            figure(row["relative_to_alone"], 3) + " x",
            f"{row['padding_alone']:.2f} x" if "padding_alone" in row else "",
        ]
        for row in record["rows"]
    ]
    return ("members", "ms a member's step", "separate runs = 1", "of it by padding"), cells


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print and write; return the record."""
    return run_script("population", __doc__, measure, table, arguments, options_of)


if __name__ == "__main__":
    main(sys.argv[1:])
