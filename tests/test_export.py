"""Exports answer as the prompted model does: in plain PEFT, as embeddings, baked into weights; and the way back."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny import (
    BERT,
    LLAMA,
    MODELS,
    PAD,
    TEXT,
    VOCABULARY,
    WIDTH,
    build,
    config_of,
    forward,
    padded,
    scatter,
    text,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.testing import assert_close

from softprompts import registry
from softprompts.attach import adapters_of, attach, detach
from softprompts.bake import bake
from softprompts.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_adapter, read_tensors, save_adapter, write_tensors
from softprompts.core import MethodConfig, Offset, Part, Prompt
from softprompts.errors import UsageError
from softprompts.export import (
    EMBEDS_FILE,
    encoder_outputs,
    export,
    is_tokenwise,
    prompt_embeds,
    read_adapter,
    to_embeds,
    to_prompt_tuning,
)
from softprompts.imports import import_prompt_tuning
from softprompts.init import Start

ROUNDING = 1e-5
"""fp32 sums in another order; the logits are of order 1."""
SPREAD = 0.3
LENGTH = 5
"""P of the tiny prompts."""
GREEDY = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=PAD)
TASK_TYPES = {
    "t5": "SEQ_2_SEQ_LM", "llama": "CAUSAL_LM", "llama-tied": "CAUSAL_LM", "gpt2": "CAUSAL_LM",
    "gemma3": "CAUSAL_LM", "bert-token": "TOKEN_CLS", "bert-span": "QUESTION_ANS", "bert-sequence": "SEQ_CLS",
    "roberta-token": "TOKEN_CLS", "llama-sequence": "SEQ_CLS",
}  # fmt: skip
GEMMA = dict(
    **LLAMA, head_dim=8, sliding_window=16, layer_types=["full_attention"] * 2, bos_token_id=2, eos_token_id=1,
)  # fmt: skip
MORE: dict[str, Callable[[], Any]] = {
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA)),
    "roberta-token": lambda: transformers.RobertaForTokenClassification(transformers.RobertaConfig(**BERT)),
}


def tokenizer(post: Any = None, words: int = VOCABULARY) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of the tiny models' vocabulary, word number i is id i."""
    vocabulary = ["<pad>", "</s>", "<s>", *(f"w{i}" for i in range(3, words - 1)), "<unk>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post is not None:
        backend.post_processor = post
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def base_folder(folder: Path, model: str, **more: Any) -> Path:
    """Save a tiny random backbone with a tokenizer."""
    network = (MORE[model]() if model in MORE else build(model)).eval()
    network.save_pretrained(folder)
    tokenizer(**more).save_pretrained(folder)
    return folder


def prompted_pair(tmp_path: Path, model: str, method: str | MethodConfig, **more: Any) -> tuple[Any, Path]:
    """Return (a prompted model with numbers far from zero, the folder of its adapter)."""
    base = base_folder(tmp_path / "base", model, **more)
    kind = MORE[model]() if model in MORE else MODELS[model]()
    network = type(kind).from_pretrained(base).eval()
    attach(network, config_of(method) if isinstance(method, str) else method, initialise=False)
    scatter(network.prompt_adapter, SPREAD)
    for head in adapters_of(network).heads:
        scatter(network.get_submodule(head), SPREAD)
    about = {"base_model_name_or_path": str(base), "task_type": TASK_TYPES[model]}
    return network, save_adapter(network, tmp_path / "adapter", about=about)


def in_front(ids: Tensor, prompt: Any) -> Tensor:
    """Put the prompt's ids before every row."""
    return torch.cat([torch.tensor([list(prompt)], dtype=torch.long).expand(len(ids), -1), ids], 1)


# ------------------------------------------------------------------------------------------- PEFT

PLAIN_PEFT = """
import json, sys, torch, transformers
from peft import PeftModel
base, adapter, kind, start, batches = json.loads(sys.argv[1])
model = PeftModel.from_pretrained(getattr(transformers, kind).from_pretrained(base), adapter).eval()
answers = []
for ids, mask in batches:
    more = {"decoder_input_ids": torch.tensor([start] * len(ids))} if start else {}
    logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **more).logits
    answers.append(logits.tolist())
assert not [name for name in sys.modules if name.startswith("softprompts")]
print(json.dumps(answers))
"""


@pytest.mark.parametrize(("model", "kind"), [("t5", "AutoModelForSeq2SeqLM"), ("llama", "AutoModelForCausalLM")])
def test_plain_peft_answers_equally(model: str, kind: str, tmp_path: Path) -> None:
    """In a process without this package, unpadded and padded on the right."""
    config = config_of("accept", offset_positions=0)
    network, adapter = prompted_pair(tmp_path, model, config)
    to_prompt_tuning(adapter, tmp_path / "out")
    ids = text(2)
    start = [[0, 5, 9]] if model == "t5" else []
    batches = [(ids, torch.ones_like(ids)), padded(ids, "right", 3)]
    plain = [[rows.tolist(), mask.tolist()] for rows, mask in batches]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN_PEFT,
         json.dumps([str(tmp_path / "base"), str(tmp_path / "out"), kind, start[0] if start else [], plain])],
        capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (rows, mask), theirs in zip(batches, json.loads(done.stdout.splitlines()[-1]), strict=True):
        ours = forward(network, rows, mask)
        expected = torch.tensor(theirs)[:, -ours.shape[1] :]
        if model == "llama":
            ours, expected = ours[:, :TEXT], expected[:, :TEXT]
        assert_close(ours, expected, atol=ROUNDING, rtol=0)


def test_a_prompt_tuning_checkpoint_says_what_peft_needs(tmp_path: Path) -> None:
    _, adapter = prompted_pair(tmp_path, "t5", "prompt_tuning")
    to_prompt_tuning(adapter, tmp_path / "out")
    entries = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    said = {key: entries[key] for key in ("peft_type", "task_type", "num_virtual_tokens", "token_dim", "num_layers")}
    assert said == {
        "peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": LENGTH, "token_dim": WIDTH,
        "num_layers": 2,
    }  # fmt: skip
    assert entries["num_transformer_submodules"] == 1 and entries["num_attention_heads"] == 4
    assert read_tensors(tmp_path / "out")["prompt_embeddings"].shape == (LENGTH, WIDTH)


@pytest.mark.parametrize("model", ["t5", "llama"])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "MultitaskPromptTuningConfig"])
def test_a_checkpoint_of_peft_answers_equally(model: str, kind: str, tmp_path: Path) -> None:
    import peft

    many = kind.startswith("Multitask")
    base = base_folder(tmp_path / "base", model)
    auto = transformers.AutoModelForSeq2SeqLM if model == "t5" else transformers.AutoModelForCausalLM
    more: dict[str, Any] = {"num_tasks": 3, "num_ranks": 2} if many else {}
    # Two submodules for T5, PEFT's default.
    settings = getattr(peft, kind)(task_type=TASK_TYPES[model], num_virtual_tokens=LENGTH, **more)
    theirs = peft.get_peft_model(auto.from_pretrained(base), settings).eval()
    scatter(theirs.prompt_encoder, SPREAD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "peft")
    import_prompt_tuning(tmp_path / "peft", tmp_path / "ours", task_id=1 if many else None)
    ours = load_adapter(auto.from_pretrained(base).eval(), tmp_path / "ours")
    entries = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    assert (entries["base_model_name_or_path"], entries["task_type"]) == (str(base), TASK_TYPES[model])
    ids = text(2)
    for rows, mask in ((ids, torch.ones_like(ids)), padded(ids, "right", 2)):
        named = {"task_ids": torch.tensor([1, 1])} if many else {}
        if many and model == "t5":
            # In its forward pass, unlike in `generate`, PEFT also prompts the decoder.
            keep = dict(GREEDY, input_ids=rows, attention_mask=mask, output_logits=True, return_dict_in_generate=True)
            mine, other = ours.generate(**keep), theirs.generate(**keep, **named)
            assert torch.equal(mine.sequences, other.sequences)
            assert_close(torch.stack(mine.logits), torch.stack(other.logits), atol=ROUNDING, rtol=0)
            continue
        expected = forward(theirs, rows, mask, **named)[:, LENGTH if model == "llama" else 0 :]
        found = forward(ours, rows, mask)
        if model == "llama":
            found, expected = found[:, :TEXT], expected[:, :TEXT]
        assert_close(found, expected, atol=ROUNDING, rtol=0)


def test_there_and_back(tmp_path: Path) -> None:
    network, adapter = prompted_pair(tmp_path, "llama", "prompt_tuning")
    assert export(adapter, "prompt-tuning", tmp_path / "peft")["files"] == [CONFIG_FILE, WEIGHTS_FILE]
    assert CONFIG_FILE in export(tmp_path / "peft", "softprompts", tmp_path / "back")["files"]
    ids = text()
    expected = forward(network, ids)
    detach(network)
    load_adapter(network, tmp_path / "back")
    assert torch.equal(forward(network, ids), expected)


def test_old_checkpoints_are_pickles(tmp_path: Path) -> None:
    _, adapter = prompted_pair(tmp_path, "llama", "prompt_tuning")
    to_prompt_tuning(adapter, tmp_path / "peft")
    weights = read_tensors(tmp_path / "peft")
    (tmp_path / "peft" / WEIGHTS_FILE).unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        import_prompt_tuning(tmp_path / "peft", tmp_path / "ours")
    torch.save(weights, tmp_path / "peft" / "adapter_model.bin")
    import_prompt_tuning(tmp_path / "peft", tmp_path / "ours")
    assert torch.equal(read_adapter(tmp_path / "ours").table, weights["prompt_embeddings"])


# ------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("method", ["prompt_tuning", "accept", "adept"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_bare_model_answers_embeddings_equally(model: str, method: str, tmp_path: Path) -> None:
    network, _ = prompted_pair(tmp_path, model, method)
    ids = text(2)
    expected = forward(network, ids)
    rows = [*prompt_embeds(network, ids), *prompt_embeds(network, *padded(ids, "left", 3))]
    rows += prompt_embeds(network, *padded(ids, "right", 2))
    detach(network)
    assert {tuple(row.shape) for row in rows} == {(LENGTH + TEXT, WIDTH)}
    for row, answer in zip(rows, expected.repeat(3, 1, 1), strict=True):
        assert_close(network(inputs_embeds=row[None]).logits[0, LENGTH:], answer, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("method", ["accept", "adept", "accept+dept"])
def test_a_plain_decoder_answers_a_prompted_encoder_equally(method: str, tmp_path: Path) -> None:
    network, _ = prompted_pair(tmp_path, "t5", method)
    ids = torch.cat([padded(text(1, 4), "left", 3)[0], text(1)])
    mask = (ids != PAD).long()
    keep = dict(GREEDY, output_logits=True, return_dict_in_generate=True)
    expected = network.generate(input_ids=ids, attention_mask=mask, **keep)
    route = encoder_outputs(network, ids, mask)
    assert route["attention_mask"].sum(1).tolist() == [LENGTH + 4, LENGTH + TEXT]
    again = network.generate(**encoder_outputs(network, ids, mask), **keep)
    detach(network)
    for found in (network.generate(**route, **keep), again):
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert_close(ours, theirs, atol=ROUNDING, rtol=0)


def test_the_embeds_file_says_how_to_use_it(tmp_path: Path) -> None:
    for method in ("prompt_tuning", "accept", "adept"):
        network, adapter = prompted_pair(tmp_path / method, "llama", method)
        to_embeds(adapter, tmp_path / method / "out")
        ids = text(1)
        with safe_open(tmp_path / method / "out" / EMBEDS_FILE, "pt") as file:
            about, prompt = file.metadata(), file.get_tensor("prompt_embeds")
            added = file.get_tensor("offset_embeds") if method == "accept" else torch.zeros(TEXT, WIDTH)
        assert (about["method"], about["prompt_length"], about["width"]) == (method, str(LENGTH), str(WIDTH))
        start = {"prompt_tuning": "none", "accept": "by position", "adept": "computed from the tokens"}[method]
        assert about["offset"].startswith(start) and about["model"].endswith("base")
        if method != "adept":
            whole = torch.cat([prompt, network.get_input_embeddings()(ids)[0] + added[:TEXT]])
            assert_close(whole, prompt_embeds(network, ids)[0])


# ------------------------------------------------------------------------------------------- baking

BAKED = [
    *((model, method) for model in ("llama", "llama-tied", "gpt2") for method in ("prompt_tuning", "accept+adept")),
    ("gpt2", "accept"), ("gemma3", "adept"), ("t5", "prompt_tuning"), ("llama-sequence", "adept"),
    *((model, method) for model in ("bert-token", "bert-span") for method in ("prompt_tuning", "accept", "adept")),
    ("roberta-token", "dept"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "method"), BAKED)
def test_a_baked_folder_answers_equally(model: str, method: str, tmp_path: Path) -> None:
    network, adapter = prompted_pair(tmp_path, model, method)
    baked = bake(adapter, tmp_path / "out")
    assert baked.prompt_ids == tuple(range(VOCABULARY, VOCABULARY + LENGTH)) and baked.tokenizer_adds_prompt
    plain = type(network).from_pretrained(tmp_path / "out").eval()
    ids = text(2)
    rows = in_front(ids, baked.prompt_ids)
    found, expected = forward(plain, rows, torch.ones_like(rows)), forward(network, ids, torch.ones_like(ids))
    if model not in ("t5", "llama-sequence"):
        found = found[:, LENGTH:]
    assert (expected - forward(disabled(network), ids)).abs().max() > 100 * ROUNDING
    assert_close(found[..., : expected.shape[-1]], expected, atol=ROUNDING, rtol=0)
    assert baked.difference < ROUNDING
    if model == "bert-span":
        ends = [m(input_ids=x).end_logits for m, x in ((plain, rows), (network, ids))]
        assert_close(ends[0][:, LENGTH:], ends[1], atol=ROUNDING, rtol=0)


def disabled(network: Any) -> Callable[..., Any]:
    """Return the model's forward pass without the prompt."""
    from softprompts.attach import disabled as without

    def call(**inputs: Any) -> Any:
        with without(network):
            return network(**inputs)

    call.config = network.config  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize(
    ("model", "method"),
    [("llama", "adept"), ("llama-tied", "adept"), ("gpt2", "accept"), ("gpt2", "adept"), ("t5", "spot")],
)
def test_a_baked_folder_writes_the_same_tokens(model: str, method: str, tmp_path: Path) -> None:
    network, adapter = prompted_pair(tmp_path, model, method)
    baked = bake(adapter, tmp_path / "out")
    plain = type(network).from_pretrained(tmp_path / "out").eval()
    ids, mask = padded(text(2), "left", 3)
    expected = network.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, -6:]
    # Padding, prompt, text.
    pads, words = ids[:, :3], ids[:, 3:]
    rows = torch.cat([pads, in_front(words, baked.prompt_ids)], 1)
    whole = torch.cat([mask[:, :3], torch.ones_like(rows[:, 3:])], 1)
    found = plain.generate(input_ids=rows, attention_mask=whole, **GREEDY)
    assert torch.equal(found[:, -6:], expected)
    drawn = plain.generate(
        input_ids=rows, attention_mask=whole, **{**GREEDY, "max_new_tokens": 40, "do_sample": True, "top_k": 0},
        temperature=9.0,
    )  # fmt: skip
    new = drawn if model == "t5" else drawn[:, rows.shape[1] :]
    assert new.shape[1] >= 40 and new.max() < VOCABULARY, "a token of the prompt was written"


def test_the_tokenizer_of_a_baked_folder_puts_the_prompt_in_front(tmp_path: Path) -> None:
    post = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    _, adapter = prompted_pair(tmp_path, "bert-token", "prompt_tuning", post=post)
    baked = bake(adapter, tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    front = list(baked.prompt_ids)
    batch = loaded(["w4 w5", "w6"], padding=True)
    assert batch["input_ids"] == [[*front, 2, 4, 5, 1], [*front, 2, 6, 1, PAD]]
    pair = loaded("w4", "w5", return_token_type_ids=True)
    assert pair["input_ids"] == [*front, 2, 4, 1, 5, 1]
    assert pair["token_type_ids"] == [0] * (LENGTH + 3) + [1, 1]
    assert loaded("w4 w5 w6 w7", truncation=True, max_length=LENGTH + 4)["input_ids"] == [*front, 2, 4, 5, 1]
    assert loaded.decode(batch["input_ids"][0], skip_special_tokens=True) == "w4 w5"
    about = json.loads((tmp_path / "out" / "softprompt.json").read_text())
    assert about["prompt_ids"] == front and about["method"] == "prompt_tuning" and about["tokenizer_adds_prompt"]


def test_unused_rows_of_the_table_are_used(tmp_path: Path) -> None:
    """A table may be longer than the tokenizer's vocabulary: the next ids are taken, and it grows by the rest."""
    network, adapter = prompted_pair(tmp_path, "llama-tied", "adept", words=VOCABULARY - 2)
    baked = bake(adapter, tmp_path / "out")
    assert baked.prompt_ids == tuple(range(VOCABULARY - 2, VOCABULARY - 2 + LENGTH))
    plain = type(network).from_pretrained(tmp_path / "out").eval()
    assert plain.config.vocab_size == VOCABULARY - 2 + LENGTH
    ids = torch.randint(3, VOCABULARY - 2, (2, TEXT))
    found = forward(plain, in_front(ids, baked.prompt_ids))[:, LENGTH:, : VOCABULARY - 2]
    assert_close(found, forward(network, ids)[..., : VOCABULARY - 2], atol=ROUNDING, rtol=0)


def test_a_baked_folder_can_be_baked_again(tmp_path: Path) -> None:
    _, first = prompted_pair(tmp_path, "llama", "adept")
    bake(first, tmp_path / "one")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    attach(network, config_of("adept"), initialise=False)
    scatter(network.prompt_adapter, SPREAD)
    about = {"base_model_name_or_path": str(tmp_path / "one"), "task_type": "CAUSAL_LM"}
    second = bake(save_adapter(network, tmp_path / "second", about=about), tmp_path / "two")
    assert second.prompt_ids == tuple(range(VOCABULARY + LENGTH, VOCABULARY + 2 * LENGTH))
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "two")
    ids = torch.tensor([encode("w4 w5")["input_ids"]])
    assert ids[0].tolist() == [*second.prompt_ids, *range(VOCABULARY, VOCABULARY + LENGTH), 4, 5]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()
    expected = forward(network, ids[:, LENGTH:])
    assert_close(forward(plain, ids)[:, LENGTH:, : expected.shape[-1]], expected, atol=ROUNDING, rtol=0)


def test_heads_of_another_size_and_bf16(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "bert-token")
    network = transformers.BertForTokenClassification.from_pretrained(
        base, num_labels=4, ignore_mismatched_sizes=True
    ).eval()
    attach(network, config_of("accept"), initialise=False)
    scatter(network.prompt_adapter, SPREAD)
    about = {"base_model_name_or_path": str(base), "task_type": "TOKEN_CLS"}
    adapter = save_adapter(network, tmp_path / "adapter", about=about)
    baked = bake(adapter, tmp_path / "out", dtype="bf16")
    plain = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    assert plain.dtype == torch.bfloat16 and baked.difference < 0.05
    ids = text(1)
    found = forward(plain, in_front(ids, baked.prompt_ids))[:, LENGTH:]
    assert_close(found.float(), forward(network, ids), atol=0.05, rtol=0)


def test_without_a_task_type_the_checkpoint_says_the_class(tmp_path: Path) -> None:
    network, adapter = prompted_pair(tmp_path, "llama", "prompt_tuning")
    save_adapter(network, adapter, about={"base_model_name_or_path": None})
    with pytest.raises(UsageError, match=r"does not name its backbone; give it with --model NAME"):
        bake(adapter, tmp_path / "out")
    baked = bake(adapter, tmp_path / "out", model=str(tmp_path / "base"))
    assert baked.difference < ROUNDING
    to_prompt_tuning(adapter, tmp_path / "peft", model=str(tmp_path / "base"))
    assert json.loads((tmp_path / "peft" / CONFIG_FILE).read_text())["task_type"] == "CAUSAL_LM"


# ------------------------------------------------------------------------------------------- refusals


class TextPrompt(Prompt):
    """A prompt made from the text: its mean, P times."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.length = length
        self.scale = nn.Parameter(torch.ones(width))

    @staticmethod
    def count(length: int, width: int) -> int:  # type: ignore[override]
        return width

    def initialise(self, start: Start, vocabulary: Any) -> None:
        self.scale.fill_(1.0)

    def forward(self, embeds: Tensor, mask: Tensor) -> Tensor:
        return (embeds.mean(1, keepdim=True) * self.scale).expand(-1, self.length, -1)


class NeighbourOffset(Offset):
    """An offset that depends on the token before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    @staticmethod
    def count(width: int) -> int:  # type: ignore[override]
        return width

    def initialise(self, start: Start, vocabulary: Any) -> None:
        self.scale.fill_(1.0)

    def forward(self, embeds: Tensor, at: Tensor | None) -> Tensor:
        return embeds.roll(1, 1) * self.scale


@pytest.fixture
def strange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods whose prompt, and whose offset, depends on the whole text."""
    registry.methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    @registry.register
    class TextPromptConfig(MethodConfig):
        name: ClassVar[str] = "text_prompt"

        def prompt_part(self, width: int) -> Part:
            return Part(TextPrompt, {"length": LENGTH, "width": width}, {}, Start())

    @registry.register
    class NeighbourConfig(MethodConfig):
        name: ClassVar[str] = "neighbour"

        def offset_part(self, width: int) -> Part:
            return Part(NeighbourOffset, {"width": width}, {}, Start())


REFUSED = {
    ("t5", "adept", "prompt-tuning"): r"adept adds an offset .* cannot hold; fold it into the model with --to baked",
    ("llama", "accept", "prompt-tuning"): r"accept adds an offset .* take --to embeds .* softprompts\.peft",
    ("bert-token", "prompt_tuning", "prompt-tuning"): r"has a trained head, .* --to baked",
    ("llama", "text_prompt", "prompt-tuning"): r"text_prompt makes its prompt from each text.*softprompts\.peft",
    ("llama", "text_prompt", "embeds"): r"softprompts\.export\.prompt_embeds",
    ("llama", "text_prompt", "baked"): r"no table to export",
    ("llama", "neighbour", "prompt-tuning"): r"neighbour adds an offset",
    ("llama", "neighbour", "baked"): r"depends on the whole text.*softprompts\.export\.prompt_embeds",
    ("llama", "accept", "baked"): r"LlamaForCausalLM has no table of absolute positions",
    ("t5", "adept", "baked"): r"one table for encoder and decoder.*softprompts\.export\.encoder_outputs",
    ("t5", "dept", "baked"): r"softprompts\.export\.encoder_outputs",
    ("bert-sequence", "prompt_tuning", "baked"): r"BertForSequenceClassification answers from the first token",
    ("llama", "prompt_tuning", "backed"): r"cannot export to 'backed'; did you mean 'baked'\?",
    ("llama", "prompt_tuning", "softprompts"): r"is an adapter of softprompts already",
}


@pytest.mark.usefixtures("strange")
@pytest.mark.parametrize(("case", "message"), REFUSED.items(), ids=str)
def test_what_cannot_be_exported_says_why(case: tuple[str, str, str], message: str, tmp_path: Path) -> None:
    model, method, to = case
    config = registry.method_config(method) if method in ("text_prompt", "neighbour") else method
    _, adapter = prompted_pair(tmp_path, model, config)
    with pytest.raises(UsageError, match=message) as caught:
        export(adapter, to, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_model_that_baking_would_change_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is compared with the prompted model before it is left: here with a table folded wrongly."""
    _, adapter = prompted_pair(tmp_path, "llama", "adept")
    monkeypatch.setattr("softprompts.bake.embedding_scale", lambda embedding: 1.5)
    with pytest.raises(UsageError, match=r"baking adept into this model changes its answers \(by .*nothing was"):
        bake(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_offsets_are_asked_what_they_depend_on() -> None:
    for method, answer in (("adept", True), ("accept", False), ("dept", False)):
        part = config_of(method).build(WIDTH).eval()
        scatter(part, SPREAD)
        assert part.offset is not None and is_tokenwise(part.offset, WIDTH) is answer
    assert not is_tokenwise(NeighbourOffset(WIDTH), WIDTH)


def test_folders_that_are_no_source_or_no_target(tmp_path: Path) -> None:
    _, adapter = prompted_pair(tmp_path, "llama", "prompt_tuning")
    with pytest.raises(UsageError, match="exists and is not empty; remove it or name another"):
        export(adapter, "embeds", tmp_path / "base")
    with pytest.raises(UsageError, match="holds no adapter"):
        export(tmp_path / "base", "embeds", tmp_path / "out")
    with pytest.raises(UsageError, match=r"model 'no/such' cannot be loaded \(.*--model"):
        export(adapter, "baked", tmp_path / "out", model="no/such")
    with pytest.raises(UsageError, match="a baked folder is fp32 or bf16"):
        export(adapter, "baked", tmp_path / "out", dtype="int8")
    with pytest.raises(UsageError, match="encoder_outputs is for encoder-decoder models"):
        encoder_outputs(attach(build("llama"), config_of("adept")), text())
    with pytest.raises(UsageError, match="is longer than offset_positions=24"):
        prompt_embeds(attach(build("llama"), config_of("accept")), text(1, 25))


def peft_folder(folder: Path, tensors: dict[str, Tensor], **entries: Any) -> Path:
    """Write something like a PEFT checkpoint."""
    write_tensors(folder / WEIGHTS_FILE, tensors)
    (folder / CONFIG_FILE).write_text(json.dumps(entries))
    return folder


def test_checkpoints_that_cannot_be_imported_say_why(tmp_path: Path) -> None:
    table, out = torch.zeros(6, 4), tmp_path / "out"
    shared = {
        "prompt_embeddings": table,
        "prefix_task_cols": torch.ones(2, 6, 1),
        "prefix_task_rows": torch.ones(2, 1, 4),
    }
    multi = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3}
    cases: list[tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], str]] = [
        ({"lora": table}, {"peft_type": "LORA"}, {}, "type LORA, which is no prompt before the input"),
        ({"x": table}, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, {}, "shape None for 3 virtual tokens"),
        ({"prompt_embeddings": table}, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, {}, r"\(6, 4\) for 4"),
        ({"prompt_embeddings": table, "base_model.classifier.weight": table},
         {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, {}, "has a trained head"),
        ({"prompt_embeddings": table}, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, {"task_id": 0},
         "leave --task-id out"),
        (shared, multi, {}, "prompts of 2 tasks; choose one with --task-id 0 to 1"),
        (shared, multi, {"task_id": 2}, "--task-id 2: .* holds tasks 0 to 1"),
        ({"prompt_embeddings": table}, multi, {"task_id": 0}, "prefix_task_cols' is missing"),
    ]  # fmt: skip
    for number, (tensors, entries, more, message) in enumerate(cases):
        folder = peft_folder(tmp_path / str(number), tensors, **entries)
        with pytest.raises(UsageError, match=message):
            import_prompt_tuning(folder, out, **more)
    with pytest.raises(UsageError, match="holds no PEFT checkpoint"):
        import_prompt_tuning(tmp_path, out)
    (folder / CONFIG_FILE).write_text("[")
    with pytest.raises(UsageError, match="it is damaged"):
        import_prompt_tuning(folder, out)
    assert not out.exists()
