"""What the matrix of calls runs on: tiny seeded models, one PEFT config, and the helpers of the checks.

`Ours` is a method of this package, `Peers` is PEFT's own prompt tuning; every check of `calls.py` takes either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import PeftConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

ROUNDING = 2e-5
"""fp32 sums in another order; the logits are of order 1 to 10."""
ROWS, LENGTH = 3, 7
START = (tiny.PAD, 5, 9)
"""Beginning of every T5 decoder."""
MODELS = {"t5": "t5", "llama": "llama", "bert": "bert-sequence"}
"""The model that stands for each architecture; some rows ask for another head with `Case.on`."""
TASKS = {
    "t5": "SEQ_2_SEQ_LM",
    "llama": "CAUSAL_LM",
    "llama-sequence": "SEQ_CLS",
    "bert-sequence": "SEQ_CLS",
    "bert-token": "TOKEN_CLS",
    "bert-span": "QUESTION_ANS",
}
WRITERS = ("t5", "llama")
EVERY = ("t5", "llama", "bert")
PLAN: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}


@dataclass(frozen=True)
class Case(ABC):
    """One method on one tiny model."""

    model: str
    """Key of `tiny.MODELS`."""

    @property
    def arch(self) -> str:
        """t5, llama or bert."""
        return self.model.partition("-")[0]

    @property
    def task(self) -> str:
        """PEFT's task type of the model."""
        return TASKS[self.model]

    def on(self, model: str) -> Any:
        """Return the same case on another model."""
        return replace(self, model=model)

    @abstractmethod
    def config(self, second: bool = False, **more: Any) -> PeftConfig:
        """Return a fresh config; `second` has another prompt length and, where there is one, another method."""

    @abstractmethod
    def parts(self, network: Any, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Return (prompt (1, P, D), embeds + offset (1, T, D)) of the active adapter for one unpadded row."""

    @abstractmethod
    def pooled_at(self, length: int) -> int:
        """Return the position behind a prompt of `length` that a pooler reads: a choice of design, not a defect."""

    def base(self) -> Any:
        """Return the model without a prompt, in evaluation mode; always with the same weights."""
        with seeded(5):
            return tiny.build(self.model)

    def peft(self, model: Any = None, seed: int = 3, **more: Any) -> Any:
        """Return `get_peft_model(model)` in evaluation mode, the new parameters scattered after a fixed seed."""
        model = self.base() if model is None else model
        return scattered(model, lambda: get_peft_model(model, self.config(**more)).eval(), seed)

    def two(self) -> Any:
        """Return a model with the adapters `default` (active) and `other`."""
        network = self.peft()
        scattered(network, lambda: network.add_adapter("other", self.config(second=True)), seed=4)
        return network.eval()


@dataclass(frozen=True)
class Ours(Case):
    """A method of this package."""

    method: str
    start: Path | None = None
    """A saved prompt, for the methods that need one."""

    def config(self, second: bool = False, **more: Any) -> PeftConfig:
        from softprompts.peft import SoftPromptConfig

        more.setdefault("task_type", self.task)
        if second:
            name = "adept" if self.method == "accept" else "accept"
            return SoftPromptConfig(tiny.config_of(name, prompt_length=3), **more)
        started = {"prompt_from": str(self.start)} if self.start is not None else {}
        return SoftPromptConfig(tiny.config_of(self.method, **started), **more)

    def parts(self, network: Any, embeds: Tensor) -> tuple[Tensor, Tensor]:
        method = inner(network).prompt_adapter.method()
        prompt, text = method(embeds, None, torch.ones(embeds.shape[:2], dtype=torch.long))
        return embeds[:, :0] if prompt is None else prompt, text

    def pooled_at(self, length: int) -> int:
        return length


@dataclass(frozen=True)
class Peers(Case):
    """PEFT's own prompt tuning, with its defaults."""

    def config(self, second: bool = False, **more: Any) -> PeftConfig:
        more.setdefault("task_type", self.task)
        if more.pop("modules_to_save", None):
            raise TypeError("PromptTuningConfig has no modules_to_save")
        return PromptTuningConfig(num_virtual_tokens=3 if second else 5, **more)

    def parts(self, network: Any, embeds: Tensor) -> tuple[Tensor, Tensor]:
        length = network.peft_config[network.active_adapter].num_virtual_tokens
        # T5: the table has a second half, meant for the decoder, which PEFT does not use.
        return network.get_prompt(batch_size=1)[:, :length].to(embeds.dtype), embeds

    def pooled_at(self, length: int) -> int:
        return 0


class seeded(torch.random.fork_rng):
    """Draw the same numbers inside the block, and leave the generator outside as it was."""

    def __new__(cls, seed: int) -> Any:
        raise TypeError


def seeded(seed: int) -> Any:  # noqa: F811
    raise TypeError
