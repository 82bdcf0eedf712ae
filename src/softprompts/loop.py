"""The members of a run in progress: their steps on one backbone, validation, the saved state, the test scores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from softprompts import results
from softprompts.attach import adapters_of, disabled, using
from softprompts.backbone import load_backbone
from softprompts.checkpoint import write_tensors
from softprompts.data import IGNORED, Rows, num_labels
from softprompts.dropout import fast_dropout
from softprompts.errors import Diverged, UsageError
from softprompts.evaluate import Evaluation, evaluate, majority, to_device
from softprompts.loss import LabelledOnly, summed_loss
from softprompts.member import Member
from softprompts.population import Halving

CHUNK_ROWS = 64
"""Most rows of several members in one pass on a CPU."""
PASS_SLOTS = 128
"""Slots of padding that a pass less is worth there: what a pass of t5-nano costs beside its rows, roughly."""
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


class Run:
    """The members of a run in progress, on one backbone."""

    def __init__(
        self, members: Sequence[Member], accelerator: Accelerator, progress: Progress, halving: Halving | None = None
    ) -> None:
        self.members, self.accelerator, self.progress, self.halving = members, accelerator, progress, halving
        self.backbone = members[0].backbone
        self.limit = adapters_of(self.backbone.model).hooks.position_limit
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
        with fast_dropout(self.backbone.model, compiled=self.forward is not self.model):
            self._step(training)

    def _step(self, training: Sequence[Member]) -> None:
        plan, processes = training[0].plan, self.accelerator.num_processes
        whole, totals = self.batches(training)
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
        for member, chosen in zip(training, whole, strict=True):
            member.state.tokens += sum(len(member.splits["train"].sources[i]) for i in chosen)
        self.update(training, list(self.accelerator.reduce(sums) / torch.tensor(totals, device=sums.device)))
        self.progress.advance(1)

    def batches(self, training: Sequence[Member]) -> tuple[list[list[int]], list[int]]:
        """Return the rows of each member's batch, and by what each one's summed loss is divided."""
        chosen = [member.batch_at(member.state.step) for member in training]
        return chosen, [member.weight(rows) for member, rows in zip(training, chosen, strict=True)]

    def update(self, training: Sequence[Member], losses: Sequence[Tensor]) -> None:
        """Let every member take its optimizer step, and keep its loss for the log."""
        for member, loss in zip(training, losses, strict=True):
            member.pending.append(loss)
            member.update()

    def chunks(self, training: Sequence[Member], parts: Sequence[list[int]]) -> list[list[int]]:
        """Return which members go through the backbone together, by number; those without rows are left out.

        An accelerator takes all at once. A CPU is no faster on larger batches, and slower on those beyond its caches:
        there a chunk has `CHUNK_ROWS` rows, of members whose texts are about equally long. Nowhere do the longest
        prompt and the longest text of a chunk exceed the backbone's positions.
        """
        busy = [i for i, part in enumerate(parts) if part]
        cpu = self.accelerator.device.type == "cpu"
        if len(busy) == 1 or (not cpu and self.limit is None):
            return [busy]
        longest = {i: self.slots(training[i], parts[i]) for i in busy}
        found: list[list[int]] = []
        for i in sorted(busy, key=lambda i: longest[i]):
            joined = [*found[-1], i] if found else [i]
            rows = sum(len(parts[j]) for j in joined)
            padding = rows * longest[i] - sum(len(parts[j]) * longest[j] for j in joined)
            cheap = not cpu or (rows <= CHUNK_ROWS and padding <= PASS_SLOTS * (len(joined) - 1))
            if found and cheap and self.has_room([training[j] for j in joined], longest[i]):
                found[-1] = joined
            else:
                found.append([i])
        return found

    def slots(self, member: Member, part: Sequence[int]) -> int:
        """Return how long some rows of a member are in a batch of their own, without the prompt."""
        rows, encoder, causal = member.splits["train"], member.encoder, self.backbone.kind == "causal"
        if encoder.fixed:
            return encoder.max_source + encoder.max_target * causal
        return max(len(rows.sources[i]) + len(rows.targets[i]) * causal for i in part)

    def has_room(self, members: Sequence[Member], slots: int) -> bool:
        """Whether the backbone has positions for the longest prompt of several members and a text of `slots`."""
        if self.limit is None:
            return True
        adapters = adapters_of(self.backbone.model)
        return max(adapters.method(member.name).length for member in members) + slots <= self.limit

    def losses(self, training: Sequence[Member], parts: Sequence[list[int]]) -> list[Tensor]:
        """Return each member's summed loss on its rows; the backbone runs once."""
        logits, targets, sizes = self.answers(training, parts)
        pairs = zip(logits.split(sizes), targets.split(sizes), strict=True)
        return [summed_loss(*pair) for pair in pairs]

    def answers(
        self, training: Sequence[Member], parts: Sequence[list[int]], chosen: bool = False
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Return (logits (M, V), targets (M), how many of the M are each member's) for the labels of their rows.

        `chosen` says that the adapters of the rows are chosen already.
        """
        rows = Rows.together([member.splits["train"].pick(part) for member, part in zip(training, parts, strict=True)])
        encoder = max((member.encoder for member in training), key=lambda encoder: encoder.max_source)
        inputs, labels = encoder.batch(rows, range(len(rows)))
        inputs, labels = to_device(inputs, self.backbone.model), labels.to(self.accelerator.device)
        seen = None if self.backbone.kind == "classification" else labels != IGNORED
        # A compiled model would be compiled anew for each number of labels.
        compiled = self.forward is not self.model
        with (
            nullcontext() if chosen else self.adapters_for(training, [len(part) for part in parts]),
            nullcontext() if seen is None or compiled else self.labelled.at(seen),
        ):
            logits = self.forward(**inputs).logits
        if compiled and seen is not None:
            logits = logits[:, : seen.shape[1]][seen]
        # One logit per row of a head, per target token of a language model.
        of_rows = torch.ones(len(rows), dtype=torch.long) if seen is None else seen.sum(1)
        targets = labels if seen is None else labels[seen]
        return logits, targets, [int(count.sum()) for count in of_rows.split([len(part) for part in parts])]

    def adapters_for(self, training: Sequence[Member], rows: Sequence[int]) -> AbstractContextManager[None]:
        """Let the first `rows[0]` rows of a batch use the first member's adapter, and so on."""
        if len(self.members) == 1:
            return nullcontext()
        names = [member.name for member, count in zip(training, rows, strict=True) for _ in range(count)]
        return using(self.backbone.model, names)

    def log(self, training: Sequence[Member]) -> None:
        """Write the losses since the last look; a member whose loss is no number anymore gives up."""
        known = []
        for member in training:
            try:
                mean = member.log(self.main)
            except Diverged as error:
                self.diverged(member, error)
                continue
            if mean is not None:
                known.append(mean)
        if known:
            self.progress.advance(0, loss=sum(known) / len(known))

    def diverged(self, member: Member, error: Diverged) -> None:
        """End a run whose loss is no number anymore; among others, it alone is dropped."""
        if len(self.members) == 1:
            raise error
        self.drop(member, str(error))

    def drop(self, member: Member, reason: str) -> None:
        """Take no more steps of a member, and say why."""
        member.state.dropped = reason
        self.progress.note(f"{self.label(member)}{reason}")
        if self.main:
            results.write_record(member.out, member.gave_up())

    def validate(self, training: Sequence[Member]) -> None:
        """Score the validation split; keep the adapters that are the best so far; drop losers if halving says so."""
        scores = []
        for member in training:
            if member.state.dropped is not None:
                continue
            scores.append(member.judge(self.timed(member, "validation"), self.main))
            if member.out_of_patience():
                self.progress.note(
                    f"{self.label(member)}stopped at step {member.state.step}: {member.plan.patience} evaluations "
                    f"without a better score"
                )
        if scores:
            self.progress.advance(0, score=max(scores))
        if self.halving is not None:
            for member, reason in self.halving.losers(self.training()):
                self.drop(member, reason)

    def label(self, member: Member) -> str:
        """Return how notes call a member: by its folder, if it has company."""
        return "" if len(self.members) == 1 else f"{member.out.name}: "

    def evaluate(self, member: Member, split: str, advance: Callable[[int], Any] = lambda done: None) -> Evaluation:
        """Answer and score one split with a member's adapter as it is."""
        adapters, plan = adapters_of(self.backbone.model), member.settings.eval
        adapters.active = member.name
        return evaluate(
            member.encoder,
            member.splits[split],
            member.settings.data.protocol,
            plan.scoring,
            plan.batch_size,
            advance,
            self.accelerator,
            plan.beams,
        )

    def timed(self, member: Member, split: str) -> dict[str, float]:
        """Return a split's scores, and count the time as the member's."""
        begun = time.perf_counter()
        scores = self.evaluate(member, split).scores
        member.state.eval_seconds += time.perf_counter() - begun
        return scores

    def untuned(self, member: Member) -> dict[str, float]:
        """Return the scores of the bare backbone; of a fresh one, where training has changed the backbone itself."""
        if not adapters_of(self.backbone.model).changes_model:
            with disabled(self.backbone.model):
                return self.evaluate(member, "untuned", self.progress.advance).scores
        # In the precision of what was trained.
        backbone = load_backbone(member.settings.model.updated(dtype="fp32"), num_labels(member.encoder.task))
        bare = replace(member.encoder, backbone=backbone)
        data, plan = member.settings.data, member.settings.eval
        rows = member.splits["untuned"]
        found = evaluate(
            bare, rows, data.protocol, plan.scoring, plan.batch_size, self.progress.advance, beams=plan.beams
        )
        return found.scores

    def keep(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the finished records."""
        for member, record in zip(self.members, records, strict=True):
            results.write_record(member.out, record)

    def key(self, member: Member) -> str:
        """Return a member's name in the common state: a population's may lose members between kill and resume."""
        return member.name if len(self.members) == 1 else member.out.name

    def save_state(self) -> None:
        """Write everything a resume needs into one file, atomically."""
        self.accelerator.wait_for_everyone()
        tensors = self.random_states()
        if not self.main:
            return
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
            # Of a population that has shrunk to one since, the state knows it by its folder.
            known = (self.key(member), member.out.name)
            own = next((key for key in known if key in file.metadata()), self.key(member))
            mine = {k.removeprefix(f"{own}/"): value for k, value in tensors.items() if k.startswith(f"{own}/")}
            member.take(file.metadata()[own], mine)
        own = f"rng.{self.accelerator.process_index}"
        if own in tensors:  # a process more than before goes on as it began
            torch.set_rng_state(tensors[own])
        if torch.cuda.is_available() and f"{own}.cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"{own}.cuda"])

    def random_states(self) -> dict[str, Tensor]:
        """Return the random state of every process: each draws its own dropout."""
        own = f"rng.{self.accelerator.process_index}"
        states = {own: torch.get_rng_state()}
        if torch.cuda.is_available():
            states[f"{own}.cuda"] = torch.cuda.get_rng_state()
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            states = dict(gather_object(list(states.items())))
        return states

    def finish(self) -> list[dict[str, Any]]:
        """Score each member's best adapter on the test split, write the predictions, return the records."""
        self.accelerator.wait_for_everyone()
        records = []
        untuned: dict[tuple[int, int], dict[str, float]] = {}
        for member in self.members:
            if member.state.dropped is not None:
                records.append(member.gave_up())
                continue
            member.take_best()
            begun = time.perf_counter()
            self.progress.phase("test", len(member.splits["test"]))
            test = self.evaluate(member, "test", self.progress.advance)
            task, protocol = member.encoder.task, member.settings.data.protocol
            examples = member.splits["test"].examples
            baselines = {"majority": majority(task, member.data.train, examples, protocol)}
            if member.settings.eval.untuned and self.backbone.kind != "classification":
                # The bare backbone answers the same for all members whose texts are cut alike, and as many.
                asked = id(member.encoder), len(member.splits["untuned"])
                if asked not in untuned:
                    self.progress.phase("untuned", asked[1])
                    untuned[asked] = self.untuned(member)
                baselines["untuned"] = untuned[asked]
            member.state.eval_seconds += time.perf_counter() - begun
            if self.main:
                results.write_predictions(
                    member.out,
                    (
                        {"source": example.source, "target": example.target, "prediction": prediction}
                        for example, prediction in zip(examples, test.predictions, strict=True)
                    ),
                )
            records.append(member.finished(test, baselines, len(self.members)))
        return records


def piece(share: list[int], accumulate: int, number: int) -> list[int]:
    """Return the rows of one of the pieces that a share of a batch is cut into; later pieces may be empty."""
    size = -(-len(share) // accumulate)
    return share[number * size : (number + 1) * size]
