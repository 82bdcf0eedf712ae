"""How parameters start: Kaiming (the authors' code), Gaussian (the paper), vocabulary rows, text.

Starts from a trained adapter (the intermediate-task and target-task initialisations of ACCEPT, SPoT) are
settings of every method, `prompt_from` and `offset_from`, and are carried out by `attach`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from softprompts.errors import UsageError

InitName = Literal["kaiming", "gaussian", "uniform", "vocabulary", "text"]

FREQUENT_IDS = 5000
"""Vocabulary rows are drawn from the first 5,000 ids, which SentencePiece orders by frequency."""


@dataclass(frozen=True)
class Start:
    """How one part is initialised."""

    name: InitName = "kaiming"
    std: float = 0.02
    text: str | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The backbone's embedding table and, if there is a tokenizer, how a text becomes ids."""

    embedding: Float[Tensor, "V D"]
    encode: Callable[[str], list[int]] | None = None


def uniform_(tensor: Tensor, bound: float) -> None:
    """Fill in place from U(-bound, bound)."""
    torch.nn.init.uniform_(tensor, -bound, bound)


def gaussian_(tensor: Tensor, std: float) -> None:
    """Fill in place from N(0, std^2)."""
    torch.nn.init.normal_(tensor, 0.0, std)


def vocabulary_rows(rows: int, vocabulary: Vocabulary) -> Float[Tensor, "rows D"]:
    """Return embeddings of `rows` distinct ids drawn from the most frequent ones (repeated if too few)."""
    pool = min(FREQUENT_IDS, vocabulary.embedding.shape[0])
    ids = torch.randperm(pool)
    ids = ids.repeat(-(-rows // pool))[:rows]
    return vocabulary.embedding[ids.to(vocabulary.embedding.device)].float()


def text_rows(rows: int, text: str | None, vocabulary: Vocabulary) -> Float[Tensor, "rows D"]:
    """Return the embeddings of a text's tokens, repeated or cut to `rows`.

    Raises:
        UsageError: no text, no tokenizer, or a text without tokens.
    """
    if not text:
        raise UsageError("init='text' needs a text; set init_text, for example init_text='Is this review positive?'")
    if vocabulary.encode is None:
        raise UsageError("init='text' needs the tokenizer; call attach(model, config, tokenizer=tokenizer)")
    ids = vocabulary.encode(text)
    if not ids:
        raise UsageError(f"init_text={text!r} has no tokens; use a longer text")
    ids = (ids * -(-rows // len(ids)))[:rows]
    return vocabulary.embedding[torch.tensor(ids, device=vocabulary.embedding.device)].float()


def start_rows(rows: int, start: Start, vocabulary: Vocabulary) -> Float[Tensor, "rows D"]:
    """Return the rows that a `vocabulary` or `text` start asks for."""
    return text_rows(rows, start.text, vocabulary) if start.name == "text" else vocabulary_rows(rows, vocabulary)
