"""Vectors as weighted sums of shared codewords: the heart of ACCEPT (arXiv 2410.12847, section 3).

The width D is cut into K subspaces of S = D/K columns. Each subspace has its own codebook of C codewords, and
each of the n vectors has its own weights:

    vectors[i, k] = sum_c weights[i, k, c] * codebooks[k, c]          (n,K,C), (K,C,S) -> (n,K,S) -> (n,D)

The codebooks hold C*D numbers whatever K is, the weights n*K*C: together C*(D + n*K).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompts.errors import UsageError
from softprompts.init import Start, Vocabulary, gaussian_, start_rows, uniform_
from softprompts.weighting import WeightingSettings, find_weighting


class Codebook(nn.Module):
    """n vectors of width D, composed from K codebooks of C codewords."""

    def __init__(
        self,
        vectors: int,
        width: int,
        subspaces: int,
        codewords: int,
        weighting: str = "linear",
        top_k: int = 4,
        gain: float = 1.0,
        frozen: bool = False,
    ) -> None:
        """Make room for the parameters.

        Args:
            vectors: n, how many vectors are composed.
            width: D, must be a multiple of `subspaces`.
            subspaces: K.
            codewords: C, per subspace.
            weighting: what is done to the weights before the sum, by its name in `weighting.py`.
            top_k: codewords kept per subspace by `topk`.
            gain: scale of the codewords' Kaiming bound, 1/sqrt(C*S) times this.
            frozen: the codewords do not train; they stay part of the state.

        Raises:
            UsageError: `subspaces` does not divide `width`, or no such weighting.
        """
        super().__init__()
        check_subspaces(width, subspaces)
        self.weighting = find_weighting(weighting)
        self.settings = WeightingSettings(top_k)
        self.gain = gain
        self.weights = nn.Parameter(torch.empty(vectors, subspaces, codewords))
        codebooks = torch.empty(subspaces, codewords, width // subspaces)
        self.codebooks: Tensor
        if frozen:
            # A buffer, so that no requires_grad_ makes it train.
            self.register_buffer("codebooks", codebooks)
        else:
            self.codebooks = nn.Parameter(codebooks)

    @staticmethod
    def count(vectors: int, width: int, subspaces: int, codewords: int, frozen: bool = False) -> int:
        """Return C * (D + n*K), or n*K*C if the codewords are frozen."""
        return codewords * (vectors * subspaces + (0 if frozen else width))

    def forward(self, rows: slice | Int[Tensor, " n"] = slice(None)) -> Float[Tensor, "n D"]:
        """Return the vectors, or only those in `rows`."""
        weights = self.weighting.weigh(self.weights[rows], self.settings)
        return torch.einsum("nkc,kcs->nks", weights, self.codebooks).flatten(1)

    def initialise(self, start: Start, vocabulary: Vocabulary) -> None:
        """Fill in place: Kaiming-uniform with the authors' fans, Gaussian, or fitted to vocabulary rows.

        A weighting with a start of its own has it for the weights, whatever the codewords start from.
        """
        vectors, subspaces, codewords = self.weights.shape
        size = self.codebooks.shape[2]
        if self.weighting.start_std is not None:
            gaussian_(self.weights, self.weighting.start_std)
        elif start.name == "gaussian":
            gaussian_(self.weights, start.std)
        else:
            uniform_(self.weights, (subspaces * codewords) ** -0.5)
        if start.name == "gaussian":
            gaussian_(self.codebooks, start.std)
            return
        uniform_(self.codebooks, self.gain * (codewords * size) ** -0.5)
        if start.name in ("vocabulary", "text"):
            self.fit(start_rows(vectors, start, vocabulary))

    def fit(self, target: Float[Tensor, "n D"]) -> None:
        """Set the parameters to the closest vectors that C codewords can write (truncated SVD, in place).

        Exact if C >= min(n, S). Codewords beyond the rank keep their values and get weight 0, so that they
        still receive a gradient.

        Raises:
            UsageError: a weighting that is not linear, which cannot write arbitrary vectors.
        """
        if not self.weighting.fits:
            name = self.weighting.name
            raise UsageError(f"weighting='{name}' cannot be fitted to given vectors; use init='kaiming'")
        vectors, subspaces, codewords = self.weights.shape
        slices = target.reshape(vectors, subspaces, -1).transpose(0, 1)
        left, scale, right = torch.linalg.svd(slices, full_matrices=False)
        rank = min(codewords, scale.shape[1])
        root = scale[:, :rank].sqrt()
        self.weights.zero_()
        self.weights[:, :, :rank] = (left[:, :, :rank] * root[:, None]).transpose(0, 1)
        self.codebooks[:, :rank] = root[:, :, None] * right[:, :rank]


def check_subspaces(width: int, subspaces: int, setting: str = "subspaces") -> None:
    """Raise UsageError, naming the nearest divisors, if `subspaces` does not divide the width."""
    if subspaces < 1 or width % subspaces:
        divisors = [k for k in range(1, width + 1) if width % k == 0]
        below = max((k for k in divisors if k < subspaces), default=1)
        above = min((k for k in divisors if k > subspaces), default=width)
        near = f"{below} or {above}" if below != above else str(below)
        raise UsageError(f"{setting}={subspaces} does not divide the model width {width}; try {near}")


def default_subspaces(width: int, size: int = 32) -> int:
    """Return the number of subspaces whose width is nearest to `size` columns (D/32 if 32 divides D)."""
    divisors = (k for k in range(1, width + 1) if width % k == 0)
    return min(divisors, key=lambda k: (abs(width // k - size), k))


def most_codewords(tokens: int, width: int, vectors: int, subspaces: int, setting: str = "codewords") -> int:
    """Return the most codewords that `tokens` free vectors pay for: floor(tokens*D / (D + n*K)).

    Paper: section 3.4 and Table 12, whose 18 rows this rule reproduces.

    Raises:
        UsageError: not even one codeword fits.
    """
    one = width + vectors * subspaces
    if tokens * width < one:
        raise UsageError(
            f"{setting}: a budget of {tokens} x {width} = {tokens * width} numbers is too small for one codeword, "
            f"which takes {one} ({vectors} vectors in {subspaces} subspaces); raise budget_tokens to at least "
            f"{-(-one // width)} for this part, or use fewer subspaces"
        )
    return tokens * width // one
