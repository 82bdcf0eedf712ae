"""What the project set out to reach, beside what the committed records say: the first table of docs/speed.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
Row = Mapping[str, Any]
Figures = list[tuple[str, float]]
"""What was measured, each with the name of its case; better than the goal or not."""


@dataclass(frozen=True)
class Target:
    """One goal: which record tells, how, and the number to reach."""

    text: str
    benchmark: str
    figures: Callable[[Record], Figures]
    goal: float
    at_most: bool = False
    form: str = "{:.2f} x"

    def row(self, record: Record | None) -> list[str]:
        """Return the cells: the goal, what came out, the verdict."""
        found = [] if record is None else self.figures(record)
        if not found:
            return [self.text, "not measured here", "open"]
        good = [value <= self.goal if self.at_most else value >= self.goal for _, value in found]
        verdict = "reached" if all(good) else "partly" if any(good) else "missed"
        return [self.text, "; ".join(f"{self.form.format(value)} {case}".strip() for case, value in found), verdict]


def median(key: str, name: Callable[[Row], str], keep: Callable[[Row], bool]) -> Callable[[Record], Figures]:
    """Return a reader of one figure's medians, of the rows to keep."""
    return lambda record: [(name(row), row[key]["median"]) for row in record["rows"] if keep(row)]


def text_of(row: Row) -> str:
    """Name a row of `train_step`."""
    return f"at {row['text_tokens']} tokens"


def at_seventy(dtype: str) -> Callable[[Row], bool]:
    """Return which row of `train_step` a goal is about."""
    return lambda row: row["dtype"] == dtype and row["text_tokens"] == 70


def serving(row: Row) -> str:
    """Name a row of `mixed_serving`."""
    return f"{row['model']} {row['kind']}" + (" (remembering)" if row["remembering"] else "")


def shares(record: Record) -> Figures:
    """Return the time of a step in units of the limit, at the rate of the same rounds and at the best rate."""
    rows = [row for row in record["rows"] if row["dtype"] == "fp32"]
    return [
        (f"{text_of(row)}{where}", 1 / row[key]["median"])
        for key, where in (("share_of_limit", ""), ("share_of_best", ", best rate"))
        for row in rows
    ]


def evaluating(record: Record) -> Figures:
    """Return the part of each run that evaluating took, in percent."""
    return [(f"({row['task']})", 100 * row["eval_share"]) for row in record["rows"]]


def searching(record: Record) -> Figures:
    """Return the cost of a run with a search, in plain runs."""
    return [(f"({row['task']})", row["with_search"]) for row in record["rows"] if row["with_search"]]


def starting(number: int) -> Callable[[Record], Figures]:
    """Return a reader of the seconds in a row of `start_up`."""
    return lambda record: [("", record["rows"][number]["seconds"]["median"])]


def members(row: Row) -> str:
    """Name a row of `population`."""
    return f"({row['members']}, {row['case']})"


TARGETS = (
    Target("a step at 70 tokens at least 4 times as fast as the reference way, fp32", "train_step",
           median("faster_than_reference", text_of, at_seventy("fp32")), 4),
    Target("the same 6 times in bf16, on a CPU with bf16 units", "train_step",
           median("faster_than_reference", text_of, at_seventy("bf16")), 6),
    Target("a step within 25 % of the limit", "train_step", shares, 1.25, at_most=True),
    Target("a decoder's step at least 2.5 times as fast as PEFT's", "decoder_step",
           median("faster_than_peft", lambda row: "", lambda row: True), 2.5),
    Target("a member of a population costs at most 5 % more than alone", "population",
           median("relative_to_alone", members, lambda row: row["members"] > 1), 1.05, at_most=True),
    Target("mixed requests at least 5 times as fast as switching adapters", "mixed_serving",
           median("faster_than_rows", serving, lambda row: True), 5),
    Target("evaluating takes at most a tenth of a default run", "default_run", evaluating, 10, at_most=True,
           form="{:.1f} %"),
    Target("a run with a search costs at most 1.5 plain runs", "default_run", searching, 1.5, at_most=True),
    Target("`softprompts --help` within 0.4 s", "start_up", starting(0), 0.4, at_most=True, form="{:.2f} s"),
    Target("the demo's first step within 15 s", "start_up", starting(1), 15, at_most=True, form="{:.1f} s"),
)  # fmt: skip


def table(record_of: Callable[[str], Record | None]) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and cells."""
    return ("goal", "medians measured", ""), [target.row(record_of(target.benchmark)) for target in TARGETS]
