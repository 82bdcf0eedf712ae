"""Batches: every row once, similar lengths together, a pure function of seed and epoch; tokens as they must be."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompts.backbone import load_backbone
from softprompts.config import DataSettings, ModelSettings
from softprompts.data import IGNORED, Encoder, epoch_batches, eval_batches, make_encoder, pad, spread
from softprompts.errors import UsageError
from softprompts.tasks import Example, get_task
from softprompts.tasks.own import OwnTask

LENGTHS = [3, 50, 7, 7, 90, 12, 33, 4, 5, 61, 8]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_holds_every_row_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(lengths, size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size) and max(map(len, batches)) <= size
    assert batches == epoch_batches(lengths, size, seed, epoch)


def test_epochs_and_seeds_differ() -> None:
    lengths = list(range(64))
    assert epoch_batches(lengths, 8, 1, 0) != epoch_batches(lengths, 8, 1, 1) != epoch_batches(lengths, 8, 2, 1)


def test_buckets_waste_little() -> None:
    lengths = torch.randint(5, 200, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    slots = sum(max(lengths[i] for i in batch) * len(batch) for batch in epoch_batches(lengths, 16, 0, 0))
    assert slots < 1.1 * sum(lengths)


def test_evaluation_starts_with_the_longest() -> None:
    batches = eval_batches(LENGTHS, 4)
    assert sorted(row for batch in batches for row in batch) == list(range(len(LENGTHS))) and batches[0][0] == 4


@given(st.lists(st.integers(0, 100), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 300))
def test_evaluation_batches_hold_every_row_once_and_few_slots(lengths: list[int], size: int, slots: int) -> None:
    batches = eval_batches(lengths, size, slots)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= size and (len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= slots)


def classes(*counts: int) -> list[Example]:
    return [Example("x", str(label), (), label=label) for label, count in enumerate(counts) for _ in range(count)]


def test_a_choice_of_rows_has_every_class_in_its_share() -> None:
    rows = classes(600, 300, 100)
    for count in (10, 100, 500):
        chosen = spread(rows, count)
        assert chosen == sorted(set(chosen)) and len(chosen) == count
        assert [sum(rows[i].label == label for i in chosen) for label in range(3)] == [
            6 * count // 10,
            3 * count // 10,
            count // 10,
        ]
    assert set(spread(rows, 100)) < set(spread(rows, 500))
    assert spread(rows, 100) == spread(rows, 100) and spread(rows, 100)[:60] != list(range(60))
    assert spread(rows, 1000) == spread(rows, 5000) == list(range(1000))


def test_a_choice_of_rows_without_classes_is_of_the_wanted_size() -> None:
    assert len(spread([Example("x", "y", ("y",)) for _ in range(50)], 7)) == 7


def test_a_choice_of_rows_keeps_questions_whole() -> None:
    rows = [Example("x", "1", (), label=i % 2, group=f"question {i // 3}") for i in range(90)]
    chosen = spread(rows, 20)
    assert len(chosen) == 21 and all(chosen.count(i) for row in chosen for i in range(row // 3 * 3, row // 3 * 3 + 3))


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5), st.booleans())
def test_padding_keeps_the_tokens(sequences: list[list[int]], left: bool) -> None:
    ids, mask = pad(sequences, 0, left)
    assert [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)] == sequences
    edge = mask[:, -1] if left else mask[:, 0]
    assert edge.all()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    backbone = load_backbone(ModelSettings(dtype="fp32"))
    return make_encoder(backbone, get_task("glue/sst2"), DataSettings(max_source_tokens=12))


def example(text: str, target: str = "1") -> Example:
    return Example(text, target, (target,), label=int(target))


def test_label_words_of_the_same_tokens_are_refused(encoder: Encoder) -> None:
    task = OwnTask("own/same", ["text"], "label", labels={"0": "\u2603", "1": "\u2604"})
    with pytest.raises(UsageError, match=r"writes the label words '\u2603' and '\u2604' with the same tokens"):
        make_encoder(encoder.backbone, task, DataSettings())


def test_long_texts_lose_their_end_but_not_the_end_of_text(encoder: Encoder) -> None:
    rows = encoder.encode([example("sentence: short"), example("sentence: " + "long " * 40)])
    eos = encoder.backbone.tokenizer.eos_token_id
    assert rows.truncated == 1 and len(rows.sources[1]) == 12 and rows.sources[1][-1] == eos
    assert rows.sources[0][-1] == eos and len(rows.sources[0]) < 12


def test_seq2seq_labels_are_the_shifted_decoder_input(encoder: Encoder) -> None:
    rows = encoder.encode([example("sentence: a"), example("sentence: much longer than a", "0")])
    inputs, labels = encoder.batch(rows, [0, 1])
    start = encoder.backbone.model.config.decoder_start_token_id
    assert (inputs["decoder_input_ids"][:, 0] == start).all()
    seen = labels[:, :-1] != IGNORED
    assert torch.equal(inputs["decoder_input_ids"][:, 1:][seen], labels[:, :-1][seen])
    text = encoder.backbone.tokenizer.batch_decode(labels.clamp(min=0), skip_special_tokens=True)
    assert [word.strip() for word in text] == ["1", "0"]


def test_fixed_padding_pads_to_the_maximum() -> None:
    backbone = load_backbone(ModelSettings(dtype="fp32"))
    encoder = make_encoder(backbone, get_task("glue/sst2"), DataSettings(max_source_tokens=40, padding="max"))
    inputs, _ = encoder.batch(encoder.encode([example("sentence: a")]), [0])
    assert inputs["input_ids"].shape == (1, 40)


def test_causal_rows_end_with_the_target_and_never_lose_it() -> None:
    class Letters:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
        all_special_ids = (0, 1, 2)

        def __call__(self, text, add_special_tokens):
            if isinstance(text, list):
                return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
            return {"input_ids": [ord(letter) for letter in text]}

    backbone = SimpleNamespace(kind="causal", tokenizer=Letters(), model=None)
    encoder = make_encoder(backbone, get_task("glue/sst2"), DataSettings(max_source_tokens=20))
    rows = encoder.encode([example("x" * 50), example("yy", "0")])
    inputs, labels = encoder.batch(rows, [0, 1])
    assert rows.truncated == 1 and len(rows.sources[0]) == 20
    assert inputs["logits_to_keep"] == labels.shape[1] + 1 == 3
    assert inputs["input_ids"][:, -2:].tolist() == [[ord("1"), 2], [ord("0"), 2]]
    assert torch.equal(labels, inputs["input_ids"][:, -2:]) and not (labels == IGNORED).any()
    assert rows.sources[1][0] == 1 and inputs["attention_mask"][1, 0] == 0
