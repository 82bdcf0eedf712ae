"""Tokenizers of every kind put the prompt's tokens before a text, also when loaded again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from softprompts.prompt_tokens import CONFIG_FILE, SAMPLE_TEXT, add_tokens, save_tokenizer, with_prompt

LENGTH = 3
LETTERS = [chr(number) for number in range(33, 127)]


def numbered(*words: str) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


BYTES = numbered("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>", *LETTERS, "\u0120")
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
CLASSES: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertTokenizer(
        vocab=numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "text", "another", ",", ".")
    ),
    "gpt2": lambda: transformers.GPT2Tokenizer(vocab=BYTES, merges=[]),
    "roberta": lambda: transformers.RobertaTokenizer(vocab=BYTES, merges=[]),
    "llama": lambda: transformers.LlamaTokenizer(vocab=numbered("<unk>", "<s>", "</s>", "\u2581", *LETTERS), merges=[]),
    "t5": lambda: transformers.T5Tokenizer(vocab=PIECES),
}


@pytest.mark.parametrize("name", CLASSES)
def test_saved_and_loaded_it_puts_the_prompt_in_front(name: str, tmp_path: Path) -> None:
    tokenizer = CLASSES[name]()
    one, two = tokenizer(SAMPLE_TEXT)["input_ids"], tokenizer("a text", "another")["input_ids"]
    tokens, ids = add_tokens(tokenizer, LENGTH)
    assert ids == list(range(ids[0], ids[0] + LENGTH)) and tokens[0] == "<softprompt_0>"
    assert save_tokenizer(tokenizer, tmp_path, [*ids, *one])
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(SAMPLE_TEXT)["input_ids"] == [*ids, *one]
    assert loaded("a text", "another")["input_ids"] == [*ids, *two]
    assert not {*ids} & {*loaded(SAMPLE_TEXT, add_special_tokens=False)["input_ids"]}
    plain = tokenizer.decode(one, skip_special_tokens=True)
    assert loaded.decode([*ids, *one], skip_special_tokens=True) == plain
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize("name", ["none", "bert", "roberta", "byte-level", "sequence"])
def test_post_processors_of_every_kind_get_the_prompt(name: str) -> None:
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 2)])
    kinds = {
        "none": None, "bert": processors.BertProcessing(("</s>", 1), ("<s>", 2)),
        "roberta": processors.RobertaProcessing(("</s>", 1), ("<s>", 2)), "byte-level": processors.ByteLevel(),
        "sequence": processors.Sequence([processors.ByteLevel(), template]),
    }  # fmt: skip
    plain, changed = words(kinds[name]), words(kinds[name])
    tree = json.loads(changed.backend_tokenizer.to_str())
    tree["post_processor"] = with_prompt(tree["post_processor"], ["<p>", "<q>"], [60, 61])
    changed.backend_tokenizer.post_processor = Tokenizer.from_str(json.dumps(tree)).post_processor
    for texts in (["w4 w5"], ["w4", "w6 w7"]):
        before, after = plain(*texts, return_token_type_ids=True), changed(*texts, return_token_type_ids=True)
        assert after["input_ids"] == [60, 61, *before["input_ids"]]
        assert after["token_type_ids"] == [0, 0, *before["token_type_ids"]]
    assert with_prompt({"type": "Unheard"}, ["<p>"], [60]) is None


def test_a_tokenizer_that_cannot_be_told_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompts.prompt_tokens.with_prompt", lambda *_: None)
    tokenizer = words(None)
    read = tokenizer(SAMPLE_TEXT)["input_ids"]
    _, ids = add_tokens(tokenizer, LENGTH)
    assert not save_tokenizer(tokenizer, tmp_path, [*ids, *read])
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(SAMPLE_TEXT)["input_ids"] == read
    assert loaded("<softprompt_1>")["input_ids"] == [ids[1]]
    saved = json.loads((tmp_path / CONFIG_FILE).read_text())["tokenizer_class"]
    assert saved != "PreTrainedTokenizerFast", "the class is only changed where that helps"


def words(post: Any) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of 60 words."""
    backend = Tokenizer(
        models.WordLevel(numbered("<pad>", "</s>", "<s>", *(f"w{i}" for i in range(3, 59)), "<unk>"), unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post is not None:
        backend.post_processor = post
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
