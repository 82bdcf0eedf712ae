"""How much of each split a run scores: evaluating takes less than a tenth of a default run; the rest is said."""

from pathlib import Path

import pytest
from test_evaluate import encoder_of, splits_of
from tiny import build

from softprompts import results
from softprompts.config import TrainSettings, parse_assignment, resolve
from softprompts.loop import Progress
from softprompts.scored import ROW_COST, scored_rows
from softprompts.train import train
from softprompts.trained import open_trained


def counts(*more: str, kind: str = "seq2seq", **sizes: int) -> tuple[tuple[int, int, int], list[str]]:
    """Return the rows scored in training, at its end and without a prompt, and the notes."""
    settings = resolve(None, [parse_assignment(text) for text in ("task=glue/sst2", *more)])
    splits = splits_of(**sizes)
    chosen, notes = scored_rows(settings, encoder_of(build("t5"), kind), splits)
    for rows in chosen.values():
        assert sum(e.label or 0 for e in rows.examples) == pytest.approx(len(rows) / 4, abs=1)
    return (len(chosen["validation"]), len(chosen["test"]), len(chosen["untuned"])), notes


def test_evaluations_cost_a_tenth_of_the_training() -> None:
    (validation, test, untuned), notes = counts()
    assert (validation, test, untuned) == (133, 1067, 267)
    evaluations = TrainSettings().steps // TrainSettings().eval_steps()
    spent = ROW_COST * (evaluations * validation + test + untuned)
    trained = TrainSettings().steps * TrainSettings().batch_size
    assert spent / (spent + trained) < 0.1
    assert notes == [
        "validation scores in training are of 133 of 1,000 rows, a fixed choice (eval.validation_rows)",
        "test scores are of 1,067 of 5,000 rows, a fixed choice (eval.test_rows=all or `softprompts eval` takes "
        "every one)",
        "the untuned backbone is scored on 267 of 5,000 test rows",
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["train.steps=20"], (64, 500, 64)),
        (["train.steps=100000"], (1000, 5000, 5000)),
        (["train.batch_size=32"], (267, 2133, 533)),
        (["eval.validation_rows=50"], (50, 1067, 267)),
        (["eval.validation_rows=5000"], (1000, 1067, 267)),
        (["eval.validation_rows=all"], (1000, 1067, 267)),
        (["eval.test_rows=all"], (133, 5000, 267)),
        (["eval.test_rows=200"], (133, 200, 200)),
        (["data.protocol=paper"], (1000, 5000, 5000)),
        (["data.protocol=paper", "eval.validation_rows=300"], (300, 5000, 5000)),
        (["data.protocol=paper", "eval.test_rows=300"], (1000, 300, 300)),
        (["data.validation_limit=1000"], (1000, 1067, 267)),
        (["data.test_limit=5000"], (133, 5000, 5000)),
        (["eval.scoring=generate"], (round(80 / 0.84), round(640 / 0.84), round(160 / 0.84))),
    ],
)
def test_how_many_rows_are_scored(settings: list[str], expected: tuple[int, int, int]) -> None:
    assert counts(*settings)[0] == expected


def test_small_splits_are_scored_whole_and_silently() -> None:
    assert counts(validation=138, test=139) == ((138, 139, 139), [])
    assert counts("eval.untuned=false", validation=138, test=800) == ((138, 800, 267), [])


def test_beams_count() -> None:
    assert counts("eval.scoring=generate", "eval.beams=2")[0][1] == round(640 / (0.6 + 0.03 * 8 * 2))


def test_what_costs_more_than_its_share_is_said() -> None:
    note = "evaluating will cost about as much as 248 of 1,000 steps"
    assert counts("eval.test_rows=all")[1] == [counts()[1][0], counts()[1][2], note]
    assert counts("train.steps=100", "eval.untuned=false", validation=60, test=400)[1] == [], "20 steps are not long"


def test_longer_texts_cost_more() -> None:
    settings = resolve(None, [("task", "glue/sst2")])
    splits = splits_of() | {"validation": splits_of(length=100)["validation"]}
    assert len(scored_rows(settings, encoder_of(build("t5"), "seq2seq"), splits)[0]["validation"]) == 67


def test_a_run_says_what_it_scored(tmp_path: Path) -> None:
    own = ["task=demo/mood", "model.dtype=fp32", "method={name='accept', prompt_length=6, budget_tokens=16}",
           "data.train_limit=16", "train.batch_size=4", "train.steps=2", "eval.validation_rows=24",
           "eval.test_rows=40"]  # fmt: skip
    notes: list[str] = []

    class Listen(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    record = train(resolve(None, [parse_assignment(text) for text in own]), tmp_path, progress=Listen())
    assert record["scores"]["validation"]["n"] == 24 and record["scores"]["test"]["n"] == 40
    assert record["baselines"]["untuned"]["n"] == record["baselines"]["majority"]["n"] == 40
    assert record["data"]["sizes"] == {"train": 16, "validation": 80, "test": 120}
    assert len((tmp_path / results.PREDICTIONS).read_text().splitlines()) == 40
    assert open_trained(tmp_path).evaluate().scores["n"] == 120
    assert any("of 24 of 80 rows" in note for note in notes)


def test_few_rows_and_several_tasks_train_less() -> None:
    assert counts(train=4)[0] == (64, 500, 67), "4 rows a step, not 16"
    settings, splits = resolve(None, [("task", "glue/sst2")]), splits_of()
    chosen, notes = scored_rows(settings, encoder_of(build("t5"), "seq2seq"), splits, 2)
    assert [len(rows) for rows in chosen.values()] == [67, 533, 133] and len(notes) == 3


def test_larger_choices_have_the_smaller_ones() -> None:
    splits, encoder = splits_of(), encoder_of(build("t5"), "seq2seq")
    before: dict[str, set[int]] = {}
    for steps in (500, 1000, 1500, 3000):
        settings = resolve(None, [("task", "glue/sst2"), ("train.steps", steps)])
        chosen = scored_rows(settings, encoder, splits)[0]
        rows = {name: {id(example) for example in part.examples} for name, part in chosen.items()}
        assert rows["untuned"] < rows["test"]
        assert all(before[name] < rows[name] for name in before)
        before = rows
