"""Answers and scores: generation (greedy or by beams), ranking of the label words, or a classification head."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from softprompts.attach import adapters_of, remembering
from softprompts.backbone import Backbone, decoder_start
from softprompts.data import IGNORED, Encoder, Rows, eval_batches, pad
from softprompts.errors import UsageError
from softprompts.loss import hide_answer
from softprompts.shapes import SLOT, attention_window
from softprompts.tasks.base import Example, Protocol, Task

Scoring = Literal["rank", "generate", "head"]
WORD_SLOTS = 16_384
"""Most slots (of texts times label words) of one call: more words are ranked in several calls, to bound the memory."""
BATCH_SLOTS = {"cpu": 2_048, "accelerator": 8_192}
"""Slots of an evaluation batch, prompt and padding counted: a processor is slower with more, it leaves its caches."""
BATCH_ROWS = 256
"""Most rows of an evaluation batch whose size is automatic."""


@dataclass
class Evaluation:
    """Predictions in the order of the examples, their scores, and how they came about."""

    predictions: list[str]
    scores: dict[str, float]
    scoring: Scoring


def scoring_for(backbone: Backbone, task: Task, protocol: Protocol, wanted: str, beams: int = 1) -> Scoring:
    """Decide how a task is scored: `auto` follows the protocol, a head decides for itself.

    Raises:
        UsageError: a wish that the task or the model cannot fulfil, or beams for answers that are not generated.
    """
    scoring = possible_scoring(backbone, task, protocol, wanted)
    if beams > 1 and scoring != "generate":
        reason, change = ("a head answers", "")
        if scoring == "rank":
            reason, change = "the label words are ranked", "set eval.scoring=generate or "
        raise UsageError(f"eval.beams={beams} cannot be used: {reason}, nothing is generated; {change}leave it at 1")
    return scoring


def possible_scoring(backbone: Backbone, task: Task, protocol: Protocol, wanted: str) -> Scoring:
    """Decide how a task is scored, whatever the beams.

    Raises:
        UsageError: a wish that the task or the model cannot fulfil.
    """
    possible: Scoring | None
    possible = "head" if backbone.kind == "classification" else "generate" if task.label_words is None else None
    if possible is not None:
        if wanted not in ("auto", possible):
            reason = "a head answers" if possible == "head" else "the answers are open"
            raise UsageError(f"eval.scoring={wanted} cannot be had: {reason}; leave it at auto")
        return possible
    if wanted == "auto":
        return "generate" if protocol == "paper" else "rank"
    return "rank" if wanted == "rank" else "generate"


@torch.inference_mode()
def predict(
    encoder: Encoder,
    rows: Rows,
    scoring: Scoring,
    batch_size: int | None = None,
    advance: Callable[[int], Any] = lambda done: None,
    share: tuple[int, int] = (0, 1),
    beams: int = 1,
) -> dict[int, str]:
    """Return the answer to each row, by row number.

    Args:
        encoder: of the backbone that answers.
        rows: encoded examples.
        scoring: see `scoring_for`.
        batch_size: rows at a time; None = as many as the device is fast with.
        advance: told how many rows were done after each batch.
        share: (rank, of how many processes): this process answers every n-th batch.
        beams: of a search for the most likely generated answer; 1 = greedy.
    """
    model = encoder.backbone.model
    was_training = model.training
    model.eval()
    ways: dict[Scoring, Callable[..., list[str]]]
    ways = {"rank": rank, "generate": partial(generate, beams=beams), "head": classify}
    answers: dict[int, str] = {}
    try:
        with remembering(model) if hasattr(model, SLOT) else nullcontext():
            for chosen in batches_for(model, rows, batch_size, beams)[share[0] :: share[1]]:
                answers.update(zip(chosen, ways[scoring](encoder, rows, chosen), strict=True))
                advance(len(chosen))
    finally:
        model.train(was_training)
    return answers


def evaluate(
    encoder: Encoder,
    rows: Rows,
    protocol: Protocol,
    wanted: str = "auto",
    batch_size: int | None = None,
    advance: Callable[[int], Any] = lambda done: None,
    accelerator: Any = None,
    beams: int = 1,
) -> Evaluation:
    """Answer every row and score the answers by the task's metrics under the protocol."""
    scoring = scoring_for(encoder.backbone, encoder.task, protocol, wanted, beams)
    share = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    answers = predict(encoder, rows, scoring, batch_size, advance, share, beams)
    if share[1] > 1:
        from accelerate.utils import gather_object

        answers = dict(gather_object(list(answers.items())))
    predictions = [answers[i] for i in range(len(rows))]
    scores = encoder.task.score(predictions, rows.examples, protocol, cut=encoder_cut(encoder))
    return Evaluation(predictions, scores, scoring)


def batches_for(model: Any, rows: Rows, batch_size: int | None, beams: int = 1) -> list[list[int]]:
    """Return the batches of an evaluation, of `batch_size` rows or of the slots that the model's device likes.

    Each beam of a row takes the row's slots again.
    """
    lengths = [len(ids) for ids in rows.sources]
    if batch_size is not None:
        return eval_batches(lengths, batch_size)
    slots = BATCH_SLOTS["cpu" if model.device.type == "cpu" else "accelerator"]
    prompt = longest_prompt(model)
    return eval_batches([(length + prompt) * beams for length in lengths], max(1, BATCH_ROWS // beams), slots)


def longest_prompt(model: Any) -> int:
    """Return the length of the longest attached prompt."""
    attached = adapters_of(model).methods() if hasattr(model, SLOT) else {}
    return max((method.length for method in attached.values()), default=0)


def to_device(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Move the tensors among the inputs to the model's device."""
    return {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def generate(encoder: Encoder, rows: Rows, chosen: Sequence[int], beams: int = 1) -> list[str]:
    """Generate greedily, or keep several beams and take the likeliest per token.

    One token beyond the longest label word, so that a longer answer counts as wrong; for open answers one less than
    the longest target, which leaves out its end of text (the reference's length of 20 with the start token).
    """
    beyond = 1 if encoder.task.label_words is not None else -1
    model, tokenizer = encoder.backbone.model, encoder.backbone.tokenizer
    inputs = to_device(encoder.inputs(rows, chosen), model)
    out = model.generate(
        **inputs,
        max_new_tokens=encoder.max_target + beyond,
        do_sample=False,
        num_beams=beams,
        pad_token_id=encoder.pad_id,
        eos_token_id=ends(model, tokenizer),
    )
    if encoder.backbone.kind == "causal":
        out = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


def ends(model: Any, tokenizer: Any) -> list[int] | None:
    """Return the ids that end an answer: the model's own, and the tokenizer's, which ends the targets of training."""
    own = model.generation_config.eos_token_id
    ids = dict.fromkeys([*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id])
    return [token for token in ids if token is not None] or None


def rank(encoder: Encoder, rows: Rows, chosen: Sequence[int]) -> list[str]:
    """Choose the label word of the highest log-likelihood, end of text included; never an invalid answer."""
    words = encoder.task.label_words
    assert words is not None, "scoring_for ranks only tasks with label words"
    likelihood = rank_seq2seq if encoder.backbone.kind == "seq2seq" else rank_causal
    scores = likelihood(encoder, rows, chosen, [encoder.encode_target(word) for word in words])
    return [words[i] for i in scores.argmax(1).tolist()]


def rank_seq2seq(encoder: Encoder, rows: Rows, chosen: Sequence[int], words: list[list[int]]) -> Tensor:
    """Return (B, words) log-likelihoods; the text is encoded once, all words are decoded together."""
    model = encoder.backbone.model
    inputs = to_device(encoder.inputs(rows, chosen), model)
    memory, mask = model.get_encoder()(**inputs)[0], inputs["attention_mask"]
    start = decoder_start(model)
    columns = []
    for some in portions(words, memory):
        targets = pad(some, IGNORED)[0].to(model.device)
        decoder_ids = pad([[start, *word[:-1]] for word in some], encoder.pad_id)[0].to(model.device)
        logits = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory.repeat_interleave(len(some), 0)),
            attention_mask=mask.repeat_interleave(len(some), 0),
            decoder_input_ids=decoder_ids.repeat(len(chosen), 1),
            use_cache=False,
        ).logits
        columns.append(log_likelihood(logits, targets.repeat(len(chosen), 1)).view(len(chosen), -1))
    return torch.cat(columns, 1)


def rank_causal(encoder: Encoder, rows: Rows, chosen: Sequence[int], words: list[list[int]]) -> Tensor:
    """Return (B, words) log-likelihoods: one pass over the text, one over all words behind its cache.

    The text's last logits rate the first tokens; words of one token need no more.
    """
    model = encoder.backbone.model
    inputs = to_device(encoder.inputs(rows, chosen), model)
    longest = max(len(word) for word in words)
    longer = longest > 1
    window = attention_window(model) if longer else None
    if window is not None and longest_prompt(model) + inputs["input_ids"].shape[1] + longest > window:
        return rank_whole(encoder, rows, chosen, words)  # behind padding in a cache, words would see less of the text
    out = model(**inputs, logits_to_keep=1, use_cache=longer)
    first = out.logits[:, -1].float().log_softmax(-1)
    likelihoods = first[:, [word[0] for word in words]]
    if not longer:
        return likelihoods
    cache = out.get("past_key_values")
    if not hasattr(cache, "batch_repeat_interleave"):
        return rank_whole(encoder, rows, chosen, words)
    parts = portions(words, inputs["input_ids"])
    rest = []
    for number, some in enumerate(parts, 1):
        # A pass writes to its cache: all but the last get a copy.
        own = cache if number == len(parts) else copy.deepcopy(cache)
        own.batch_repeat_interleave(len(some))
        rest.append(rank_rest(encoder, inputs["attention_mask"], own, some))
    return likelihoods + torch.cat(rest, 1)


def rank_rest(encoder: Encoder, mask: Tensor, cache: Any, words: list[list[int]]) -> Tensor:
    """Return (B, words) log-likelihoods of the words' tokens after their first.

    Args:
        encoder: of a decoder-only backbone.
        mask: (B, T) of the texts.
        cache: of the texts, each repeated for every word.
        words: of any lengths; those of one token get 0.
    """
    model = encoder.backbone.model
    # A word's last token is rated, never read; a word of one token has to read something all the same.
    ids, seen = pad([word[:-1] or word for word in words], encoder.pad_id)
    targets = pad([word[1:] or [IGNORED] for word in words], IGNORED)[0].to(model.device)
    ids, seen = ids.to(model.device), seen.to(model.device)
    logits = model(
        input_ids=ids.repeat(len(mask), 1),
        attention_mask=torch.cat([mask.repeat_interleave(len(words), 0), seen.repeat(len(mask), 1)], 1),
        past_key_values=cache,
        use_cache=True,
    ).logits
    return log_likelihood(logits, targets.repeat(len(mask), 1)).view(len(mask), -1)


def rank_whole(encoder: Encoder, rows: Rows, chosen: Sequence[int], words: list[list[int]]) -> Tensor:
    """Return (B, words) log-likelihoods, one pass over text and word per word: for models without a cache."""
    model = encoder.backbone.model
    columns = []
    for word in words:
        ids, mask = pad([rows.sources[i] + word for i in chosen], encoder.pad_id, left=True)
        inputs = to_device({"input_ids": ids, "attention_mask": mask}, model)
        hide_answer(model, torch.ones(len(chosen), len(word), dtype=torch.bool, device=model.device))
        logits = model(**inputs, logits_to_keep=len(word) + 1, use_cache=False).logits[:, :-1]
        columns.append(log_likelihood(logits, torch.tensor(word, device=model.device).expand(len(chosen), -1)))
    return torch.stack(columns, 1)


def portions(words: list[list[int]], texts: Tensor) -> list[list[list[int]]]:
    """Cut the words into portions that fit one call beside texts (B, T, ...); mostly all words are one portion."""
    size = max(1, WORD_SLOTS // (texts.shape[0] * texts.shape[1]))
    return [words[i : i + size] for i in range(0, len(words), size)]


def log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed log-probability of (B, L) targets under (B, L, V) logits, ignored ones left out."""
    logp = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logp * (targets != IGNORED)).sum(1)


def classify(encoder: Encoder, rows: Rows, chosen: Sequence[int]) -> list[str]:
    """Answer through the head: the word of the best class, or the number of a regression."""
    model = encoder.backbone.model
    logits = model(**to_device(encoder.inputs(rows, chosen), model)).logits.float()
    words = encoder.task.label_words
    if words is None:
        return [f"{value:.4f}" for value in logits[:, 0].tolist()]
    return [words[i] for i in logits.argmax(1).tolist()]


def encoder_cut(encoder: Encoder) -> Callable[[str], str]:
    """Return what shortens a text to the longest target, as the paper protocol does with references."""
    tokenizer = encoder.backbone.tokenizer

    def cut(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: encoder.max_target - 1]
        return tokenizer.decode(ids, skip_special_tokens=True)

    return cut


def majority(task: Task, train: Sequence[Example], test: Sequence[Example], protocol: Protocol) -> dict[str, float]:
    """Score the constant answer that is most frequent in training; for regression, the training mean."""
    if train[0].value is not None:
        answer = f"{sum(example.value or 0.0 for example in train) / len(train):.4f}"
    else:
        answer = Counter(example.target for example in train).most_common(1)[0][0]
    return task.score([answer] * len(test), test, protocol)
