"""Codebooks: the einsum against the explicit sum, weightings, fits and sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from softprompts.codebook import Codebook, default_subspaces
from softprompts.errors import UsageError
from softprompts.init import Start, Vocabulary

EMBEDDING = torch.randn(50, 24, generator=torch.Generator().manual_seed(3))
NOTHING = Vocabulary(EMBEDDING)


def random_codebook(vectors: int, subspaces: int, codewords: int, size: int, **more) -> Codebook:
    book = Codebook(vectors, subspaces * size, subspaces, codewords, **more)
    for parameter in book.parameters():
        torch.nn.init.normal_(parameter)
    return book


@given(n=st.integers(1, 5), k=st.integers(1, 4), c=st.integers(1, 5), s=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_vectors_are_the_explicit_sum(n: int, k: int, c: int, s: int) -> None:
    book = random_codebook(n, k, c, s)
    for i, vector in enumerate(book()):
        for subspace in range(k):
            expected = sum(book.weights[i, subspace, word] * book.codebooks[subspace, word] for word in range(c))
            assert_close(vector[subspace * s : (subspace + 1) * s], expected)


@given(n=st.integers(1, 4), k=st.integers(1, 3), c=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_one_hot_weights_pick_codewords(n: int, k: int, c: int) -> None:
    book = random_codebook(n, k, c, 3)
    picks = torch.randint(0, c, (n, k))
    with torch.no_grad():
        book.weights.copy_(torch.nn.functional.one_hot(picks, c).float())
    chosen = torch.stack([torch.cat([book.codebooks[j, picks[i, j]] for j in range(k)]) for i in range(n)])
    assert torch.equal(book(), chosen)


def test_some_rows_are_those_of_the_whole() -> None:
    book = random_codebook(6, 2, 3, 4)
    assert_close(book(slice(4)), book()[:4])
    assert_close(book(torch.tensor([3, 0, 3])), book()[[3, 0, 3]])


def test_weightings() -> None:
    plain = random_codebook(5, 2, 6, 4)

    def like(weighting: str) -> Codebook:
        book = random_codebook(5, 2, 6, 4, weighting=weighting, top_k=2)
        book.load_state_dict(plain.state_dict())
        return book

    weights, words = plain.weights, plain.codebooks
    assert_close(like("softmax")(), torch.einsum("nkc,kcs->nks", weights.softmax(-1), words).flatten(1))
    kept = weights.abs() >= weights.abs().topk(2, -1).values[..., -1:]
    assert_close(like("topk")(), torch.einsum("nkc,kcs->nks", weights * kept, words).flatten(1))
    hard, best = like("hard"), weights.argmax(-1)
    picked = torch.stack([torch.cat([words[j, best[i, j]] for j in range(2)]) for i in range(5)])
    assert_close(hard(), picked)
    # Straight through: the gradient of the weights is the softmax's.
    soft = like("softmax")
    direction = torch.randn(5, 8)
    (hard() * direction).sum().backward()
    (soft() * direction).sum().backward()
    assert_close(hard.weights.grad, soft.weights.grad)


def test_kaiming_bounds_are_those_of_the_authors_code() -> None:
    book = Codebook(60, 768, 24, 20)
    book.initialise(Start("kaiming"), NOTHING)
    assert book.weights.abs().max() <= (24 * 20) ** -0.5 and book.codebooks.abs().max() <= (20 * 32) ** -0.5
    assert 0.0020 < book().std() < 0.0034, "facts: a composed prompt has std 0.0027 on T5-base"
    offset = Codebook(256, 768, 2, 24, gain=6**0.5)
    offset.initialise(Start("kaiming"), NOTHING)
    assert 0.0050 < offset().std() < 0.0070, "facts: a composed offset has std 0.0060 on T5-base"


def test_gaussian_start_has_its_deviation() -> None:
    book = Codebook(60, 768, 24, 20)
    book.initialise(Start("gaussian", std=0.5), NOTHING)
    assert_close(book.codebooks.std(), torch.tensor(0.5), atol=0.02, rtol=0)


@pytest.mark.parametrize("codewords", [6, 9])
def test_enough_codewords_fit_exactly(codewords: int) -> None:
    target = EMBEDDING[:6]
    book = Codebook(6, 24, 2, codewords)
    with torch.no_grad():
        book.initialise(Start(), NOTHING)
        book.fit(target)
    assert_close(book(), target, atol=1e-5, rtol=1e-5)


def test_too_few_codewords_fit_as_well_as_can_be() -> None:
    target = EMBEDDING[:20]
    book = Codebook(20, 24, 2, 3)
    with torch.no_grad():
        book.fit(target)
    left = sum(torch.linalg.svdvals(piece)[3:].square().sum() for piece in target.reshape(20, 2, 12).transpose(0, 1))
    assert_close((book() - target).square().sum(), left, atol=1e-3, rtol=1e-4)


def test_every_parameter_of_a_fitted_codebook_gets_a_gradient() -> None:
    book = Codebook(4, 24, 2, 9)
    with torch.no_grad():
        book.initialise(Start(), NOTHING)
        book.fit(EMBEDDING[:4])
    book().square().sum().backward()
    assert (book.weights.grad != 0).all()


def test_only_linear_weights_can_be_fitted() -> None:
    with pytest.raises(UsageError, match="cannot be fitted"):
        Codebook(4, 24, 2, 3, weighting="softmax").fit(EMBEDDING[:4])


@pytest.mark.parametrize(
    ("width", "subspaces"), [(768, 24), (512, 16), (1024, 32), (256, 8), (384, 12), (32, 1), (48, 2)]
)
def test_default_subspaces_have_32_columns_or_nearly(width: int, subspaces: int) -> None:
    assert default_subspaces(width) == subspaces
