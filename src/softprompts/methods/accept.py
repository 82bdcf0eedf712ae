"""ACCEPT: prompt and offset as soft combinations of shared codewords (arXiv 2410.12847).

Both halves of a decomposed prompt are written with product-quantisation codebooks whose codewords and weights
are learned: the prompt before the input (the paper's SCPP) and the offset by position (its SCAP).

    prompt[i, k] = sum_c weights[i, k, c] * codebooks[k, c]          i < P, K subspaces, C codewords
    offset[t, k] = sum_c weights'[t, k, c] * codebooks'[k, c]        t < T, K' subspaces, C' codewords
    input        = [ prompt ; embeds + offset ]

**Cost.** C*(D + P*K) + C'*(D + T*K') scalars; one einsum per codebook and step.

**Relations.** K=1 is a low-rank prompt, so DePT's offset is SCAP with one subspace and a fixed scale. Either
part alone is the ablation (`prompt_length=0`, `offset_positions=0`); with the other half as in the paper's
Table 6 they are `accept+dept` (SCPP, low rank) and `prompt_tuning+accept` (free prompt, SCAP). Try ACCEPT
with its defaults first; the learning rates matter more than the sizes.

**Differs.** The codebook sizes follow from the budget (test_budget: all 18 rows of Table 12); K = D/32, since
the paper's K=24 divides only some widths. Positions count text tokens, not slots. One einsum composes only the
rows in use, where the authors' code materialises C' times as much (test_codebook). The paper initialises with a
Gaussian of unstated width, the code with Kaiming bounds: both are offered, Kaiming is the default.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from softprompts.codebook import Codebook, Weighting, check_subspaces, default_subspaces, most_codewords
from softprompts.core import MethodConfig, Part, PositionOffset, Prompt, left_for_offset
from softprompts.init import InitName, Start, Vocabulary
from softprompts.registry import register

OFFSET_GAIN = 6**0.5
"""The authors' code draws SCAP's codewords from a bound sqrt(6) wider than SCPP's."""


class CodebookPrompt(Prompt):
    """P vectors composed from a codebook; the paper's SCPP."""

    def __init__(self, length: int, width: int, subspaces: int, codewords: int, **weighting: Any) -> None:
        super().__init__()
        self.length = length
        self.codebook = Codebook(length, width, subspaces, codewords, **weighting)

    @staticmethod
    def count(length: int, width: int, subspaces: int, codewords: int) -> int:  # type: ignore[override]
        """Return C*(D + P*K)."""
        return Codebook.count(length, width, subspaces, codewords)

    def initialise(self, start: Start, vocabulary: Vocabulary) -> None:
        self.codebook.initialise(start, vocabulary)

    def forward(self, embeds: Float[Tensor, "B T D"], mask: Int[Tensor, "B T"]) -> Float[Tensor, "P D"]:
        return self.codebook()


class CodebookOffset(PositionOffset):
    """One offset per position, composed from a codebook; the paper's SCAP."""

    def __init__(self, positions: int, width: int, subspaces: int, codewords: int, **weighting: Any) -> None:
        super().__init__()
        self.positions = positions
        self.codebook = Codebook(positions, width, subspaces, codewords, gain=OFFSET_GAIN, **weighting)

    @staticmethod
    def count(positions: int, width: int, subspaces: int, codewords: int) -> int:  # type: ignore[override]
        """Return C'*(D + T*K')."""
        return Codebook.count(positions, width, subspaces, codewords)

    def initialise(self, start: Start, vocabulary: Vocabulary) -> None:
        self.codebook.initialise(start, vocabulary)

    def table(self, rows: int) -> Float[Tensor, "rows D"]:
        return self.codebook(rows)


@register
class AcceptConfig(MethodConfig):
    """Settings of ACCEPT. With D=768 the defaults give 44,160 + 30,720 = 74,880."""

    name: ClassVar[str] = "accept"

    prompt_length: int = Field(60, ge=0)
    """P, the vectors of SCPP; 0 leaves SCPP out."""
    prompt_subspaces: int | None = Field(None, ge=1)
    """K. None = the model width / 32, or the nearest number that divides the width."""
    prompt_codewords: int | None = Field(None, ge=1)
    """C. None = the most that fit the prompt's share of the budget (all of it if there is no offset)."""
    offset_positions: int = Field(256, ge=0)
    """T, the longest text that SCAP reaches; 0 leaves SCAP out."""
    offset_subspaces: int = Field(2, ge=1)
    """K' of SCAP."""
    offset_codewords: int | None = Field(None, ge=1)
    """C' of SCAP. None = the most that fit what the prompt leaves of the budget."""
    budget_tokens: int = Field(100, ge=1)
    """The budget, counted in free vectors of the model width: prompt_length for SCPP, the rest for SCAP."""
    weighting: Weighting = "linear"
    """How codewords are combined: linear (the paper), softmax, topk (sparse), hard (one, straight-through)."""
    top_k: int = Field(4, ge=1)
    """Codewords kept per subspace by weighting="topk"."""
    init: Literal["kaiming", "gaussian", "vocabulary", "text"] = "kaiming"
    """Start: the authors' code, the paper's Gaussian, or (SCPP) the best fit to vocabulary rows or a text."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of init="gaussian"; the paper does not state its own."""
    init_text: str | None = None
    """Text of init="text", repeated or cut to the prompt's length."""

    def resolved(self, width: int) -> AcceptConfig:
        sizes: dict[str, int] = {}
        if self.prompt_length:
            subspaces = self.prompt_subspaces or default_subspaces(width)
            check_subspaces(width, subspaces, "prompt_subspaces")
            share = self.prompt_length if self.offset_positions else self.budget_tokens
            sizes["prompt_subspaces"] = subspaces
            sizes["prompt_codewords"] = self.prompt_codewords or most_codewords(
                share, width, self.prompt_length, subspaces, "prompt_codewords"
            )
        if self.offset_positions:
            check_subspaces(width, self.offset_subspaces, "offset_subspaces")
            sizes["offset_codewords"] = self.offset_codewords or most_codewords(
                left_for_offset(self.budget_tokens, self.prompt_length),
                width,
                self.offset_positions,
                self.offset_subspaces,
                "offset_codewords",
            )
        return self.updated(**sizes)

    def prompt_part(self, width: int) -> Part | None:
        if self.prompt_length == 0:
            return None
        sized = self.resolved(width)
        sizes: dict[str, Any] = {
            "length": self.prompt_length,
            "width": width,
            "subspaces": sized.prompt_subspaces,
            "codewords": sized.prompt_codewords,
        }
        return Part(CodebookPrompt, sizes, self._weighting(), Start(self.init, self.init_std, self.init_text))

    def offset_part(self, width: int) -> Part | None:
        if self.offset_positions == 0:
            return None
        sizes: dict[str, Any] = {
            "positions": self.offset_positions,
            "width": width,
            "subspaces": self.offset_subspaces,
            "codewords": self.resolved(width).offset_codewords,
        }
        # Vocabulary rows and texts are starts of a prompt; an offset starts near zero.
        name: InitName = "gaussian" if self.init == "gaussian" else "kaiming"
        return Part(CodebookOffset, sizes, self._weighting(), Start(name, self.init_std))

    def _weighting(self) -> dict[str, Any]:
        return {"weighting": self.weighting, "top_k": self.top_k}
