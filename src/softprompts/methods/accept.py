"""ACCEPT: prompt and offset as soft combinations of shared codewords (arXiv 2410.12847).

Both halves of a decomposed prompt are written with product-quantisation codebooks whose codewords and weights
are learned: the prompt before the input (the paper's SCPP) and the offset by position (its SCAP).

    prompt[i, k] = sum_c weights[i, k, c] * codebooks[k, c]          i < P, K subspaces, C codewords
    offset[t, k] = sum_c weights'[t, k, c] * codebooks'[k, c]        t < T, K' subspaces, C' codewords
    input        = [ prompt ; embeds + offset ]

**Cost.** C*(D + P*K) + C'*(D + T*K') scalars; one einsum per codebook and step. With codebooks frozen at another
adapter's (`freeze_codebooks`) the weights alone: C*P*K + C'*T*K'.

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

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from softprompts.codebook import Codebook, check_subspaces, default_subspaces, most_codewords
from softprompts.core import MethodConfig, Part, PositionOffset, Prompt, Saved, SoftPrompt, left_for_offset
from softprompts.errors import UsageError
from softprompts.init import InitName, Start, Vocabulary
from softprompts.registry import register
from softprompts.weighting import find_weighting

OFFSET_GAIN = 6**0.5
"""The authors' code draws SCAP's codewords from a bound sqrt(6) wider than SCPP's."""


class CodebookPrompt(Prompt):
    """P vectors composed from a codebook; the paper's SCPP."""

    def __init__(self, length: int, width: int, subspaces: int, codewords: int, **more: Any) -> None:
        super().__init__()
        self.length = length
        self.codebook = Codebook(length, width, subspaces, codewords, **more)

    @staticmethod
    def count(  # type: ignore[override]
        length: int, width: int, subspaces: int, codewords: int, frozen: bool = False
    ) -> int:
        """Return C*(D + P*K), or P*K*C with frozen codewords."""
        return Codebook.count(length, width, subspaces, codewords, frozen)

    def initialise(self, start: Start, vocabulary: Vocabulary) -> None:
        self.codebook.initialise(start, vocabulary)

    def forward(self, embeds: Float[Tensor, "B T D"], mask: Int[Tensor, "B T"]) -> Float[Tensor, "P D"]:
        return self.codebook()


class CodebookOffset(PositionOffset):
    """One offset per position, composed from a codebook; the paper's SCAP."""

    def __init__(self, positions: int, width: int, subspaces: int, codewords: int, **more: Any) -> None:
        super().__init__()
        self.positions = positions
        self.codebook = Codebook(positions, width, subspaces, codewords, gain=OFFSET_GAIN, **more)

    @staticmethod
    def count(  # type: ignore[override]
        positions: int, width: int, subspaces: int, codewords: int, frozen: bool = False
    ) -> int:
        """Return C'*(D + T*K'), or T*K'*C' with frozen codewords."""
        return Codebook.count(positions, width, subspaces, codewords, frozen)

    def initialise(self, start: Start, vocabulary: Vocabulary) -> None:
        self.codebook.initialise(start, vocabulary)

    def table(self, rows: slice | Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        return self.codebook(rows)


@register
class AcceptConfig(MethodConfig):
    """Settings of ACCEPT. With D=768 the defaults give 44,160 + 30,720 = 74,880."""

    name: ClassVar[str] = "accept"
    task_parts: ClassVar[tuple[str, ...]] = ("prompt.codebook.weights", "offset.codebook.weights")

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
    weighting: str = "linear"
    """How codewords are combined: linear (the paper), softmax, topk (sparse), hard (one, straight-through), or a
    weighting registered by yourself."""
    top_k: int = Field(4, ge=1)
    """Codewords kept per subspace by weighting="topk"."""
    init: Literal["kaiming", "gaussian", "vocabulary", "text"] = "kaiming"
    """Start: the authors' code, the paper's Gaussian, or (SCPP) the best fit to vocabulary rows or a text."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of init="gaussian"; the paper does not state its own."""
    init_text: str | None = None
    """Text of init="text", repeated or cut to the prompt's length."""
    codebooks_from: str | None = None
    """Saved adapter whose codebooks are the start: the prompt's and the offset's, as far as both adapters have them.
    Read once, when attached, unless codebooks_stored="reference"."""
    freeze_codebooks: bool = False
    """Train the weights alone: the codebooks stay those of codebooks_from."""
    codebooks_stored: Literal["copy", "reference"] = "copy"
    """What a saved adapter with frozen codebooks holds: a copy of them, or a reference to the adapter in codebooks_from
    with their checksum; that adapter must then stay as it is."""

    @field_validator("weighting")
    @classmethod
    def _weighting_is_known(cls, value: str) -> str:
        return find_weighting(value).name

    @model_validator(mode="after")
    def _reference_needs_frozen_codebooks(self) -> AcceptConfig:
        if self.codebooks_stored == "reference" and not self.freeze_codebooks:
            raise ValueError(
                "codebooks_stored='reference' needs codebooks that do not train; set freeze_codebooks=true too, or "
                "codebooks_stored='copy'"
            )
        return self

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
            **self._frozen(),
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
            **self._frozen(),
        }
        # Vocabulary rows and texts are starts of a prompt; an offset starts near zero.
        name: InitName = "gaussian" if self.init == "gaussian" else "kaiming"
        return Part(CodebookOffset, sizes, self._weighting(), Start(name, self.init_std))

    def _weighting(self) -> dict[str, Any]:
        return {"weighting": self.weighting, "top_k": self.top_k}

    def _frozen(self) -> dict[str, bool]:
        return {"frozen": True} if self.freeze_codebooks else {}

    def start_from(self, method: SoftPrompt, saved: Saved) -> None:
        super().start_from(method, saved)
        source = self.codebooks_from
        if source is None:
            if self.freeze_codebooks:
                raise UsageError("freeze_codebooks=true needs trained codebooks; set codebooks_from=ADAPTER")
            return
        if self.init in ("vocabulary", "text") and method.prompt is not None:
            raise UsageError(
                f"init='{self.init}' fits the codebooks, codebooks_from={source} replaces them; leave one of them out"
            )
        parts = {part: getattr(method, part) for part in ("prompt", "offset") if getattr(method, part) is not None}
        taken = [part for part, module in parts.items() if self._take_codebooks(part, module.codebook, saved)]
        missing = [part for part in parts if part not in taken]
        if missing and (self.freeze_codebooks or not taken):
            raise UsageError(
                f"codebooks_from={source}: no codebooks for the {' and the '.join(missing)}; name an ACCEPT adapter "
                f"that has them, or leave this part out"
            )

    def _take_codebooks(self, part: str, codebook: Codebook, saved: Saved) -> bool:
        """Copy one part's codebooks from `codebooks_from`; False if there are none."""
        theirs = saved.part(str(self.codebooks_from), part).get("codebook.codebooks")
        if theirs is None:
            return False
        own = codebook.codebooks
        if theirs.shape != own.shape:
            subspaces, codewords, size = theirs.shape
            fits = subspaces * size == own.shape[0] * own.shape[2]
            way = f"set {part}_subspaces={subspaces} and {part}_codewords={codewords}"
            raise UsageError(
                f"codebooks_from={self.codebooks_from}: its {part} has {sizes_text(theirs)}, this one needs "
                f"{sizes_text(own)}; {way if fits else 'name an adapter of the same model width'}"
            )
        with torch.no_grad():
            own.copy_(theirs)
        return True

    def kept_elsewhere(self) -> dict[str, str]:
        if self.codebooks_stored == "copy" or self.codebooks_from is None:
            return {}
        return {f"{part}.codebook.codebooks": self.codebooks_from for part in ("prompt", "offset")}


def sizes_text(codebooks: Tensor) -> str:
    """Say the sizes of codebooks (K, C, S) in words."""
    subspaces, codewords, size = codebooks.shape
    return f"{subspaces} codebooks of {codewords} codewords of {size} numbers"
