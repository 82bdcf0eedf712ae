"""Using a trained run: own data are read as they were trained on, cut texts are said."""

from pathlib import Path

import pytest

from softprompts.config import parse_assignment, resolve
from softprompts.errors import UsageError
from softprompts.train import train
from softprompts.trained import open_trained

SIZES = ("method.prompt_length=4", "method.budget_tokens=20", "method.offset_positions=32", "train.steps=1",
         "train.batch_size=4", "eval.untuned=false", "model.dtype=fp32")  # fmt: skip


def csv(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    rows = [f"the {word} number {i},{i % 2}" for i, word in enumerate(["lamp", "tree", "road", "song"] * 5)]
    data = csv(folder / "data.csv", "review,label", rows)
    pairs = (f"data.path={data}", 'data.labels={"0"="bad","1"="good"}', *SIZES)
    train(resolve(None, [parse_assignment(pair) for pair in pairs]), folder / "run")
    return folder / "run"


def test_other_data_are_read_through_the_trained_columns(run: Path, tmp_path: Path) -> None:
    rows = [f"Bonn,a remark on {i},{i % 2}" for i in range(20)]
    trained = open_trained(run, [("data.path", str(csv(tmp_path / "other.csv", "city,review,label", rows)))])
    read = []
    encode = trained.encoder.encode
    object.__setattr__(trained.encoder, "encode", lambda examples: read.extend(examples) or encode(examples))
    trained.evaluate("test")
    assert all(example.source.startswith("review: a remark") for example in read)
    assert {example.target for example in read} <= {"bad", "good"}


def test_new_texts_fill_the_trained_column(run: Path) -> None:
    trained = open_trained(run)
    notes: list[str] = []
    answers = trained.predict(["a lamp", {"review": "a lamp"}, "word " * 99], note=notes.append)
    assert answers[0] == answers[1] and set(answers) <= {"bad", "good"}
    assert notes == ["1 of 3 given texts were cut to 32 tokens (method.offset_positions, or the model's own positions)"]


def test_what_is_no_run_says_so(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UsageError, match="holds no adapter"):
        open_trained(tmp_path)
    with pytest.raises(UsageError, match="unknown split 'tset'"):
        open_trained(run).evaluate("tset")
