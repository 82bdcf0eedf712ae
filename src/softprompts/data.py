"""Examples to tokens to length-bucketed batches. The order of the data is a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompts.backbone import Backbone, decoder_start
from softprompts.cache import Tokens, cached_tokens
from softprompts.config import DataSettings, RunSettings
from softprompts.errors import UsageError
from softprompts.tasks import Example, Task, TaskData, fingerprint, get_task, load_task
from softprompts.tasks.splits import SEED

IGNORED = -100
OPEN_TARGET_TOKENS = 20
BUCKET = 64
"""Batches are cut from groups of at most this many batches' worth of rows, sorted by length."""
ANSWER_CUE = " Answer: "
"""Stands between text and answer for decoder-only models, which have no other sign that the text is over."""


@dataclass
class Rows:
    """Encoded examples of one split."""

    examples: Sequence[Example]
    sources: list[list[int]]
    targets: list[list[int]]
    classes: list[float]
    truncated: int
    targets_cut: int = 0

    def __len__(self) -> int:
        return len(self.sources)

    def pick(self, chosen: Sequence[int]) -> Rows:
        """Return some of the rows."""
        return Rows(
            [self.examples[i] for i in chosen],
            [self.sources[i] for i in chosen],
            [self.targets[i] for i in chosen],
            [self.classes[i] for i in chosen],
            0,
        )

    @staticmethod
    def together(several: Sequence[Rows]) -> Rows:
        """Return the rows of several, one after the other."""
        whole = Rows([], [], [], [], 0)
        for rows in several:
            whole.examples = [*whole.examples, *rows.examples]
            whole.sources += rows.sources
            whole.targets += rows.targets
            whole.classes += rows.classes
        return whole


@dataclass(frozen=True)
class Encoder:
    """Turns a task's examples into tokens for one backbone."""

    backbone: Backbone
    task: Task
    max_source: int
    max_target: int
    fixed: bool = False
    limited_by: str = "data.max_source_tokens"
    cached: bool = False

    def encode(self, examples: Sequence[Example]) -> Rows:
        """Tokenise; texts beyond `max_source` tokens lose their end, never their target.

        Raises:
            UsageError: a target that does not fit `max_target` tokens in a task with label words.
        """
        if not examples:
            return Rows(examples, [], [], [], 0)
        tokens = (cached_tokens if self.cached else Encoder.tokenise)(self, examples)
        longest = max(len(ids) for ids in tokens.targets)
        if longest > self.max_target and self.backbone.kind != "classification":
            raise UsageError(f"a target of {longest} tokens exceeds data.max_target_tokens={self.max_target}; raise it")
        classes = [float(e.value if e.label is None and e.value is not None else e.label or 0) for e in examples]
        return Rows(examples, tokens.sources, tokens.targets, classes, tokens.truncated, tokens.targets_cut)

    def tokenise(self, examples: Sequence[Example]) -> Tokens:
        """Return the tokens of sources and targets, cut to their lengths (the targets of label words never)."""
        tokenizer = self.backbone.tokenizer
        causal = self.backbone.kind == "causal"
        cue = cue_ids(self.backbone) if causal else []
        full = tokenizer([example.source for example in examples], add_special_tokens=not causal)["input_ids"]
        room = self.max_source - len(cue)
        if causal:
            start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            room -= len(start)
            sources = [start + ids[:room] + cue for ids in full]
        else:
            sources = [ids if len(ids) <= room else cut(ids, room, tokenizer) for ids in full]
        known = {text: self.encode_target(text) for text in {example.target for example in examples}}
        targets = [known[example.target] for example in examples]
        targets_cut = 0
        if self.cuts_targets:
            most, end = self.max_target, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            targets_cut = sum(len(ids) > most for ids in targets)
            targets = [ids if len(ids) <= most else ids[: most - len(end)] + end for ids in targets]
        return Tokens(sources, targets, sum(len(ids) > room for ids in full), targets_cut)

    @property
    def cuts_targets(self) -> bool:
        """Whether long targets are cut: open answers of models that write."""
        return self.task.label_words is None and self.backbone.kind != "classification"

    def encode_target(self, text: str) -> list[int]:
        """Return a target's ids with the end-of-text id."""
        tokenizer = self.backbone.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]

    def inputs(self, rows: Rows, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Return the padded (B, T) inputs of some rows, for generation or a classification head."""
        left = self.backbone.kind == "causal"
        ids, mask = pad([rows.sources[i] for i in chosen], self.pad_id, left, self.max_source if self.fixed else 0)
        return {"input_ids": ids, "attention_mask": mask}

    def batch(self, rows: Rows, chosen: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Return (model inputs, labels) of some rows for training.

        Labels are (B, L) target ids aligned with the logits that `inputs` asks for, or (B,) classes.
        """
        if self.backbone.kind == "classification":
            regression = self.backbone.model.config.num_labels == 1
            labels = torch.tensor([rows.classes[i] for i in chosen])
            return self.inputs(rows, chosen), labels if regression else labels.long()
        targets = [rows.targets[i] for i in chosen]
        if self.backbone.kind == "seq2seq":
            inputs = self.inputs(rows, chosen)
            start = decoder_start(self.backbone.model)
            labels, seen = pad(targets, self.pad_id)
            inputs["decoder_input_ids"] = torch.cat([labels.new_full((len(chosen), 1), start), labels[:, :-1]], 1)
            return inputs, labels.masked_fill(seen == 0, IGNORED)
        # Padded on the left, so that all targets end in the last slots and only those logits are computed.
        whole = [rows.sources[i] + target for i, target in zip(chosen, targets, strict=True)]
        ids, mask = pad(whole, self.pad_id, left=True, least=self.max_source + self.max_target if self.fixed else 0)
        labels = pad(targets, IGNORED, left=True)[0]
        return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": labels.shape[1] + 1}, labels  # type: ignore[dict-item]

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        return self.backbone.tokenizer.pad_token_id


def make_encoder(backbone: Backbone, task: Task, settings: DataSettings, reach: int | None = None) -> Encoder:
    """Size an encoder by the data settings, the task's own lengths, and the longest text the prompt allows."""
    longest_word = None
    words = task.target_words(settings.protocol)
    if words:
        sizes = Encoder(backbone, task, 0, 0)
        written = {word: sizes.encode_target(word) for word in words}
        longest_word = max(map(len, written.values()))
        if backbone.kind != "classification":
            check_words(backbone, written)
    max_source = settings.max_source_tokens or task.max_source_tokens
    max_target = settings.max_target_tokens or longest_word or task.max_target_tokens or OPEN_TARGET_TOKENS
    limited_by = "data.max_source_tokens"
    if reach is not None and backbone.kind == "causal":
        reach -= max_target
    if reach is not None and reach < max_source:
        max_source, limited_by = reach, "method.offset_positions, or the model's own positions"
    least = len(cue_ids(backbone)) + 4 if backbone.kind == "causal" else 4
    if max_source < least:
        raise UsageError(
            f"only {max_source} tokens are left for the text ({limited_by}); it takes at least {least}: raise that "
            f"limit or shorten the prompt"
        )
    return Encoder(backbone, task, max_source, max_target, settings.padding == "max", limited_by, settings.cache)


def check_words(backbone: Backbone, written: Mapping[str, list[int]]) -> None:
    """Make sure that a model that writes can tell the label words apart; `written` are their tokens.

    Raises:
        UsageError: two of them are the same tokens.
    """
    known: dict[tuple[int, ...], str] = {}
    for word, ids in written.items():
        other = known.setdefault(tuple(ids), word)
        if other != word:
            raise UsageError(
                f"the tokenizer of '{backbone.name}' writes the label words '{other}' and '{word}' with the "
                f"same tokens; take other words (--labels), or another model"
            )


def cue_ids(backbone: Backbone) -> list[int]:
    """Return the tokens between text and answer for a decoder-only model."""
    return backbone.tokenizer(ANSWER_CUE, add_special_tokens=False)["input_ids"]


def load_data(
    settings: RunSettings, splits: Sequence[str] = ("train", "validation", "test"), whole: bool = False
) -> TaskData:
    """Read the task or the user's own data, and apply the limits; `whole` as in `load_own`.

    Raises:
        UsageError: no such task or file, an empty split.
    """
    data = settings.data
    shots = data.shots if "train" in splits else None
    if data.path is not None:
        from softprompts.tasks.own import load_own

        loaded = load_own(
            data.path,
            data.inputs,
            data.target,
            data.labels,
            data.kind,
            protocol=data.protocol,
            mirror=data.mirror,
            splits=splits,
            shots=shots,
            shot_seed=data.shot_seed,
            whole=whole,
        )
    else:
        task = get_task(str(settings.task))
        loaded = load_task(task, data.protocol, data.folder, data.mirror, splits, shots, data.shot_seed)
    for name in splits:
        limit = getattr(data, f"{name}_limit")
        if limit is not None:
            kept = getattr(loaded, name)[:limit]
            setattr(loaded, name, kept)
            loaded.provenance[name] |= {"examples": len(kept), "sha256": fingerprint(kept)}
        if not getattr(loaded, name):
            raise UsageError(f"{loaded.task.name}: the {name} split is empty; nothing can be trained or scored")
    return loaded


def num_labels(task: Any) -> int | None:
    """Return the outputs a classification head needs: classes, 1 for a regression, None for open answers."""
    if task.label_words is not None:
        return len(task.label_words)
    return 1 if task.report_metric in ("pearson", "spearmanr") else None


def truncation_notes(splits: dict[str, Rows], encoder: Encoder) -> list[str]:
    """Say how many texts and targets were cut."""
    notes = []
    for name, rows in splits.items():
        if rows.truncated:
            where = f"{encoder.max_source} tokens ({encoder.limited_by})"
            notes.append(f"{rows.truncated} of {len(rows)} {name} texts were cut to {where}")
        if rows.targets_cut:
            where = f"{encoder.max_target} tokens (data.max_target_tokens)"
            notes.append(f"{rows.targets_cut} of {len(rows)} {name} targets were cut to {where}")
    return notes


def cut(ids: list[int], room: int, tokenizer: Any) -> list[int]:
    """Shorten ids to `room`, keeping a closing special token (T5's end of text, BERT's [SEP])."""
    last = ids[-1]
    return [*ids[: room - 1], last] if last in tokenizer.all_special_ids else ids[:room]


def pad(sequences: Sequence[Sequence[int]], fill: int, left: bool = False, least: int = 0) -> tuple[Tensor, Tensor]:
    """Return (B, T) ids and mask, T = the longest sequence or `least`."""
    width = max(least, max(len(s) for s in sequences))
    ids = torch.full((len(sequences), width), fill, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, where] = torch.tensor(sequence, dtype=torch.long)
        mask[row, where] = 1
    return ids, mask


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of one epoch: every row once, rows of similar length together, order shuffled."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    # Never more than a quarter of the rows in a group, or small data would make the same batches every epoch.
    size = batch_size * max(1, min(BUCKET, len(order) // batch_size // 4))
    batches: list[list[int]] = []
    for start in range(0, len(order), size):
        group = sorted(order[start : start + size], key=lambda row: lengths[row])
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


def eval_batches(lengths: Sequence[int], batch_size: int, slots: int | None = None) -> list[list[int]]:
    """Return batches of all rows, longest first (the memory peak comes at once).

    Args:
        lengths: slots of each row.
        batch_size: most rows of a batch.
        slots: most slots of a batch, padding counted; a longer row is a batch of its own. None = any.
    """
    batches: list[list[int]] = []
    size = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not batches or len(batches[-1]) >= size:
            batches.append([])
            size = batch_size if slots is None else max(1, min(batch_size, slots // max(1, lengths[row])))
        batches[-1].append(row)
    return batches


def spread(examples: Sequence[Example], count: int) -> list[int]:
    """Choose about `count` rows, always the same ones, every class with its share; in the order of the rows.

    What is scored together (the answers of one question) is taken whole, so that it may be a few more; a smaller
    choice is part of a larger one.
    """
    together: dict[Any, list[int]] = {}
    for row, example in enumerate(examples):
        together.setdefault(row if example.group is None else example.group, []).append(row)
    units = list(together.values())
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(SEED)).tolist()
    kinds: dict[Any, list[list[int]]] = {}
    for unit in (units[i] for i in order):
        kinds.setdefault(examples[unit[0]].label if len(unit) == 1 else None, []).append(unit)
    # Each class is laid out evenly from 0 to 1: any beginning of the whole has every class with its share.
    placed = [((i + 0.5) / len(own), unit) for own in kinds.values() for i, unit in enumerate(own)]
    chosen: list[int] = []
    for _, unit in sorted(placed, key=lambda entry: entry[0]):
        if len(chosen) >= count:
            break
        chosen += unit
    return sorted(chosen)
