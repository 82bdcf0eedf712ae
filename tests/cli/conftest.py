"""A small table, and one run trained on it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import SMALL, Answer, call, write_table


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv of 20 rows with the columns review and stars."""
    return write_table(tmp_path_factory.mktemp("data") / "films.csv")


@pytest.fixture(scope="session")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """A finished run's folder, and what training it printed. Not to be written to."""
    out = tmp_path_factory.mktemp("trained") / "run"
    labels = ["--labels", "0=negative,1=positive"]
    answer = call("train", "--data", table, "--input", "review", "--target", "stars", *labels, *SMALL, "--out", out)
    assert answer.code == 0, answer.err
    return out, answer


@pytest.fixture
def copied(trained: tuple[Path, Answer], tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "copy"))


@pytest.fixture
def train_here(table: Path, tmp_path: Path) -> Callable[..., Answer]:
    """Train on the table into `tmp_path / "run"` with more arguments."""

    def train(*more: str | Path) -> Answer:
        columns = ["--input", "review", "--target", "stars"]
        return call("train", "--data", table, *columns, *SMALL, "--out", tmp_path / "run", *more)

    return train
