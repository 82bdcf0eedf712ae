"""Rows of the matrix: transformers' Trainer and several processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import Case, batch, far, near, near_all, run, same, trainable
from datasets import Dataset
from peft import PeftModel
from registry_of_calls import call
from tiny import PAD
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

RATE, STEPS = 0.05, 4
EPSILON = 1e-3
"""Adam's; the usual 1e-8 would turn the rounding of tiny gradients into steps of full length."""
CLOSE = 1e-4
"""Parameters after some steps, the losses of the Trainer's log."""


def examples(case: Case, first: bool = True) -> list[dict[str, Any]]:
    """Return four rows of six tokens.

    `first=False` keeps the first label of texts out of the loss: PEFT's prompt tuning makes it a target, which has a
    row of its own.
    """
    ids, _ = batch(rows=4, length=6)
    ids = ids.masked_fill(ids == PAD, 4)
    rows = []
    for number, text in enumerate(ids.tolist()):
        labels = text if first or case.arch == "t5" else [-100, *text[1:]]
        if case.task == "SEQ_CLS":
            labels = number % 2
        rows.append({"input_ids": text, "attention_mask": [1] * 6, "labels": labels})
    return rows


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack the rows, all of one length."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def trainer(case: Case, network: Any, folder: Path, data: Any, kind: Any = Trainer, **changes: Any) -> Any:
    """Return a quiet Trainer with a constant rate and no weight decay."""
    more = {key: changes.pop(key) for key in ("compute_metrics", "data_collator", "eval_dataset") if key in changes}
    arguments = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": RATE,
        "adam_epsilon": EPSILON,
        "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 1, "dataloader_pin_memory": False, "seed": 0,
    }  # fmt: skip
    settings = (Seq2SeqTrainingArguments if kind is Seq2SeqTrainer else TrainingArguments)(**{**arguments, **changes})
    more = {"data_collator": collate, "eval_dataset": data, **more}
    built = kind(model=network, args=settings, train_dataset=data, **more)
    built.remove_callback(PrinterCallback)
    return built


def by_hand(case: Case, network: Any, data: list[dict[str, Any]], steps: int = STEPS) -> None:
    """Train with a plain loop: whole data, Adam, clipped gradients, as the Trainer's defaults say."""
    parameters = [parameter for _, parameter in trainable(network)]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=EPSILON, weight_decay=0.0)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        network(**collate(data)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    network.eval()


def values(network: Any) -> list[Tensor]:
    """Return copies of the trainable parameters."""
    return [parameter.detach().clone() for _, parameter in trainable(network)]


@call("Trainer, training", "parameters after four steps = a plain loop")
def check_train(case: Case, folder: Path) -> None:
    network, twin, data = case.peft(), case.peft(), examples(case, first=False)
    trainer(case, network, folder, data).train()
    by_hand(case, twin, data)
    near_all(values(network), values(twin), "parameters", CLOSE)
    far(torch.cat([x.flatten() for x in values(network)]), torch.cat([x.flatten() for x in values(case.peft())]),
        "trained")  # fmt: skip


@call("Trainer, reported loss", "of the first step = the model's own loss on that batch")
def check_loss(case: Case, folder: Path) -> None:
    network, data = case.peft(), examples(case)
    with torch.no_grad():
        expected = network(**collate(data)).loss
    run_ = trainer(case, network, folder, data, max_steps=1)
    run_.train()
    near(torch.tensor(run_.state.log_history[0]["loss"]), expected, "loss", CLOSE)


@call("Trainer, evaluate and predict", "loss and logits = forward passes")
def check_evaluate(case: Case, folder: Path) -> None:
    network, data = case.peft(), examples(case, first=False)
    made = trainer(case, network, folder, data, per_device_eval_batch_size=4)
    with torch.no_grad():
        out = network(**collate(data))
    near(torch.tensor(made.evaluate()["eval_loss"]), out.loss, "loss", CLOSE)
    predictions = made.predict(data).predictions
    logits = torch.as_tensor(predictions[0] if isinstance(predictions, tuple) else predictions)
    near(logits, out.logits, "logits")


@call("Trainer, best model", "load_best_model_at_end: logits = the best checkpoint's, not the last's")
def check_best(case: Case, folder: Path) -> None:
    network, (ids, mask), data = case.peft(), batch(), examples(case)
    worse = iter(range(100))
    trainer(
        case, network, folder, data, max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        compute_metrics=lambda _: {"score": -next(worse)},
    ).train()  # fmt: skip
    first, last = (
        run(case, PeftModel.from_pretrained(case.base(), folder / f"checkpoint-{step}").eval(), ids, mask)
        for step in (1, 2)
    )
    near(run(case, network.eval(), ids, mask), first, "logits against the first checkpoint")
    far(first, last, "the two checkpoints")


@call("Trainer, resume", "from the middle = uninterrupted, every bit")
def check_resume(case: Case, folder: Path) -> None:
    network, again, data = case.peft(), case.peft(seed=8), examples(case)
    plan = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    trainer(case, network, folder, data, **plan).train()
    resumed = trainer(case, again, folder / "again", data, **plan)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert resumed.state.global_step == STEPS, f"stopped at step {resumed.state.global_step}"
    assert values(again), "nothing trains after resuming"
    for one, other in zip(values(again), values(network), strict=True):
        same(one, other, "parameters")


@call("Seq2SeqTrainer, predict_with_generate", "predictions = generate", archs=("t5",))
def check_seq2seq(case: Case, folder: Path) -> None:
    network, data = case.peft(), examples(case)
    made = trainer(
        case, network, folder, data, kind=Seq2SeqTrainer, predict_with_generate=True, generation_max_length=6,
    )  # fmt: skip
    written = torch.as_tensor(made.predict(data).predictions)
    inputs = collate(data)
    inputs.pop("labels")
    expected = network.generate(**inputs, max_length=6, do_sample=False)
    same(written[:, : expected.shape[1]], expected, "tokens")
    assert (written[:, expected.shape[1] :] == PAD).all(), "tokens after the end"


@call("Trainer, remove_unused_columns", "a text column is dropped, parameters = without it")
def check_columns(case: Case, folder: Path) -> None:
    network, twin, data = case.peft(), case.peft(), examples(case, first=False)
    table = Dataset.from_list([{**row, "note": "words"} for row in data])
    trainer(case, network, folder, table, max_steps=2).train()
    by_hand(case, twin, data, steps=2)
    near_all(values(network), values(twin), "parameters", CLOSE)


@call(
    "Trainer, label smoothing", "loss = smoothed by hand on the next tokens (plain T5 fails, without PEFT too)",
    archs=("llama",),
)  # fmt: skip
def check_smoothing(case: Case, folder: Path) -> None:
    network, data = case.peft(), examples(case)
    made = trainer(case, network, folder, data, label_smoothing_factor=0.1)
    inputs = collate(data)
    with torch.no_grad():
        loss = made.compute_loss(network, dict(inputs))
        logits = run(case, network, inputs["input_ids"])
    chances, following = log_softmax(logits[:, :-1], -1), inputs["labels"][:, 1:, None]
    near(loss, -0.9 * chances.gather(-1, following).mean() - 0.1 * chances.mean(), "loss")


def check_processes(case: Case, folder: Path, network: Any) -> None:
    """Train in two processes: both end with the parameters of one process and a batch twice as large."""
    twin, data = case.peft(), examples(case, first=False)
    by_hand(case, twin, data)
    # With it on, transformers doubles the loss of every model that takes loss arguments and ignores them (T5, BERT).
    plan = {"average_tokens_across_devices": False, "ddp_backend": "gloo"}
    trainer(case, network, folder, data, per_device_train_batch_size=2, **plan).train()
    assert dist.get_world_size() == 2, "one process"
    network.set_adapter("default")
    mine = [parameter.detach().clone() for name, parameter in trainable(network) if "other" not in name.split(".")]
    for value in mine:
        both = [torch.zeros_like(value) for _ in range(2)]
        dist.all_gather(both, value)
        same(both[0], both[1], "parameters of the two processes")
    near_all(mine, values(twin), "parameters against one process", CLOSE)


@call("two processes (DDP)", "gloo: parameters in step, and = one process with the whole batch", processes=2)
def check_ddp(case: Case, folder: Path) -> None:
    check_processes(case, folder, case.peft())


@call("two processes, inactive adapter", "the same beside a second adapter", processes=2)
def check_ddp_two(case: Case, folder: Path) -> None:
    check_processes(case, folder, case.two())
