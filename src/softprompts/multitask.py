"""Several tasks at once: rows of different tasks in one batch, parameters shared by all of them or owned by one.

`train --task glue/mnli,glue/qnli` trains a prompt for each task. What a method names in `task_parts` belongs to the
task (MPT's factors, ATTEMPT's target prompt, the weights of ACCEPT's codebooks); everything else is one tensor for
all. Rows come in proportion to n^(1/temperature); one optimizer steps for all tasks, and the checkpoint is chosen by
the mean of their validation scores. It leaves

    OUT/run.json              the means, and each task's scores
    OUT/adapter/              the shared parts with the mean of the tasks' own: the start of a new task (`prompt_from`)
    OUT/tasks/<task>/         a run's folder for each task, which can be used alone
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from softprompts import results
from softprompts.attach import adapters_of, attach, using
from softprompts.backbone import Backbone, default_device, load_backbone
from softprompts.checkpoint import ROOT, adapter_folder, load_adapter, write_adapter
from softprompts.config import RunSettings
from softprompts.core import MethodConfig, SoftPrompt
from softprompts.data import load_data, make_encoder, truncation_notes
from softprompts.errors import Diverged, SoftPromptsError, UsageError
from softprompts.evaluate import Evaluation
from softprompts.loop import Progress, Run
from softprompts.member import Member
from softprompts.scored import scored_rows
from softprompts.train import carry_out, unfinished
from softprompts.trained import RUN_ENTRY

DRAWS = 1_000_033
"""Keeps the draws of tasks apart from those of rows, which use another multiple of the seed."""


def train_tasks(
    settings: RunSettings,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one prompt per task of `settings.task` (names joined by commas) together. Returns the record.

    Args:
        settings: of the run.
        out: its folder.
        resume: continue where the folder says.
        overwrite: begin again.
        about: further entries of the record.
        progress: hears of every step.

    Raises:
        UsageError: settings, data or folder that cannot be used; nothing is written then.
        SoftPromptsError: the loss is not a number, or the disk refuses.
    """
    folder, progress = Path(out), progress or Progress()
    accelerator = Accelerator(cpu=default_device().type == "cpu")
    if accelerator.num_processes > 1:
        raise UsageError("several tasks train in one process; start one process, or one task at a time")
    before = unfinished(settings, folder, resume)
    if before is not None and before["status"] == "done":
        progress.note(f"{folder} is finished; nothing to resume")
        return before
    results.check_folder(folder, resume, overwrite)
    torch.manual_seed(settings.seed)
    each = [settings.updated(task=name) for name in settings.tasks]
    data = [load_data(one) for one in each]
    if len({one.task.name for one in data}) < len(data):
        raise UsageError(f"--task {settings.task} names a task twice; join different names by commas")
    backbone = load_backbone(settings.model, 2)
    if backbone.kind == "classification":
        raise UsageError("several tasks need a model that writes, such as T5 or GPT; this one answers through a head")
    folders = [folder / results.TASKS / slug(one.task.name) for one in data]
    teachers = attach_teachers(backbone, settings, [out.name for out in folders])
    begun = resume and (folders[0] / results.STATE).exists()
    names = attach_tasks(backbone, settings, [out.name for out in folders], begun)
    members: list[Member] = []
    for one, out, name, found in zip(each, folders, names, data, strict=True):
        reach = adapters_of(backbone.model).reach(name)
        encoder = make_encoder(backbone, found.task, one.data, reach)
        splits = {split: encoder.encode(getattr(found, split)) for split in ("train", "validation", "test")}
        scored, limits = scored_rows(one, encoder, splits, len(each))
        for note in (*found.notes, *truncation_notes(splits, encoder), *limits):
            progress.note(f"{found.task.name}: {note.removeprefix(f'{found.task.name}: ')}")
        # The first one's optimizer steps for all: what is shared must move once.
        steps_for = () if members else list(dict.fromkeys(names))
        member = Member(one, out, name, encoder, found, {**splits, **scored}, steps_for)
        # A baseline's weights lie outside its adapter, and are all the first one's.
        inside = dict(adapters_of(backbone.model).method(name).named_parameters())
        weights = inside or (members or [member])[0].parameters
        member.record = results.new_record(one, found, backbone, splits, name, weights.values())
        member.record["trained_with"] = list(settings.tasks)
        members.append(member)
    record = {**joint_record(settings, members), **(about or {})}
    if before is not None and before["data"] != record["data"]:
        raise UsageError(f"the data have changed since {folder} was begun; take --overwrite to begin again")
    if overwrite and not resume:
        results.clear_folder(folder)
    results.write_record(folder, record)
    run = TasksRun(members, accelerator, progress, folder, teachers, record)
    try:
        carry_out(run, overwrite=False)
    except Exception as error:
        with suppress(SoftPromptsError):
            results.write_record(folder, {**record, "status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    return run.record


def slug(task: str) -> str:
    """Return a task's name as a folder and an adapter may have it: `superglue-wsc-fixed`."""
    return re.sub(r"[^\w+-]+", "-", task)


def attach_tasks(backbone: Backbone, settings: RunSettings, names: Sequence[str], begun: bool) -> list[str]:
    """Attach an adapter for each task, sharing what is not a task's own; return the name of each one's.

    A baseline changes the one backbone there is, so that all tasks use the same adapter.

    Raises:
        UsageError: a method that does not fit.
    """
    config = settings.method_config()
    if "tasks" in type(config).model_fields:
        config = config.updated(tasks=len(names))
    own = list(names[:1]) * len(names) if config.changes_model else list(names)
    for name in dict.fromkeys(own):
        attach(backbone.model, config, name, tokenizer=backbone.tokenizer, initialise=not begun)
    methods = adapters_of(backbone.model).methods()
    if not any(parameter.requires_grad for parameter in backbone.model.parameters()):
        raise UsageError(f"method '{config.name}' trains nothing here; take a prompt method")
    for name in own[1:]:
        share(methods[own[0]], methods[name], config.task_parts)
    return own


def share(first: SoftPrompt, other: SoftPrompt, task_parts: Sequence[str]) -> None:
    """Let `other` have the very tensors of `first`, except for a task's own."""
    for kind in ("_parameters", "_buffers"):
        for path, module in other.named_modules():
            for name, value in getattr(module, kind).items():
                if value is not None and f"{path}.{name}" not in task_parts:
                    getattr(module, kind)[name] = getattr(first.get_submodule(path), kind)[name]


def attach_teachers(backbone: Backbone, settings: RunSettings, names: Sequence[str]) -> list[str]:
    """Attach the teachers' adapters, frozen, and return their names: one for each task, or none at all.

    Raises:
        UsageError: not as many teachers as tasks, or one that cannot be loaded.
    """
    folders = settings.train.teachers
    if folders and len(folders) != len(names):
        raise UsageError(
            f"train.teachers names {len(folders)} adapters for {len(names)} tasks; give one for each, in their order"
        )
    if folders and settings.model.compile:
        raise UsageError("train.teachers and model.compile=true exclude each other; leave one out")
    teachers = [f"teacher-of-{name}" for name in names[: len(folders)]]
    if folders and settings.method_config().changes_model:
        raise UsageError(f"train.teachers: {settings.method['name']} cannot stand beside teachers; leave them out")
    for teacher, folder in zip(teachers, folders, strict=True):
        load_adapter(backbone.model, adapter_folder(Path(folder)), teacher, trainable=False)
    return teachers


class TasksRun(Run):
    """Members of different tasks that share an optimizer: the first one's.

    Args:
        members: one per task.
        accelerator: of the process.
        progress: hears of every step.
        out: folder of the whole.
        teachers: names of the frozen adapters to learn from, one per task; none at all is fine.
        record: of the whole, as far as it is known.
    """

    def __init__(
        self,
        members: Sequence[Member],
        accelerator: Accelerator,
        progress: Progress,
        out: Path,
        teachers: Sequence[str],
        record: dict[str, Any],
    ) -> None:
        super().__init__(members, accelerator, progress)
        self.record = record
        self.out, self.teachers = out, teachers
        self.leader = members[0]
        sizes = torch.tensor([len(member.splits["train"]) for member in members], dtype=torch.double)
        self.chances = mixture(sizes, self.leader.plan.temperature)
        self.drawn = [0] * len(members)
        self.parts: dict[Path, list[int]] = {}

    def load_state(self) -> None:
        """Go on from a saved state; the rows drawn until then follow from the seed."""
        super().load_state()
        for step in range(self.leader.state.step):
            self.drawn = [sum(pair) for pair in zip(self.drawn, self.draw(step), strict=True)]

    def draw(self, step: int) -> list[int]:
        """Return how many rows of each task are in a step's batch; a pure function of the seed and the step."""
        generator = torch.Generator().manual_seed(self.leader.settings.seed * DRAWS + step)
        rows = torch.multinomial(self.chances, self.leader.plan.batch_size, replacement=True, generator=generator)
        return torch.bincount(rows, minlength=len(self.members)).tolist()

    def step(self, training: Sequence[Member]) -> None:
        """One optimizer step on a batch of all tasks."""
        counts = self.draw(self.leader.state.step)
        self.parts = {
            member.out: member.rows_from(first, count)
            for member, first, count in zip(self.members, self.drawn, counts, strict=True)
        }
        super().step([member for member in self.members if self.parts[member.out]])
        self.drawn = [sum(pair) for pair in zip(self.drawn, counts, strict=True)]

    def batches(self, training: Sequence[Member]) -> tuple[list[list[int]], list[int]]:
        # Every task's sum is divided by the whole batch, so that they add up to its mean.
        chosen = [self.parts[member.out] for member in training]
        total = sum(member.weight(rows) for member, rows in zip(training, chosen, strict=True))
        return chosen, [total] * len(chosen)

    def update(self, training: Sequence[Member], losses: Sequence[Tensor]) -> None:
        loss = torch.stack(list(losses)).sum()
        for member in self.members:
            member.pending.append(loss)
            member.update()

    def losses(self, training: Sequence[Member], parts: Sequence[list[int]]) -> list[Tensor]:
        """Return each task's summed loss, with the distance from the teachers if there are any."""
        if not self.teachers:
            return super().losses(training, parts)
        model = self.backbone.model
        names = {member.name: teacher for member, teacher in zip(self.members, self.teachers, strict=True)}
        rows = [names[member.name] for member, part in zip(training, parts, strict=True) for _ in part]
        logits, targets, sizes = self.answers(training, parts)
        hidden = self.labelled.hidden
        model.eval()  # a teacher answers as it would in use, without dropout
        with torch.no_grad(), using(model, rows):
            taught = self.answers(training, parts, chosen=True)[0]
        model.train()
        apart = distance(logits, taught, hidden, self.labelled.hidden) * self.leader.plan.distillation
        each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none") + apart
        return [part.sum() for part in each.split(sizes)]

    def adapters_for(self, training: Sequence[Member], rows: Sequence[int]) -> AbstractContextManager[None]:
        if not adapters_of(self.backbone.model).changes_model:
            return super().adapters_for(training, rows)
        places = [self.members.index(member) for member in training]
        return self.on_tasks([place for place, count in zip(places, rows, strict=True) for _ in range(count)])

    def diverged(self, member: Member, error: Diverged) -> None:
        """All tasks share what has diverged."""
        raise error

    def on_tasks(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """Tell a baseline the task of each row."""
        from softprompts.baselines.base import on_tasks

        return on_tasks(self.backbone.model, numbers)

    def evaluate(self, member: Member, split: str, advance: Callable[[int], Any] = lambda done: None) -> Evaluation:
        changes = adapters_of(self.backbone.model).changes_model
        with self.on_tasks([self.members.index(member)]) if changes else nullcontext():
            return super().evaluate(member, split, advance)

    def keep(self, records: Sequence[dict[str, Any]]) -> None:
        """Write every task's record and the whole's."""
        super().keep(records)
        self.record |= joint_scores(records)
        results.write_record(self.out, self.record)

    def validate(self, training: Sequence[Member]) -> None:
        """Score every task; keep all adapters if the mean of the scores that decide is the best so far."""
        found = [self.timed(member, "validation") for member in self.members]
        joint = mean(member.deciding(scores) for member, scores in zip(self.members, found, strict=True))
        for number, (member, scores) in enumerate(zip(self.members, found, strict=True)):
            number_task(self.backbone, member.name, number)
            member.judge(scores, self.main, joint)
        if self.leader.state.best_step == self.leader.state.step:
            self.save_mean()
        if self.leader.out_of_patience():
            self.progress.note(
                f"stopped at step {self.leader.state.step}: {self.leader.plan.patience} evaluations without a better "
                f"mean score"
            )
        self.progress.advance(0, score=joint)

    def save_mean(self) -> None:
        """Write the shared parameters with the mean of the tasks' own."""
        adapters = adapters_of(self.backbone.model)
        config = adapters.configs[self.leader.name]
        about = {key: value for key, value in self.leader.about().items() if key != RUN_ENTRY}
        methods = [adapters.method(member.name) for member in self.members]
        method = mean_of(config, adapters.width, methods)
        weights = {f"{ROOT}{name}": self.backbone.model.get_parameter(name) for name in adapters.weights}
        write_adapter(self.out / results.ADAPTER, config, adapters.width, method, weights, about)


def mixture(sizes: Tensor, temperature: float) -> Tensor:
    """Return the chance of each task, of sizes (N): n^(1/temperature), normalised."""
    chances = sizes.double() ** (1 / temperature)
    return chances / chances.sum()


def mean_of(config: MethodConfig, width: int, methods: Sequence[SoftPrompt]) -> SoftPrompt:
    """Return an adapter with the shared parameters of several and the mean of their own."""
    found = config.build(width)
    own = set(config.task_parts)
    states = [method.state_dict() for method in methods]
    found.load_state_dict(
        {
            key: torch.stack([state[key] for state in states]).mean(0) if key in own else value
            for key, value in states[0].items()
        }
    )
    return found


def distance(logits: Tensor, taught: Tensor, hidden: Tensor, shown: Tensor) -> Tensor:
    """Return (M): how far each answer token's distribution and last state are from the teacher's.

    The divergence KL(teacher || student) of logits (M, V), plus the squared error of the states (M, D) in units of the
    mean square of the teacher's, since the scale of states differs among models. MPT (arXiv 2303.02861), equations 3
    and 4.
    """
    student, teacher = logits.float().log_softmax(-1), taught.float().log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    shown = shown.float()
    error = (hidden.float() - shown).square().mean(-1) / shown.square().mean(-1).clamp(min=1e-12)
    return divergence + error


def number_task(backbone: Backbone, name: str, number: int) -> None:
    """Note in the config of an adapter that serves all tasks for which one it is about to be saved."""
    configs = adapters_of(backbone.model).configs
    if "task_number" in type(configs[name]).model_fields:
        configs[name] = configs[name].updated(task_number=number)


def joint_record(settings: RunSettings, members: Sequence[Member]) -> dict[str, Any]:
    """Return the part of the whole's record that is known before the first step."""
    first = members[0]
    common = ("schema", "status", "method", "protocol", "model", "seed", "num_backbone", "method_resolved")
    return {
        **{key: first.record[key] for key in common},
        "task": ",".join(member.encoder.task.name for member in members),
        "metric": {"report": "mean", "select": "mean"},
        "num_trainable": sum(parameter.numel() for parameter in first.parameters.values()),
        "num_trainable_head": 0,
        "settings": settings.model_dump(mode="json"),
        "data": {member.encoder.task.name: member.record["data"]["provenance"] for member in members},
        "environment": first.record["environment"],
    }


def joint_scores(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the whole's record says at the end: each task's scores, their means, the cost."""
    whole: dict[str, Any] = {"validation": {}, "test": {}}
    for split, kind in (("validation", "select"), ("test", "report")):
        scores = [(record["scores"][split], record["metric"][kind]) for record in records]
        whole[split] = {"mean": mean(own[metric] for own, metric in scores), "n": sum(own["n"] for own, _ in scores)}
    costs = [record["cost"] for record in records]
    return {
        "status": "done",
        "steps_done": records[0]["steps_done"],
        "best_step": records[0]["best_step"],
        "scores": whole,
        "tasks": {
            record["task"]: {
                "folder": f"{results.TASKS}/{slug(record['task'])}",
                "metric": record["metric"],
                "scores": record["scores"],
                "baselines": record["baselines"],
            }
            for record in records
        },
        "cost": {
            **{key: round(sum(cost[key] for cost in costs), 2) for key in ("seconds", "train_seconds", "eval_seconds")},
            "tokens": sum(cost["tokens"] for cost in costs),
            "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs),
            "adapter_bytes": sum(cost["adapter_bytes"] for cost in costs),
        },
    }
