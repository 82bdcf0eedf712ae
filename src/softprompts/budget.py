"""How many rows a run scores: of large splits as many as cost little beside the training, always the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from softprompts.config import RunSettings
from softprompts.data import Encoder, Rows, spread
from softprompts.evaluate import scoring_for

SHARES = {"validation": 0.05, "test": 0.04, "untuned": 0.01}
"""What scoring may cost, in units of the training: the validation split each time together, the tuned model's test
rows, and the bare backbone's. A tenth in all."""
LEAST = {"validation": 64, "test": 500, "untuned": 64}
"""Fewer rows say too little, whatever they cost: at 500, one standard error of an accuracy of 0.8 is 1.8 points."""
ROW_COST, TOKEN_COST = 0.5, 0.03
"""Cost of a row scored, and of a token generated for it, in rows trained (measured: 0.4 to 0.5)."""
USUAL_PROMPT = 60
"""Slots of a row beside its text, in estimates that must not differ among runs compared with each other."""
NOTES = {
    "validation": "validation scores in training are of {} rows, a fixed choice (eval.validation_rows)",
    "test": "test scores are of {} rows, a fixed choice (eval.test_rows=all or `softprompts eval` takes every one)",
    "untuned": "the untuned backbone is scored on {} test rows",
}


def scored_rows(
    settings: RunSettings, encoder: Encoder, splits: Mapping[str, Rows]
) -> tuple[dict[str, Rows], list[str]]:
    """Return the rows scored in training (`validation`), at its end (`test`), without a prompt (`untuned`), and notes.

    Whole splits, unless they would cost more than their share; a pure function of settings and data.
    """
    plan = settings.train
    trained = plan.steps * plan.batch_size
    wishes = {"validation": settings.eval.validation_rows, "test": settings.eval.test_rows, "untuned": None}
    limits = {"validation": settings.data.validation_limit, "test": settings.data.test_limit}
    chosen: dict[str, Rows] = {}
    notes, spent = [], 0.0
    for name, wanted in wishes.items():
        # The bare backbone answers some of the rows that the tuned one answers.
        split, whole = ("test", chosen["test"]) if name == "untuned" else (name, splits[name])
        times = -(-plan.steps // plan.eval_steps()) if name == "validation" else 1
        each = times * cost_in_rows(settings, encoder, splits["train"], whole)
        open_choice = settings.data.protocol != "paper" and limits[split] is None
        count: int | Literal["all"] = wanted or "all"
        if wanted is None and open_choice:
            count = max(LEAST[name], round(SHARES[name] * trained / each))
        chosen[name] = whole if count == "all" or count >= len(whole) else whole.pick(spread(whole.examples, count))
        scores = name != "untuned" or (settings.eval.untuned and encoder.backbone.kind != "classification")
        spent += each * len(chosen[name]) * scores
        if scores and len(chosen[name]) < len(splits[split]):
            notes.append(NOTES[name].format(f"{len(chosen[name]):,} of {len(splits[split]):,}"))
    if spent > 1.01 * sum(SHARES.values()) * trained:
        notes.append(f"evaluating will cost about as much as {spent / plan.batch_size:,.0f} of {plan.steps:,} steps")
    return chosen, notes


def cost_in_rows(settings: RunSettings, encoder: Encoder, train: Rows, scored: Rows) -> float:
    """Estimate what scoring a row costs, in rows trained, from the lengths alone: a resumed run must choose alike."""
    plan = settings.eval
    scoring = scoring_for(encoder.backbone, encoder.task, settings.data.protocol, plan.scoring, plan.beams)
    # A few shots are no measure of usual lengths, and draws compared with each other must score the same rows.
    typical = train if settings.data.shots is None else scored
    own, usual = (sum(map(len, rows.sources)) / len(rows) + USUAL_PROMPT for rows in (scored, typical))
    return ROW_COST * own / usual + TOKEN_COST * (encoder.max_target * plan.beams if scoring == "generate" else 0)
