"""Metrics against their definitions written out, and what they do where nothing is defined."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompts.tasks import metrics

WORDS = ("0", "1")
answers = st.lists(st.tuples(st.sampled_from(["0", "1", "2", ""]), st.sampled_from(WORDS)), min_size=1, max_size=30)

# The metrics of scikit-learn take milliseconds each.
few = settings(max_examples=40, deadline=None)


def counts(pairs):
    """True positives, false positives, false negatives, true negatives."""
    tally = {(a, t): 0 for a in WORDS for t in WORDS}
    for answer, target in pairs:
        tally[answer, target] += 1
    return tally["1", "1"], tally["1", "0"], tally["0", "1"], tally["0", "0"]


@given(answers)
@few
def test_f1_is_the_definition_with_invalid_answers_wrong(pairs):
    mended = [(a if a in WORDS else str(1 - int(t)), t) for a, t in pairs]
    hit, false, missed, _ = counts(mended)
    expected = 2 * hit / (2 * hit + false + missed) if hit else 0.0
    got, targets = [a for a, _ in pairs], [t for _, t in pairs]
    assert metrics.f1(got, targets, WORDS) == pytest.approx(expected)
    assert metrics.oppose_invalid(got, targets, WORDS) == [a for a, _ in mended]


@given(answers)
@few
def test_matthews_is_the_definition_on_label_words(pairs):
    pairs = [(a, t) for a, t in pairs if a in WORDS] or [("0", "1")]
    hit, false, missed, rejected = counts(pairs)
    product = (hit + false) * (hit + missed) * (rejected + false) * (rejected + missed)
    expected = (hit * rejected - false * missed) / math.sqrt(product) if product else 0.0
    got = metrics.matthews([a for a, _ in pairs], [t for _, t in pairs], WORDS)
    assert got == pytest.approx(expected)


def test_matthews_takes_an_invalid_answer_for_a_class():
    targets = ["0", "0", "1", "1"]
    unguarded = metrics.matthews(["0", "0", "1", "maybe"], targets, WORDS)
    guarded = metrics.matthews(["0", "0", "1", "0"], targets, WORDS)
    assert unguarded == pytest.approx(6 / math.sqrt(10 * 8))
    assert guarded == pytest.approx(2 / math.sqrt(1 * 3 * 2 * 2))


def test_macro_f1_weighs_classes_alike():
    targets = ["0", "0", "0", "1", "2"]
    assert metrics.macro_f1(["0", "0", "0", "1", "1"], targets, "012") == pytest.approx((1 + 2 / 3 + 0) / 3)
    # A class that is neither there nor predicted says nothing.
    assert metrics.macro_f1(["0", "1"], ["0", "1"], "012") == 1.0
    assert metrics.macro_f1(["x", "1"], ["0", "1"], "012") == 0.5


@given(st.lists(st.floats(0, 5), min_size=2, max_size=20), st.floats(0.5, 3), st.floats(-5, 5))
@few
def test_correlations_ignore_scale_and_shift(values, scale, shift):
    changed = [scale * value + shift for value in values]
    if len(set(values)) == len(set(changed)) > 1 and max(values) - min(values) > 0.01:
        assert metrics.pearson(changed, values) == pytest.approx(1.0)
        assert metrics.pearson([-value for value in changed], values) == pytest.approx(-1.0)
    assert -1 - 1e-9 <= metrics.spearman(changed, values) <= 1 + 1e-9


def test_correlations_known_values():
    assert metrics.pearson([1, 2, 4], [1, 2, 3]) == pytest.approx(0.9819805060619657)
    assert metrics.spearman([1, 2, 100], [1, 2, 3]) == pytest.approx(1.0)
    assert metrics.spearman([1, 3, 2], [1, 2, 3]) == pytest.approx(0.5)


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_undefined_correlations_are_zero(values):
    for metric in (metrics.pearson, metrics.spearman):
        assert metric(values, [1.0, 2.0, 3.0]) == metric([1.0, 2.0, 3.0], values) == 0.0
        assert metric([1.0], [1.0]) == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [("3.4", 3.4), ("-1", -1.0), ("", None), ("three", None), ("nan", None), ("inf", None), ("3,4", None)],
)
def test_parse_number(text, number):
    assert metrics.parse_number(text) == number


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The U.S.", "us"),
        ("U . S .", "u s"),
        ("  An  apple, a day ", "apple day"),
        ("theatre", "theatre"),
        ("a", ""),
        ("re-election", "reelection"),
        ("“Émile”", "“émile”"),
    ],
)
def test_normalise_answer(text, form):
    assert metrics.normalise_answer(text) == form


def test_free_text_takes_the_best_reference():
    references = [["the green house", "a house"], ["Paris"]]
    assert metrics.exact_match(["house", "paris."], references) == 1.0
    assert metrics.exact_match(["green", "Rome"], references) == 0.0
    assert metrics.token_f1(["green", "Rome"], references) == pytest.approx((2 / 3) / 2)


def test_token_f1_counts_repeated_words_once_each():
    assert metrics.token_f1(["no no no"], [["no yes"]]) == pytest.approx(2 / 5)


def test_empty_answers_share_no_word():
    assert metrics.token_f1(["the"], [["a"]]) == 0.0
    assert metrics.exact_match(["the"], [["a"]]) == 1.0


@given(st.text("aA. théz-'\t", max_size=30))
def test_an_answer_is_exact_for_itself(text):
    assert metrics.exact_match([text], [["something else", text]]) == 1.0


def test_grouped_scores_by_hand():
    # First question: one of two positives found, one negative marked. Second: all right. Third: no positives.
    targets = ["1", "1", "0", "1", "0", "0"]
    groups = ["a", "a", "a", "b", "b", "c"]
    f1, em = metrics.grouped(["1", "0", "1", "1", "0", "0"], targets, groups, WORDS)
    assert f1 == pytest.approx((0.5 + 1 + 1) / 3)
    assert em == pytest.approx(2 / 3)
    f1, em = metrics.grouped(["1", "1", "0", "1", "0", "1"], targets, groups, WORDS)
    assert (f1, em) == pytest.approx((2 / 3, 2 / 3))
    assert metrics.grouped(["x"] * 6, targets, groups, WORDS) == (0.0, 0.0)


@given(answers)
@few
def test_grouping_everything_together_is_plain_f1(pairs):
    got, targets = [a for a, _ in pairs], [t for _, t in pairs]
    together, _ = metrics.grouped(got, targets, ["q"] * len(pairs), WORDS)
    plain = metrics.f1(got, targets, WORDS)
    nothing_to_find = "1" not in targets and "1" not in metrics.oppose_invalid(got, targets, WORDS)
    assert together == pytest.approx(1.0 if nothing_to_find else plain)
