"""Masks, positions and orders of texts in a batch, some of them behind a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softprompts.rows import Selection


def asked(mask: Tensor, answer: Tensor | None) -> Tensor:
    """Return the mask (B, T) of a text without the answer (B, L) at its end."""
    return mask if answer is None else mask * ~nn.functional.pad(answer, (mask.shape[1] - answer.shape[1], 0))


def positions(mask: Tensor) -> Tensor:
    """Return (B, T) positions counted over real tokens, 0 for padding before the text."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def text_positions(
    selection: Selection, embeds: Tensor, mask: Tensor | None, position_ids: Tensor | None, past: int
) -> Tensor:
    """Return (B, new): where in its text each token of a generation's later step stands, the prompt not counted."""
    new = embeds.shape[1]
    if position_ids is not None:
        at = position_ids.expand(embeds.shape[0], -1)
    elif mask is not None and mask.dim() == 2:
        at = positions(mask)[:, -new:]
    else:
        at = (past + torch.arange(new, device=embeds.device)).expand(embeds.shape[0], -1)
    return (at - selection.lengths(embeds)).clamp(min=0)


def sorted_by(order: Tensor, values: Any) -> Any:
    """Return (B, T) or (B, T, D) values in another order (B, T) of their slots; None stays None."""
    if values is None:
        return None
    return values.gather(1, order if values.dim() == 2 else order.unsqueeze(-1).expand_as(values))


def packing(mask: Tensor, slots: int) -> Tensor:
    """Return the order (B, T) that puts the padding before the rest in the first `slots` slots of each row."""
    behind = torch.arange(mask.shape[1], device=mask.device) >= slots
    return ((mask != 0) | behind).int().argsort(dim=1, stable=True)


def has_gaps(mask: Tensor) -> bool:
    """Whether a row of the mask (B, T) has padding between its tokens."""
    real = (mask != 0).int()
    before, behind = real.cumsum(1), real.flip(1).cumsum(1).flip(1)
    return bool(((real == 0) & (before > 0) & (behind > 0)).any())


def extended_types(types: Tensor | None, length: int) -> Tensor | None:
    """Put the prompt's token types, 0, before those (B, T) of the text; None stays None."""
    return None if types is None else torch.cat([types.new_zeros(len(types), length), types], 1)


def ones_for(embeds: Tensor, length: int | None = None) -> Tensor:
    """Return the (B, T) mask of an input without padding."""
    return torch.ones(embeds.shape[0], length or embeds.shape[1], dtype=torch.long, device=embeds.device)


def restarts(position_ids: Tensor | None) -> bool:
    """Whether explicit positions go back somewhere, as in packed sequences."""
    return position_ids is not None and bool((position_ids[:, 1:] < position_ids[:, :-1]).any())
