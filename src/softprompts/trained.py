"""Use what `train` left: open a run or a bare adapter, score it again, answer new texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompts import results
from softprompts.attach import adapters_of
from softprompts.backbone import Backbone, embedded_name, load_backbone
from softprompts.checkpoint import adapter_folder, load_adapter, read_config
from softprompts.config import COLUMNS, DataSettings, ModelSettings, RunSettings, insert
from softprompts.data import Encoder, Rows, load_data, make_encoder, num_labels, truncation_notes
from softprompts.errors import UsageError
from softprompts.evaluate import Evaluation, evaluate, predict, scoring_for
from softprompts.tasks import Example, Task, check_protocol, get_task
from softprompts.tasks.own import OwnTask, texts_to_examples

RUN_ENTRY = "softprompts_run"
"""Entry of `adapter_config.json` that says how the adapter was trained, so that it can be used alone."""
LIMITS = ("shots", "train_limit", "validation_limit", "test_limit")
"""Settings that leave rows of the data out."""
HEADS = {"SEQ_CLS": "classification", "CAUSAL_LM": "language", "SEQ_2_SEQ_LM": "language"}
"""How an adapter answers, by PEFT's task type."""


class FreeText(Task):
    """No task: the model reads a text as it is and writes on."""

    name = "free text"
    template = "{text}"
    columns = ("text",)
    label_words = None
    max_source_tokens = 1_000_000


class FreeEncoder(Encoder):
    """Gives a text the tokenizer's own special tokens and nothing else."""

    def encode(self, examples: Sequence[Example]) -> Rows:
        """Tokenise; texts beyond `max_source` tokens lose their end."""
        full = self.backbone.tokenizer([example.source for example in examples])["input_ids"]
        sources = [ids[: self.max_source] for ids in full]
        empty: list[list[int]] = [[] for _ in examples]
        return Rows(examples, sources, empty, [0.0] * len(full), sum(len(ids) > self.max_source for ids in full))


@dataclass
class Trained:
    """A backbone with a trained prompt on it, and the task it was trained for."""

    encoder: Encoder
    settings: RunSettings
    record: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    """What was guessed about the data."""
    whole: bool = False
    """Whether the data are a file that was not trained on, so that all its rows can be scored."""

    @property
    def task(self) -> Task:
        """The task it was trained for, or is used on."""
        return self.encoder.task

    @property
    def protocol(self) -> Any:
        """The protocol of templates and scores."""
        return check_protocol(self.settings.data.protocol)

    def evaluate(
        self,
        split: str = "test",
        scoring: str | None = None,
        advance: Callable[[int], Any] = lambda done: None,
        note: Callable[[str], Any] = lambda text: None,
    ) -> Evaluation:
        """Answer and score one split of the task's data; `advance` counts rows, `note` hears what to know of the data.

        Of a single file that was not trained on, all rows are scored, whatever the split is called.

        Raises:
            UsageError: the data cannot be read, there is no such split, or no task.
        """
        if isinstance(self.task, FreeText):
            raise UsageError(
                "this adapter does not say for which task it was trained; give --task NAME, or --data FILE for your "
                "own data"
            )
        if split not in ("train", "validation", "test"):
            raise UsageError(f"unknown split '{split}'; use validation or test")
        loaded = load_data(self.settings, (split,), self.whole)
        for text in loaded.notes:
            note(text)
        rows = self._encode(getattr(loaded, split), split, note)
        plan, wanted = self.settings.eval, scoring or self.settings.eval.scoring
        return evaluate(self.encoder, rows, self.protocol, wanted, plan.batch_size, advance, beams=plan.beams)

    def predict(
        self,
        texts: Sequence[str | Mapping[str, Any]],
        advance: Callable[[int], Any] = lambda done: None,
        note: Callable[[str], Any] = lambda text: None,
    ) -> list[str]:
        """Answer texts, or rows with the task's input columns; `advance` and `note` as in `evaluate`.

        Raises:
            UsageError: an empty text or a missing column.
        """
        rows = self._encode(texts_to_examples(self.task, texts, self.protocol), "given", note)
        plan = self.settings.eval
        scoring = scoring_for(self.encoder.backbone, self.task, self.protocol, plan.scoring, plan.beams)
        answers = predict(self.encoder, rows, scoring, plan.batch_size, advance, beams=plan.beams)
        return [answers[i] for i in range(len(rows))]

    def _encode(self, examples: Sequence[Example], name: str, note: Callable[[str], Any]) -> Rows:
        rows = self.encoder.encode(examples)
        for text in truncation_notes({name: rows}, self.encoder):
            note(text)
        return rows


def open_trained(path: str | Path, overrides: Sequence[tuple[str, Any]] = ()) -> Trained:
    """Load the backbone and the adapter of a run's folder, or of a bare adapter folder.

    An adapter that `train` did not make (PEFT saved it, or `save_adapter`) does not say its task: override "task" or
    "data.path", else it can only `predict`, and writes freely from a text as it is.

    Args:
        path: what `train` wrote, or its `adapter/` alone, wherever it was copied; or any adapter of this package.
        overrides: settings to change, for example ("data.folder", "/data") or ("model.name", "my/t5").

    Raises:
        UsageError: no adapter there, a backbone that cannot be loaded, or a head whose task is not said.
    """
    path = Path(path)
    folder = adapter_folder(path)
    if (path / results.TASKS).is_dir():
        names = ", ".join(sorted(task.name for task in (path / results.TASKS).iterdir()))
        raise UsageError(f"{path} was trained on several tasks; name one of {names}: {path / results.TASKS}/NAME")
    _, entries = read_config(folder)
    run = entries.get(RUN_ENTRY) or bare_entry(entries, folder)
    settings = settings_of(run, overrides)
    given = {key for key, _ in overrides}
    whole = is_other_file(settings, run)
    if whole:  # what limited the training does not limit this
        limits = {key: None for key in LIMITS if f"data.{key}" not in given}
        settings = settings.updated(data=settings.data.updated(**limits))
    settings, task, notes = find_task(settings, run["own"], given)
    free = isinstance(task, FreeText)
    backbone = load_backbone(settings.model, 1 if free else num_labels(task))
    if free and backbone.kind == "classification":
        raise UsageError(
            f"{folder} answers through a head and does not say for which task it was trained; give --task NAME, or "
            f"--data FILE for your own data"
        )
    load_adapter(backbone.model, folder, trainable=False)
    backbone.model.eval()
    record = results.read_record(path) if (path / results.RECORD).is_file() else {}
    return Trained(encoder_for(backbone, task, settings), settings, record, notes, whole)


def bare_entry(entries: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a run entry for an adapter that has none: its backbone and how it answers, but no task.

    Raises:
        UsageError: it answers in a way that no task here asks for.
    """
    task_type = entries.get("task_type")
    wrapped = str((entries.get("auto_mapping") or {}).get("base_model_class") or "")
    if task_type not in (None, *HEADS) or wrapped.endswith(("ForTokenClassification", "ForQuestionAnswering")):
        raise UsageError(
            f"{folder} was trained for {task_type or wrapped}, which eval and predict cannot ask; use it with "
            f"softprompts.load_adapter"
        )
    has_head = wrapped.endswith("ForSequenceClassification") or bool(entries.get("modules_to_save"))
    head = HEADS.get(str(task_type)) or ("classification" if has_head else "auto")
    base = entries.get("base_model_name_or_path")
    model = {"name": base and embedded_name(base), "revision": entries.get("revision"), "head": head}
    return {"task": None, "own": None, "data": {}, "model": model, "eval": {}}


def settings_of(run: Mapping[str, Any], overrides: Sequence[tuple[str, Any]]) -> RunSettings:
    """Return a run entry's settings with the overrides put in.

    Raises:
        UsageError: a task and data of one's own together, no backbone, or settings that cannot be.
    """
    tree = {"task": run["task"], "data": dict(run["data"]), "model": dict(run["model"]), "eval": dict(run["eval"])}
    given = {key for key, _ in overrides}
    if run["own"]:
        # Other data are read through the columns and label words that were trained on, never guessed again.
        tree["data"] |= {key: run["own"][key] for key in COLUMNS if run["own"][key] is not None}
    if {"task", "data.path"} <= given:
        raise UsageError("--task and --data exclude each other; leave one out")
    if "task" in given:
        tree["data"] = {key: value for key, value in tree["data"].items() if key not in ("path", *COLUMNS)}
    if "data.path" in given:
        tree["task"] = None
    if "model.name" in given:
        tree["model"]["revision"] = None  # it was another repository's
    for key, value in overrides:
        insert(tree, key, value)
    if tree["model"].get("name", "") is None:
        raise UsageError("the adapter does not name its backbone; give it with --model NAME")
    return RunSettings(**tree)


def is_other_file(settings: RunSettings, run: Mapping[str, Any]) -> bool:
    """Whether the data are a single file, none of the name of the one that was trained on (it may have moved), nor the
    `train` of a folder of that name."""
    path, trained_on = settings.data.path, run["task"] or run["data"].get("path")
    # An adapter that does not say what it was trained on may have seen these very rows.
    if path is None or trained_on is None or not Path(path).expanduser().is_file():
        return False
    name, home = Path(path).name, Path(path).resolve().parent.name
    known = Path(trained_on).name
    return name != known and not (home == known and name.split(".")[0] == "train")


def find_task(
    settings: RunSettings, own: Mapping[str, Any] | None, given: set[str]
) -> tuple[RunSettings, Task, tuple[str, ...]]:
    """Return (settings without anything left to guess, the task, notes on what was guessed)."""
    columns = {f"data.{key}" for key in COLUMNS}
    if own is not None and not given & {"task", *columns}:
        return settings, OwnTask(**own), ()
    if settings.data.path is not None:
        found = load_data(settings, ())
        assert isinstance(found.task, OwnTask), "a path gives a task of named columns"
        spec = found.task.spec()
        data = settings.data.updated(**{key: spec[key] for key in COLUMNS})
        return settings.updated(data=data), found.task, tuple(found.notes)
    if given & columns:
        raise UsageError("--input, --target, --labels and --kind describe data of your own; give --data FILE too")
    return settings, FreeText() if settings.task is None else get_task(settings.task), ()


def encoder_for(backbone: Backbone, task: Task, settings: RunSettings) -> Encoder:
    """Return the encoder of a task, or of free text."""
    encoder = make_encoder(backbone, task, settings.data, adapters_of(backbone.model).longest_text)
    return FreeEncoder(**vars(encoder)) if isinstance(task, FreeText) else encoder


def run_entry(settings: RunSettings, task: Task) -> dict[str, Any]:
    """Return what an adapter must carry so that `open_trained` needs nothing else."""
    return {
        "task": settings.task,
        "own": task.spec() if isinstance(task, OwnTask) else None,
        "data": changed(settings.data, DataSettings()),
        "model": changed(settings.model, ModelSettings()),
        "eval": settings.eval.model_dump(mode="json"),
    }


def changed(settings: Any, defaults: Any) -> dict[str, Any]:
    """Return the settings that are not the defaults, as plain data."""
    plain, usual = settings.model_dump(mode="json"), defaults.model_dump(mode="json")
    return {key: value for key, value in plain.items() if value != usual[key]}
