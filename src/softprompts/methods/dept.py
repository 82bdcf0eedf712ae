"""DePT: a short prompt and a low-rank offset by position (arXiv 2309.05173).

The budget of a long prompt is split: a shorter one, and a table of T offsets written as a low-rank product.

    input = [ prompt (P, D) ; embeds + scale * left (T, R) @ right (R, D) ]        scale = alpha / sqrt(R)

**Cost.** P*D + R*(T+D) scalars; fewer prepended tokens than prompt tuning, so faster.

**Relations.** ACCEPT replaces both halves by codebooks; `accept+dept` is the paper's SCPP with this offset.
ADePT makes the offset depend on the token instead of the position. Two learning rates: about 0.3 for the
prompt, 1e-4 to 5e-3 for the offset.

**Differs.** Positions count text tokens, not slots, so left padding changes nothing; only the rows in use are
computed (test_engine: `test_padding_does_not_matter`). Weight decay, inert in the authors' code, is 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from softprompts.core import Part, PositionOffset, left_for_offset
from softprompts.errors import UsageError
from softprompts.init import Start, Vocabulary, uniform_
from softprompts.methods.prompt_tuning import FreePromptSettings
from softprompts.registry import register


class LowRankOffset(PositionOffset):
    """A (T, D) table as the product of (T, R) and (R, D)."""

    def __init__(self, positions: int, width: int, rank: int, alpha: float = 8.0) -> None:
        super().__init__()
        self.positions = positions
        self.scale = alpha / rank**0.5
        self.left = nn.Parameter(torch.empty(positions, rank))
        self.right = nn.Parameter(torch.empty(rank, width))

    @staticmethod
    def count(positions: int, width: int, rank: int) -> int:  # type: ignore[override]
        """Return R*(T+D)."""
        return rank * (positions + width)

    def initialise(self, start: Start, vocabulary: Vocabulary) -> None:
        """Start at exactly zero: `left` uniform +-1/sqrt(R), `right` zero."""
        uniform_(self.left, self.left.shape[1] ** -0.5)
        self.right.zero_()

    def table(self, rows: slice | Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        return self.scale * (self.left[rows] @ self.right)


@register
class DePTConfig(FreePromptSettings):
    """Settings of DePT. With D=768 the defaults give 46,080 + 30,720 = 76,800."""

    name: ClassVar[str] = "dept"

    prompt_length: int = Field(60, ge=0)
    """P; 0 leaves the prompt out."""
    offset_positions: int = Field(256, ge=0)
    """T, the longest text that the offset reaches; 0 leaves the offset out."""
    rank: int | None = Field(None, ge=1)
    """R. None = the most that the budget leaves beside the prompt."""
    alpha: float = Field(8.0, gt=0)
    """The offset is scaled by alpha / sqrt(rank)."""
    budget_tokens: int = Field(100, ge=1)
    """The budget, counted in free vectors of the model width."""

    def resolved(self, width: int) -> DePTConfig:
        if self.rank is not None or self.offset_positions == 0:
            return self
        tokens = left_for_offset(self.budget_tokens, self.prompt_length)
        rank = tokens * width // (self.offset_positions + width)
        if rank < 1:
            raise UsageError(
                f"rank: a budget of {tokens} x {width} = {tokens * width} numbers is too small for rank 1, which "
                f"takes {self.offset_positions + width}; raise budget_tokens or lower offset_positions"
            )
        return self.updated(rank=rank)

    def prompt_part(self, width: int) -> Part | None:
        return self.free_prompt(self.prompt_length, width)

    def offset_part(self, width: int) -> Part | None:
        if self.offset_positions == 0:
            return None
        sizes: dict[str, Any] = {"positions": self.offset_positions, "width": width, "rank": self.resolved(width).rank}
        return Part(LowRankOffset, sizes, {"alpha": self.alpha}, Start())
