"""A user's own data: what is read, what is guessed and said, how it is scored, and what each mistake says."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from hub_mirror import write_mirror

from softprompts.errors import UsageError
from softprompts.tasks import get_task
from softprompts.tasks.columns import parse_labels
from softprompts.tasks.own import OwnTask, load_own, texts_to_examples

N = 40
TEXTS = [f"sentence number {index}" for index in range(N)]
FOLLOWS = [index % 2 for index in range(N)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def write_csv(path: str, **columns: Iterable[Any]) -> str:
    """Write columns to a csv or tsv file below the working directory; return its path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.endswith(".tsv") else ",")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def write_jsonl(path: str, rows: Iterable[dict]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mood(path: str = "mood.csv", n: int = N) -> str:
    return write_csv(path, text=TEXTS[:n], label=FOLLOWS[:n])


def fails(function, *arguments, **options) -> str:
    """The message of the UsageError that a call raises; always one line."""
    with pytest.raises(UsageError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------- one file


def test_one_file_is_split_and_every_guess_is_said() -> None:
    data = load_own(mood())
    assert [len(data.train), len(data.validation), len(data.test)] == [32, 4, 4]
    assert data.notes == [
        "target column: 'label' (guessed; set --target to change)",
        "input column: 'text' (guessed; set --input to change)",
        "kind: classes, as 'label' has 2 different values (guessed; set --kind to change)",
        "label words: 0 1 (guessed; set --labels to change)",
        "no validation or test split in mood.csv: took 1 in 10 training rows for each (seed 42); "
        "rows: train 32, validation 4, test 4",
    ]
    sources = [example.source for part in (data.train, data.validation, data.test) for example in part]
    assert sorted(sources) == sorted(f"text: {text}" for text in TEXTS)
    assert data.task.name == "own/mood"
    assert data.provenance["test"]["source"] == "local:mood.csv (4 of 40 rows, seed 42)"


def test_the_split_is_always_the_same() -> None:
    first, again = load_own(mood()), load_own(mood())
    assert first.provenance == again.provenance
    # Pinned: another partition would silently move every user's scores.
    assert [int(example.source.split()[-1]) for example in first.test] == [0, 3, 8, 18]


def test_given_settings_need_no_guess() -> None:
    data = load_own(mood(), inputs=["text"], target="label", labels={"1": "good", "0": "bad"})
    assert len(data.notes) == 1 and "seed 42" in data.notes[0]
    assert data.task.label_words == ("good", "bad") and data.task.label_names == ("1", "0")
    for example in data.train:
        odd = int(example.source.split()[-1]) % 2
        assert (example.label, example.target) == ((0, "good") if odd else (1, "bad"))
        assert example.references == (example.target,)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_examples(ending: str) -> None:
    expected = load_own(mood())
    columns = {"text": TEXTS, "label": FOLLOWS}
    path = f"other{ending}"
    if ending == ".parquet":
        datasets.Dataset.from_dict(columns).to_parquet(path)
    elif ending == ".jsonl":
        write_jsonl(path, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    else:
        write_csv(path, **columns)
    data = load_own(path)
    assert (data.train, data.validation, data.test) == (expected.train, expected.validation, expected.test)


def test_several_inputs_stand_in_the_order_of_the_file_or_of_the_user() -> None:
    path = write_csv("nli.csv", idx=range(N), premise=TEXTS, hypothesis=TEXTS[::-1], score=FOLLOWS, label=FOLLOWS)
    data = load_own(path)
    assert (
        "input columns: 'premise', 'hypothesis' (guessed; set --input to change); left out: 'idx', 'score'"
        in data.notes
    )
    texts = {example.source for part in (data.train, data.validation, data.test) for example in part}
    assert "premise: sentence number 0 hypothesis: sentence number 39" in texts
    swapped = load_own(path, inputs="hypothesis, premise", target="label").train[0].source
    assert swapped.startswith("hypothesis: sentence")


@pytest.mark.parametrize("column", ["label", "Labels", "target", "answer", "output", "class", "category", "y"])
def test_the_target_is_found_by_its_name(column: str) -> None:
    path = write_csv("d.csv", **{column: FOLLOWS, "text": TEXTS, "also_few": ["a", "b"] * (N // 2)})
    assert load_own(path).task.target == column


def test_ids_and_numbers_are_no_guessed_inputs() -> None:
    keys = [f"key-{index}" for index in range(N)]
    load = load_own(write_csv("d.csv", id=keys, doc_id=keys, words=range(N), text=TEXTS, label=FOLLOWS))
    assert load.task.inputs == ("text",)


def test_the_target_is_else_the_last_column_of_few_values() -> None:
    data = load_own(write_csv("d.csv", text=TEXTS, early=FOLLOWS, mood=["good", "bad"] * (N // 2), more=TEXTS))
    assert data.task.target == "mood" and data.task.label_words == ("bad", "good")
    # A column that the user named as an input is no target.
    taken = load_own("d.csv", inputs=["text", "mood"])
    assert taken.task.target == "early"


def test_columns_that_give_the_answer_away_are_no_guessed_inputs() -> None:
    names = ["neg", "pos"] * (N // 2)
    data = load_own(write_csv("d.csv", text=TEXTS, label=FOLLOWS, label_text=names, sentiment=names))
    assert "input column: 'text' (guessed; set --input to change); left out: 'label_text', 'sentiment'" in data.notes


def test_numbers_order_label_words_and_true_is_written_as_in_json() -> None:
    data = load_own(write_csv("d.csv", text=TEXTS, label=[(2, 10)[value] for value in FOLLOWS]))
    assert data.task.label_words == ("2", "10")
    rows = [{"text": text, "label": bool(value)} for text, value in zip(TEXTS, FOLLOWS, strict=True)]
    assert load_own(write_jsonl("d.jsonl", rows)).task.label_words == ("false", "true")
    whole = [{**row, "label": float(row["label"])} for row in rows]
    assert load_own(write_jsonl("e.jsonl", whole)).task.label_words == ("0", "1")


def test_repeated_inputs_across_splits_are_said() -> None:
    data = load_own(write_csv("d.csv", text=["same", "other"] * (N // 2), label=FOLLOWS), inputs=["text"])
    assert "4 of 4 test rows have an input that train has too; scores may be too good" in data.notes


def test_shots_and_a_choice_of_splits() -> None:
    data = load_own(mood(), splits=["train"], shots=4)
    assert [example.target for example in data.train].count("0") == 2 and len(data.train) == 4
    assert data.validation == data.test == []


# ---------------------------------------------------------------------------------------- folders and hub


@pytest.mark.parametrize("validation", ["validation", "dev", "valid", "val"])
def test_folder_of_splits(validation: str) -> None:
    mood("d/train.csv"), mood(f"d/{validation}.tsv", 6), write_jsonl("d/test.jsonl", [{"text": "x", "label": 1}])
    data = load_own("d")
    assert [len(data.train), len(data.validation), len(data.test)] == [40, 6, 1]
    assert [example.source for example in data.train] == [f"text: {text}" for text in TEXTS]
    assert data.provenance["validation"]["source"] == f"local:d/{validation}.tsv"
    assert not any("seed 42" in note for note in data.notes)


def test_folder_without_a_test_file_takes_a_tenth_of_train() -> None:
    mood("d/train.csv"), mood("d/dev.csv", 6)
    data = load_own("d")
    assert [len(data.train), len(data.validation), len(data.test)] == [36, 6, 4]
    assert (
        "no test split in d: took 1 in 10 training rows for it (seed 42); rows: train 36, validation 6, test 4"
        in data.notes
    )
    assert not {example.source for example in data.test} & {example.source for example in data.train}


def hub_features() -> datasets.Features:
    names = datasets.ClassLabel(names=["negative", "positive"])
    return datasets.Features({"idx": datasets.Value("int32"), "text": datasets.Value("string"), "label": names})


def test_hub_data_set_by_its_class_names(tmp_path: Path) -> None:
    columns = {"idx": range(N), "text": TEXTS, "label": FOLLOWS}
    withheld = {**columns, "label": [-1] * N}
    write_mirror(tmp_path / "m", "org/mood", {"small": {"train": columns, "test": withheld}}, hub_features())
    data = load_own("org/mood:small", mirror=tmp_path / "m")
    assert data.task.name == "own/mood:small"
    assert data.task.labels == {"0": "negative", "1": "positive"}
    assert data.notes == [
        "target column: 'label' (guessed; set --target to change)",
        "input column: 'text' (guessed; set --input to change); left out: 'idx'",
        "test split left out: all its labels are -1 (withheld)",
        "kind: classes, as 'label' has 2 different values (guessed; set --kind to change)",
        "label words: 0=negative 1=positive (guessed; set --labels to change)",
        "no validation or test split in org/mood:small: took 1 in 10 training rows for each (seed 42); "
        "rows: train 32, validation 4, test 4",
    ]
    assert data.provenance["train"]["source"] == f"mirror:{tmp_path}/m/org/mood (32 of 40 rows, seed 42)"


def test_what_a_name_of_two_parts_means(tmp_path: Path) -> None:
    unreachable = "cannot reach the hub for data set 'org/name', and there is no cached copy; "
    assert fails(load_own, "org/name").startswith(unreachable)
    assert fails(load_own, "org/name@main").startswith(unreachable)
    # Below a folder that is here, it is a mistyped path, and the network is not asked.
    mood("org/names/train.csv")
    assert fails(load_own, "org/name") == (
        "no file or folder org/name; did you mean 'names'? for the hub data set of that name write hub:org/name"
    )
    assert fails(load_own, "hub:org/name").startswith(unreachable)
    assert load_own("org/names").task.name == "own/names"


# ---------------------------------------------------------------------------------------- kinds and scores


def test_classes_are_scored_by_accuracy_and_macro_f1() -> None:
    data = load_own(mood(), labels={"0": "bad", "1": "good"})
    good = [example for example in data.train if example.target == "good"][:2]
    scores = data.task.score([" good ", "fine"], good, "clean")
    assert scores == {"accuracy": 0.5, "macro_f1": pytest.approx(2 / 3), "n": 2, "invalid": 1}
    assert data.task.select_metric("clean") == data.task.report_metric == "accuracy"


def test_free_text_with_several_answers() -> None:
    rows = [{"question": text, "answers": [f"The {index}", f"no. {index}"]} for index, text in enumerate(TEXTS)]
    data = load_own(write_jsonl("qa.jsonl", rows))
    assert "kind: text, as 'answers' has 40 different values (guessed; set --kind to change)" in data.notes
    example = data.test[0]
    index = int(example.source.split()[-1])
    assert (example.target, example.references) == (f"The {index}", (f"The {index}", f"no. {index}"))
    assert data.task.score([f"No {index}!"], [example], "clean") == {"em": 1.0, "f1": 1.0, "n": 1, "invalid": 0}
    assert data.task.select_metric("clean") == "f1" and data.task.label_words is None
    squad = [{"question": row["question"], "answers": {"text": row["answers"]}} for row in rows]
    assert load_own(write_jsonl("squad.jsonl", squad)).test == data.test


def test_many_numbers_are_correlated() -> None:
    data = load_own(write_csv("d.csv", text=TEXTS, score=[index / 8 for index in range(N)]), target="score")
    assert "kind: number, as 'score' has 40 different values (guessed; set --kind to change)" in data.notes
    assert data.task.report_metric == "pearson"
    examples = data.train[:3]
    assert examples[0].value == float(examples[0].target)
    exact = data.task.score([example.target for example in examples], examples, "clean")
    assert exact == {"pearson": pytest.approx(1), "spearmanr": pytest.approx(1), "n": 3, "invalid": 0}
    # What is no number is as wrong as an answer can be.
    low, high = sorted(data.train, key=lambda example: example.value)[:: len(data.train) - 1]
    assert data.task.score(["high", "low"], [low, high], "clean")["pearson"] == pytest.approx(-1)
    assert data.task.score(["high", "low"], [low, high], "clean")["invalid"] == 2


def test_kind_can_be_set() -> None:
    assert load_own(mood(), kind="number").task.report_metric == "pearson"
    assert load_own(mood(), kind="text").task.report_metric == "f1"
    assert fails(load_own, mood(), protocol="papper").startswith("unknown protocol 'papper'")
    assert fails(load_own, mood(), kind="clases") == (
        "unknown kind 'clases'; did you mean 'classes'? use classes, text, number"
    )
    assert fails(load_own, mood(), kind="text", labels={"0": "a", "1": "b"}) == (
        "--labels does not go with --kind text; leave one of the two out"
    )


def test_a_task_is_made_again_from_its_spec() -> None:
    for options in ({"labels": {"0": "bad", "1": "good"}}, {"kind": "text"}, {"kind": "number"}):
        task = load_own(mood(), **options).task
        again = OwnTask(**json.loads(json.dumps(task.spec())))
        row = {"text": "x", "label": "1"}
        assert again.examples(row, "clean") == task.examples(row, "clean") and again.spec() == task.spec()


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "lable"}, "--target: no column 'lable' in mood.csv; did you mean 'label'? it has text, label"),
        ({"inputs": ["words"]}, "--input: no column 'words' in mood.csv; it has text, label"),
        ({"inputs": ["label"], "target": "label"}, "--input: column 'label' is the target too; name it once"),
        ({"inputs": "text,text"}, "--input: column 'text' is named twice; name it once"),
        ({"labels": {"0": "no", "1": "no"}}, "--labels: values '0' and '1' have the same word 'no'; "
         "give each its own, or merge the two values in the data"),
        ({"labels": {"0": "no"}}, "--labels: fewer than two label words (0=no); add the others"),
        ({"labels": {"0": "no", "1": " "}}, "--labels: value '1' has an empty word; give it a word to write"),
        ({"labels": {"0": "no", "2": "yes"}}, "row 2 of mood.csv has label '1', which is not in the label words "
         "0=no 2=yes (20 such rows); add it to --labels or mend the row"),
    ],
)  # fmt: skip
def test_wrong_settings(options: dict, message: str) -> None:
    assert fails(load_own, mood(), **options) == message


def test_wrong_rows() -> None:
    path = write_csv("d.csv", text=["", *TEXTS[:4], " ", *TEXTS[:4]], label=FOLLOWS[:10])
    assert fails(load_own, path) == "column 'text' is empty in 2 of 10 rows of d.csv (row 1, 6); fill or remove them"
    rows = [{"text": "x", "label": "a"}, {"text": "y"}, *[{"text": "x", "label": None}] * 9]
    assert fails(load_own, write_jsonl("d.jsonl", rows), target="label") == (
        "column 'label' is empty in 10 of 11 rows of d.jsonl (row 2, 3, 4, 5, 6, ...); fill or remove them"
    )
    assert fails(load_own, write_csv("one.csv", text=TEXTS, label=["yes"] * N)) == (
        "all 40 training rows of one.csv have label 'yes'; add rows of another class, or set another --target"
    )
    rare = write_csv("rare.csv", text=TEXTS, label=[int(index == 3) for index in range(N)])
    assert fails(load_own, rare) == (
        "all 32 training rows of rare.csv (32 of 40 rows, seed 42) have label '0'; "
        "add rows of another class, or set another --target"
    )
    assert fails(load_own, write_csv("n.csv", text=TEXTS, label=[*range(N - 1), "many"]), kind="number") == (
        "row 40 of n.csv has label 'many', which is not a number; mend it or set --kind text"
    )
    nested = write_jsonl("nested.jsonl", [{"text": ["a", "b"], "label": value} for value in FOLLOWS])
    assert fails(load_own, nested, inputs=["text"]) == (
        "--input: column 'text' of nested.jsonl holds no text in row 1 but a list; choose another column"
    )


def test_a_label_that_train_does_not_have() -> None:
    mood("d/train.csv"), write_csv("d/dev.csv", text=["x", "y"], label=["1", "neutral"])
    assert fails(load_own, "d") == (
        "row 2 of d/dev.csv has label 'neutral', which is not in the label words 0 1; "
        "add it to --labels or mend the row"
    )
    data = load_own(mood(), labels={"0": "bad", "1": "good", "2": "mixed"})
    assert "no training row has the label 2; the model cannot learn it" in data.notes


def test_a_split_that_lacks_a_column() -> None:
    mood("d/train.csv"), write_csv("d/test.csv", text=TEXTS)
    assert fails(load_own, "d") == "--target: no column 'label' in d/test.csv; it has text"


def test_what_cannot_be_guessed() -> None:
    assert fails(load_own, write_csv("d.csv", one=TEXTS, two=TEXTS)) == (
        "cannot tell which column of d.csv is the target; set --target to one of one, two"
    )
    assert fails(load_own, write_csv("d.csv", idx=range(N), age=range(N), label=FOLLOWS)) == (
        "cannot tell which columns of d.csv are the inputs; set --input to some of: idx, age"
    )
    assert fails(load_own, write_csv("d.csv", label=FOLLOWS)) == (
        "cannot tell which columns of d.csv are the inputs; set --input to some of: none besides the target"
    )


def test_wrong_places(tmp_path: Path) -> None:
    mood()
    assert fails(load_own, "moood.csv") == "no file moood.csv; did you mean 'mood.csv'?"
    assert fails(load_own, "moods") == (
        "no file or folder moods; check the path, or name a hub data set as org/name or org/name:config"
    )
    assert fails(load_own, "") == "--data is empty; name a file, a folder or a hub data set"
    Path("mood.txt").write_text("x")
    assert fails(load_own, "mood.txt").startswith("cannot tell what kind of file mood.txt is; name it with one of")
    Path("empty").mkdir()
    assert fails(load_own, "empty") == (
        "no train file in empty, which holds no data files; name one train with the ending .jsonl.gz or .jsonl "
        "or .csv or .tsv or .parquet, or give --data a single file"
    )
    mood("d/train.csv"), mood("d/dev.csv"), mood("d/val.csv")
    assert fails(load_own, "d") == "d holds 2 validation files: dev.csv, val.csv; keep one"
    assert fails(load_own, mood("few.csv", 2), target="label", labels={"0": "a", "1": "b"}) == (
        "few.csv has 2 training rows, too few to set aside validation and test; add rows, at least 3 in all"
    )
    write_mirror(tmp_path / "m", "org/odd", {"a": {"test": {"text": ["x"]}}})
    assert fails(load_own, "org/odd:a", mirror=tmp_path / "m") == (
        "data set 'org/odd:a' has no split 'train', only test; choose one with training rows"
    )


def test_label_words_as_written_on_the_command_line() -> None:
    assert parse_labels("0=negative, 1 = very positive") == {"0": "negative", "1": "very positive"}
    assert fails(parse_labels, "0=a,b") == "--labels: 'b' is not VALUE=WORD; write it like 0=negative,1=positive"
    assert fails(parse_labels, "0=a,0=b") == "--labels: value '0' has two words, 'a' and 'b'; keep one"


# ---------------------------------------------------------------------------------------- prediction


def test_texts_become_what_the_model_was_trained_on() -> None:
    data = load_own(mood())
    (example,) = texts_to_examples(data.task, ["sentence number 3"])
    assert example.source in {example.source for example in data.train + data.validation + data.test}
    assert (example.target, example.references, example.label) == ("", (), None)
    assert texts_to_examples(data.task, [{"text": "a", "extra": 1}])[0].source == "text: a"
    pair = OwnTask("own/nli", ["premise", "claim"], "label", "text")
    assert texts_to_examples(pair, [{"claim": "b", "premise": "a"}])[0].source == "premise: a claim: b"
    assert fails(texts_to_examples, pair, ["a"]) == (
        'text 1: own/nli reads 2 columns; give {"premise": ..., "claim": ...}'
    )
    assert fails(texts_to_examples, pair, [{"premise": "a", "claim": "b"}, {"premise": "a", "clam": "b"}]) == (
        "text 2 lacks the column 'claim' of own/nli; did you mean 'clam'? it has premise, clam"
    )
    assert fails(texts_to_examples, pair, [{"premise": "a", "claim": " "}]) == (
        "text 1: column 'claim' is empty; give it some words"
    )


def test_texts_for_a_benchmark_task() -> None:
    rte, squad = get_task("glue/rte"), get_task("squad")
    finished = "sentence1: a sentence2: b"
    assert texts_to_examples(rte, [finished])[0].source == finished
    assert texts_to_examples(rte, [{"sentence1": "a", "sentence2": "b"}])[0].source == finished
    (example,) = texts_to_examples(squad, [{"question": "Who?", "context": "Ann."}])
    assert example.source == "question: Who ?  context: Ann . "
    assert fails(texts_to_examples, rte, [{"sentence1": "a"}]) == (
        "text 1 lacks the column 'sentence2' of glue/rte; did you mean 'sentence1'? it has sentence1"
    )
    assert fails(texts_to_examples, squad, [{"question": None, "context": "x"}]).startswith("text 1 does not fit squad")
    assert fails(texts_to_examples, rte, ["ok", "  "]) == "text 2 is empty; give it some words or leave it out"
