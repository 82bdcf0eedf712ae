"""Which prompt does each row of a batch use? The one mechanism behind serving, populations and ensembles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompts.core import SoftPrompt
from softprompts.errors import UsageError, suggest

BASE = "__base__"
"""Name for rows that use no prompt (PEFT's word for it)."""


class Selection:
    """The adapters of a batch: one for all rows, or one per row (None = no prompt).

    Shorter prompts are filled up with masked zeros on the left, so that every prompt ends where its text begins.
    """

    def __init__(self, methods: Sequence[SoftPrompt | None], rows: Sequence[Sequence[int]] | None = None) -> None:
        self.methods = methods
        self.rows = rows

    @property
    def mixed(self) -> bool:
        """Whether the rows may differ."""
        return self.rows is not None

    @property
    def length(self) -> int:
        """P, the longest prompt of the batch."""
        return max(length_of(method) for method in self.methods)

    def lengths(self, like: Tensor) -> Tensor:
        """Return (B, 1): the prompt length of each row, on the device of `like` (B, ...)."""
        lengths = torch.full((like.shape[0], 1), length_of(self.methods[0]), dtype=torch.long, device=like.device)
        for method, rows in zip(self.methods, self.rows or (), strict=False):
            lengths[list(rows)] = length_of(method)
        return lengths

    @property
    def shared(self) -> bool:
        """Whether there is a prompt, and no prompt depends on its row's text."""
        return self.length > 0 and not self.per_row

    @property
    def per_row(self) -> bool:
        """Whether a prompt depends on its row's text."""
        prompts = [method.prompt for method in self.methods if method is not None and method.prompt is not None]
        return any(prompt.per_row for prompt in prompts)

    def tables(
        self, embeds: Float[Tensor, "B T D"], mask: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "A P D"], Int[Tensor, "A P"]]:
        """Return (prompts, their mask), one row per adapter: A are the adapters of the batch. For shared prompts."""
        tables = embeds.new_zeros(len(self.methods), self.length, embeds.shape[2])
        rows = []
        for method, row in zip(self.methods, tables, strict=True):
            table = row
            if method is not None and method.prompt is not None:
                own = method.prompt(embeds[:1], mask[:1]).to(embeds.dtype)
                table = nn.functional.pad(own, (0, 0, self.length - own.shape[0], 0))
            rows.append(table)
        lengths = torch.tensor([length_of(method) for method in self.methods], device=embeds.device)
        slots = torch.arange(self.length, device=embeds.device)
        return torch.stack(rows), (slots >= self.length - lengths.unsqueeze(1)).to(mask.dtype)

    def members(self, batch: int, like: Tensor) -> Int[Tensor, " B"]:
        """Return for each of `batch` rows the number of its adapter, on the device of `like`."""
        members = torch.zeros(batch, dtype=torch.long, device=like.device)
        for number, rows in enumerate(self.rows or ()):
            members[list(rows)] = number
        return members

    def extended(self, mask: Int[Tensor, "B T"]) -> Int[Tensor, "B P+T"]:
        """Put the mask of the prompts before a mask, in its own dtype."""
        if not self.length:
            return mask
        if not self.mixed:
            return torch.cat([mask.new_ones(mask.shape[0], self.length), mask], 1)
        slots = torch.arange(self.length, device=mask.device)
        return torch.cat([(slots >= self.length - self.lengths(mask)).to(mask.dtype), mask], 1)

    def __call__(
        self,
        embeds: Float[Tensor, "B T D"],
        at: Int[Tensor, "B T"] | None,
        mask: Int[Tensor, "B T"],
        prepend: bool = True,
    ) -> tuple[Float[Tensor, "B P D"] | None, Float[Tensor, "B T D"]]:
        """Return (prompts or None, embeds + offsets), each row as if it were alone; see `SoftPrompt.forward`."""
        if self.rows is None:
            method = self.methods[0]
            assert method is not None, "a batch without any prompt has no selection"
            return method(embeds, at, mask, prepend)
        width = self.length if prepend else 0
        prompts = embeds.new_zeros(embeds.shape[0], width, embeds.shape[2])
        changed = embeds
        for method, rows in zip(self.methods, self.rows, strict=True):
            if method is None:
                continue
            index = torch.tensor(rows, device=embeds.device)
            prompt, own = method(embeds[index], None if at is None else at[index], mask[index], prepend)
            changed = changed.index_copy(0, index, own)
            if prompt is not None:
                filled = nn.functional.pad(prompt, (0, 0, width - prompt.shape[1], 0))
                prompts = prompts.index_copy(0, index, filled)
        return prompts if width else None, changed


def select(
    methods: Mapping[str, SoftPrompt], names: Sequence[str], batch: int, beams: bool = False
) -> Selection | None:
    """Return the selection for `names`, one per row; None if all are base.

    With `beams`, several rows may stand for each name: the first `batch / len(names)` rows for the first, and so on.

    Raises:
        UsageError: an unknown name, or a number of names that does not divide the batch.
    """
    for name in names:
        if name != BASE and name not in methods:
            known = [*methods, BASE]
            raise UsageError(f"no adapter '{name}'{suggest(name, known)} (known: {', '.join(known)})")
    repeats, rest = divmod(batch, len(names)) if names else (0, 1)
    if rest or not repeats or (repeats > 1 and not beams):
        raise UsageError(f"{len(names)} adapter names for a batch of {batch} rows; give one name per row")
    rows: dict[str, list[int]] = {}
    for row in range(batch):
        rows.setdefault(names[row // repeats], []).append(row)
    if set(rows) == {BASE}:
        return None
    if len(rows) == 1:
        return Selection([methods[names[0]]])
    return Selection([None if name == BASE else methods[name] for name in rows], list(rows.values()))


def length_of(method: SoftPrompt | None) -> int:
    """Return the prompt length of an adapter, 0 for none."""
    return 0 if method is None else method.length
