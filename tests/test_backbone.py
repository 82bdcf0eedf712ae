"""Quantised backbones: what is asked of transformers, what stays floating, what is refused. Settings of models."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny import BERT, LLAMA, T5, build
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, LlamaConfig, T5Config

from softprompts import AcceptConfig, attach, backbone
from softprompts.backbone import AUTO_CLASSES, load_backbone
from softprompts.cli import main
from softprompts.config import ModelSettings, parse_assignment, resolve
from softprompts.errors import UsageError
from softprompts.results import read_record
from softprompts.train import train

QUANTIZATIONS = ("8bit", "4bit")
FILES = sorted((Path(__file__).parents[1] / "experiments" / "models").glob("*.toml"))
WIDTHS = {
    "google-t5/t5-small": 512,
    "google-t5/t5-base": 768,
    "google-t5/t5-large": 1024,
    "google-t5/t5-3b": 1024,
    "google/flan-t5-xxl": 4096,
    "meta-llama/Llama-2-7b-hf": 4096,
}
COUNTS = {
    "t5-small": 50_304,
    "t5-base": 74_880,
    "t5-large": 98_816,
    "t5-3b": 98_816,
    "flan-t5-11b": 396_800,
    "llama-2-7b": 404_992,
}
ROWS = {"t5-small": (16, 1), "t5-base": (16, 1), "t5-large": (16, 1), "t5-3b": (2, 1), "flan-t5-11b": (1, 1)}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for bitsandbytes that supports this machine's device."""
    stand_in = SimpleNamespace(__version__="9.9", supported_torch_devices={"cpu", "cuda"})
    found = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: True if name == "bitsandbytes" else found(name, *a)
    )
    monkeypatch.setattr(backbone, "is_bitsandbytes_available", lambda: True)
    return stand_in


def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("model", ["t5", "gpt2", "bert-sequence", "bart"])
def test_a_folder_without_a_tokenizer(model: str, tmp_path: Path) -> None:
    """transformers makes up an empty one, which would turn all texts into the same."""
    small = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=64, max_position_embeddings=32)
    network = BartForConditionalGeneration(BartConfig(**small, **heads)) if model == "bart" else build(model)
    network.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"has no tokenizer .*; save the model's own into its folder"):
        load_backbone(ModelSettings(name=str(tmp_path)), 2)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantization_without_the_library(quantization: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent(monkeypatch)
    message = (
        f"^model.quantization={quantization} needs bitsandbytes; run pip install 'softprompts\\[quant\\]', or set it "
        f"to none$"
    )
    with pytest.raises(UsageError, match=message):
        load_backbone(ModelSettings(quantization=quantization))
    plan = resolve(None, [("task", "demo/mood"), ("model.quantization", quantization)])
    with pytest.raises(UsageError, match=message):
        train(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_quantization_with_an_old_library(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UsageError, match=r"^model.quantization=8bit needs a newer bitsandbytes; run pip install -U"):
        load_backbone(ModelSettings(quantization="8bit"))


def test_quantization_on_hardware_that_cannot(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library.supported_torch_devices = {"xpu", "cuda"}
    monkeypatch.setattr(backbone, "default_device", lambda: torch.device("cpu"))
    with pytest.raises(UsageError) as caught:
        load_backbone(ModelSettings(quantization="4bit"))
    assert str(caught.value) == (
        "model.quantization=4bit: the installed bitsandbytes 9.9 supports cuda, xpu, not this machine's cpu; upgrade "
        "it, or set it to none"
    )


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(UsageError, match="quantization='3bit' cannot be used"):
        ModelSettings(quantization="3bit")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_what_is_asked_of_transformers(
    quantization: Any, dtype: Any, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds, asked = AUTO_CLASSES["seq2seq"], {}

    def load(source: str, **options: Any) -> Any:
        asked.update(options)
        plain = {key: value for key, value in options.items() if key not in ("quantization_config", "device_map")}
        return transformers.AutoModelForSeq2SeqLM.from_pretrained(source, **plain)

    stand_in = SimpleNamespace(from_pretrained=load, from_config=kinds.from_config)
    monkeypatch.setitem(AUTO_CLASSES, "seq2seq", stand_in)
    monkeypatch.setattr(backbone, "default_device", lambda: torch.device("cpu"))
    loaded = load_backbone(ModelSettings(quantization=quantization, dtype=dtype))
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    options = asked["quantization_config"]
    assert (options.load_in_8bit, options.load_in_4bit) == (quantization == "8bit", quantization == "4bit")
    assert options.llm_int8_skip_modules == ["lm_head"]
    assert asked["dtype"] == wanted and asked["device_map"] == {"": "cpu"}
    if quantization == "4bit":
        assert options.bnb_4bit_quant_type == "nf4" and options.bnb_4bit_compute_dtype == wanted
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_nothing_is_asked_for_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch)
    monkeypatch.setattr(backbone, "quantized", None)
    assert load_backbone(ModelSettings(dtype="fp32")).model.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "kind", "kept"),
    [
        (T5Config(**T5), "seq2seq", ["lm_head"]),
        (LlamaConfig(**LLAMA), "causal", ["lm_head"]),
        (LlamaConfig(**LLAMA), "classification", ["score"]),
        (BertConfig(**BERT), "classification", ["bert.pooler", "classifier"]),
    ],
)
def test_heads_and_output_layers_stay_floating(config: Any, kind: Any, kept: list[str], library: Any) -> None:
    options = backbone.quantized("8bit", config, kind, torch.float32)["quantization_config"]
    assert options.llm_int8_skip_modules == kept


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_prompt_trains_on_a_quantised_backbone(quantization: Any, tmp_path: Path) -> None:
    """With the library itself: nearly the same answers, floating embeddings, gradients of the whole prompt."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    device = backbone.default_device().type
    if device not in bitsandbytes.supported_torch_devices:
        pytest.skip(f"this bitsandbytes does not support {device}")
    small = load_backbone(ModelSettings(quantization=quantization, dtype="fp32")).model
    whole = load_backbone(ModelSettings(dtype="fp32")).model
    assert small.get_input_embeddings().weight.dtype == small.lm_head.weight.dtype == torch.float32
    assert small.get_memory_footprint() < 0.6 * whole.get_memory_footprint()
    ids, labels = torch.arange(20, 40).view(2, 10).to(small.device), torch.arange(30, 38).view(2, 4).to(small.device)
    losses = [model(input_ids=ids, labels=labels).loss.item() for model in (small, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    attach(small, AcceptConfig(prompt_length=4, budget_tokens=12, offset_positions=32))
    small(input_ids=ids, labels=labels).loss.backward()
    trained = [parameter for parameter in small.parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all(parameter.grad.abs().max() > 1e-5 for parameter in trained)
    plan = [
        "task=demo/mood", f"model.quantization={quantization}", "model.dtype=fp32", "train.steps=2",
        "method={name='accept', prompt_length=4, budget_tokens=12, offset_positions=32}", "train.batch_size=4",
        "data.test_limit=8", "data.validation_limit=8", "eval.untuned=false",
    ]  # fmt: skip
    record = train(resolve(None, [parse_assignment(text) for text in plan]), tmp_path / "run")
    assert record["status"] == "done" and record["settings"]["model"]["quantization"] == quantization


# ------------------------------------------------------------------------------ settings of models


def test_there_is_a_file_for_each_model() -> None:
    assert [file.stem for file in FILES] == sorted(COUNTS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_settings_of_a_model(file: Path) -> None:
    settings = resolve(file, [("task", "glue/rte")])
    width = WIDTHS[settings.model.name]
    config = settings.method_config().resolved(width)
    assert config.num_trainable(width) == COUNTS[file.stem]
    assert sum(p.numel() for p in config.build(width).parameters()) == COUNTS[file.stem]
    plan = settings.train
    assert plan.steps == 30_000 and plan.warmup_steps() == 1_800
    if file.stem == "llama-2-7b":
        assert settings.model.head == "classification" and settings.data.max_source_tokens == 64
        assert (plan.prompt_rate, plan.offset_rate, plan.batch_size) == (3e-3, 5e-5, 32)
        assert config.offset_positions == 64 and round(COUNTS[file.stem] / 1000) == 405
    else:
        assert (plan.batch_size, plan.accumulate) == ROWS[file.stem]
        assert config.offset_positions == 256 and settings.data.max_source_tokens in (None, 256)
    assert COUNTS[file.stem] <= 102 * width


def test_the_command_line_takes_a_file_and_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its settings go under the options: here another model and a shorter run."""
    small = ["--model", "t5-nano", "--seed", "3"]
    for setting in ("method.prompt_subspaces=8", "method.offset_positions=64", "train.steps=1", "data.train_limit=16",
                    "data.validation_limit=8", "data.test_limit=8"):  # fmt: skip
        small += ["-s", setting]
    file = next(str(file) for file in FILES if file.stem == "t5-base")
    assert main(["train", file, "--task", "demo/mood", *small, "--out", str(tmp_path / "run")]) == 0
    settings = read_record(tmp_path / "run")["settings"]
    assert settings["task"] == "demo/mood" and settings["train"]["warmup"] == 1800 and settings["train"]["steps"] == 1
    assert settings["method"]["prompt_codewords"] == 20 and settings["model"]["name"] == "t5-nano"
