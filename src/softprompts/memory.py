"""In a causal model the keys and values of a prompt do not depend on the text behind it: compute them once.

A batch of B texts costs P + B*T tokens instead of B*(P + T), forward and backward: the rows attend to expanded views of
one prompt, and the gradients of all rows meet in it.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softprompts.core import SoftPrompt
from softprompts.errors import UsageError
from softprompts.masks import has_gaps, packing, positions, sorted_by
from softprompts.rows import Selection

PACKED = "softprompts_packed"
"""Attribute of a cache: how many of its slots are not in the order of the mask."""
States = list[tuple[Tensor, Tensor]]
"""(keys, values) of each layer, each (A, heads, P, D/heads) for A adapters."""


_lock = threading.Lock()
"""Not the memory's own: models are copied and pickled."""


class PromptMemory:
    """Keys and values of prompts; `kept` outlives the batch while the adapters and the backbone do not change."""

    def __init__(self, start: int = 0) -> None:
        self._start = start
        """The number of the first position."""
        self._kept: dict[Hashable, States] = {}
        self._inside = 0

    @property
    def kept(self) -> dict[Hashable, States] | None:
        """What is remembered, by adapter; None where nothing may be: outside `keeping`, and for gradients."""
        return self._kept if self._inside and not torch.is_grad_enabled() else None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Remember inside the `with` block; threads may come and go in any order, the last one out forgets."""
        with _lock:
            self._inside += 1
        try:
            yield
        finally:
            with _lock:
                self._inside -= 1
                if not self._inside:
                    self._kept = {}  # a new one: a call in progress keeps its own

    def cache(self, body: nn.Module, selection: Selection, embeds: Tensor, mask: Tensor, batch: int) -> Any:
        """Return a fresh cache of `batch` rows that holds their prompts, P slots each.

        Args:
            body: the transformer below the head, unhooked calls of which are `body.forward`.
            selection: with shared prompts.
            embeds: (B, T, D) of the batch, for width, dtype and device.
            mask: (B, T) of the batch.
            batch: rows of the cache; rows beyond B repeat each row (beams).
        """
        kept = self.kept
        if kept is None:
            layers = prompt_states(body, selection, embeds, mask, self._start)
        else:
            layers = stacked([self._remembered(kept, body, method, embeds, mask) for method in selection.methods])
        cache = new_cache(body)
        members = None if len(selection.methods) == 1 else selection.members(len(embeds), embeds)
        if members is not None:
            members = members.repeat_interleave(batch // len(embeds))
        for number, states in enumerate(layers):
            if members is None:
                rows = [state.expand(batch, *state.shape[1:]) for state in states]
            else:
                rows = [state.index_select(0, members) for state in states]
            cache.update(*rows, number)
        return cache

    def _remembered(
        self, kept: dict[Hashable, States], body: nn.Module, method: SoftPrompt | None, embeds: Tensor, mask: Tensor
    ) -> States | None:
        """Return the states of one adapter, None if it prepends nothing."""
        if method is None or not method.length:
            return None
        key = (id(method), embeds.dtype, embeds.device)
        if key not in kept:
            kept[key] = prompt_states(body, Selection([method]), embeds, mask, self._start)
        return kept[key]


def prompt_states(body: nn.Module, selection: Selection, embeds: Tensor, mask: Tensor, start: int) -> States:
    """Run the body on the prompts of a batch's A adapters, from position `start` on, and return the states."""
    tables, own = selection.tables(embeds, mask)
    cache = new_cache(body)
    body.forward(
        inputs_embeds=tables,
        attention_mask=own if selection.mixed else None,
        position_ids=positions(own) + start,
        past_key_values=cache,
        use_cache=True,
    )
    return [(layer.keys, layer.values) for layer in cache.layers]


def stacked(prompts: Sequence[States | None]) -> States:
    """Put the states of several adapters (A = 1 each) beside each other, shorter ones filled up on the left."""
    if len(prompts) == 1 and prompts[0] is not None:
        return prompts[0]
    longest = max((states for states in prompts if states is not None), key=lambda states: states[0][0].shape[2])
    # What has no prompt gets any states: its slots are masked.
    full = [longest if states is None else states for states in prompts]
    return [
        tuple(torch.cat([filled(states[layer][i], like) for states in full]) for i, like in enumerate(pair))  # type: ignore[misc]
        for layer, pair in enumerate(longest)
    ]


def filled(states: Tensor, like: Tensor) -> Tensor:
    """Return (1, heads, p, D/heads) states with zeros on the left up to the length of `like`."""
    return nn.functional.pad(states, (0, 0, like.shape[2] - states.shape[2], 0))


def slot_order(mask: Tensor, cache: Any, window: int, crosses: bool) -> Tensor | None:
    """Return the order in which a decoder with an attention window takes its slots, None for that of the mask.

    Args:
        mask: (B, P+T) of prompt and text, those in the cache included.
        cache: what has been computed before, or is to be filled, or None.
        window: slots that the narrowest layer looks at.
        crosses: whether the rows are, or will be, longer than that.

    Raises:
        UsageError: the cache holds padding inside the rows, which the window would count.
    """
    past = 0 if cache is None else cache.get_seq_length()
    if past == 0:
        packed = mask.shape[1] if crosses else 0
        note_packed(cache, packed)
    else:
        packed = getattr(cache, PACKED, 0)
    order = packing(mask, packed) if packed else None
    if past and crosses and has_gaps(mask if order is None else sorted_by(order, mask)):
        raise UsageError(
            f"a prompt cannot be used with padding inside a cache of {int(past)} slots beyond the attention window of "
            f"{window}; pass the whole texts without past_key_values"
        )
    return order


def note_packed(cache: Any, slots: int) -> None:
    """Note on a cache, if there is one, that its first slots are `[padding; prompt; text]`; copies keep the note."""
    if cache is not None:
        setattr(cache, PACKED, slots)


def new_cache(body: Any) -> Any:
    """Return an empty cache of the kind the model itself would make."""
    from transformers import DynamicCache

    return DynamicCache(config=body.config)


def can_share(body: nn.Module, accepted: set[str], selection: Selection, batch: int, remembers: bool) -> bool:
    """Whether a batch of that size gains from prompts computed beforehand, and the model can do it.

    A single row gains nothing, unless the prompt is remembered.
    """
    # Some set the flag on a module below.
    recomputes = body.training and any(getattr(module, "gradient_checkpointing", False) for module in body.modules())
    gains = batch > 1 or remembers
    return gains and selection.shared and not recomputes and {"past_key_values", "position_ids"} <= accepted
