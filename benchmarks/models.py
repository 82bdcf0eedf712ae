"""Models with random weights, texts of random tokens, and the package's own training loop around them."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from common import seeded
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from softprompts.attach import attach
from softprompts.backbone import Backbone, Kind, quiet
from softprompts.config import RunSettings, TrainSettings
from softprompts.core import MethodConfig
from softprompts.data import Encoder, Rows, epoch_batches
from softprompts.loop import Progress, Run
from softprompts.member import Member

quiet()
PAD, END = 0, 1
NO_TASK: Any = None
START: dict[str, Any] = {"decoder_start_token_id": PAD}
T5_SMALL = T5Config(**START)
"""transformers' defaults are T5-small's shape, with its dropout of 0.1."""
T5_NANO = T5Config(vocab_size=8192, d_model=256, d_kv=32, d_ff=1024, num_layers=4, num_heads=8, dropout_rate=0.0,
                   **START)  # fmt: skip
LLAMA = LlamaConfig(vocab_size=8000, hidden_size=512, intermediate_size=1376, num_hidden_layers=6,
                    num_attention_heads=8, num_key_value_heads=8, pad_token_id=PAD, bos_token_id=2,
                    eos_token_id=END)  # fmt: skip
T5_BASE = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, **START)
SHAPES = {"t5-nano": T5_NANO, "t5-small": T5_SMALL, "t5-base": T5_BASE}
TINY_T5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **START)
TINY_LLAMA = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, pad_token_id=PAD, bos_token_id=2,
                         eos_token_id=END)  # fmt: skip
QUICK_METHOD = {"prompt_length": 5, "prompt_codewords": 3, "prompt_subspaces": 4, "offset_codewords": 3}
"""Sizes of ACCEPT that fit the tiny models."""


def shape_option(parser: ArgumentParser, default: str = "t5-small") -> None:
    """Add the option that says the model's shape."""
    parser.add_argument("--shape", default=default, choices=SHAPES, help=f"of the model (default {default})")


def build(config: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Return a model with random weights, the same at each call."""
    torch.manual_seed(0)
    kind: Any = T5ForConditionalGeneration if config.is_encoder_decoder else LlamaForCausalLM
    return kind(config).to(device, dtype).eval()


def text_lengths(rows: int, mean: float, longest: int) -> list[int]:
    """Return lengths drawn from a lognormal distribution (sigma 0.5), scaled to the mean, from 4 to `longest`."""
    drawn = torch.randn(rows, generator=seeded(1)).mul(0.5).exp()
    scale = mean / float(drawn.mean())
    for _ in range(20):  # what the longest lose, the others get
        lengths = drawn.mul(scale).round().clamp(4, longest)
        scale *= mean / float(lengths.mean())
    return lengths.int().tolist()


def random_ids(length: int, vocabulary: int, generator: torch.Generator) -> list[int]:
    """Return ids without special ones."""
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def texts(lengths: Sequence[int], target: int, vocabulary: int) -> Rows:
    """Return encoded examples of these lengths, with targets of `target` tokens."""
    generator = seeded(2)
    sources = [random_ids(length, vocabulary, generator) for length in lengths]
    targets = [random_ids(target, vocabulary, generator) for _ in lengths]
    return Rows([None] * len(lengths), sources, targets, [0.0] * len(lengths), 0)


def typical_batch(lengths: Sequence[int], batch: int) -> tuple[list[int], float]:
    """Return the rows of the batch of an epoch that is padded closest to the mean batch, and that mean.

    A step's time grows almost in proportion to the padded length, so this batch stands for the epoch.
    """
    batches = [each for each in epoch_batches(lengths, batch, 42, 0) if len(each) == batch]
    longest = [max(lengths[row] for row in each) for each in batches]
    mean = sum(longest) / len(longest)
    return batches[min(range(len(batches)), key=lambda i: abs(longest[i] - mean))], mean


class Fixed(Member):
    """A member of a run whose every step has the same rows."""

    chosen: list[int]

    def batch_at(self, step: int) -> list[int]:
        return self.chosen


class Loop:
    """The package's training loop on a model: `softprompts.loop.Run` with one member or several.

    Args:
        model: its weights stay as they are.
        methods: of the members, one each.
        rows: the training examples.
        chosen: the rows of every member's batch.
    """

    def __init__(
        self, model: Any, methods: Sequence[MethodConfig], rows: Rows, chosen: Sequence[Sequence[int]], device: str
    ) -> None:
        kind: Kind = "seq2seq" if model.config.is_encoder_decoder else "causal"
        tokenizer = SimpleNamespace(pad_token_id=PAD)
        self.model = model
        self.backbone = Backbone(model, tokenizer, kind, "random", model.dtype)
        self.encoder = Encoder(self.backbone, NO_TASK, 10_000, 10_000)
        names = ["default"] if len(methods) == 1 else [f"member-{number}" for number in range(len(methods))]
        self.members = []
        for name, method, own in zip(names, methods, chosen, strict=True):
            attach(model, method, name)
            settings = RunSettings(train=TrainSettings(steps=1_000_000, batch_size=len(own)))
            member = Fixed(settings, Path(), name, self.encoder, NO_TASK, {"train": rows})
            member.chosen = list(own)
            self.members.append(member)
        self.run = Run(self.members, Accelerator(cpu=device == "cpu"), Progress())

    def step(self) -> None:
        """One optimizer step of each member, as `softprompts train` takes it."""
        self.model.train()
        self.run.step(self.members)
        for member in self.members:
            member.pending.clear()

    def losses(self) -> list[torch.Tensor]:
        """Return each member's mean loss per target token, without dropout."""
        self.model.eval()
        summed = self.run.losses(self.members, [member.chosen for member in self.members])
        return [
            loss / member.weight(member.chosen)
            for loss, member in zip(summed, self.members, strict=True)
            if loss is not None
        ]
