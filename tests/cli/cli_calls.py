"""Calls of the command line in this process, and the smallest settings and data for them."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompts.cli import main

SMALL = [
    "-s", "train.steps=2", "-s", "method.prompt_length=4", "-s", "method.offset_positions=64",
    "-s", "method.budget_tokens=20", "-s", "data.max_source_tokens=64", "-s", "model.dtype=fp32",
]  # fmt: skip
"""Settings of the smallest useful run."""
ROWS = 10


@dataclass
class Answer:
    """What one call left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object of `--json`."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The error line, which must be the only one and the last."""
        lines = self.err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.err
        assert "Traceback" not in self.err
        return lines[-1].removeprefix("error: ")


def call(*arguments: str | Path) -> Answer:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Answer(code, out.getvalue(), err.getvalue())


def write_table(path: Path, rows: int = ROWS) -> Path:
    """Write a table of `rows` good and as many bad films."""
    lines = [f"a lovely film number {i},1\nan awful film number {i},0\n" for i in range(rows)]
    path.write_text("review,stars\n" + "".join(lines))
    return path
