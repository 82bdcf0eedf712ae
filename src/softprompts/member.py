"""One run's own things: its prompt and optimizer, its batches, its best checkpoint, its folder and record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompts import results
from softprompts.attach import adapters_of
from softprompts.backbone import Backbone
from softprompts.checkpoint import restore_adapter, save_adapter
from softprompts.config import RunSettings, TrainSettings
from softprompts.data import Encoder, Rows, epoch_batches
from softprompts.errors import Diverged, UsageError, suggest
from softprompts.evaluate import Evaluation
from softprompts.shapes import SLOT
from softprompts.tasks import TaskData
from softprompts.trained import RUN_ENTRY, run_entry

EPSILON = 1e-6
"""AdamW's epsilon in the reference code."""
TASK_TYPES = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "classification": "SEQ_CLS"}


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
    dropped: str | None = None


class Member:
    """One set of settings in training: alone, or beside others on one backbone.

    Args:
        settings: of the run.
        out: its folder.
        name: of its adapter on the model.
        encoder: of the backbone, with the adapter attached.
        data: the task's examples.
        splits: the same, encoded.
        steps_for: the adapters that its optimizer steps, if not its own alone: of several tasks that share parameters,
            one steps for all.
    """

    def __init__(
        self,
        settings: RunSettings,
        out: Path,
        name: str,
        encoder: Encoder,
        data: TaskData,
        splits: dict[str, Rows],
        steps_for: Sequence[str] | None = None,
    ) -> None:
        self.settings, self.out, self.name = settings, out, name
        self.encoder, self.data, self.splits = encoder, data, splits
        self.backbone = encoder.backbone
        check_compile(settings, self.backbone, name)
        names = [name] if steps_for is None else list(steps_for)
        self.parameters = trainable(self.backbone, names)
        self.optimizer = make_optimizer(self.backbone, names, settings.train) if names else None
        self.state = State()
        self.pending: list[Tensor] = []
        self.epoch: tuple[int, list[list[int]]] = (-1, [])
        self.order: tuple[int, list[int]] = (-1, [])
        self.record: dict[str, Any] = {}

    @property
    def plan(self) -> TrainSettings:
        """The settings of the loop."""
        return self.settings.train

    @property
    def trains(self) -> bool:
        """Whether steps are left for it."""
        return self.state.step < self.plan.steps and not self.out_of_patience() and self.state.dropped is None

    def out_of_patience(self) -> bool:
        """Whether the last evaluations brought nothing."""
        return self.plan.patience is not None and self.state.stale >= self.plan.patience

    def batch_at(self, step: int) -> list[int]:
        """Return the rows of a step; a pure function of the seed and the step."""
        per_epoch = -(-len(self.splits["train"]) // self.plan.batch_size)
        number, place = divmod(step, per_epoch)
        return self._batches(number)[place]

    def rows_from(self, first: int, count: int) -> list[int]:
        """Return `count` rows of the endless order of epochs, from the one numbered `first` on."""
        found: list[int] = []
        while len(found) < count:
            number, place = divmod(first + len(found), len(self.splits["train"]))
            if self.order[0] != number:
                self.order = number, [row for batch in self._batches(number) for row in batch]
            found += self.order[1][place : place + count - len(found)]
        return found

    def _batches(self, number: int) -> list[list[int]]:
        """Return the batches of an epoch; the last one asked for is kept."""
        if self.epoch[0] != number:
            lengths = [len(ids) for ids in self.splits["train"].sources]
            self.epoch = number, epoch_batches(lengths, self.plan.batch_size, self.settings.seed, number)
        return self.epoch[1]

    def weight(self, chosen: list[int]) -> int:
        """Return by what a batch's summed loss is divided: its target tokens, or its rows for a head."""
        if self.backbone.kind == "classification":
            return len(chosen)
        return sum(len(self.splits["train"].targets[i]) for i in chosen)

    def update(self) -> None:
        """Clip the gradients, take one optimizer step at the schedule's rates, forget the gradients."""
        if self.optimizer is not None:
            if self.plan.clip:
                torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.plan.clip, foreach=True)
            factor = schedule(self.state.step, self.plan.steps, self.plan.warmup_steps())
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1

    def log(self, write: bool) -> float | None:
        """Write the losses since the last look, one line a step; return their mean.

        Raises:
            Diverged: a loss is not a finite number.
        """
        losses = torch.stack(self.pending).tolist() if self.pending else []
        first = self.state.step - len(losses) + 1
        self.pending.clear()
        for step, loss in enumerate(losses, first):
            if loss != loss or loss in (float("inf"), float("-inf")):
                raise Diverged(
                    f"the loss is {loss} at step {step} (train.prompt_rate={self.plan.prompt_rate}, train.offset_rate="
                    f"{self.plan.offset_rate}, model.dtype={self.settings.model.dtype}); lower the rates or take fp32"
                )
            if write:
                results.append_step(self.out, {"step": step, "loss": loss})
        return sum(losses) / len(losses) if losses else None

    def deciding(self, scores: Mapping[str, float]) -> float:
        """Return the score that selects the checkpoint."""
        return scores[self.encoder.task.select_metric(self.settings.data.protocol)]

    def judge(self, scores: dict[str, float], write: bool, score: float | None = None) -> float:
        """Keep the adapter if its validation scores are the best so far; return the score that decides.

        `score` decides in place of its own, where several tasks choose together.
        """
        score = self.deciding(scores) if score is None else score
        if score > self.state.best_score:
            self.state.best_score, self.state.best_step = score, self.state.step
            self.state.best_scores, self.state.stale = scores, 0
            if write:
                save_adapter(self.backbone.model, self.out / results.ADAPTER, self.name, self.about())
        else:
            self.state.stale += 1
        if write:
            results.append_step(self.out, {"step": self.state.step, "validation": scores})
        return score

    def take_best(self) -> None:
        """Put the best checkpoint's weights back."""
        restore_adapter(self.backbone.model, self.out / results.ADAPTER, self.name)

    def about(self) -> dict[str, Any]:
        """Return what a saved adapter says of its origin, enough to use it alone."""
        return {
            "base_model_name_or_path": self.settings.model.name,
            "revision": self.settings.model.revision,
            "task_type": TASK_TYPES[self.backbone.kind],
            RUN_ENTRY: run_entry(self.settings, self.encoder.task),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights and AdamW's moments, by name."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found[f"value.{name}"] = parameter
            state = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
            found |= {f"{key}.{name}": value for key, value in state.items()}
        # What does not train but was read from elsewhere: ATTEMPT's sources.
        return found | {f"buffer.{name}": value for name, value in self.buffers().items()}

    def buffers(self) -> dict[str, Tensor]:
        """Return what the adapter holds beside its parameters, by name."""
        return dict(adapters_of(self.backbone.model).method(self.name).named_buffers())

    def take(self, state: str, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` (JSON) and `tensors` say; KeyError and TypeError if they are of another run."""
        self.state = State(**json.loads(state))
        with torch.no_grad():
            for name, buffer in self.buffers().items():
                buffer.copy_(tensors[f"buffer.{name}"])
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"value.{name}"])
                # What no batch has reached yet has no moments.
                if self.optimizer is not None and f"step.{name}" in tensors:
                    # A fused step is counted where the parameter is.
                    counted = parameter.device if self.optimizer.defaults.get("fused") else "cpu"
                    self.optimizer.state[parameter] = {
                        key: tensors[f"{key}.{name}"].to(counted if key == "step" else parameter.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }

    def finished(self, test: Evaluation, baselines: dict[str, Any], beside: int) -> dict[str, Any]:
        """Return the complete record. `beside` is the number of members that shared the backbone."""
        state = self.state
        together = {"population": beside} if beside > 1 else {}
        return {
            **self.record,
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
                **together,
            },
        }

    def gave_up(self) -> dict[str, Any]:
        """Return the record of a member that was dropped: no test scores, and the reason."""
        return {
            **self.record,
            "status": "dropped",
            "reason": self.state.dropped,
            "steps_done": self.state.step,
            "best_step": self.state.best_step,
            "scores": {"validation": self.state.best_scores},
        }


def trainable(backbone: Backbone, names: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    """Return everything that adapters train, in the model's order, each parameter once.

    The names are those within the adapter; of several adapters, the later ones' begin with their own and a slash.
    """
    adapters = adapters_of(backbone.model)
    own = {f"{SLOT}.softprompt_methods.{name}.": f"{name}/" if number else "" for number, name in enumerate(names)}
    heads, weights = tuple(f"{head}." for head in adapters.heads), set(adapters.weights)
    found = {}
    for key, parameter in backbone.model.named_parameters() if names else ():
        start = next((start for start in own if key.startswith(start)), None)
        if start is not None:
            found[own[start] + key.removeprefix(start)] = parameter
        elif key.startswith(heads) or key in weights:
            found[key] = parameter
    return found


def make_optimizer(backbone: Backbone, names: Sequence[str], plan: TrainSettings) -> torch.optim.AdamW:
    """Return AdamW with one learning rate for the prompt, one for the offset, one for a head, and `train.rates`.

    Raises:
        UsageError: a rate for a parameter that is not there.
    """
    usual = {
        "prompt": plan.prompt_rate,
        "offset": plan.offset_rate,
        "head": plan.head_rate,
        "baseline": plan.baseline_rate,
    }
    weights = set(adapters_of(backbone.model).weights)
    groups: dict[str, dict[str, Any]] = {}
    found = trainable(backbone, names)
    check_rates(plan.rates, [key.rpartition("/")[2] for key in found])
    for full, parameter in found.items():
        key = full.rpartition("/")[2]
        part = key.partition(".")[0]
        part = "baseline" if key in weights else part if part in ("prompt", "offset") else "head"
        # The whole name is more special than its end.
        own = next((k for k in (key, key.rpartition(".")[2]) if k in plan.rates), None)
        label = part if own is None else f"{part}:{own}"
        peak = usual[part] if own is None else plan.rates[own]
        groups.setdefault(label, {"params": [], "peak": peak, "name": label})["params"].append(parameter)
    # One kernel for all tensors where there is one; elsewhere torch's own choice.
    fused = True if backbone.model.device.type == "cuda" else None
    return torch.optim.AdamW(list(groups.values()), lr=0.0, eps=EPSILON, weight_decay=plan.weight_decay, fused=fused)


def check_compile(settings: RunSettings, backbone: Backbone, name: str) -> None:
    """Make sure that a prompt made from the text can be kept from seeing the answer.

    Raises:
        UsageError: a compiled decoder-only model, whose hooks are not told where the answer begins.
    """
    prompt = adapters_of(backbone.model).method(name).prompt
    if settings.model.compile and backbone.kind == "causal" and prompt is not None and prompt.per_row:
        raise UsageError(
            f"model.compile=true: the prompt of {settings.method_config().name} is made from the text, which a "
            f"compiled decoder-only model cannot tell from the answer; leave it out"
        )


def check_rates(rates: Mapping[str, float], parameters: Iterable[str]) -> None:
    """Make sure that every rate is one of a parameter, by its name or the last part of it.

    Raises:
        UsageError: one is not.
    """
    known = {*parameters, *(ends := sorted({key.rpartition(".")[2] for key in parameters}))}
    if wrong := next((key for key in rates if key not in known), None):
        raise UsageError(
            f"train.rates.{wrong}: this method trains nothing of that name{suggest(wrong, ends)} "
            f"(it trains {', '.join(ends)})"
        )


def schedule(step: int, steps: int, warmup: int) -> float:
    """Return the factor on every rate: linear up over `warmup` steps, then linear down to 0 at `steps`."""
    if step < warmup:
        return step / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))
