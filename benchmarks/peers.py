"""The peers: the reference code's way of training, written from its description, and PEFT's own prompt tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn

from softprompts.attach import adapters_of
from softprompts.data import IGNORED, Rows, pad
from softprompts.member import EPSILON

SOURCE, TARGET = 256, 20
"""The reference pads every text and every target to these lengths."""
RATES = {"prompt": 0.3, "offset": 5e-3}
CLIP = 1.0


class ReferenceCodebook(nn.Module):
    """Vectors as weighted sums of codewords, by way of the whole (n, K, C, S) product."""

    def __init__(self, weights: Tensor, codebooks: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.detach().clone())
        self.codebooks = nn.Parameter(codebooks.detach().clone())

    def forward(self) -> Tensor:
        """Return all (n, D) vectors."""
        return (self.weights.unsqueeze(-1) * self.codebooks.unsqueeze(0)).sum(2).flatten(1)


class Reference:
    """ACCEPT as its authors' code trains it: everything padded to full length, vectors repeated for each row.

    Args:
        model: a T5 of its own.
        like: a model with ACCEPT attached, for the same start.
        source: length of every padded text; the rows of the offset's table.
        target: length of every padded target.
    """

    def __init__(self, model: Any, like: Any, source: int = SOURCE, target: int = TARGET) -> None:
        self.model, self.source, self.target = model.requires_grad_(False), source, target
        method: Any = adapters_of(like).method()
        self.prompt, self.offset = (
            ReferenceCodebook(part.codebook.weights, part.codebook.codebooks).to(model.device)
            for part in (method.prompt, method.offset)
        )
        groups: list[dict[str, Any]] = [
            {"params": list(getattr(self, name).parameters()), "lr": rate} for name, rate in RATES.items()
        ]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = adamw(groups, model.device)

    def loss(self, rows: Rows) -> Tensor:
        """Return the mean loss per target token of a batch."""
        device = self.model.device
        ids, mask = (x.to(device) for x in pad(rows.sources, 0, least=self.source))
        labels = pad(rows.targets, IGNORED, least=self.target)[0].to(device)
        embeds = self.model.get_input_embeddings()(ids)
        embeds += self.offset().to(embeds.dtype).repeat(len(rows), 1, 1)
        prompt = self.prompt().to(embeds.dtype).repeat(len(rows), 1, 1)
        mask = torch.cat([mask.new_ones(prompt.shape[:2]), mask], 1)
        return self.model(inputs_embeds=torch.cat([prompt, embeds], 1), attention_mask=mask, labels=labels).loss

    def step(self, rows: Rows) -> None:
        """One optimizer step."""
        self.model.train()
        self.loss(rows).backward()
        update(self.parameters, self.optimizer)


class Peft:
    """PEFT's own PROMPT_TUNING, with batches padded as ours are.

    Args:
        model: a T5 or a decoder-only model of its own.
        vectors: P.
    """

    def __init__(self, model: Any, vectors: int) -> None:
        self.seq2seq = bool(model.config.is_encoder_decoder)
        kind = TaskType.SEQ_2_SEQ_LM if self.seq2seq else TaskType.CAUSAL_LM
        config = PromptTuningConfig(task_type=kind, num_virtual_tokens=vectors, num_transformer_submodules=1)
        self.model = get_peft_model(model, config)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = adamw([{"params": self.parameters, "lr": RATES["prompt"]}], self.table.device)

    @property
    def table(self) -> nn.Parameter:
        """The (P, D) vectors."""
        encoder: Any = self.model.prompt_encoder["default"]
        return encoder.embedding.weight

    def loss(self, rows: Rows) -> Tensor:
        """Return the mean loss per target token of a batch."""
        device = self.table.device
        if self.seq2seq:
            ids, mask = (x.to(device) for x in pad(rows.sources, 0))
            labels = pad(rows.targets, IGNORED)[0].to(device)
        else:
            both = list(zip(rows.sources, rows.targets, strict=True))
            ids, mask = (x.to(device) for x in pad([source + target for source, target in both], 0))
            labels = pad([[IGNORED] * len(source) + target for source, target in both], IGNORED)[0].to(device)
        return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def step(self, rows: Rows) -> None:
        """One optimizer step."""
        self.model.train()
        self.loss(rows).backward()
        update(self.parameters, self.optimizer)


def adamw(groups: list[dict[str, Any]], device: torch.device) -> torch.optim.AdamW:
    """Return the optimizer that ours is too: one kernel on CUDA."""
    return torch.optim.AdamW(groups, eps=EPSILON, weight_decay=0.0, fused=True if device.type == "cuda" else None)


def update(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Clip, step, forget the gradients; as `softprompts.member.Member.update` does."""
    torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
