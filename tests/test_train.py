"""The loop: learns, resumes bit for bit, accumulates exactly, stops, refuses what cannot be."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.testing import assert_close

from softprompts import results
from softprompts.backbone import embedded_path, load_backbone
from softprompts.checkpoint import WEIGHTS_FILE
from softprompts.config import ModelSettings, RunSettings, TrainSettings, parse_assignment, resolve
from softprompts.errors import SoftPromptsError, UsageError
from softprompts.evaluate import rank_causal, rank_seq2seq
from softprompts.loop import Progress
from softprompts.member import Member, schedule
from softprompts.tasks import Example
from softprompts.train import train
from softprompts.trained import open_trained

SMALL = [
    "task=demo/request", "model.dtype=fp32", "method.name=accept", "method.prompt_length=6", "method.budget_tokens=16",
    "method.offset_positions=64", "data.max_source_tokens=64", "data.train_limit=24", "data.validation_limit=8",
    "data.test_limit=8", "train.batch_size=4", "train.eval_every=4", "train.steps=12", "eval.untuned=false",
]  # fmt: skip


def settings_of(*more: str) -> RunSettings:
    return resolve(None, [parse_assignment(text) for text in (*SMALL, *more)])


def weights(folder: Path) -> bytes:
    return (folder / results.ADAPTER / WEIGHTS_FILE).read_bytes()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class KillAt(Progress):
    """Kills after so many units, counted from the training of that number on."""

    def __init__(self, step: int, training: int = 0) -> None:
        self.left, self.before = step, training

    def phase(self, name: str, total: int) -> None:
        self.before -= name == "train"

    def advance(self, units: int = 1, **numbers: float) -> None:
        if self.before <= 0:
            self.left -= units
            if self.left == 0:
                raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; ADePT's dropout and two accumulated pieces make every step draw random numbers."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(settings_of(*ADEPT), folder)
    return folder


ADEPT = ("method={name='adept', prompt_length=6, rank=4}", "train.accumulate=2")


@pytest.mark.parametrize("step", [1, 5, 8, 11])
def test_killed_and_resumed_equals_uninterrupted(step: int, whole: Path, tmp_path: Path) -> None:
    settings = settings_of(*ADEPT)
    with pytest.raises(Killed):
        train(settings, tmp_path, progress=KillAt(step))
    assert results.read_record(tmp_path)["status"] == "running"
    record = train(settings, tmp_path, resume=True)
    reference = results.read_record(whole)
    assert weights(tmp_path) == weights(whole)
    assert (tmp_path / results.STEPS).read_bytes() == (whole / results.STEPS).read_bytes()
    assert (tmp_path / results.PREDICTIONS).read_bytes() == (whole / results.PREDICTIONS).read_bytes()
    for key in ("scores", "best_step", "steps_done", "num_trainable", "settings", "data", "status"):
        assert record[key] == reference[key], key
    assert record["cost"]["tokens"] == reference["cost"]["tokens"]


def test_a_process_killed_for_real_resumes_to_the_same(whole: Path, tmp_path: Path) -> None:
    script = tmp_path / "go.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\ntorch.set_num_threads(1)\n"
        "from softprompts.config import RunSettings\nfrom softprompts.train import train\nimport json\n"
        f"train(RunSettings(**json.loads({settings_of(*ADEPT).model_dump_json()!r})), Path(sys.argv[1]))\n"
    )
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "run")], env=os.environ)
    steps = tmp_path / "run" / results.STEPS
    deadline = time.monotonic() + 120
    while not (steps.exists() and '"validation"' in steps.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(settings_of(*ADEPT), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(whole)
    assert steps.read_bytes() == (whole / results.STEPS).read_bytes()


def test_the_record_says_everything(whole: Path) -> None:
    record = results.read_record(whole)
    assert record["status"] == "done" and record["schema"] == 1 and record["task"] == "demo/request"
    assert record["num_trainable"] == 6 * 256 + 2 * 256 * 4 + 4 + 256
    for split in ("validation", "test"):
        assert 0 <= record["scores"][split]["accuracy"] <= 1 and record["scores"][split]["n"] == 8
    targets = [json.loads(line)["target"] for line in (whole / results.PREDICTIONS).read_text().splitlines()]
    assert record["baselines"]["majority"]["accuracy"] in (targets.count("0") / 8, targets.count("1") / 8)
    assert {"seconds", "tokens_per_second", "peak_memory_bytes", "adapter_bytes"} <= set(record["cost"])
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert all(len(part["sha256"]) == 64 for part in record["data"]["provenance"].values())
    assert not (whole / results.STATE).exists()
    rows = [json.loads(line) for line in (whole / results.PREDICTIONS).read_text().splitlines()]
    right = sum(row["target"] == row["prediction"] for row in rows)
    assert right / 8 == record["scores"]["test"]["accuracy"]


def test_a_finished_run_is_not_run_again(whole: Path) -> None:
    before = (whole / results.RECORD).read_bytes()
    train(settings_of(*ADEPT), whole, resume=True)
    assert (whole / results.RECORD).read_bytes() == before


def test_the_saved_adapter_scores_as_the_run_says(whole: Path, tmp_path: Path) -> None:
    trained = open_trained(whole)
    assert trained.evaluate("test").scores == results.read_record(whole)["scores"]["test"]
    (whole / results.ADAPTER).rename(tmp_path / "moved")
    try:
        alone = open_trained(tmp_path / "moved")
        assert alone.predict(["The soup was cold."]) == trained.predict(["The soup was cold."])
    finally:
        (tmp_path / "moved").rename(whole / results.ADAPTER)


@pytest.mark.parametrize("method", ["prompt_tuning", "dept", "adept", "accept", "accept+dept", "prompt_tuning+accept"])
def test_eight_examples_are_learned_by_heart(method: str, tmp_path: Path) -> None:
    sizes = {"prompt_tuning": "budget_tokens=16", "adept": "prompt_length=8,budget_tokens=16,dropout=0"}
    inner = sizes.get(method, "prompt_length=8,budget_tokens=16,offset_positions=64")
    if "+" in method:
        inner = "prompt={prompt_length=8,budget_tokens=16},offset={budget_tokens=16,offset_positions=64}"
    settings = settings_of(
        f"method={{name='{method}',{inner}}}", "data.train_limit=8", "train.batch_size=8", "train.steps=80",
        "train.warmup=5", "train.eval_every=80", "train.prompt_rate=0.5", "train.offset_rate=0.01",
    )  # fmt: skip
    train(settings, tmp_path)
    losses = losses_of(tmp_path)
    assert losses[-1] < 0.2 * losses[0], losses


def losses_of(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / results.STEPS).read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    for pieces in (1, 3):
        train(settings_of(f"train.accumulate={pieces}", "train.steps=4"), tmp_path / str(pieces))
    first, second = (losses_of(tmp_path / str(n)) for n in (1, 3))
    assert_close(torch.tensor(first), torch.tensor(second), atol=1e-4, rtol=1e-4)


def test_fixed_padding_changes_no_loss(tmp_path: Path) -> None:
    for how in ("dynamic", "max"):
        train(settings_of(f"data.padding={how}", "train.steps=3"), tmp_path / how)
    first, second = (losses_of(tmp_path / how) for how in ("dynamic", "max"))
    assert_close(torch.tensor(first), torch.tensor(second), atol=1e-4, rtol=1e-4)


def test_the_schedule_is_linear_up_and_down() -> None:
    factors = [schedule(step, 10, 4) for step in range(11)]
    assert factors[:5] == [0, 0.25, 0.5, 0.75, 1.0] and factors[10] == 0
    assert factors[4:] == pytest.approx([1 - i / 6 for i in range(7)])
    assert TrainSettings(steps=30_000).warmup_steps() == 1_800


def test_two_rates_reach_the_two_parts(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def moved(*more: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / "-".join(more)
        train(settings_of("train.steps=2", "train.eval_every=1", "train.warmup=0", *more), folder)
        return load_file(folder / results.ADAPTER / WEIGHTS_FILE)

    still = moved("train.prompt_rate=0", "train.offset_rate=0")
    for rate, part in (("train.prompt_rate=0", ".offset."), ("train.offset_rate=0", ".prompt.")):
        # The best of two steps may be the first; both come after one update.
        one = moved(rate)
        assert {key.split("softprompt_methods")[1] for key in one if not torch.equal(one[key], still[key])} == {
            key.split("softprompt_methods")[1] for key in one if part in key
        }


def test_patience_stops_early(tmp_path: Path) -> None:
    more = ("train.patience=1", "train.prompt_rate=0", "train.offset_rate=0", "train.eval_every=2")
    record = train(settings_of(*more), tmp_path)
    assert record["steps_done"] == 4 and record["best_step"] == 2


def test_gradients_are_clipped_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(parameters: Any, limit: float, **more: Any) -> None:
        seen.append(len(list(parameters)))
        assert limit == 0.5

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train(settings_of("train.clip=0.5", "train.steps=1"), tmp_path)
    assert seen == [4], "both codebooks and both weights in one norm"


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompts.loop.summed_loss", lambda logits, *rest: logits.sum() * float("nan"))
    with pytest.raises(SoftPromptsError, match=r"the loss is nan at step 1 .*lower the rates") as caught:
        train(settings_of(), tmp_path)
    assert "\n" not in str(caught.value)
    assert results.read_record(tmp_path)["status"] == "failed"


def test_shots_and_truncation_are_said(tmp_path: Path) -> None:
    notes: list[str] = []

    class Listen(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    more = ("data.shots=4", "data.max_source_tokens=8", "train.steps=1")
    record = train(settings_of(*more), tmp_path, progress=Listen())
    assert record["data"]["sizes"]["train"] == 4 and record["data"]["truncated"]["test"] > 0
    assert any("texts were cut to 8 tokens (data.max_source_tokens)" in note for note in notes)


def test_a_run_stopped_early_and_killed_in_its_test_is_the_same(tmp_path: Path) -> None:
    class KillInTest(Progress):
        def phase(self, name: str, total: int) -> None:
            if name == "test":
                raise Killed

    more = ("train.patience=1", "train.prompt_rate=0", "train.offset_rate=0", "train.eval_every=2")
    with pytest.raises(Killed):
        train(settings_of(*more), tmp_path, progress=KillInTest())
    record = train(settings_of(*more), tmp_path, resume=True)
    assert record["steps_done"] == 4 and len(losses_of(tmp_path)) == 4


def test_a_resume_needs_the_same_data_and_a_whole_state(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"a text of {i},{i % 2}\n" for i in range(30)))
    settings = resolve(None, [("data.path", str(data)), *(parse_assignment(text) for text in SMALL[1:])])
    with pytest.raises(Killed):
        train(settings, tmp_path / "run", progress=KillAt(6))
    state = (tmp_path / "run" / results.STATE).read_bytes()
    (tmp_path / "run" / results.STATE).write_bytes(state[:100])
    with pytest.raises(UsageError, match=r"state.safetensors is damaged .*--overwrite"):
        train(settings, tmp_path / "run", resume=True)
    data.write_text(data.read_text().replace("text of 3", "word of 3"))
    with pytest.raises(UsageError, match="the data have changed since"):
        train(settings, tmp_path / "run", resume=True)


def test_a_resume_does_not_need_the_source_of_a_warm_start(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / results.ADAPTER, tmp_path / "source")
    settings = settings_of(*ADEPT, f"method.prompt_from='{tmp_path / 'source'}'")
    with pytest.raises(Killed):
        train(settings, tmp_path / "run", progress=KillAt(6))
    shutil.rmtree(tmp_path / "source")
    assert train(settings, tmp_path / "run", resume=True)["status"] == "done"


def test_long_answers_are_cut_and_said(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"what is {i}", "answer": f"it is {i} " * 20} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes: list[str] = []

    class Listen(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    given = [("data.path", str(data)), ("data.kind", "text"), ("train.steps", 1)]
    train(resolve(None, [*map(parse_assignment, SMALL[1:]), *given]), tmp_path / "run", progress=Listen())
    assert "24 of 24 train targets were cut to 20 tokens (data.max_target_tokens)" in notes


def test_an_encoder_without_a_pooler_comes_back_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    """Masked language models are saved without a pooler: what loading makes up must be trained and saved."""
    sizes = ("method.prompt_length=4", "method.offset_positions=40", "method.budget_tokens=16", "train.steps=2")
    train(settings_of(f"model.name={folders['bert']}", *sizes), tmp_path)
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trained = open_trained(tmp_path)
        rows = trained.encoder.encode([Example("sentence: a", "", ()), Example("sentence: something else", "", ())])
        with torch.no_grad():
            logits.append(trained.encoder.backbone.model(**trained.encoder.inputs(rows, [0, 1])).logits)
    assert torch.equal(*logits)


def test_generation_is_greedy_whatever_the_checkpoint_says(folders: dict[str, Path]) -> None:
    model = load_backbone(ModelSettings(name=str(folders["t5"]))).model
    assert model.generation_config.min_length in (None, 0) and model.generation_config.repetition_penalty in (None, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models with the embedded tokenizer, saved as users have them."""
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForMaskedLM,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    tokenizer = AutoTokenizer.from_pretrained(embedded_path("t5-nano"))
    root = tmp_path_factory.mktemp("models")
    made = {}
    for name, model in {
        "t5": lambda: T5ForConditionalGeneration(T5Config(**{**tiny.T5, "vocab_size": len(tokenizer)})),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**tiny.LLAMA, "vocab_size": len(tokenizer)})),
        "bert": lambda: BertForMaskedLM(BertConfig(**{**tiny.BERT, "vocab_size": len(tokenizer)})),
    }.items():
        made[name] = root / name
        network = model()
        if name == "t5":
            network.generation_config.min_length = 7
            network.generation_config.repetition_penalty = 3.0
        network.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.mark.parametrize(
    ("model", "more", "scoring"),
    [
        ("t5", (), "rank"),
        ("t5", ("eval.scoring=generate",), "generate"),
        ("llama", (), "rank"),
        ("llama", ("data.protocol=paper",), "generate"),
        ("llama", ("model.head=classification",), "head"),
        ("bert", (), "head"),
        ("t5", ("model.gradient_checkpointing=true",), "rank"),
        ("t5", ("model.dtype=bf16",), "rank"),
        ("bert", ("model.dtype=bf16",), "head"),
    ],
)
def test_every_architecture_trains_and_comes_back(
    model: str, more: tuple[str, ...], scoring: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    sizes = ("method.prompt_length=4", "method.offset_positions=40", "method.budget_tokens=16", "train.steps=4")
    record = train(settings_of(f"model.name={folders[model]}", *sizes, *more), tmp_path)
    assert record["scoring"] == scoring and (record["num_trainable_head"] > 0) == (scoring == "head")
    trained = open_trained(tmp_path)
    assert trained.evaluate("test").scores == record["scores"]["test"]
    rows = [json.loads(line) for line in (tmp_path / results.PREDICTIONS).read_text().splitlines()]
    texts = [row["source"].removeprefix("sentence: ") for row in rows]
    assert trained.predict(texts) == [row["prediction"] for row in rows]


def test_ranking_is_the_likelihood_written_out(folders: dict[str, Path], tmp_path: Path) -> None:
    """Against one unbatched, unpadded forward pass per text and word, on both kinds of writers."""
    for model in ("t5", "llama"):
        settings = settings_of(f"model.name={folders[model]}", "train.steps=1", "method.offset_positions=60")
        train(settings, tmp_path / model)
        trained = open_trained(tmp_path / model)
        network, tokenizer = trained.encoder.backbone.model, trained.encoder.backbone.tokenizer
        texts = ["short", "a rather longer text than the first one"]
        rows = trained.encoder.encode([Example(f"sentence: {text}", "", ()) for text in texts])
        words = [trained.encoder.encode_target(word) for word in ("0", "1")]
        likelihood = rank_seq2seq if model == "t5" else rank_causal
        with torch.no_grad():
            batched = likelihood(trained.encoder, rows, [0, 1], words)
            for row, source in enumerate(rows.sources):
                for column, word in enumerate(words):
                    if model == "t5":
                        decoder = torch.tensor([[network.config.decoder_start_token_id, *word[:-1]]])
                        logits = network(input_ids=torch.tensor([source]), decoder_input_ids=decoder).logits[0]
                    else:
                        logits = network(input_ids=torch.tensor([source + word])).logits[0, len(source) - 1 : -1]
                    expected = sum(logits.log_softmax(-1)[i, token] for i, token in enumerate(word))
                    assert_close(batched[row, column], expected, atol=1e-4, rtol=0)
        assert tokenizer.eos_token_id in words[0]


def test_texts_beyond_the_offset_are_cut_not_refused(tmp_path: Path) -> None:
    notes: list[str] = []

    class Listen(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    more = ("method.offset_positions=8", "data.max_source_tokens=64", "train.steps=1")
    train(settings_of(*more), tmp_path, progress=Listen())
    assert any("cut to 8 tokens (method.offset_positions" in note for note in notes)
    assert len(open_trained(tmp_path).predict(["a long story " * 20])) == 1


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Five rows in batches of four: the last batch leaves the second process without a row of its own."""
    settings = settings_of("data.train_limit=5", "train.steps=4", "train.eval_every=2")
    train(settings, tmp_path / "one")
    script = tmp_path / "go.py"
    script.write_text(
        "import json, sys, torch\nfrom pathlib import Path\ntorch.set_num_threads(1)\n"
        "from softprompts.config import RunSettings\nfrom softprompts.train import train\n"
        f"train(RunSettings(**json.loads({settings.model_dump_json()!r})), Path(sys.argv[1]))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "two")], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_close(
        torch.tensor(losses_of(tmp_path / "one")), torch.tensor(losses_of(tmp_path / "two")), atol=1e-4, rtol=0
    )
    one, two = (results.read_record(tmp_path / name) for name in ("one", "two"))
    assert one["cost"]["tokens"] == two["cost"]["tokens"]
    assert one["scores"] == two["scores"] and one["num_trainable"] == two["num_trainable"]


def test_two_processes_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Each process draws its own dropout, from where it was. A sweep trains one run at a time there."""
    settings = settings_of("method={name='adept', prompt_length=6, rank=4}", "train.steps=6", "train.eval_every=2")
    script = tmp_path / "go.py"
    script.write_text(
        "import json, sys, torch\nfrom pathlib import Path\ntorch.set_num_threads(1)\n"
        "from softprompts.config import RunSettings\nfrom softprompts.loop import Progress\n"
        "from softprompts.sweep import Planned, run_sweep\nfrom softprompts.train import train\n"
        f"settings, out = RunSettings(**json.loads({settings.model_dump_json()!r})), Path(sys.argv[1])\n"
        "class Killed(BaseException):\n    pass\n"
        "class Kill(Progress):\n    left = 3\n    def advance(self, units=1, **numbers):\n"
        "        self.left -= units\n        if self.left == 0:\n            raise Killed\n"
        "train(settings, out / 'whole')\n"
        "try:\n    train(settings, out / 'killed', progress=Kill())\nexcept Killed:\n    pass\n"
        "train(settings, out / 'killed', resume=True)\n"
        "both = [Planned(f'seed-{n}', settings.updated(seed=n), {'seed': n}) for n in (1, 2)]\n"
        "run_sweep(both, out / 'sweep')\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "killed")
    for seed in (1, 2):
        record = results.read_record(tmp_path / "sweep" / f"seed-{seed}")
        assert record["status"] == "done" and "population" not in record["cost"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("method={name='none'}",), "method 'none' trains nothing here"),
        (("task=demo/requests",), "did you mean 'demo/request'"),
        (("model.name=no/such-model",), "model 'no/such-model' cannot be loaded"),
        (("method.prompt_subspaces=7",), "prompt_subspaces=7 does not divide the model width 256"),
    ],
)
def test_what_cannot_be_writes_nothing(more: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        train(settings_of(*more), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folders_are_not_overwritten_unasked(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists and is not empty; continue it with --resume"):
        train(settings_of(), whole)
    with pytest.raises(UsageError, match="was begun with other settings"):
        train(settings_of("seed=3"), whole, resume=True)
    (tmp_path / "mine.txt").write_text("keep")
    for permission in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match="is not the folder of a run"):
            train(settings_of(), tmp_path, **permission)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_batches_of_a_run_cover_the_data_every_epoch(tmp_path: Path) -> None:
    run = object.__new__(Member)
    run.settings, run.epoch = settings_of(), (-1, [])
    run.splits = {"train": type("Rows", (), {"sources": [[0] * n for n in range(1, 11)], "__len__": lambda s: 10})()}
    order = [run.batch_at(step) for step in range(6)]
    assert sorted(sum(order[:3], [])) == sorted(sum(order[3:], [])) == list(range(10))
    assert order[:3] != order[3:]
