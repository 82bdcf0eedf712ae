"""The training loop, read top to bottom: data, backbone, prompt, steps, best checkpoint, scores, record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from softprompts import results
from softprompts.attach import adapters_of, attach, disabled
from softprompts.backbone import Backbone, default_device, load_backbone
from softprompts.checkpoint import restore_adapter, save_adapter, write_tensors
from softprompts.config import RunSettings, TrainSettings
from softprompts.data import (
    IGNORED,
    Encoder,
    Rows,
    epoch_batches,
    load_data,
    make_encoder,
    num_labels,
    truncation_notes,
)
from softprompts.errors import SoftPromptsError, UsageError
from softprompts.evaluate import Evaluation, evaluate, majority, to_device
from softprompts.tasks import TaskData
from softprompts.trained import RUN_ENTRY, run_entry

EPSILON = 1e-6
"""AdamW's epsilon in the reference code."""
LOG_EVERY = 10
"""Losses are looked at every so many steps: each look waits for the accelerator."""


class Progress:
    """What a run tells while it goes; this one keeps silent, the command line draws bars."""

    def phase(self, name: str, total: int) -> None:
        """A new phase of `total` units begins."""

    def advance(self, units: int = 1, **numbers: float) -> None:
        """Units were done; `numbers` are the latest loss, score and speed."""

    def note(self, text: str) -> None:
        """Something the user should know."""


@dataclass
class State:
    """How far a run is. Together with the tensors beside it, all that a resume needs."""

    step: int = 0
    best_step: int = 0
    best_score: float = float("-inf")
    best_scores: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0


def train(
    settings: RunSettings,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one prompt, score it, and leave a run record in `out`. Returns the record.

    Raises:
        UsageError: settings, data or folder that cannot be used; nothing is written then.
        SoftPromptsError: the loss is not a number, or the disk refuses.
    """
    out, progress = Path(out), progress or Progress()
    accelerator = Accelerator(cpu=default_device().type == "cpu")
    earlier = None
    if resume and (out / results.RECORD).exists():
        record = earlier = results.read_record(out)
        if record["settings"] != settings.model_dump(mode="json"):
            raise UsageError(f"{out} was begun with other settings; resume with --out alone, or take --overwrite")
        if record["status"] == "done":
            progress.note(f"{out} is finished; nothing to resume")
            return record
    results.check_folder(out, resume, overwrite)
    torch.manual_seed(settings.seed)
    task_data = load_data(settings)
    backbone = load_backbone(settings.model, num_labels(task_data.task))
    attach(
        backbone.model,
        settings.method_config(),
        tokenizer=backbone.tokenizer,
        also_train=backbone.untrained,
        # A saved state holds the weights: the adapters they started from may be gone.
        initialise=not (resume and (out / results.STATE).exists()),
    )
    if not trainable(backbone):
        raise UsageError(f"method '{settings.method['name']}' trains nothing here; take a prompt method, or a head")
    encoder = make_encoder(backbone, task_data.task, settings.data, adapters_of(backbone.model).longest_text)
    splits = {name: encoder.encode(getattr(task_data, name)) for name in ("train", "validation", "test")}
    for note in (*task_data.notes, *truncation_notes(splits, encoder)):
        progress.note(note)

    record = results.new_record(settings, task_data, backbone, splits, named_trainable(backbone))
    if earlier is not None and earlier["data"]["provenance"] != record["data"]["provenance"]:
        raise UsageError(f"the data have changed since {out} was begun; take --overwrite to begin again")
    # Every process draws its own dropout; the first one's numbers are those of a run alone.
    if accelerator.process_index:
        torch.manual_seed(settings.seed + 7919 * accelerator.process_index)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if accelerator.is_main_process:
        if overwrite and not resume:
            results.clear_folder(out)
        results.write_record(out, record)
    accelerator.wait_for_everyone()
    run = Run(settings, out, encoder, splits, accelerator, progress)
    try:
        run.steps()
        record = run.finish(record, task_data)
    except Exception as error:
        if accelerator.is_main_process:
            with suppress(SoftPromptsError):
                results.write_record(out, {**record, "status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    if accelerator.is_main_process:
        results.write_record(out, record)
        (out / results.STATE).unlink(missing_ok=True)
    return record


class Run:
    """One training run in progress."""

    def __init__(
        self,
        settings: RunSettings,
        out: Path,
        encoder: Encoder,
        splits: dict[str, Rows],
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        self.settings, self.out, self.encoder, self.splits = settings, out, encoder, splits
        self.accelerator, self.progress = accelerator, progress
        self.backbone = encoder.backbone
        self.model = accelerator.prepare(self.backbone.model)
        self.optimizer = make_optimizer(self.backbone, settings.train)
        self.state = State()
        self.pending: list[Tensor] = []
        self.epoch: tuple[int, list[list[int]]] = (-1, [])

    def steps(self) -> None:
        """Train to the last step, or until patience runs out; resume where a saved state says."""
        plan = self.settings.train
        self.load_state()
        self.progress.phase("train", plan.steps)
        self.progress.advance(self.state.step)
        self.backbone.model.train()
        begun = time.perf_counter()
        while self.state.step < plan.steps and not self.out_of_patience():
            self.step(plan)
            done = self.state.step
            evaluates = done % plan.eval_steps() == 0 or done == plan.steps
            saves = done % (plan.save_every or plan.eval_steps()) == 0 and done < plan.steps
            if evaluates or saves or done % LOG_EVERY == 0:
                self.log()
            if evaluates or saves:
                self.state.train_seconds += time.perf_counter() - begun
                if evaluates:
                    self.validate()
                if saves:
                    self.save_state()
                begun = time.perf_counter()
        if self.out_of_patience():
            text = f"stopped at step {self.state.step}: {plan.patience} evaluations without a better score"
            self.progress.note(text)

    def out_of_patience(self) -> bool:
        """Whether the last evaluations brought nothing."""
        patience = self.settings.train.patience
        return patience is not None and self.state.stale >= patience

    def step(self, plan: TrainSettings) -> None:
        """One optimizer step on one batch, cut into `accumulate` pieces and shared among processes."""
        chosen = self.batch_at(self.state.step)
        # A process without a row of a small last batch takes one for nothing: all must join in the backward pass.
        own = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        mine, counts = own or chosen[:1], bool(own)
        size = -(-len(mine) // plan.accumulate)
        pieces = [mine[i : i + size] for i in range(0, len(mine), size)]
        total = self.weight(chosen)
        self.state.tokens += sum(len(self.splits["train"].sources[i]) for i in chosen)
        loss_sum = torch.zeros((), device=self.accelerator.device)
        for number, piece in enumerate(pieces, 1):
            inputs, labels = self.encoder.batch(self.splits["train"], piece)
            last = number == len(pieces)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                inputs, labels = to_device(inputs, self.backbone.model), labels.to(self.accelerator.device)
                part = summed_loss(self.model(**inputs).logits, labels, self.backbone) * counts
                # Divided by the whole batch, so that pieces and processes add up to the mean of the batch.
                self.accelerator.backward(part * self.accelerator.num_processes / total)
            loss_sum += part.detach()
        if plan.clip:
            torch.nn.utils.clip_grad_norm_(trainable(self.backbone), plan.clip, foreach=True)
        factor = schedule(self.state.step, plan.steps, plan.warmup_steps())
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending.append(self.accelerator.reduce(loss_sum) / total)
        self.state.step += 1
        self.progress.advance(1)

    def batch_at(self, step: int) -> list[int]:
        """Return the rows of a step; a pure function of the seed and the step."""
        rows, plan = self.splits["train"], self.settings.train
        per_epoch = -(-len(rows) // plan.batch_size)
        number, place = divmod(step, per_epoch)
        if self.epoch[0] != number:
            lengths = [len(ids) for ids in rows.sources]
            self.epoch = number, epoch_batches(lengths, plan.batch_size, self.settings.seed, number)
        return self.epoch[1][place]

    def weight(self, chosen: list[int]) -> int:
        """Return by what a batch's summed loss is divided: its target tokens, or its rows for a head."""
        if self.backbone.kind == "classification":
            return len(chosen)
        return sum(len(self.splits["train"].targets[i]) for i in chosen)

    def log(self) -> None:
        """Write the losses since the last look, one line a step.

        Raises:
            SoftPromptsError: a loss is not a finite number.
        """
        losses = torch.stack(self.pending).tolist() if self.pending else []
        first = self.state.step - len(losses) + 1
        self.pending.clear()
        for step, loss in enumerate(losses, first):
            if loss != loss or loss in (float("inf"), float("-inf")):
                plan = self.settings.train
                raise SoftPromptsError(
                    f"the loss is {loss} at step {step} (train.prompt_rate={plan.prompt_rate}, train.offset_rate="
                    f"{plan.offset_rate}, model.dtype={self.settings.model.dtype}); lower the rates or take fp32"
                )
            if self.accelerator.is_main_process:
                results.append_step(self.out, {"step": step, "loss": loss})
        if losses:
            self.progress.advance(0, loss=sum(losses) / len(losses))

    def validate(self) -> None:
        """Score the validation split and keep the adapter if it is the best so far."""
        begun = time.perf_counter()
        scores = self.evaluate("validation").scores
        select = self.encoder.task.select_metric(self.settings.data.protocol)
        if scores[select] > self.state.best_score:
            self.state.best_score, self.state.best_step = scores[select], self.state.step
            self.state.best_scores, self.state.stale = scores, 0
            if self.accelerator.is_main_process:
                save_adapter(self.backbone.model, self.out / results.ADAPTER, about=self.about())
        else:
            self.state.stale += 1
        if self.accelerator.is_main_process:
            results.append_step(self.out, {"step": self.state.step, "validation": scores})
        self.state.eval_seconds += time.perf_counter() - begun
        self.progress.advance(0, score=scores[select])

    def evaluate(self, split: str, advance: Callable[[int], Any] = lambda done: None) -> Evaluation:
        """Answer and score one split with the model as it is."""
        plan = self.settings.eval
        return evaluate(
            self.encoder,
            self.splits[split],
            self.settings.data.protocol,
            plan.scoring,
            plan.batch_size,
            advance,
            self.accelerator,
        )

    def about(self) -> dict[str, Any]:
        """Return what a saved adapter says of its origin, enough to use it alone."""
        kinds = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "classification": "SEQ_CLS"}
        return {
            "base_model_name_or_path": self.settings.model.name,
            "revision": self.settings.model.revision,
            "task_type": kinds[self.backbone.kind],
            RUN_ENTRY: run_entry(self.settings, self.encoder.task),
        }

    def save_state(self) -> None:
        """Write everything a resume needs into one file, atomically."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        tensors = {"rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        for name, parameter in named_trainable(self.backbone):
            tensors[f"value.{name}"] = parameter
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        write_tensors(self.out / results.STATE, tensors, {"state": json.dumps(vars(self.state))})

    def load_state(self) -> None:
        """Go on from a saved state if there is one."""
        path = self.out / results.STATE
        if not path.exists():
            self.keep_steps()
            return
        try:
            with safe_open(path, "pt") as file:
                self.read_state(file)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is damaged ({error}); begin again with --overwrite") from None
        self.keep_steps()
        self.progress.note(f"resumed at step {self.state.step}")

    def read_state(self, file: Any) -> None:
        """Take over the step, the random state, the weights and AdamW's moments."""
        self.state = State(**json.loads(file.metadata()["state"]))
        if self.accelerator.is_main_process:
            torch.set_rng_state(file.get_tensor("rng"))
            if torch.cuda.is_available() and "rng.cuda" in file.keys():  # noqa: SIM118 (not a dict)
                torch.cuda.set_rng_state(file.get_tensor("rng.cuda"))
        with torch.no_grad():
            for name, parameter in named_trainable(self.backbone):
                parameter.copy_(file.get_tensor(f"value.{name}"))
                self.optimizer.state[parameter] = {
                    key: file.get_tensor(f"{key}.{name}").to(parameter.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def keep_steps(self) -> None:
        """Forget the log of steps that a killed run took beyond its saved state."""
        if self.accelerator.is_main_process:
            results.keep_steps(self.out, self.state.step)

    def finish(self, record: dict[str, Any], data: TaskData) -> dict[str, Any]:
        """Score the best adapter on the test split, write the predictions, complete the record."""
        protocol, task = self.settings.data.protocol, self.encoder.task
        self.accelerator.wait_for_everyone()
        restore_adapter(self.backbone.model, self.out / results.ADAPTER)
        begun = time.perf_counter()
        self.progress.phase("test", len(self.splits["test"]))
        test = self.evaluate("test", self.progress.advance)
        baselines = {"majority": majority(task, data.train, data.test, protocol)}
        self.state.eval_seconds += time.perf_counter() - begun
        if self.settings.eval.untuned and self.backbone.kind != "classification":
            self.progress.phase("untuned", len(self.splits["test"]))
            with disabled(self.backbone.model):
                baselines["untuned"] = self.evaluate("test", self.progress.advance).scores
        if self.accelerator.is_main_process:
            results.write_predictions(
                self.out,
                (
                    {"source": example.source, "target": example.target, "prediction": prediction}
                    for example, prediction in zip(data.test, test.predictions, strict=True)
                ),
            )
        state = self.state
        return {
            **record,
            "status": "done",
            "steps_done": state.step,
            "best_step": state.best_step,
            "scores": {"validation": state.best_scores, "test": test.scores},
            "baselines": baselines,
            "scoring": test.scoring,
            "cost": {
                "seconds": round(state.train_seconds + state.eval_seconds, 2),
                "train_seconds": round(state.train_seconds, 2),
                "eval_seconds": round(state.eval_seconds, 2),
                "tokens": state.tokens,
                "tokens_per_second": round(state.tokens / max(state.train_seconds, 1e-9), 1),
                "peak_memory_bytes": results.peak_memory(),
                "adapter_bytes": results.folder_bytes(self.out / results.ADAPTER),
            },
        }


def trainable(backbone: Backbone) -> list[torch.nn.Parameter]:
    """Return everything that trains: the active prompt and the head."""
    return [parameter for _, parameter in named_trainable(backbone)]


def named_trainable(backbone: Backbone) -> list[tuple[str, torch.nn.Parameter]]:
    """Return everything that trains, by name."""
    return [(name, p) for name, p in backbone.model.named_parameters() if p.requires_grad]


def make_optimizer(backbone: Backbone, plan: TrainSettings) -> torch.optim.AdamW:
    """Return AdamW with one learning rate for the prompt, one for the offset, one for a head."""
    rates = {"prompt": plan.prompt_rate, "offset": plan.offset_rate}
    adapters = adapters_of(backbone.model)
    groups = [
        {"params": parameters, "peak": rates[name], "name": name}
        for name, parameters in adapters.method().groups().items()
    ]
    head = [p for name in adapters.heads for p in backbone.model.get_submodule(name).parameters()]
    if head:
        groups.append({"params": head, "peak": plan.head_rate, "name": "head"})
    return torch.optim.AdamW(groups, lr=0.0, eps=EPSILON, weight_decay=plan.weight_decay)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Return the factor on every rate: linear up over `warmup` steps, then linear down to 0 at `steps`."""
    if step < warmup:
        return step / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def summed_loss(logits: Tensor, labels: Tensor, backbone: Backbone) -> Tensor:
    """Return the summed loss of a batch: cross-entropy over target tokens or classes, or squared error."""
    if backbone.kind == "classification":
        if labels.is_floating_point():
            return torch.nn.functional.mse_loss(logits.float().squeeze(-1), labels, reduction="sum")
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    if backbone.kind == "causal":
        logits = logits[:, :-1]
    seen = labels != IGNORED
    return torch.nn.functional.cross_entropy(logits[seen].float(), labels[seen], reduction="sum")
