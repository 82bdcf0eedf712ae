"""Use what `train` left: open a run or a bare adapter, score it again, answer new texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompts import results
from softprompts.attach import adapters_of
from softprompts.backbone import load_backbone
from softprompts.checkpoint import adapter_folder, load_adapter, read_config
from softprompts.config import DataSettings, ModelSettings, RunSettings, insert
from softprompts.data import Encoder, Rows, load_data, make_encoder, num_labels, truncation_notes
from softprompts.errors import UsageError
from softprompts.evaluate import Evaluation, evaluate, predict, scoring_for
from softprompts.tasks import Example, Task, check_protocol, get_task
from softprompts.tasks.own import OwnTask, texts_to_examples

RUN_ENTRY = "softprompts_run"
"""Entry of `adapter_config.json` that says how the adapter was trained, so that it can be used alone."""


@dataclass
class Trained:
    """A backbone with a trained prompt on it, and the task it was trained for."""

    encoder: Encoder
    settings: RunSettings
    record: Mapping[str, Any]

    @property
    def task(self) -> Task:
        """The task it was trained for."""
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
        """Answer and score one split of the task's data; `advance` counts rows, `note` hears of cut texts.

        Raises:
            UsageError: the data cannot be read, or there is no such split.
        """
        if split not in ("train", "validation", "test"):
            raise UsageError(f"unknown split '{split}'; use validation or test")
        rows = self._encode(getattr(load_data(self.settings, (split,)), split), split, note)
        plan = self.settings.eval
        return evaluate(self.encoder, rows, self.protocol, scoring or plan.scoring, plan.batch_size, advance)

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
        scoring = scoring_for(self.encoder.backbone, self.task, self.protocol, self.settings.eval.scoring)
        answers = predict(self.encoder, rows, scoring, self.settings.eval.batch_size, advance)
        return [answers[i] for i in range(len(rows))]

    def _encode(self, examples: Sequence[Example], name: str, note: Callable[[str], Any]) -> Rows:
        rows = self.encoder.encode(examples)
        for text in truncation_notes({name: rows}, self.encoder):
            note(text)
        return rows


def open_trained(path: str | Path, overrides: Sequence[tuple[str, Any]] = ()) -> Trained:
    """Load the backbone and the adapter of a run's folder, or of a bare adapter folder.

    Args:
        path: what `train` wrote, or its `adapter/` alone, wherever it was copied.
        overrides: settings to change, for example ("data.folder", "/data") or ("model.name", "my/t5").

    Raises:
        UsageError: no adapter there, or a backbone that cannot be loaded.
    """
    path = Path(path)
    folder = adapter_folder(path)
    _, entries = read_config(folder)
    run = entries.get(RUN_ENTRY)
    if run is None:
        raise UsageError(f"{folder} does not say for which task it was trained; use it with softprompts.load_adapter")
    tree = {"task": run["task"], "data": dict(run["data"]), "model": dict(run["model"]), "eval": dict(run["eval"])}
    if run["own"]:
        # Other data are read through the columns and label words that were trained on, never guessed again.
        own = {key: run["own"][key] for key in ("inputs", "target", "kind", "labels")}
        tree["data"] |= {key: value for key, value in own.items() if value is not None}
    for key, value in overrides:
        insert(tree, key, value)
    settings = RunSettings(**tree)
    task = OwnTask(**run["own"]) if run["own"] else get_task(run["task"])
    backbone = load_backbone(settings.model, num_labels(task))
    load_adapter(backbone.model, folder, trainable=False)
    backbone.model.eval()
    record = results.read_record(path) if (path / results.RECORD).is_file() else {}
    reach = adapters_of(backbone.model).longest_text
    return Trained(make_encoder(backbone, task, settings.data, reach), settings, record)


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
