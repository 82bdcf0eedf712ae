"""What `generate` was asked for, and what it gives back, in tokens of the text: the prompt does not count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompts.errors import UsageError
from softprompts.masks import ones_for


def option(model: Any, kwargs: dict, name: str) -> Any:
    """Return an option of `generate`, where it was said last: in the call, its generation config, or the model's."""
    for place in (kwargs, vars(kwargs.get("generation_config") or object), vars(model.generation_config)):
        if place.get(name) is not None:
            return place[name]
    return None


def count_text(model: Any, kwargs: dict, text: int) -> None:
    """Write lengths that count the text (T = `text` tokens) as numbers of new tokens, in place."""
    for length, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        wanted = option(model, kwargs, length)
        if option(model, kwargs, new) is None and wanted:
            kwargs[new] = max(wanted - text, 0)
            if new == "max_new_tokens" and wanted <= text:
                raise UsageError(f"max_length={wanted} leaves nothing to generate after {text} tokens; raise it")
            kwargs.pop(length, None)


def default_mask(model: Any, kwargs: dict, ids: Tensor | None, embeds: Tensor) -> Tensor:
    """Return the mask that `generate` itself assumes: pads are not text, unless they also end texts."""
    pad, eos = (option(model, kwargs, f"{name}_token_id") for name in ("pad", "eos"))
    ends = eos if isinstance(eos, list | tuple) else [eos]
    if ids is None or ids.shape[1] != embeds.shape[1] or pad is None or pad in ends or not (ids == pad).any():
        return ones_for(embeds)
    return (ids != pad).long()


def with_text(out: Any, ids: Tensor) -> Any:
    """Put the text before generated tokens, as `generate` does when it is given ids."""
    sequences = out if isinstance(out, Tensor) else out.sequences
    whole = torch.cat([ids.repeat_interleave(len(sequences) // len(ids), 0), sequences], 1)
    if isinstance(out, Tensor):
        return whole
    out.sequences = whole
    return out
