"""Requests for 16 tasks in one batch, against switching adapters: 32 short requests, 16 adapters of ACCEPT.

    python benchmarks/mixed_serving.py                  print the table, write results/mixed_serving.json
    python benchmarks/mixed_serving.py --device cuda

`mixed` answers batches of 16 in the order of arrival, each row with its own adapter (`adapter_names`). Its peers switch
with `set_adapter` and answer each request alone, in the order of arrival (`row by row`), or wait for all 32 and answer
each task's two together (`task by task`). All on one PEFT model, through `softprompts.peft`; `PEFT` answers row by row
with its own prompt tuning, 100 vectors, about as many numbers. A forward pass as for ranking answers, then four
generated tokens (label words), then twenty (the papers' length of QA answers). On the decoder-only shape also inside
`remembering`, where every side of ours keeps the keys and values of the 16 prompts. Random weights, texts of 16 tokens
on average.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from common import difference, figure, interleaved, ratio, run_script, spread
from models import LLAMA, PAD, QUICK_METHOD, T5_SMALL, TINY_LLAMA, TINY_T5, build, text_lengths, texts
from peft import PromptTuningConfig, get_peft_model

from softprompts import AcceptConfig
from softprompts.attach import remembering
from softprompts.core import MethodConfig
from softprompts.data import pad
from softprompts.peft import SoftPromptConfig

TASKS, REQUESTS, BATCH, MEAN, ROUNDS, PROMPT, BUDGET = 16, 32, 16, 16, 5, 40, 100
LENGTHS = (0, 4, 20)
"""Tokens generated; 0 = the last logits alone."""


def plan(quick: bool) -> dict[str, Any]:
    """Return sizes, full or tiny."""
    if quick:
        method: MethodConfig = AcceptConfig(offset_positions=24, **QUICK_METHOD)
        return {"models": {"t5": TINY_T5, "llama": TINY_LLAMA}, "method": method, "tasks": 2, "requests": 4, "batch": 2,
                "mean": 6, "rounds": 1, "vectors": 8}  # fmt: skip
    method = AcceptConfig(prompt_length=PROMPT, budget_tokens=BUDGET)
    return {"models": {"T5-small": T5_SMALL, "Llama": LLAMA}, "method": method, "tasks": TASKS, "requests": REQUESTS,
            "batch": BATCH, "mean": MEAN, "rounds": ROUNDS, "vectors": BUDGET}  # fmt: skip


class Server:
    """One PEFT model with an adapter per task; requests take the adapters in turn.

    Args:
        config: of the backbone.
        size: from `plan`.
        device: of the model.
        plain: PEFT's own prompt tuning in place of our tuner.
    """

    def __init__(self, config: Any, size: Mapping[str, Any], device: str, plain: bool = False) -> None:
        self.seq2seq, self.device, self.batch = config.is_encoder_decoder, device, size["batch"]
        self.plain = plain
        kind = "SEQ_2_SEQ_LM" if self.seq2seq else "CAUSAL_LM"
        self.names = [f"task-{number}" for number in range(size["tasks"])]

        def adapter() -> Any:
            if not plain:
                return SoftPromptConfig(size["method"], kind)
            return PromptTuningConfig(task_type=kind, num_virtual_tokens=size["vectors"], num_transformer_submodules=1)

        self.model = get_peft_model(build(config, device), adapter(), self.names[0])
        for name in self.names[1:]:
            self.model.add_adapter(name, adapter())
        torch.manual_seed(3)
        for key, parameter in self.model.named_parameters():
            if "softprompt_methods" in key:  # starts near zero would make all tasks alike
                torch.nn.init.normal_(parameter, 0.0, 0.5)
        self.model.eval()
        lengths = text_lengths(size["requests"], size["mean"], 64)
        self.requests = texts(lengths, 1, config.vocab_size).sources
        self.tasks = [self.names[number % len(self.names)] for number in range(len(self.requests))]
        self.inner = self.model.get_base_model()

    def answer(self, chosen: Sequence[int], new: int, **more: Any) -> torch.Tensor:
        """Return last logits (rows, vocabulary), or `new` generated ids (rows, new), of some requests."""
        ids, mask = (x.to(self.device) for x in pad([self.requests[i] for i in chosen], PAD, left=not self.seq2seq))
        given = {"input_ids": ids, "attention_mask": mask, **more}
        if new:
            found = self.model.generate(**given, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            return found[:, -new:]
        if self.seq2seq:
            given["decoder_input_ids"] = ids.new_full((len(chosen), 1), PAD)
        else:
            given["logits_to_keep"] = 1
        return self.model(**given).logits[:, -1]

    def mixed(self, new: int) -> torch.Tensor:
        """Answer in batches by arrival, an adapter per row."""
        found = []
        for start in range(0, len(self.requests), self.batch):
            chosen = range(start, min(start + self.batch, len(self.requests)))
            found.append(self.answer(chosen, new, adapter_names=[self.tasks[i] for i in chosen]))
        return torch.cat(found)

    def switch(self, name: str) -> None:
        """Let all rows use one adapter from now on."""
        self.model.set_adapter(name, **({} if self.plain else {"inference_mode": True}))

    def row_by_row(self, new: int) -> torch.Tensor:
        """Answer each request alone."""
        found = []
        for number, name in enumerate(self.tasks):
            self.switch(name)
            found.append(self.answer([number], new))
        return torch.cat(found)

    def task_by_task(self, new: int) -> torch.Tensor:
        """Answer all requests of a task together, task after task; the result is in the order of arrival."""
        found: dict[int, torch.Tensor] = {}
        for name in self.names:
            chosen = [number for number, task in enumerate(self.tasks) if task == name]
            self.switch(name)
            for start in range(0, len(chosen), self.batch):
                part = chosen[start : start + self.batch]
                found |= dict(zip(part, self.answer(part, new), strict=True))
        return torch.stack([found[number] for number in sorted(found)])


def measure(options: Namespace) -> dict[str, Any]:
    """Compare answers, then time the three ways in turns, on every shape."""
    size = plan(options.quick)
    size["rounds"] = options.rounds or size["rounds"]
    rows: list[dict[str, Any]] = []
    checks = {}
    with torch.no_grad():
        for name, config in size["models"].items():
            server = Server(config, size, options.device)
            peft = Server(config, size, options.device, plain=True)
            checks[name] = agreement(server)
            for remembers in (False, True)[: 1 if server.seq2seq else 2]:
                with remembering(server.inner) if remembers else nullcontext():
                    rows += timed(name, server, peft, remembers, size["rounds"], options.device)
    return {"rows": rows, "checks": checks}


def agreement(server: Server) -> dict[str, float]:
    """Return how far the logits of each way are from those of single requests, and how many generated ids are equal."""
    alone, written = server.row_by_row(0), server.row_by_row(4)
    return {
        "logits": max(difference(way(0), alone) for way in (server.mixed, server.task_by_task)),
        "same_tokens": float((server.mixed(4) == written).float().mean()),
        "different_tasks": difference(server.answer([0], 0), alone[1:2]),
    }


def timed(name: str, server: Server, peft: Server, remembers: bool, rounds: int, device: str) -> list[dict[str, Any]]:
    """Return a row for ranking and one for each number of generated tokens."""
    found = []
    for new in LENGTHS:
        ways: dict[str, Callable[[int], Any]] = {
            "mixed": server.mixed, "row by row": server.row_by_row, "task by task": server.task_by_task,
            "peft": peft.row_by_row
        }  # fmt: skip
        sides = {key: lambda way=way, new=new: way(new) for key, way in ways.items()}
        seconds = interleaved(sides, rounds, device)
        found.append(
            {
                "model": name,
                "kind": f"generate {new}" if new else "rank",
                "remembering": remembers,
                "requests": len(server.requests),
                "seconds": spread(seconds["mixed"]),
                "faster_than_rows": ratio(seconds["row by row"], seconds["mixed"]),
                "faster_than_tasks": ratio(seconds["task by task"], seconds["mixed"]),
                "faster_than_peft": ratio(seconds["peft"], seconds["mixed"]),
            }
        )
    return found


def table(record: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and cells."""
    cells = [
        [
            f"{row['model']}, {row['kind']}" + (", remembering" if row["remembering"] else ""),
            figure(row["seconds"], 0, 1000 / row["requests"]),
            figure(row["faster_than_rows"]) + " x",
            figure(row["faster_than_tasks"]) + " x",
            figure(row["faster_than_peft"]) + " x",
        ]
        for row in record["rows"]
    ]
    return ("", "ms a request, mixed", "row by row takes", "task by task takes", "PEFT, row by row"), cells


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print and write; return the record."""
    return run_script("mixed_serving", __doc__, measure, table, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
