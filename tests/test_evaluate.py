"""Answers cost one pass over the text: ranking equals a pass per word, generation stops."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import PAD, build, prompted
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutput

from softprompts import evaluate
from softprompts.attach import attach, remembering
from softprompts.backbone import decoder_start, load_backbone
from softprompts.config import ModelSettings, parse_assignment, resolve
from softprompts.data import Encoder, Rows
from softprompts.errors import UsageError
from softprompts.evaluate import (
    batches_for,
    log_likelihood,
    rank_causal,
    rank_seq2seq,
    rank_whole,
    scoring_for,
)
from softprompts.registry import method_config
from softprompts.tasks import Example, get_task
from softprompts.train import train

WORDS = [[5, 9, 1], [7, 1], [8, 4, 6, 11, 1], [12]]
TEXTS = (9, 3, 6, 1)
EXACT = dict(atol=1e-5, rtol=0)


def encoder_of(network: Any, kind: str) -> Encoder:
    """An encoder of made-up ids, which needs nothing of a tokenizer but its pad."""
    tokenizer = SimpleNamespace(pad_token_id=PAD)
    backbone: Any = SimpleNamespace(model=network, tokenizer=tokenizer, kind=kind)
    return Encoder(backbone, get_task("glue/sst2"), 24, 8)


def rows_of(lengths: tuple[int, ...] = TEXTS) -> Rows:
    sources = [tiny.text(1, length)[0].tolist() for length in lengths]
    return Rows([], sources, [[1]] * len(lengths), [0.0] * len(lengths), 0)


def rank_each(encoder: Encoder, rows: Rows, chosen: list[int], words: list[list[int]]) -> torch.Tensor:
    """The slow way of an encoder-decoder: its decoder once per word."""
    model, inputs = encoder.backbone.model, encoder.inputs(rows, chosen)
    memory = model.get_encoder()(**inputs)[0]
    columns = []
    for word in words:
        ids = torch.tensor([decoder_start(model), *word[:-1]]).expand(len(chosen), -1)
        logits = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=ids,
        ).logits
        columns.append(log_likelihood(logits, torch.tensor(word).expand(len(chosen), -1)))
    return torch.stack(columns, 1)


def calls_of(module: Any, run: Any) -> list[int]:
    """Return how many rows each call of a module saw while `run` ran."""
    seen: list[int] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("room", [100_000, 80, 1])
@pytest.mark.parametrize("words", [WORDS, [[5], [7]], [[5, 1], [7, 1]]], ids=["unequal", "single", "equal"])
@pytest.mark.parametrize("method", [None, "accept", "adept"])
@pytest.mark.parametrize("model", tiny.WRITERS)
@torch.no_grad()
def test_all_words_at_once_are_each_word_alone(
    model: str, method: str | None, words: list[list[int]], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "WORD_SLOTS", room)
    network = build(model) if method is None else prompted(model, method)
    fast, slow = (rank_seq2seq, rank_each) if model == "t5" else (rank_causal, rank_whole)
    encoder, rows = encoder_of(network, "seq2seq" if model == "t5" else "causal"), rows_of()
    for chosen in ([0, 1, 2, 3], [1], [3, 2]):
        expected = slow(encoder, rows, chosen, words)
        assert_close(fast(encoder, rows, chosen, words), expected, **EXACT)
    if method is not None:
        with remembering(network):
            assert_close(fast(encoder, rows, [3, 2], words), expected, **EXACT)


@torch.no_grad()
def test_the_embedded_backbone_ranks_as_before() -> None:
    backbone = load_backbone(ModelSettings(dtype="fp32"))
    attach(backbone.model, method_config("accept", {"prompt_length": 6, "budget_tokens": 16}))
    encoder = Encoder(backbone, get_task("demo/mood"), 40, 8)
    rows = encoder.encode(tiny_examples("a warm film", "a dull and far too long evening", "fine"))
    words = [encoder.encode_target(word) for word in ("bad", "good", "neither good nor bad")]
    assert len({len(word) for word in words}) > 1
    expected = rank_each(encoder, rows, [0, 1, 2], words)
    assert_close(rank_seq2seq(encoder, rows, [0, 1, 2], words), expected, **EXACT)


def tiny_examples(*texts: str) -> list[Any]:
    return [Example(f"sentence: {text}", "good", ("good",), label=1) for text in texts]


@torch.no_grad()
def test_ranking_reads_the_text_once() -> None:
    rows, chosen = rows_of(), [0, 1, 2, 3]
    network = prompted("t5", "accept")
    encoder = encoder_of(network, "seq2seq")
    run = lambda words: lambda: rank_seq2seq(encoder, rows, chosen, words)  # noqa: E731
    assert calls_of(network.get_encoder(), run(WORDS)) == [4]
    assert calls_of(network.get_decoder(), run(WORDS)) == [4 * len(WORDS)]
    network = build("llama")
    encoder = encoder_of(network, "causal")
    run = lambda words: lambda: rank_causal(encoder, rows, chosen, words)  # noqa: E731
    assert calls_of(network.base_model, run(WORDS)) == [4, 4 * len(WORDS)]
    assert calls_of(network.base_model, run([[5], [7]])) == [4]


@torch.no_grad()
def test_models_without_a_cache_are_ranked_word_by_word(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("llama")
    encoder, rows = encoder_of(network, "causal"), rows_of()
    expected = rank_causal(encoder, rows, [0, 1, 2], WORDS)
    network.base_model.register_forward_hook(lambda module, args, output: setattr(output, "past_key_values", None))
    assert_close(rank_causal(encoder, rows, [0, 1, 2], WORDS), expected, **EXACT)


@pytest.mark.parametrize("model", tiny.WRITERS)
def test_generation_ends_with_the_last_answer(model: str) -> None:
    """At the longest label word and one token more, or as soon as every row has ended."""
    network = prompted(model, "accept")
    encoder = encoder_of(network, "seq2seq" if model == "t5" else "causal")
    tokenizer = encoder.backbone.tokenizer
    tokenizer.eos_token_id, tokenizer.batch_decode = 1, lambda ids, skip_special_tokens: [str(row) for row in ids]
    network.generation_config.eos_token_id = None  # the tokenizer's own end counts as well
    rows, head = rows_of(), network.get_output_embeddings()
    count = lambda: len(calls_of(head, lambda: evaluate.generate(encoder, rows, [0, 1, 2])))  # noqa: E731

    def write(tokens: list[int]) -> Any:
        """Let each row write one token for ever."""

        def only(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            changed = torch.full_like(output, -1e9)
            changed[torch.arange(3), ..., torch.tensor(tokens)] = 0
            return changed

        return head.register_forward_hook(only)

    handle = write([1, 1, 1])
    assert count() == 1
    handle.remove()
    handle = write([1, 9, 1])
    assert count() == encoder.max_target + 1
    handle.remove()
    assert network.generation_config.eos_token_id is None


# ------------------------------------------------------------------------------------------- beams


def without_end(model: str, method: str = "accept") -> Encoder:
    """An encoder of a prompted model whose answers never end early, and are decoded as their ids."""
    network = prompted(model, method)
    tiny.scatter(network, 0.4)  # fresh models hardly prefer a token
    network.generation_config.eos_token_id = None
    encoder = encoder_of(network, "seq2seq" if model == "t5" else "causal")
    tokenizer = encoder.backbone.tokenizer
    tokenizer.eos_token_id = None
    tokenizer.batch_decode = lambda ids, skip_special_tokens: [" ".join(map(str, row.tolist())) for row in ids]
    return encoder


def answer_likelihoods(encoder: Encoder, rows: Rows, answers: list[str]) -> torch.Tensor:
    """Return each answer's log-likelihood behind its own text, by the ways that ranking has for words."""
    way = rank_each if encoder.backbone.kind == "seq2seq" else rank_whole
    words = [[int(token) for token in answer.split()] for answer in answers]
    start = encoder.backbone.kind == "seq2seq"
    return torch.stack([way(encoder, rows, [i], [word[start:]])[0, 0] for i, word in enumerate(words)])


@pytest.mark.parametrize("method", ["accept", "adept", "prompt_tuning"])
@pytest.mark.parametrize("model", ["t5", "llama", "gpt2"])  # whose greedy answers are not all the best ones
@torch.no_grad()
def test_beams_find_likelier_answers(model: str, method: str) -> None:
    """Of two tokens: there four beams are never worse than greedy, and a beam per token of the vocabulary is exact."""
    encoder, rows = replace(without_end(model, method), max_target=1), rows_of(TEXTS * 8)
    every = list(range(len(rows)))
    greedy = evaluate.generate(encoder, rows, every)
    found = evaluate.generate(encoder, rows, every, beams=4)
    gain = answer_likelihoods(encoder, rows, found) - answer_likelihoods(encoder, rows, greedy)
    assert (gain > -1e-4).all() and (gain > 0.01).any(), gain
    # A row's beams are its own, whatever else is in the batch.
    assert evaluate.generate(encoder, rows, [4, 1], beams=4) == [found[4], found[1]]
    best = evaluate.generate(encoder, rows, [1], beams=tiny.VOCABULARY)
    pairs = [[a, b] for a in range(tiny.VOCABULARY) for b in range(tiny.VOCABULARY)]
    every_pair = (rank_seq2seq if model == "t5" else rank_causal)(encoder, rows, [1], pairs)[0]
    assert best[0].split()[-2:] == [str(token) for token in pairs[int(every_pair.argmax())]]


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_predict_hands_the_beams_on(model: str) -> None:
    encoder, rows = without_end(model), rows_of((9, 3, 6, 1, 5, 7))
    every = list(range(len(rows)))
    searched = evaluate.predict(encoder, rows, "generate", beams=4)
    with torch.no_grad():
        assert [searched[i] for i in every] == evaluate.generate(encoder, rows, every, beams=4)
        assert [searched[i] for i in every] != evaluate.generate(encoder, rows, every)


@pytest.mark.parametrize(
    ("kind", "wanted", "reason"),
    [
        ("seq2seq", "auto", "the label words are ranked, nothing is generated; set eval.scoring=generate or leave"),
        ("causal", "rank", "the label words are ranked, nothing is generated; set eval.scoring=generate or leave"),
        ("classification", "auto", "a head answers, nothing is generated; leave"),
    ],
)
def test_beams_without_generation_are_refused(kind: str, wanted: str, reason: str) -> None:
    backbone: Any = SimpleNamespace(kind=kind)
    with pytest.raises(UsageError, match=f"^eval.beams=4 cannot be used: {reason} it at 1$"):
        scoring_for(backbone, get_task("glue/sst2"), "clean", wanted, 4)
    assert scoring_for(backbone, get_task("glue/sst2"), "clean", wanted) in ("rank", "head")


def test_beams_are_refused_before_the_training(tmp_path: Path) -> None:
    settings = resolve(None, [parse_assignment(text) for text in ("task=demo/mood", "eval.beams=2", "train.steps=1")])
    with pytest.raises(UsageError, match=r"^eval.beams=2 cannot be used"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_beams_count_in_batches_and_costs() -> None:
    network, rows = prompted("llama", "accept"), splits_of(validation=300)["validation"]
    assert max(len(batch) for batch in batches_for(network, rows, None, beams=4)) == 2048 // (25 * 4)
    assert [len(batch) for batch in batches_for(network, rows, 200, beams=4)] == [200, 100]
    short = Rows([], [[5]] * 300, [[1]] * 300, [0.0] * 300, 0)
    assert len(batches_for(build("llama"), short, None)[0]) == 256
    assert len(batches_for(build("llama"), short, None, beams=4)[0]) == 64


def splits_of(train: int = 4000, validation: int = 1000, test: int = 5000, length: int = 20) -> dict[str, Rows]:
    """Splits of two classes, a quarter of the rows in the second; how much of them is scored is in test_scored."""

    def rows(count: int) -> Rows:
        examples = [Example("x", "0", (), label=int(i % 4 == 0)) for i in range(count)]
        return Rows(examples, [[5] * length] * count, [[1]] * count, [0.0] * count, 0)

    return {"train": rows(train), "validation": rows(validation), "test": rows(test)}


def test_batches_follow_the_device_unless_said() -> None:
    network, rows = prompted("llama", "accept"), splits_of(validation=300)["validation"]
    assert {len(batch) for batch in batches_for(network, rows, None)} == {2048 // 25, 300 % (2048 // 25)}
    assert [len(batch) for batch in batches_for(network, rows, 200)] == [200, 100]
