"""ADePT: a short prompt and an offset computed from each token by a small network (arXiv 2501.03291).

The offset depends on the token, not on where it stands: a two-layer network reads the token's embedding.

    input = [ prompt (P, D) ; embeds + relu(embeds @ down + down_bias) @ up + up_bias ]

**Cost.** P*D + 2*D*R + R + D scalars; 4*B*T*D*R more operations, small beside one layer.

**Relations.** DePT's offset with the token in place of the position, so any text length goes, and the offset
can be folded into the embedding table. Combine its offset with a codebook prompt as `accept+adept`.

**Differs.** The dropout that the authors' code applies silently is a setting. The offset applies to generated
tokens of decoder-only models too, in training and decoding alike (test_engine: `test_generation_*`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from softprompts.core import Offset, Part, left_for_offset
from softprompts.errors import UsageError
from softprompts.init import Start, Vocabulary, uniform_
from softprompts.methods.prompt_tuning import FreePromptSettings
from softprompts.registry import register


class TokenOffset(Offset):
    """A two-layer network of width R on every token's embedding."""

    def __init__(self, width: int, rank: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Parameter(torch.empty(width, rank))
        self.down_bias = nn.Parameter(torch.empty(rank))
        self.up = nn.Parameter(torch.empty(rank, width))
        self.up_bias = nn.Parameter(torch.empty(width))

    @staticmethod
    def count(width: int, rank: int) -> int:  # type: ignore[override]
        """Return 2*D*R + R + D."""
        return 2 * width * rank + rank + width

    def initialise(self, start: Start, vocabulary: Vocabulary) -> None:
        """Start at exactly zero: `down` uniform +-1/sqrt(R), all else zero."""
        uniform_(self.down, self.down.shape[1] ** -0.5)
        for rest in (self.down_bias, self.up, self.up_bias):
            rest.zero_()

    def forward(self, embeds: Float[Tensor, "B T D"], at: Int[Tensor, "B T"] | None) -> Float[Tensor, "B T D"]:
        inner = self.dropout(embeds.to(self.down.dtype) @ self.down + self.down_bias)
        return inner.relu() @ self.up + self.up_bias


@register
class ADePTConfig(FreePromptSettings):
    """Settings of ADePT. With D=768 the defaults give 46,080 + 29,971 = 76,051."""

    name: ClassVar[str] = "adept"

    prompt_length: int = Field(60, ge=0)
    """P; 0 leaves the prompt out."""
    rank: int | None = Field(None, ge=1)
    """R, the width of the network's inner layer. None = the most that the budget leaves beside the prompt."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout before the activation, in training (0.1 in the authors' code)."""
    budget_tokens: int = Field(100, ge=1)
    """The budget, counted in free vectors of the model width."""

    def resolved(self, width: int) -> ADePTConfig:
        if self.rank is not None:
            return self
        tokens = left_for_offset(self.budget_tokens, self.prompt_length)
        rank = (tokens - 1) * width // (2 * width + 1)
        if rank < 1:
            raise UsageError(
                f"rank: a budget of {tokens} x {width} = {tokens * width} numbers is too small for rank 1, which "
                f"takes {TokenOffset.count(width, 1)}; raise budget_tokens or lower prompt_length"
            )
        return self.updated(rank=rank)

    def prompt_part(self, width: int) -> Part | None:
        return self.free_prompt(self.prompt_length, width)

    def offset_part(self, width: int) -> Part | None:
        sizes: dict[str, Any] = {"width": width, "rank": self.resolved(width).rank}
        return Part(TokenOffset, sizes, {"dropout": self.dropout}, Start())
