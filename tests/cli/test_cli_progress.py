"""Progress on stderr: bars on a terminal, lines elsewhere; and the public names of the package."""

import io
import subprocess
import sys
from types import ModuleType

import pytest
from rich.console import Console

import softprompts
from softprompts.progress import BarProgress, LineProgress, clock, make_progress


def go(console: Console) -> BarProgress | LineProgress:
    """Report a short run."""
    with make_progress(console, "seed 1") as progress:
        progress.note("a note [with brackets]")
        progress.phase("train", 100)
        for _ in range(10):
            progress.advance(5)
            progress.advance(0, loss=0.5)
        progress.advance(0, score=0.75)
        progress.phase("test", 8)
        progress.advance(8)
    return progress


def test_lines() -> None:
    stream = io.StringIO()
    assert isinstance(go(Console(file=stream, width=40)), LineProgress)
    note, phase, evaluation, test = stream.getvalue().splitlines()
    assert note == "a note [with brackets]"
    assert phase == "seed 1 train: 100 steps"
    assert evaluation.startswith("seed 1 train 50/100  loss 0.5000  score 0.7500  ")
    assert evaluation.endswith(" left")
    assert test == "seed 1 test: 8 rows"


def test_bars() -> None:
    stream = io.StringIO()
    assert isinstance(go(Console(file=stream, width=140, force_terminal=True)), BarProgress)
    drawn = stream.getvalue()
    for shown in ("seed 1 reading", "seed 1 test", "8/8", "a note [with brackets]"):
        assert shown in drawn


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# ------------------------------------------------------------------------------------ public names


def test_every_public_name_is_there() -> None:
    for name in softprompts.__all__:
        assert not isinstance(getattr(softprompts, name), ModuleType)
    assert set(softprompts.__all__) <= set(dir(softprompts))
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = softprompts.atach


def test_attach_is_the_function_whatever_was_imported_before() -> None:
    code = "import softprompts.train, softprompts.attach; from softprompts import attach; print(callable(attach))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "True\n", done.stderr
