"""Choose learning rates and the start on the validation split, with a population, before the real run.

The first complaint about soft prompts is their learning rate. `find` trains N candidates beside each other for a few
steps, keeps the better half, and again; it costs no more than half of the run it prepares (`SHARE`).
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from softprompts.config import RunSettings
from softprompts.core import CombinedConfig, MethodConfig
from softprompts.data import OPEN_TARGET_TOKENS
from softprompts.errors import SoftPromptsError, UsageError
from softprompts.files import write_text
from softprompts.population import Halving, alone
from softprompts.results import RECORD, SEARCH, TRIALS, clear_folder
from softprompts.scored import ROW_COST, TOKEN_COST
from softprompts.sweep import has_head
from softprompts.tasks import get_task
from softprompts.weighting import find_weighting

if TYPE_CHECKING:
    from softprompts.loop import Progress

SHARE = 0.5
"""Most that a search costs, in plain runs."""
RUNGS = 3
"""Evaluations; after each but the last, the worse half is dropped."""
VALIDATION_ROWS = 64
"""Rows of the validation split that rank the candidates."""
LEAST_STEPS = 5
PROMPT_RATES = (0.03, 3.0)
"""Range of prompt rates: a decade around the papers' 0.3 to 0.5, evenly on a logarithmic scale."""
OFFSET_RATES = (1e-4, 5e-2)
"""Range of offset rates; the papers take 1e-4 to 5e-3."""


def find(
    settings: RunSettings,
    count: int,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[RunSettings, dict[str, Any]]:
    """Search among `count` candidates, the given settings first among them.

    Args:
        settings: of the real run.
        count: candidates, at least 2.
        out: the run's folder; the trials go to `search/` in it, the outcome to `search.json`.
        resume: take the outcome of an earlier search there, or go on with one that was killed.
        overwrite: what the folder holds of an earlier run may go, once the search can begin.
        progress: hears of the trials' steps.

    Returns:
        (settings of the real run, what was tried and found).

    Raises:
        UsageError: too few steps for so many candidates, settings that cannot be used, or a run to resume that was
            begun without a search; nothing is written then.
        SoftPromptsError: no candidate's loss stays a number.
    """
    from softprompts.train import train_together

    check_searchable(settings)
    file, folder = out / SEARCH, out / TRIALS
    if resume and (out / RECORD).exists() and not file.exists():
        raise UsageError(f"{out} was begun without --search; resume with --out alone, or take --overwrite")
    if resume and file.exists():
        outcome = json.loads(file.read_text(encoding="utf-8"))
        if outcome["asked"] != settings.model_dump(mode="json") or outcome["count"] != count:
            raise UsageError(f"{out} was begun with other settings; resume with --out alone, or take --overwrite")
        if outcome["chosen"] is not None:
            return RunSettings(**outcome["settings"]), outcome
    outcome = {"asked": settings.model_dump(mode="json"), "count": count, "chosen": None}
    begun = time.perf_counter()
    steps = steps_per_rung(settings, count)
    tried = candidates(settings, count)
    trials = [trial(one, steps) for one in tried]

    def begin() -> None:
        if overwrite and not resume:
            clear_folder(out)
        write_text(file, json.dumps(outcome, indent=2) + "\n")

    outs = [folder / f"trial-{number}" for number in range(count)]
    halving = Halving(tuple(range(1, RUNGS)), least=2)
    records = train_together(
        trials, outs, resume=resume, overwrite=not resume, halving=halving, progress=progress, begin=begin
    )
    metric = records[0]["metric"]["select"]
    scores = [record["scores"]["validation"].get(metric, -math.inf) for record in records]
    # Candidates that were dropped saw fewer steps: the winner is one of those that saw them all.
    finalists = [number for number in range(count) if records[number]["status"] == "done"]
    if not finalists:
        raise SoftPromptsError(f"--search {count}: no candidate was left; the first {records[0]['reason']}")
    best = max(finalists, key=lambda number: scores[number])
    chosen = tried[best]
    outcome |= {
        "chosen": best,
        "metric": metric,
        "trials": [
            {
                **choice(one),
                "score": score if math.isfinite(score) else None,
                "steps": record["steps_done"],
                "status": record["status"],
            }
            for one, score, record in zip(trials, scores, records, strict=True)
        ],
        "rows": records[best]["scores"]["validation"]["n"],
        "seconds": round(time.perf_counter() - begun, 2),
        "settings": chosen.model_dump(mode="json"),
    }
    write_text(file, json.dumps(outcome, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return chosen, outcome


def check_searchable(settings: RunSettings) -> None:
    """Make sure that candidates can be trained beside each other.

    Raises:
        UsageError: they cannot.
    """
    if alone(settings) or has_head(settings):
        raise UsageError(
            "--search trains its candidates beside each other, which baselines, several tasks, start.kind, a "
            "classification head and model.compile do not allow; leave --search out"
        )


def unfinished_search(out: Path) -> tuple[RunSettings, int] | None:
    """Return (settings as asked, count) of the search that a run began with, None if it began without one."""
    file = out / SEARCH
    if not file.exists():
        return None
    outcome = json.loads(file.read_text(encoding="utf-8"))
    return RunSettings(**outcome["asked"]), outcome["count"]


def candidates(settings: RunSettings, count: int) -> list[RunSettings]:
    """Return the given settings and `count - 1` others: rates drawn on a log scale, starts in turn.

    The draws depend on the seed alone. Rates lie one to a stratum of their range (Latin hypercube), so that a few
    candidates cover it.
    """
    draw = random.Random(settings.seed)
    config = settings.method_config()
    parts = {name for name in ("prompt", "offset") if has_part(config, name)}
    starts = start_choices(config)
    others = count - 1
    prompt, offset = strata(draw, PROMPT_RATES, others), strata(draw, OFFSET_RATES, others)
    found = [settings]
    for number in range(others):
        train: dict[str, Any] = {}
        if "prompt" in parts:
            train["prompt_rate"] = prompt[number]
        if "offset" in parts:
            train["offset_rate"] = offset[number]
        start = starts[number % len(starts)] if starts else None
        method = settings.method if start is None else {**settings.method, "init": start}
        found.append(settings.updated(train=settings.train.updated(**train), method=method))
    return found


def strata(draw: random.Random, span: tuple[float, float], count: int) -> list[float]:
    """Return `count` numbers of a range, one from each of as many equal parts of its logarithm, in random order."""
    low, high = map(math.log, span)
    numbers = [math.exp(low + (high - low) * (place + draw.random()) / count) for place in range(count)]
    draw.shuffle(numbers)
    return [float(f"{number:.3g}") for number in numbers]


def has_part(config: MethodConfig, name: str) -> bool:
    """Whether a method prepends or adds anything, at a width that every default fits."""
    return getattr(config, f"{name}_part")(768) is not None


def start_choices(config: MethodConfig) -> list[str]:
    """Return the starts that need nothing else: the one given, and the vocabulary's rows."""
    field = type(config).model_fields.get("init")
    if field is None or isinstance(config, CombinedConfig) or config.prompt_from is not None:
        return []
    weighting = getattr(config, "weighting", "linear")
    if getattr(config, "codebooks_from", None) is not None or not find_weighting(weighting).fits:
        return []  # codewords that are given, or that cannot be fitted to rows
    given = config.init  # type: ignore[attr-defined]
    return list(dict.fromkeys([given, *(["vocabulary"] if "vocabulary" in get_args(field.annotation) else [])]))


def steps_per_rung(settings: RunSettings, count: int) -> int:
    """Return the steps between evaluations for which the whole search costs `SHARE` of the run.

    Raises:
        UsageError: fewer than `LEAST_STEPS`.
    """
    if count < 2:
        raise UsageError(f"--search {count} leaves nothing to choose from; give it at least 2 candidates")
    alive, rounds = count, 0
    for _ in range(RUNGS):
        rounds += alive
        alive = max(2, -(-alive // 2))
    rows = min(VALIDATION_ROWS, settings.data.validation_limit or VALIDATION_ROWS)
    # The survivors are also scored on as many test rows (`trial`), which decides nothing.
    evaluation = (rows * rounds + alive) * row_cost(settings) / settings.train.batch_size
    steps = int((SHARE * settings.train.steps - evaluation) / rounds)
    if steps < LEAST_STEPS:
        need = math.ceil((LEAST_STEPS * rounds + evaluation) / SHARE)
        raise UsageError(
            f"--search {count} needs at least train.steps={need} to try each candidate for {LEAST_STEPS} steps; "
            f"raise train.steps={settings.train.steps} or search less"
        )
    return steps


def row_cost(settings: RunSettings) -> float:
    """Estimate what scoring a row costs, in rows trained, before anything is loaded."""
    plan, protocol = settings.eval, settings.data.protocol
    task = None if settings.task is None else get_task(settings.task)
    open_answers = settings.data.kind == "text" if task is None else task.label_words is None
    if not (open_answers or plan.scoring == "generate" or (plan.scoring == "auto" and protocol == "paper")):
        return ROW_COST
    usual = OPEN_TARGET_TOKENS if task is None else task.max_target_tokens or OPEN_TARGET_TOKENS
    return ROW_COST + TOKEN_COST * (settings.data.max_target_tokens or usual) * plan.beams


def trial(settings: RunSettings, steps: int) -> RunSettings:
    """Return a candidate's settings for the search: few steps, few rows, no baseline."""
    short = {"steps": RUNGS * steps, "eval_every": steps, "patience": None, "save_every": None, "warmup": None}
    return settings.updated(
        train=settings.train.updated(**short),
        data=settings.data.updated(test_limit=1),
        # A choice of every class in its share: the first rows of own data may all be of one.
        eval=settings.eval.updated(untuned=False, validation_rows=VALIDATION_ROWS),
    )


def choice(settings: RunSettings) -> dict[str, Any]:
    """Return what distinguishes a candidate."""
    config = settings.method_config()
    init = {"init": config.init} if "init" in type(config).model_fields else {}
    return {"prompt_rate": settings.train.prompt_rate, "offset_rate": settings.train.offset_rate, **init}


def describe(outcome: dict[str, Any]) -> str:
    """Return one line about a search's outcome."""
    best: dict[str, Any] = outcome["trials"][outcome["chosen"]]
    named = ", ".join(f"{key}={value}" for key, value in best.items() if key not in ("score", "steps", "status"))
    return (
        f"search: {named} of {outcome['count']} candidates ({outcome['metric']} {best['score']:.4f} after "
        f"{best['steps']} steps on {outcome['rows']} validation rows)"
    )
