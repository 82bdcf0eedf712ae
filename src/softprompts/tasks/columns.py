"""Columns of a user's table: cells as text, label words, and guesses at which column is what.

A guess comes with a note for the user, which names the setting that changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from softprompts.errors import UsageError, suggest
from softprompts.tasks.metrics import parse_number

Kind = Literal["classes", "text", "number"]
Rows = Sequence[Mapping[str, Any]]

TARGET_NAMES = ("label", "labels", "target", "answer", "answers", "output", "class", "category", "y")
ID_NAMES = {"", "id", "ids", "idx", "index", "guid", "uid", "uuid", "unnamed: 0", "__index_level_0__"}
MAX_CLASSES = 20
MAX_WORD_LENGTH = 50


def cell_text(value: Any) -> str:
    """A cell as text: nothing for None and NaN, `true` for True, `1` for 1.0."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def cell_answers(value: Any) -> tuple[str, ...]:
    """The accepted answers in a target cell: one text, a list of them, or SQuAD's {"text": [...]}."""
    if isinstance(value, Mapping):
        value = value.get("text", [])
    texts = [cell_text(item).strip() for item in (value if isinstance(value, (list, tuple)) else [value])]
    return tuple(dict.fromkeys(text for text in texts if text))


def column_names(rows: Rows) -> tuple[str, ...]:
    """All columns, in the order of their first use."""
    return tuple(dict.fromkeys(column for row in rows for column in row))


def column_texts(rows: Rows, column: str) -> list[str]:
    """A column as stripped texts."""
    return [cell_text(row.get(column)).strip() for row in rows]


def require_column(rows: Rows, column: str, setting: str, where: str) -> None:
    """Raise UsageError if there is no such column."""
    columns = column_names(rows)
    if column not in columns:
        raise UsageError(
            f"--{setting}: no column '{column}' in {where}{suggest(column, columns) or ';'} it has {', '.join(columns)}"
        )


def check_cells(rows: Rows, inputs: Sequence[str], target: str, where: str) -> None:
    """Raise UsageError unless the columns exist and hold something in every row, the inputs texts."""
    for column in (*inputs, target):
        require_column(rows, column, "target" if column == target else "input", where)
        cells = [row.get(column) for row in rows]
        nested = [n for n, cell in enumerate(cells, start=1) if isinstance(cell, (list, tuple, Mapping))]
        if nested and column != target:
            raise UsageError(
                f"--input: column '{column}' of {where} holds no text in row {nested[0]} "
                f"but a {type(cells[nested[0] - 1]).__name__}; choose another column"
            )
        empty = [str(number) for number, cell in enumerate(cells, start=1) if not cell_answers(cell)]
        if empty:
            listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            raise UsageError(
                f"column '{column}' is empty in {len(empty)} of {len(rows)} rows of {where} (row {listed}); "
                "fill or remove them"
            )


# ---------------------------------------------------------------------------------------- labels


def parse_labels(text: str) -> dict[str, str]:
    """Read label words as written on the command line: `0=negative,1=positive`."""
    labels: dict[str, str] = {}
    for part in text.split(","):
        raw, _, word = (piece.strip() for piece in part.partition("="))
        if not (raw and word):
            raise UsageError(f"--labels: '{part.strip()}' is not VALUE=WORD; write it like 0=negative,1=positive")
        if raw in labels:
            raise UsageError(f"--labels: value '{raw}' has two words, '{labels[raw]}' and '{word}'; keep one")
        labels[raw] = word
    return check_labels(labels)


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Strip label words and check that answers can be told apart."""
    stripped = {str(raw).strip(): str(word).strip() for raw, word in labels.items()}
    values: dict[str, str] = {}
    for raw, word in stripped.items():
        if not word:
            raise UsageError(f"--labels: value '{raw}' has an empty word; give it a word to write")
        if word in values:
            raise UsageError(
                f"--labels: values '{values[word]}' and '{raw}' have the same word '{word}'; "
                "give each its own, or merge the two values in the data"
            )
        values[word] = raw
    if len(stripped) < 2:
        shown = show_labels(stripped) or "none given"
        raise UsageError(f"--labels: fewer than two label words ({shown}); add the others")
    return stripped


def show_labels(labels: Mapping[str, str]) -> str:
    """Label words as the user would write them."""
    return " ".join(word if raw == word else f"{raw}={word}" for raw, word in labels.items())


# ---------------------------------------------------------------------------------------- guesses


def guess_target(rows: Rows, taken: Sequence[str], where: str) -> tuple[str, str]:
    """The column of a usual name, else the last one with few different values; `taken` are inputs."""
    columns = [column for column in column_names(rows) if column not in taken]
    note = "target column: '{}' (guessed; set --target to change)"
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    for name in TARGET_NAMES:
        if name in by_name:
            return by_name[name], note.format(by_name[name])
    for column in reversed(columns):
        if not _is_id(column) and _has_few_values(column_texts(rows, column)):
            return column, note.format(column)
    raise UsageError(f"cannot tell which column of {where} is the target; set --target to one of {', '.join(columns)}")


def guess_inputs(rows: Rows, target: str, where: str) -> tuple[tuple[str, ...], str]:
    """The other columns of text, in order; not ids, numbers, or the target in other words."""
    others = [column for column in column_names(rows) if column != target]
    inputs = tuple(
        column for column in others
        if not _is_id(column) and _is_text(rows, column) and not _tells_target(rows, column, target)
    )  # fmt: skip
    if not inputs:
        listed = ", ".join(others) or "none besides the target"
        raise UsageError(f"cannot tell which columns of {where} are the inputs; set --input to some of: {listed}")
    left_out = _quoted(column for column in others if column not in inputs)
    note = f"input column{'s' if len(inputs) > 1 else ''}: {_quoted(inputs)} (guessed; set --input to change)"
    return inputs, note + (f"; left out: {left_out}" if left_out else "")


def guess_kind(rows: Rows, target: str, class_names: Sequence[str] = ()) -> tuple[Kind, str]:
    """Classes for few short values that recur, numbers for many numbers, else free text."""
    texts = column_texts(rows, target)
    different = len(set(texts))
    kind: Kind = "text"
    if class_names or (
        _has_few_values(texts)
        and max(map(len, texts)) <= MAX_WORD_LENGTH
        and not any(isinstance(row.get(target), (list, tuple, Mapping)) for row in rows)
    ):
        kind = "classes"
    elif all(parse_number(text) is not None for text in texts):
        kind = "number"
    note = f"kind: {kind}, as '{target}' has {different:,} different values (guessed; set --kind to change)"
    return kind, note


def guess_labels(rows: Rows, target: str, class_names: Sequence[str] = ()) -> dict[str, str]:
    """Label words: the names of the classes where the data set has them, else the labels as written."""
    if class_names:
        return {str(index): name for index, name in enumerate(class_names)}
    texts = set(column_texts(rows, target))
    numbers = {text: parse_number(text) for text in texts}
    if all(number is not None for number in numbers.values()):
        return {text: text for text in sorted(texts, key=lambda text: (numbers[text] or 0.0, text))}
    return {text: text for text in sorted(texts)}


def _is_id(column: str) -> bool:
    name = column.strip().lower()
    return name in ID_NAMES or name.endswith(("_id", "_idx", "_index"))


def _has_few_values(texts: Sequence[str]) -> bool:
    different = len(set(texts))
    return different <= MAX_CLASSES and 2 * different <= len(texts)


def _is_text(rows: Rows, column: str) -> bool:
    """Whether a column holds texts, and not only numbers written as text."""
    values = [row.get(column) for row in rows]
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    if any(value is not None and not isinstance(value, str) for value in values):
        return False
    return any(parse_number(text) is None for text in texts)


def _tells_target(rows: Rows, column: str, target: str) -> bool:
    """Whether a column only repeats the target, as `label_text` does; it would give the answer away."""
    if column.lower().startswith(f"{target.lower()}_"):
        return True
    texts, targets = column_texts(rows, column), column_texts(rows, target)
    different = len(set(texts))
    pairs = set(zip(texts, targets, strict=True))
    return _has_few_values(texts) and different == len(set(targets)) == len(pairs)


def _quoted(columns: Any) -> str:
    return ", ".join(f"'{column}'" for column in columns)
