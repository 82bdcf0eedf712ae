"""How many rows a run scores: of large splits as many as cost little beside the training, always the same ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

from softprompts.config import RunSettings
from softprompts.data import Encoder, Rows, spread
from softprompts.evaluate import scoring_for

SHARES = {"validation": 0.05, "test": 0.04, "untuned": 0.01}
"""What scoring may cost, in units of the training: the validation split each time together, the tuned model's test
rows, and the bare backbone's. A tenth in all."""
LEAST = {"validation": 64, "test": 500, "untuned": 64}
"""Fewer rows say too little, whatever they cost: at 500, one standard error of an accuracy of 0.8 is 1.8 points."""
ROW_COST, TOKEN_COST = 0.6, 0.03
"""Cost of a row scored, and of a token generated for it, in rows trained (a row: 0.50 to 0.56 measured)."""
SAID, SAID_STEPS = 0.11, 50
"""From which part of the training on, and from how many steps' worth, the cost of evaluating is said beforehand."""
USUAL_PROMPT = 60
"""Slots of a row beside its text, in estimates that must not differ among runs compared with each other."""
NOTES = {
    "validation": "validation scores in training are of {} rows, a fixed choice (eval.validation_rows)",
    "test": "test scores are of {} rows, a fixed choice (eval.test_rows=all or `softprompts eval` takes every one)",
    "untuned": "the untuned backbone is scored on {} test rows",
}


def scored_rows(
    settings: RunSettings, encoder: Encoder, splits: Mapping[str, Rows], tasks: int = 1
) -> tuple[dict[str, Rows], list[str]]:
    """Return the rows scored in training (`validation`), at its end (`test`), without a prompt (`untuned`), and notes.

    Whole splits, unless they would cost more than their share; a pure function of settings and data. Of several
    `tasks` trained together, each may cost its part.
    """
    plan, rows = settings.train, len(splits["train"])
    # The batches of few rows are smaller.
    trained = plan.steps * rows / -(-rows // plan.batch_size) / tasks
    wishes = {"validation": settings.eval.validation_rows, "test": settings.eval.test_rows, "untuned": None}
    limits = {"validation": settings.data.validation_limit, "test": settings.data.test_limit}
    chosen: dict[str, Rows] = {}
    notes, spent = [], 0.0
    for name, wanted in wishes.items():
        # The bare backbone answers some of the rows that the tuned one answers: larger choices have the smaller ones.
        split, whole = ("test", chosen["test"]) if name == "untuned" else (name, splits[name])
        every = splits[split]
        times = -(-plan.steps // plan.eval_steps()) if name == "validation" else 1
        each = times * cost_in_rows(settings, encoder, splits["train"], whole)
        count = wanted if isinstance(wanted, int) else len(whole)
        if wanted is None and settings.data.protocol != "paper" and limits[split] is None:
            count = max(LEAST[name], round(SHARES[name] * trained / each))
            # Nearly all rows tell no less than all for little more.
            count = len(whole) if count >= 0.9 * len(whole) else count
        chosen[name] = whole if count >= len(whole) else every.pick(spread(every.examples, count))
        scores = name != "untuned" or (settings.eval.untuned and encoder.backbone.kind != "classification")
        spent += each * len(chosen[name]) * scores
        if scores and len(chosen[name]) < len(every):
            notes.append(NOTES[name].format(f"{len(chosen[name]):,} of {len(every):,}"))
    steps = math.ceil(spent / trained * plan.steps)
    if spent > SAID * trained and steps > SAID_STEPS:
        notes.append(f"evaluating will cost about as much as {steps:,} of {plan.steps:,} steps")
    return chosen, notes


def cost_in_rows(settings: RunSettings, encoder: Encoder, train: Rows, scored: Rows) -> float:
    """Estimate what scoring a row costs, in rows trained, from the lengths alone: a resumed run must choose alike."""
    plan = settings.eval
    scoring = scoring_for(encoder.backbone, encoder.task, settings.data.protocol, plan.scoring, plan.beams)
    # A few shots are no measure of usual lengths, and draws compared with each other must score the same rows.
    typical = train if settings.data.shots is None else scored
    own, usual = (sum(map(len, rows.sources)) / len(rows) + USUAL_PROMPT for rows in (scored, typical))
    return ROW_COST * own / usual + TOKEN_COST * (encoder.max_target * plan.beams if scoring == "generate" else 0)
