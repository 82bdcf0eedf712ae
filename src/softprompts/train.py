"""The training loop, read top to bottom: data, backbone, prompt, steps, best checkpoint, scores, record.

`train` runs one set of settings; `train_together` runs several on one backbone, whose rows pass through it in one
batch. The first is the second with one member.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from softprompts import results
from softprompts.attach import adapters_of, attach, disabled, using
from softprompts.backbone import default_device, load_backbone
from softprompts.checkpoint import write_tensors
from softprompts.config import RunSettings
from softprompts.data import IGNORED, Rows, load_data, make_encoder, num_labels, truncation_notes
from softprompts.errors import SoftPromptsError, UsageError
from softprompts.evaluate import Evaluation, evaluate, majority, scored_rows, to_device
from softprompts.loss import LabelledOnly, summed_loss
from softprompts.member import Member
from softprompts.population import Halving, check_fit

CHUNK_ROWS = 64
"""Most rows of several members in one pass on a CPU."""
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


def train(
    settings: RunSettings,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one prompt, score it, and leave a run record in `out`. Returns the record.

    Args:
        settings: of the run.
        out: its folder.
        resume: continue where the folder says.
        overwrite: begin again.
        about: further entries of the record, for example how the settings were found.
        progress: hears of every step.

    Raises:
        UsageError: settings, data or folder that cannot be used; nothing is written then.
        SoftPromptsError: the loss is not a number, or the disk refuses.
    """
    return train_together([settings], [out], resume=resume, overwrite=overwrite, about=about, progress=progress)[0]


def train_together(
    settings: Sequence[RunSettings],
    outs: Sequence[str | Path],
    *,
    resume: bool = False,
    overwrite: bool = False,
    halving: Halving | None = None,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train several prompts on one backbone at once, each as if alone, and leave a run record in each folder.

    Args:
        settings: of the members; they may differ in method, rates, seed and few-shot draw.
        outs: a folder for each.
        resume: continue where the folders' common state says.
        overwrite: begin again.
        halving: drop the worse half after some evaluations; such a member's record has the status "dropped".
        about: further entries of every record.
        progress: hears of every step.

    Raises:
        UsageError: settings, data or folders that cannot be used, or members that do not fit each other.
        SoftPromptsError: a loss is not a number, or the disk refuses.
    """
    folders, progress = [Path(out) for out in outs], progress or Progress()
    first = settings[0]
    check_fit(settings)
    accelerator = Accelerator(cpu=default_device().type == "cpu")
    if len(settings) > 1 and accelerator.num_processes > 1:
        raise UsageError(
            "several prompts on one backbone train in one process; start one process, or one run at a time"
        )
    earlier = [unfinished(one, out, resume) for one, out in zip(settings, folders, strict=True)]
    if all(record is not None and record["status"] in ("done", "dropped") for record in earlier):
        for out in folders:
            progress.note(f"{out} is finished; nothing to resume")
        return [record for record in earlier if record is not None]
    for out in folders:
        results.check_folder(out, resume, overwrite)
    torch.manual_seed(first.seed)
    task_data = load_data(first)
    backbone = load_backbone(first.model, num_labels(task_data.task))
    names = ["default"] if len(settings) == 1 else [f"member-{number}" for number in range(len(settings))]
    begun = resume and (folders[0] / results.STATE).exists()
    for number, (one, name) in enumerate(zip(settings, names, strict=True)):
        if number:
            torch.manual_seed(one.seed)
        # A saved state holds the weights: the adapters they started from may be gone.
        attach(
            backbone.model,
            one.method_config(),
            name,
            tokenizer=backbone.tokenizer,
            also_train=backbone.untrained,
            initialise=not begun,
        )
        if not any(parameter.requires_grad for parameter in backbone.model.parameters()):
            raise UsageError(f"method '{one.method['name']}' trains nothing here; take a prompt method, or a head")
    adapters = adapters_of(backbone.model)
    reaches = [adapters.reach(name) for name in names]
    encoder = make_encoder(backbone, task_data.task, first.data, min((r for r in reaches if r), default=None))
    shared = {name: encoder.encode(getattr(task_data, name)) for name in ("train", "validation", "test")}
    for note in (*task_data.notes, *truncation_notes(shared, encoder)):
        progress.note(note)
    members: list[Member] = []
    for one, out, name, before in zip(settings, folders, names, earlier, strict=True):
        data, splits = task_data, shared
        if (one.data.shots, one.data.shot_seed) != (first.data.shots, first.data.shot_seed):
            data = load_data(one)
            splits = {**shared, "train": encoder.encode(data.train)}
        scored, limits = scored_rows(one, encoder, splits)
        for note in limits if not members else ():
            progress.note(note)
        member = Member(one, out, name, encoder, data, {**splits, **scored})
        member.record = results.new_record(one, data, backbone, splits, name, member.parameters.values())
        member.record |= about or {}
        if before is not None and before["data"]["provenance"] != member.record["data"]["provenance"]:
            raise UsageError(f"the data have changed since {out} was begun; take --overwrite to begin again")
        members.append(member)
    # Every process draws its own dropout; the first one's numbers are those of a run alone.
    if accelerator.process_index:
        torch.manual_seed(first.seed + 7919 * accelerator.process_index)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if accelerator.is_main_process:
        for member in members:
            if overwrite and not resume:
                results.clear_folder(member.out)
            results.write_record(member.out, member.record)
    accelerator.wait_for_everyone()
    run = Run(members, accelerator, progress, halving)
    try:
        run.steps()
        records = run.finish()
    except Exception as error:
        if accelerator.is_main_process:
            for member in members:
                failed = {**member.record, "status": "failed", "error": f"{type(error).__name__}: {error}"}
                with suppress(SoftPromptsError):
                    results.write_record(member.out, failed)
        raise
    if accelerator.is_main_process:
        for member, record in zip(members, records, strict=True):
            results.write_record(member.out, record)
        run.state_file.unlink(missing_ok=True)
    return records


def unfinished(settings: RunSettings, out: Path, resume: bool) -> dict[str, Any] | None:
    """Return the record that a resumed run has left, None if there is none.

    Raises:
        UsageError: it was begun with other settings.
    """
    if not (resume and (out / results.RECORD).exists()):
        return None
    record = results.read_record(out)
    if record["settings"] != settings.model_dump(mode="json"):
        raise UsageError(f"{out} was begun with other settings; resume with --out alone, or take --overwrite")
    return record


class Run:
    """The members of a run in progress, on one backbone."""

    def __init__(
        self, members: Sequence[Member], accelerator: Accelerator, progress: Progress, halving: Halving | None = None
    ) -> None:
        self.members, self.accelerator, self.progress, self.halving = members, accelerator, progress, halving
        self.encoder = members[0].encoder
        self.backbone = self.encoder.backbone
        self.state_file = members[0].out / results.STATE
        for member in members:
            for parameter in member.parameters.values():
                parameter.requires_grad_(True)
        self.model = accelerator.prepare(self.backbone.model)
        self.labelled = LabelledOnly(self.backbone)
        # Dynamic shapes: lengths change with every batch, and one graph must do for all of them.
        compiles = members[0].settings.model.compile
        self.forward = torch.compile(self.model, dynamic=True) if compiles else self.model

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    def training(self) -> list[Member]:
        """Return the members that have steps to go."""
        return [member for member in self.members if member.trains]

    def steps(self) -> None:
        """Train to the last step, or until patience runs out; resume where a saved state says."""
        plan = self.members[0].plan
        self.load_state()
        self.progress.phase("train", plan.steps)
        done = max(member.state.step for member in self.members)
        self.progress.advance(done)
        self.backbone.model.train()
        begun = time.perf_counter()
        while training := self.training():
            self.step(training)
            done = training[0].state.step
            evaluates = done % plan.eval_steps() == 0 or done == plan.steps
            saves = done % (plan.save_every or plan.eval_steps()) == 0 and done < plan.steps
            if evaluates or saves or done % LOG_EVERY == 0:
                self.log(training)
            if evaluates or saves:
                for member in training:
                    member.state.train_seconds += (time.perf_counter() - begun) / len(training)
                if evaluates:
                    self.validate(training)
                if saves:
                    self.save_state()
                begun = time.perf_counter()

    def step(self, training: Sequence[Member]) -> None:
        """One optimizer step of each member, all their rows in one batch, cut into pieces and shared by processes."""
        plan, processes = training[0].plan, self.accelerator.num_processes
        whole = [member.batch_at(member.state.step) for member in training]
        totals = [member.weight(chosen) for member, chosen in zip(training, whole, strict=True)]
        # A process without a row of a small last batch takes one for nothing: all must join in the backward pass.
        shares = [chosen[self.accelerator.process_index :: processes] for chosen in whole]
        counts = [bool(share) for share in shares]
        shares = [share or chosen[:1] for share, chosen in zip(shares, whole, strict=True)]
        pieces = max(-(-len(share) // -(-len(share) // plan.accumulate)) for share in shares)
        sums = torch.zeros(len(training), device=self.accelerator.device)
        for number in range(pieces):
            parts = [piece(share, plan.accumulate, number) for share in shares]
            for chunk in self.chunks(training, parts):
                with nullcontext() if number == pieces - 1 else self.accelerator.no_sync(self.model):
                    losses = self.losses([training[i] for i in chunk], [parts[i] for i in chunk])
                    # Divided by the whole batch, so that pieces and processes add up to the mean of the batch.
                    scaled = [loss * counts[i] * processes / totals[i] for i, loss in zip(chunk, losses, strict=True)]
                    self.accelerator.backward(sum(scaled[1:], scaled[0]))
                for i, loss in zip(chunk, losses, strict=True):
                    sums[i] += loss.detach() * counts[i]
        sums = self.accelerator.reduce(sums)
        for index, (member, chosen) in enumerate(zip(training, whole, strict=True)):
            member.state.tokens += sum(len(member.splits["train"].sources[i]) for i in chosen)
            member.pending.append(sums[index] / totals[index])
            member.update()
        self.progress.advance(1)

    def chunks(self, training: Sequence[Member], parts: Sequence[list[int]]) -> list[list[int]]:
        """Return which members go through the backbone together, by number; those without rows are left out.

        An accelerator takes all at once. A CPU is no faster on larger batches, and slower on those beyond its caches:
        there a chunk has `CHUNK_ROWS` rows, of members whose texts are of similar length.
        """
        busy = [i for i, part in enumerate(parts) if part]
        if len(busy) == 1 or self.accelerator.device.type != "cpu":
            return [busy]
        longest = {i: max(len(training[i].splits["train"].sources[row]) for row in parts[i]) for i in busy}
        found: list[list[int]] = []
        for i in sorted(busy, key=lambda i: longest[i]):
            if found and sum(len(parts[j]) for j in (*found[-1], i)) <= CHUNK_ROWS:
                found[-1].append(i)
            else:
                found.append([i])
        return found

    def losses(self, training: Sequence[Member], parts: Sequence[list[int]]) -> list[Tensor]:
        """Return each member's summed loss on its rows; the backbone runs once."""
        rows = Rows.together([member.splits["train"].pick(part) for member, part in zip(training, parts, strict=True)])
        inputs, labels = self.encoder.batch(rows, range(len(rows)))
        inputs, labels = to_device(inputs, self.backbone.model), labels.to(self.accelerator.device)
        names = [member.name for member, part in zip(training, parts, strict=True) for _ in part]
        seen = None if self.backbone.kind == "classification" else labels != IGNORED
        # A compiled model would be compiled anew for each number of labels.
        compiled = self.forward is not self.model
        with (
            nullcontext() if len(self.members) == 1 else using(self.backbone.model, names),
            nullcontext() if seen is None or compiled else self.labelled.at(seen),
        ):
            logits = self.forward(**inputs).logits
        if compiled and seen is not None:
            logits = logits[:, : seen.shape[1]][seen]
        # One logit per row of a head, per target token of a language model.
        of_rows = torch.ones(len(rows), dtype=torch.long) if seen is None else seen.sum(1)
        targets = labels if seen is None else labels[seen]
        sizes = [int(count.sum()) for count in of_rows.split([len(part) for part in parts])]
        pairs = zip(logits.split(sizes), targets.split(sizes), strict=True)
        return [summed_loss(*pair) for pair in pairs]

    def log(self, training: Sequence[Member]) -> None:
        """Write the losses since the last look; SoftPromptsError if one is not a number."""
        means = [member.log(self.main) for member in training]
        known = [mean for mean in means if mean is not None]
        if known:
            self.progress.advance(0, loss=sum(known) / len(known))

    def validate(self, training: Sequence[Member]) -> None:
        """Score the validation split; keep the adapters that are the best so far; drop losers if halving says so."""
        scores = []
        for member in training:
            begun = time.perf_counter()
            scores.append(member.judge(self.evaluate(member, "validation").scores, self.main))
            member.state.eval_seconds += time.perf_counter() - begun
            if member.out_of_patience():
                self.progress.note(
                    f"{self.label(member)}stopped at step {member.state.step}: {member.plan.patience} evaluations "
                    f"without a better score"
                )
        self.progress.advance(0, score=max(scores))
        if self.halving is not None:
            for member, reason in self.halving.losers(self.training()):
                member.state.dropped = reason
                self.progress.note(f"{self.label(member)}{reason}")
                if self.main:
                    results.write_record(member.out, member.gave_up())

    def label(self, member: Member) -> str:
        """Return how notes call a member: by its folder, if it has company."""
        return "" if len(self.members) == 1 else f"{member.out.name}: "

    def evaluate(self, member: Member, split: str, advance: Callable[[int], Any] = lambda done: None) -> Evaluation:
        """Answer and score one split with a member's adapter as it is."""
        adapters, plan = adapters_of(self.backbone.model), member.settings.eval
        adapters.active = member.name
        return evaluate(
            self.encoder,
            member.splits[split],
            member.settings.data.protocol,
            plan.scoring,
            plan.batch_size,
            advance,
            self.accelerator,
        )

    def key(self, member: Member) -> str:
        """Return a member's name in the common state: a population's may lose members between kill and resume."""
        return member.name if len(self.members) == 1 else member.out.name

    def save_state(self) -> None:
        """Write everything a resume needs into one file, atomically."""
        self.accelerator.wait_for_everyone()
        if not self.main:
            return
        tensors = {"rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        states = {}
        for member in self.members:
            own = self.key(member)
            tensors |= {f"{own}/{key}": value for key, value in member.tensors().items()}
            states[own] = json.dumps(vars(member.state))
        write_tensors(self.state_file, tensors, states)

    def load_state(self) -> None:
        """Go on from a saved state if there is one; forget the log of steps beyond it."""
        if self.state_file.exists():
            try:
                with safe_open(self.state_file, "pt") as file:
                    self.read_state(file)
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{self.state_file} is damaged ({error}); begin again with --overwrite") from None
            self.progress.note(f"resumed at step {max(member.state.step for member in self.members)}")
        if self.main:
            for member in self.members:
                results.keep_steps(member.out, member.state.step)

    def read_state(self, file: Any) -> None:
        """Take over the random state, and every member's step, weights and moments."""
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        for member in self.members:
            own = self.key(member)
            mine = {k.removeprefix(f"{own}/"): value for k, value in tensors.items() if k.startswith(f"{own}/")}
            member.take(file.metadata()[own], mine)
        if self.main:
            torch.set_rng_state(tensors["rng"])
            if torch.cuda.is_available() and "rng.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng.cuda"])

    def finish(self) -> list[dict[str, Any]]:
        """Score each member's best adapter on the test split, write the predictions, return the records."""
        self.accelerator.wait_for_everyone()
        records, untuned = [], None
        for member in self.members:
            if member.state.dropped is not None:
                records.append(member.gave_up())
                continue
            member.take_best()
            begun = time.perf_counter()
            self.progress.phase("test", len(member.splits["test"]))
            test = self.evaluate(member, "test", self.progress.advance)
            data, protocol = member.data, member.settings.data.protocol
            baselines = {"majority": majority(self.encoder.task, data.train, data.test, protocol)}
            if member.settings.eval.untuned and self.backbone.kind != "classification":
                if untuned is None:
                    self.progress.phase("untuned", len(member.splits["untuned"]))
                    with disabled(self.backbone.model):
                        untuned = self.evaluate(member, "untuned", self.progress.advance).scores
                baselines["untuned"] = untuned
            member.state.eval_seconds += time.perf_counter() - begun
            if self.main:
                results.write_predictions(
                    member.out,
                    (
                        {"source": example.source, "target": example.target, "prediction": prediction}
                        for example, prediction in zip(data.test, test.predictions, strict=True)
                    ),
                )
            records.append(member.finished(test, baselines, len(self.members)))
        return records


def piece(share: list[int], accumulate: int, number: int) -> list[int]:
    """Return the rows of one of the pieces that a share of a batch is cut into; later pieces may be empty."""
    size = -(-len(share) // accumulate)
    return share[number * size : (number + 1) * size]
