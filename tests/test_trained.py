"""Using a trained run, or an adapter that says no task: what is read, guessed, answered and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BERT, LLAMA, scatter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from softprompts.attach import adapters_of, attach
from softprompts.backbone import EMBEDDED, embedded_path
from softprompts.checkpoint import CONFIG_FILE, save_adapter
from softprompts.config import parse_assignment, resolve
from softprompts.errors import UsageError
from softprompts.methods.prompt_tuning import PromptTuningConfig
from softprompts.train import train
from softprompts.trained import RUN_ENTRY, is_other_file, open_trained

SIZES = ("method.prompt_length=4", "method.budget_tokens=20", "method.offset_positions=32", "train.steps=1",
         "train.batch_size=4", "eval.untuned=false", "model.dtype=fp32")  # fmt: skip


def csv(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    rows = [f"the {word} number {i},{i % 2}" for i, word in enumerate(["lamp", "tree", "road", "song"] * 5)]
    data = csv(folder / "data.csv", "review,label", rows)
    pairs = (f"data.path={data}", 'data.labels={"0"="bad","1"="good"}', *SIZES)
    train(resolve(None, [parse_assignment(pair) for pair in pairs]), folder / "run")
    return folder / "run"


def test_other_data_are_read_through_the_trained_columns(run: Path, tmp_path: Path) -> None:
    rows = [f"Bonn,a remark on {i},{i % 2}" for i in range(20)]
    trained = open_trained(run, [("data.path", str(csv(tmp_path / "other.csv", "city,review,label", rows)))])
    read = []
    encode = trained.encoder.encode
    object.__setattr__(trained.encoder, "encode", lambda examples: read.extend(examples) or encode(examples))
    trained.evaluate("test")
    assert all(example.source.startswith("review: a remark") for example in read)
    assert {example.target for example in read} <= {"bad", "good"}


def test_new_texts_fill_the_trained_column(run: Path) -> None:
    trained = open_trained(run)
    notes: list[str] = []
    answers = trained.predict(["a lamp", {"review": "a lamp"}, "word " * 99], note=notes.append)
    assert answers[0] == answers[1] and set(answers) <= {"bad", "good"}
    assert notes == ["1 of 3 given texts were cut to 32 tokens (method.offset_positions, or the model's own positions)"]


def test_what_is_no_run_says_so(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UsageError, match="holds no adapter"):
        open_trained(tmp_path)
    with pytest.raises(UsageError, match="unknown split 'tset'"):
        open_trained(run).evaluate("tset")


# ------------------------------------------------------------------- adapters that `train` did not make


def bare(folder: Path, network: Any, base: str | None, task_type: str | None, **about: Any) -> Path:
    """Save a prompt the way PEFT does: with a backbone and a task type, without a task."""
    if not hasattr(network, "prompt_adapter"):
        attach(network, PromptTuningConfig(prompt_length=4))
    return save_adapter(network, folder, about={"base_model_name_or_path": base, "task_type": task_type, **about})


def words_folder(folder: Path, network: Any) -> Path:
    """Save a tiny model with a tokenizer of words."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<s>", *(f"w{i}" for i in range(56)), "<unk>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    network.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The embedded backbone with a strong prompt, and its adapter without a run entry."""
    torch.manual_seed(0)
    network = AutoModelForSeq2SeqLM.from_pretrained(embedded_path(EMBEDDED), dtype=torch.float32).eval()
    attach(network, PromptTuningConfig(prompt_length=4))
    scatter(network.prompt_adapter, 3.0)
    return network, bare(tmp_path_factory.mktemp("nano") / "adapter", network, EMBEDDED, "SEQ_2_SEQ_LM")


FP32 = ("model.dtype", "fp32")


def test_a_run_without_its_entry_scores_the_same_with_the_same_options(run: Path, tmp_path: Path) -> None:
    """The entry is all that `train` adds: task, columns and words can come from the options instead."""
    expected = open_trained(run).evaluate("test")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (run / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    entries = json.loads((folder / CONFIG_FILE).read_text())
    entry = entries.pop(RUN_ENTRY)
    (folder / CONFIG_FILE).write_text(json.dumps(entries))
    given = [("data.path", entry["data"]["path"]), ("data.labels", {"0": "bad", "1": "good"}), FP32]
    trained = open_trained(folder, given)
    found = trained.evaluate("test")
    assert (found.scores, found.predictions) == (expected.scores, expected.predictions)
    assert any("input column" in note for note in trained.notes), "what was guessed is said"
    assert trained.settings.data.inputs == ("review",) and trained.settings.data.kind == "classes"
    spelled = [*given, ("data.inputs", ["review"]), ("data.target", "label"), ("data.kind", "classes")]
    assert not [note for note in open_trained(folder, spelled).notes if "set --input" in note]


def test_another_file_is_scored_whole(run: Path, tmp_path: Path) -> None:
    """Neither the limits nor the shots of the training leave rows of it out; those that are given do."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (run / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    entries = json.loads((folder / CONFIG_FILE).read_text())
    entries[RUN_ENTRY]["data"] |= {"shots": 4, "train_limit": 5, "test_limit": 3}
    (folder / CONFIG_FILE).write_text(json.dumps(entries))
    rows = "".join(f"a good film {row},1\n" for row in range(20))
    (tmp_path / "more.csv").write_text(f"review,label\n{rows}")
    given = [("data.path", str(tmp_path / "more.csv")), FP32]
    assert [open_trained(folder, given).evaluate(split).scores["n"] for split in ("test", "train")] == [20, 20]
    assert open_trained(folder, [*given, ("data.test_limit", 2)]).evaluate("test").scores["n"] == 2


@pytest.mark.parametrize(
    ("path", "other"),
    [("films/train.csv", False), ("films/test.csv", True), ("more/train.csv", True), ("films", False)],
)
def test_the_training_file_of_a_folder_is_no_other_file(path: str, other: bool, tmp_path: Path) -> None:
    place = tmp_path / path
    place.parent.mkdir(exist_ok=True)
    csv(place, "review,label", ["a film,1"])
    settings = resolve(None, [("data.path", str(place))])
    assert is_other_file(settings, {"task": None, "data": {"path": "old/films"}}) is other


def test_a_bare_adapter_is_used_on_a_task(nano: tuple[Any, Path]) -> None:
    folder = nano[1]
    trained = open_trained(folder, [("task", "demo/mood"), ("data.test_limit", 8), FP32])
    assert (trained.task.name, trained.settings.model.name, trained.encoder.backbone.kind) == (
        "demo/mood", EMBEDDED, "seq2seq",
    )  # fmt: skip
    assert trained.evaluate("test").scores["n"] == 8
    assert set(trained.predict(["What a day!"])) <= set(trained.task.words)


def test_a_run_is_used_on_another_task(run: Path) -> None:
    trained = open_trained(run, [("task", "demo/mood"), ("data.test_limit", 4), FP32])
    assert trained.task.name == "demo/mood" and trained.settings.data.path is None
    assert trained.evaluate("test").scores["n"] == 4


def test_without_a_task_the_model_writes_on(nano: tuple[Any, Path]) -> None:
    network, folder = nano
    texts = ["The soup was cold and the waiter was rude.", "What a day!"]
    answers = open_trained(folder, [FP32, ("data.max_target_tokens", 9)]).predict(texts)
    tokenizer = AutoTokenizer.from_pretrained(embedded_path(EMBEDDED))
    for text, answer in zip(texts, answers, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = network.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        assert answer == tokenizer.decode(out[0], skip_special_tokens=True).strip()
    assert all(answers)


def test_a_decoder_reads_the_text_as_it_is(tmp_path: Path) -> None:
    network = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    base = words_folder(tmp_path / "base", network)
    attach(network, PromptTuningConfig(prompt_length=4))
    scatter(network.prompt_adapter)
    folder = bare(tmp_path / "adapter", network, str(base), "CAUSAL_LM")
    trained = open_trained(folder, [FP32])
    trained.encoder.backbone.model.generation_config.eos_token_id = None
    answer = trained.predict(["w3 w4 w5", "w7"])
    ids = torch.tensor([[6, 7, 8]])
    out = network.generate(input_ids=ids, max_new_tokens=19, do_sample=False, eos_token_id=None)[0, 3:]
    assert answer[0] == AutoTokenizer.from_pretrained(base).decode(out, skip_special_tokens=True).strip()
    notes: list[str] = []
    open_trained(folder, [FP32, ("data.max_source_tokens", 5)]).predict(["w3 " * 9], note=notes.append)
    assert notes == ["1 of 1 given texts were cut to 5 tokens (data.max_source_tokens)"]


@pytest.mark.parametrize(
    "about", [{"task_type": "SEQ_CLS"}, {"auto_mapping": {"base_model_class": "BertForSequenceClassification"}}]
)
def test_a_head_answers_when_the_task_is_said(about: dict[str, Any], tmp_path: Path) -> None:
    network = BertForSequenceClassification(BertConfig(**BERT)).eval()
    base = words_folder(tmp_path / "base", network)
    attach(network, PromptTuningConfig(prompt_length=4))
    scatter(network.prompt_adapter)
    for head in adapters_of(network).heads:
        scatter(network.get_submodule(head))
    folder = bare(tmp_path / "adapter", network, str(base), **{"task_type": None, **about})
    trained = open_trained(folder, [("task", "demo/mood"), ("data.test_limit", 6), FP32])
    assert trained.evaluate("test").scoring == "head"
    words = trained.task.words
    for text in ("w3 w4 w5", "w40 w8 w9"):
        ids = trained.encoder.encode([example_of(trained, text)]).sources
        assert trained.predict([text]) == [words[int(network(input_ids=torch.tensor(ids)).logits.argmax())]]
    with pytest.raises(
        UsageError, match=r"answers through a head and does not say .* give --task NAME, or --data FILE"
    ):
        open_trained(folder, [FP32])


def example_of(trained: Any, text: str) -> Any:
    from softprompts.tasks.own import texts_to_examples

    return texts_to_examples(trained.task, [text])[0]


def test_an_adapter_that_peft_saved(tmp_path: Path) -> None:
    """What transformers' Trainer and PEFT leave behind."""
    peft = pytest.importorskip("peft")
    from softprompts.peft import SoftPromptConfig

    base = words_folder(tmp_path / "base", BertForSequenceClassification(BertConfig(**BERT)))
    network = BertForSequenceClassification.from_pretrained(base)
    wrapped = peft.get_peft_model(network, SoftPromptConfig(PromptTuningConfig(prompt_length=4), task_type="SEQ_CLS"))
    scatter(wrapped.base_model.model.prompt_adapter)
    scatter(wrapped.base_model.model.classifier.modules_to_save)
    wrapped.save_pretrained(tmp_path / "adapter")
    trained = open_trained(tmp_path / "adapter", [("task", "demo/mood"), FP32])
    ids = torch.tensor(trained.encoder.encode([example_of(trained, "w3 w4 w5")]).sources)
    wrapped.eval()
    assert torch.allclose(trained.encoder.backbone.model(input_ids=ids).logits, wrapped(input_ids=ids).logits)
    assert trained.predict(["w3 w4 w5"])[0] in trained.task.words


def test_another_backbone_and_its_revision(nano: tuple[Any, Path], tmp_path: Path) -> None:
    network, _ = nano
    folder = bare(tmp_path / "adapter", network, None, None, revision="0123abc")
    with pytest.raises(UsageError, match=r"does not name its backbone; give it with --model NAME"):
        open_trained(folder)
    settings = open_trained(folder, [("model.name", EMBEDDED)]).settings
    assert (settings.model.name, settings.model.revision) == (EMBEDDED, None)


REFUSED: list[tuple[list[tuple[str, Any]], str]] = [
    ([("task", "demo/mood"), ("data.path", "x.csv")], "--task and --data exclude each other; leave one out"),
    ([("data.target", "label")], "--input, --target, --labels and --kind describe data of your own; give --data FILE"),
    ([("task", "demo/moot")], "unknown task 'demo/moot'; did you mean 'demo/mood'"),
    ([("data.path", "none.csv")], "none.csv"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_does_not_go_together(given: list[tuple[str, Any]], message: str, nano: tuple[Any, Path]) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_trained(nano[1], given)
    assert "\n" not in str(caught.value)


def test_what_a_bare_adapter_cannot(nano: tuple[Any, Path], tmp_path: Path) -> None:
    network, folder = nano
    with pytest.raises(UsageError, match=r"does not say for which task .* give --task NAME, or --data FILE"):
        open_trained(folder).evaluate("test")
    for more in (
        {"task_type": "TOKEN_CLS"},
        {"task_type": None, "auto_mapping": {"base_model_class": "BertForQuestionAnswering"}},
    ):
        other = bare(tmp_path / str(len(more)), network, EMBEDDED, **more)  # type: ignore[arg-type]
        with pytest.raises(
            UsageError, match=r"(TOKEN_CLS|BertForQuestionAnswering), which eval and predict cannot ask"
        ):
            open_trained(other, [("task", "demo/mood")])
