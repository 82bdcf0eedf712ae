"""A user's own data as a task: columns and label words are given, or guessed and said so.

Rows are counted from 1, the first one below the header. What a guess decided is a note for the user, with
the setting that changes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softprompts.errors import UsageError, suggest
from softprompts.tasks import metrics as measures
from softprompts.tasks.base import Example, Hub, Protocol, Row, Task, check_protocol
from softprompts.tasks.columns import (
    Kind,
    Rows,
    cell_answers,
    cell_text,
    check_cells,
    check_labels,
    column_texts,
    guess_inputs,
    guess_kind,
    guess_labels,
    guess_target,
    require_column,
    show_labels,
)
from softprompts.tasks.loading import TaskData, load_task
from softprompts.tasks.sources import ENDINGS, find_table, has_known_ending, hub_splits, read_hub, read_table
from softprompts.tasks.splits import OFFICIAL, SEED, SPLITS, permutation

METRICS: dict[str, tuple[str, ...]] = {
    "classes": ("accuracy", "macro_f1"),
    "text": ("em", "f1"),
    "number": ("pearson", "spearmanr"),
}
REPORTED = {"classes": "accuracy", "text": "f1", "number": "pearson"}
"""The headline metric of each kind, which also selects the checkpoint."""
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "dev", "valid", "val"), "test": ("test",)}
LONG_ANSWER = 10
"""Where references of free text have more words than this on average, ROUGE-L is given beside exact match and F1."""
HELD_OUT_SHARE = 10
"""One row in this many is set aside for each split that the data lack."""
_HUB_ID = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(:(?P<config>[^:@]+))?(@(?P<revision>[^@]+))?")
_NO_LABEL = "-1"


class OwnTask(Task):
    """A task made of named columns. `spec()` says all of it: `OwnTask(**task.spec())` is the same task."""

    split_rule = OFFICIAL

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        target: str,
        kind: Kind = "classes",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        classes = kind == "classes"
        self.name = name
        self.inputs = tuple(inputs)
        self.target = target
        self.kind = kind
        self.labels = check_labels(labels or {}) if classes else {}
        self.columns = (*self.inputs, target)
        self.label_column = target
        self.label_words = tuple(self.labels.values()) if classes else None
        self.label_names = tuple(self.labels) if classes else None
        self.has_label_table = classes
        self.metric_names = METRICS[kind]
        self.report_metric = REPORTED[kind]

    def spec(self) -> dict[str, Any]:
        """What makes this task, ready for JSON."""
        return {
            "name": self.name,
            "inputs": list(self.inputs),
            "target": self.target,
            "kind": self.kind,
            "labels": self.labels or None,
        }

    def source(self, row: Row, protocol: Protocol) -> str:
        return " ".join(f"{column}: {cell_text(row[column])}" for column in self.inputs)

    def class_of(self, row: Row) -> int:
        raw = cell_text(row[self.target]).strip()
        return list(self.labels).index(raw) if raw in self.labels else -1

    def render(self, row: Row, protocol: Protocol) -> list[Example]:
        if self.kind == "classes":
            return super().render(row, protocol)
        answers = cell_answers(row[self.target])
        value = measures.parse_number(answers[0]) if self.kind == "number" else None
        return [Example(self.source(row, protocol), answers[0], answers, value=value)]

    def is_valid(self, answer: str) -> bool:
        if self.kind == "number":
            return measures.parse_number(answer) is not None
        return super().is_valid(answer)

    def measure(
        self,
        answers: Sequence[str],
        examples: Sequence[Example],
        protocol: Protocol,
        cut: Callable[[str], str] | None,
    ) -> dict[str, float]:
        if self.kind != "number":
            scores = super().measure(answers, examples, protocol, cut)
            if self.kind == "text" and protocol == "clean" and _mean_words(examples) > LONG_ANSWER:
                scores["rougeL"] = measures.rouge_l(answers, [example.references for example in examples])
            return scores
        references = [float(example.target) for example in examples]
        low, high = min(references), max(references)
        # An answer that is no number counts as the farther end of the scale.
        farther = [low if value - low > high - value else high for value in references]
        numbers = [measures.parse_number(answer) for answer in answers]
        values = [end if number is None else number for number, end in zip(numbers, farther, strict=True)]
        return {
            "pearson": measures.pearson(values, references),
            "spearmanr": measures.spearman(values, references),
        }


def _mean_words(examples: Sequence[Example]) -> float:
    texts = [text for example in examples for text in example.references]
    return sum(len(text.split()) for text in texts) / max(1, len(texts))


def load_own(
    data: str | Path,
    inputs: Sequence[str] | None = None,
    target: str | None = None,
    labels: Mapping[str, str] | None = None,
    kind: Kind | None = None,
    protocol: str = "clean",
    mirror: str | Path | None = None,
    splits: Sequence[str] = SPLITS,
    shots: int | None = None,
    shot_seed: int = 0,
    whole: bool = False,
) -> TaskData:
    """Load a user's data: a file, a folder of splits, or a hub id `org/name[:config][@revision]`.

    `inputs` and `target` are columns; `labels` are label words, from the value in the data to the word
    that the model writes. `kind` is `classes`, `text` (free answers) or `number`. What is None is guessed
    from the training rows. A split that the data lack is a tenth of the training rows, always the same;
    if data without any split are `whole`, all their rows are the split that is asked for.
    """
    protocol = check_protocol(protocol)
    if kind is not None and kind not in METRICS:
        raise UsageError(f"unknown kind '{kind}'{suggest(kind, METRICS) or ';'} use {', '.join(METRICS)}")
    if labels is not None:
        labels, kind = check_labels(labels), kind or "classes"
        if kind != "classes":
            raise UsageError(f"--labels does not go with --kind {kind}; leave one of the two out")
    found = _read(str(data), Path(mirror) if mirror is not None else None)
    chosen, target = _choose_columns(found, inputs, target)
    _drop_unlabelled(found, target)
    for split, rows in found.rows.items():
        check_cells(rows, chosen, target, found.place(split))
    task = _make_task(found, chosen, target, kind, labels)
    for split, rows in found.rows.items():
        _check_targets(task, rows, found.place(split))
    if splits and not (whole and list(found.rows) == ["train"]):
        _set_aside(found)
        _check_classes(task, found)
    for split in splits:
        found.rows.setdefault(split, found.rows["train"])
        found.origins.setdefault(split, found.origins["train"])

    def read(split: str) -> tuple[Sequence[Row], str]:
        return found.rows[split], found.origins[split]

    loaded = load_task(task, protocol, splits=splits, shots=shots, shot_seed=shot_seed, read=read)
    loaded.notes += found.notes + _repeats(loaded)
    return loaded


def texts_to_examples(
    task: Task, texts: Sequence[str | Mapping[str, Any]], protocol: Protocol = "clean"
) -> list[Example]:
    """Examples without a target, for prediction.

    A dictionary holds the input columns. A text fills the input column of a task that has just one; for
    a benchmark task with several it is the finished source.
    """
    examples = []
    for number, text in enumerate(texts, start=1):
        if isinstance(text, str):
            columns = [column for column in task.columns if column != task.label_column]
            if len(columns) == 1:
                text = {columns[0]: text}
            elif isinstance(task, OwnTask):
                wanted = ", ".join(f'"{column}": ...' for column in columns)
                raise UsageError(f"text {number}: {task.name} reads {len(columns)} columns; give {{{wanted}}}")
        source = text if isinstance(text, str) else _source(task, text, number, protocol)
        if not source.strip():
            raise UsageError(f"text {number} is empty; give it some words or leave it out")
        examples.append(Example(source, "", ()))
    return examples


def _source(task: Task, row: Mapping[str, Any], number: int, protocol: Protocol) -> str:
    if isinstance(task, OwnTask):
        empty = [column for column in task.inputs if column in row and not cell_text(row[column]).strip()]
        if empty:
            raise UsageError(f"text {number}: column '{empty[0]}' is empty; give it some words")
    try:
        return task.source(task.normalise(row), protocol)
    except KeyError as error:
        column = str(error.args[0])
        has = ", ".join(map(str, row)) or "no columns"
        raise UsageError(
            f"text {number} lacks the column '{column}' of {task.name}{suggest(column, row) or ';'} it has {has}"
        ) from error
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"text {number} does not fit {task.name} ({error}); check the values") from error


# ---------------------------------------------------------------------------------------- columns


def _choose_columns(found: _Found, inputs: Sequence[str] | None, target: str | None) -> tuple[tuple[str, ...], str]:
    rows, where = found.rows["train"], found.place("train")
    listed = inputs.split(",") if isinstance(inputs, str) else inputs or ()
    given = [column.strip() for column in listed]
    for column in given:
        require_column(rows, column, "input", where)
        if column == target or given.count(column) > 1:
            twice = "is the target too" if column == target else "is named twice"
            raise UsageError(f"--input: column '{column}' {twice}; name it once")
    if target is None:
        target, note = guess_target(rows, given, where)
        found.notes.append(note)
    require_column(rows, target, "target", where)
    if not given:
        guessed, note = guess_inputs(rows, target, where)
        found.notes.append(note)
        return guessed, target
    return tuple(given), target


def _make_task(
    found: _Found, inputs: Sequence[str], target: str, kind: Kind | None, labels: Mapping[str, str] | None
) -> OwnTask:
    rows, names = found.rows["train"], found.class_names.get(target, ())
    if kind is None:
        kind, note = guess_kind(rows, target, names)
        found.notes.append(note)
    if kind == "classes" and labels is None:
        _require_two_classes(rows, target, found.place("train"))
        labels = guess_labels(rows, target, names)
        found.notes.append(f"label words: {show_labels(labels)} (guessed; set --labels to change)")
    return OwnTask(f"own/{found.name}", inputs, target, kind, labels)


def _check_targets(task: OwnTask, rows: Rows, where: str) -> None:
    if task.kind == "text":
        return
    fits = task.labels.__contains__ if task.kind == "classes" else task.is_valid
    texts = column_texts(rows, task.target)
    wrong = [(number, text) for number, text in enumerate(texts, start=1) if not fits(text)]
    if wrong:
        number, text = wrong[0]
        more = f" ({len(wrong)} such rows)" if len(wrong) > 1 else ""
        if task.kind == "number":
            raise UsageError(
                f"row {number} of {where} has {task.target} '{text}', which is not a number{more}; "
                "mend it or set --kind text"
            )
        raise UsageError(
            f"row {number} of {where} has {task.target} '{text}', which is not in the label words "
            f"{show_labels(task.labels)}{more}; add it to --labels or mend the row"
        )


def _check_classes(task: OwnTask, found: _Found) -> None:
    """Say which classes the final training rows lack; one class alone is an error."""
    if task.kind != "classes":
        return
    rows = found.rows["train"]
    _require_two_classes(rows, task.target, found.place("train"))
    present = set(column_texts(rows, task.target))
    absent = [raw for raw in task.labels if raw not in present]
    if absent:
        found.notes.append(f"no training row has the label {' or '.join(absent)}; the model cannot learn it")


def _require_two_classes(rows: Rows, target: str, where: str) -> None:
    different = set(column_texts(rows, target))
    if len(different) == 1:
        raise UsageError(
            f"all {len(rows)} training rows of {where} have {target} '{different.pop()}'; "
            "add rows of another class, or set another --target"
        )


# ---------------------------------------------------------------------------------------- reading


@dataclass
class _Found:
    """What was read: the rows of each split, where they are from, and what to tell the user."""

    data: str
    name: str
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def place(self, split: str) -> str:
        """Where a split is from, for messages."""
        return self.origins[split].removeprefix("local:")


def _read(data: str, mirror: Path | None) -> _Found:
    explicit = data.startswith("hub:")
    path = Path(data).expanduser()
    match = _HUB_ID.fullmatch(data.removeprefix("hub:"))
    if not data.strip():
        raise UsageError("--data is empty; name a file, a folder or a hub data set")
    if not explicit and path.is_dir():
        return _read_folder(data, path)
    if not explicit and (path.is_file() or has_known_ending(path)):
        found = _Found(data, path.name.split(".")[0])
        found.rows["train"], found.origins["train"] = read_table(path), f"local:{path}"
        return found
    if match and (explicit or mirror is not None or not Path(data.split("/")[0]).is_dir()):
        hub = Hub(match["path"], match["config"], match["revision"] or "main")
        return _read_hub(data, hub, mirror)
    if match:
        siblings = [entry.name for entry in path.parent.iterdir()]
        raise UsageError(
            f"no file or folder {data}{suggest(path.name, siblings) or ';'} "
            f"for the hub data set of that name write hub:{data}"
        )
    raise UsageError(f"no file or folder {data}; check the path, or name a hub data set as org/name or org/name:config")


def _read_folder(data: str, folder: Path) -> _Found:
    found = _Found(data, folder.resolve().name)
    for split, names in SPLIT_NAMES.items():
        paths = [path for name in names if (path := find_table(folder, name)) is not None]
        if len(paths) > 1:
            files = ", ".join(path.name for path in paths)
            raise UsageError(f"{folder} holds {len(paths)} {split} files: {files}; keep one")
        if paths:
            found.rows[split], found.origins[split] = read_table(paths[0]), f"local:{paths[0]}"
    if "train" not in found.rows:
        tables = sorted(entry.name for entry in folder.iterdir() if has_known_ending(entry))
        raise UsageError(
            f"no train file in {folder}, which holds {', '.join(tables) or 'no data files'}; "
            f"name one train with the ending {' or '.join(ENDINGS)}, or give --data a single file"
        )
    return found


def _read_hub(data: str, hub: Hub, mirror: Path | None) -> _Found:
    found = _Found(data, hub.path.split("/")[-1] + (f":{hub.config}" if hub.config else ""))
    there = hub_splits(hub, mirror)
    for split, names in SPLIT_NAMES.items():
        for name in [name for name in names if name in there][:1]:
            found.rows[split], found.origins[split], found.class_names = read_hub(hub, name, mirror)
    if "train" not in found.rows:
        raise UsageError(
            f"data set '{data}' has no split 'train', only {', '.join(there)}; choose one with training rows"
        )
    return found


def _drop_unlabelled(found: _Found, target: str) -> None:
    """Leave out published splits whose labels are withheld."""
    for split in [split for split in found.rows if split != "train"]:
        labels = {cell_text(row.get(target)) for row in found.rows[split]}
        if target in found.class_names and labels == {_NO_LABEL}:
            del found.rows[split], found.origins[split]
            found.notes.append(f"{split} split left out: all its labels are {_NO_LABEL} (withheld)")


def _set_aside(found: _Found) -> None:
    """Take the splits that the data lack out of the training rows."""
    missing = [split for split in ("validation", "test") if split not in found.rows]
    if not missing:
        return
    rows, origin = found.rows["train"], found.origins["train"]
    share = max(1, len(rows) // HELD_OUT_SHARE)
    if len(rows) - share * len(missing) < 1:
        raise UsageError(
            f"{found.data} has {len(rows)} training rows, too few to set aside {' and '.join(missing)}; "
            f"add rows, at least {len(missing) + 1} in all"
        )
    order = permutation(len(rows))
    parts = [order[share * index : share * (index + 1)] for index in range(len(missing))]
    parts.append(order[share * len(missing) :])
    for split, part in zip([*missing, "train"], parts, strict=True):
        found.rows[split] = [rows[index] for index in part]
        found.origins[split] = f"{origin} ({len(part)} of {len(rows)} rows, seed {SEED})"
    sizes = ", ".join(f"{split} {len(found.rows[split]):,}" for split in SPLITS)
    found.notes.append(
        f"no {' or '.join(missing)} split in {found.data}: took 1 in {HELD_OUT_SHARE} training rows for "
        f"{'each' if len(missing) > 1 else 'it'} (seed {SEED}); rows: {sizes}"
    )


def _repeats(data: TaskData) -> list[str]:
    seen = {example.source for example in data.train}
    notes = []
    for split in ("validation", "test"):
        examples: list[Example] = getattr(data, split)
        again = sum(example.source in seen for example in examples)
        if again:
            notes.append(
                f"{again} of {len(examples)} {split} rows have an input that train has too; scores may be too good"
            )
    return notes
