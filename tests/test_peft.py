"""`softprompts.peft` beside the matrix of calls: configs, cards, what other tools wrote, and what is refused."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from tiny import T5, WIDTH, build, config_of, forward, prompted, scatter, text
from torch import nn
from torch.testing import assert_close

from softprompts import AcceptConfig, attach, detach, load_adapter, save_adapter
from softprompts.attach import adapters_of
from softprompts.cli import main
from softprompts.errors import UsageError
from softprompts.peft import SoftPromptConfig, peft_type

ROOT = Path(__file__).parent.parent
TASKS = {"t5": "SEQ_2_SEQ_LM", "llama": "CAUSAL_LM", "bert-sequence": "SEQ_CLS", "bert-token": "TOKEN_CLS"}


def adapted(model: str, method: str = "accept", base: Any = None, **options: Any) -> Any:
    """A tiny PEFT model whose prompt is far from zero, in evaluation mode."""
    network = build(model) if base is None else base
    wrapped = get_peft_model(network, SoftPromptConfig(config_of(method), TASKS[model], **options))
    scatter(network.prompt_adapter)
    return wrapped.eval()


def twin(model: Any, name: str) -> Any:
    """A bare copy of the backbone of an adapted model of that kind."""
    copy = build(name)
    bare = model.unload() if isinstance(model, PeftModel) else detach(model)
    copy.load_state_dict(bare.state_dict())
    return copy


# ------------------------------------------------------------------------------------------------- config


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    for method in ("accept", "accept+dept"):
        config = SoftPromptConfig(config_of(method), "CAUSAL_LM", modules_to_save=["lm_head"])
        config.save_pretrained(str(tmp_path))
        again = PeftConfig.from_pretrained(str(tmp_path))
        assert isinstance(again, SoftPromptConfig) and again.softprompt == config.softprompt
        assert again.to_dict() == config.to_dict() and again.modules_to_save == ["lm_head"]
        assert again.peft_type is PeftType.SOFTPROMPT and again.peft_type.value == "SOFTPROMPT"


def test_a_method_by_its_name() -> None:
    assert SoftPromptConfig().softprompt == AcceptConfig()
    assert SoftPromptConfig("accept+dept").softprompt.name == "accept+dept"
    with pytest.raises(UsageError, match="did you mean 'accept'"):
        SoftPromptConfig("acept")


def test_the_type_is_added_once_and_is_like_the_others() -> None:
    assert peft_type("SOFTPROMPT") is PeftType("SOFTPROMPT") is PeftType["SOFTPROMPT"] is PeftType.SOFTPROMPT
    assert list(PeftType).count("SOFTPROMPT") == 1 and PeftType.SOFTPROMPT == "SOFTPROMPT"


def test_the_parameter_count_is_the_formula(capsys: pytest.CaptureFixture) -> None:
    for model in ("t5", "llama"):
        network = adapted(model)
        count = config_of("accept").num_trainable(WIDTH)
        assert network.get_nb_trainable_parameters()[0] == count
        network.print_trainable_parameters()
        assert f"trainable params: {count:,}" in capsys.readouterr().out


def test_starting_from_a_text(tmp_path: Path) -> None:
    from softprompts.backbone import EMBEDDED, load_backbone
    from softprompts.config import ModelSettings

    config = config_of("prompt_tuning", init="text", init_text="good or bad")
    with pytest.raises(UsageError, match="set tokenizer_name_or_path"):
        get_peft_model(build("t5"), SoftPromptConfig(config, "SEQ_2_SEQ_LM"))
    nano = load_backbone(ModelSettings(name=EMBEDDED))
    get_peft_model(nano.model, SoftPromptConfig(config, "SEQ_2_SEQ_LM"))
    prompt = adapters_of(nano.model).method().prompt
    ids = nano.tokenizer("good or bad", add_special_tokens=False)["input_ids"]
    expected = nano.model.get_input_embeddings().weight[ids[0]]
    assert prompt is not None and torch.equal(next(prompt.parameters())[0], expected)


# -------------------------------------------------------------------------------------- files and other tools


def test_the_file_is_the_adapter_alone_and_the_card_says_what_to_import(tmp_path: Path) -> None:
    network = adapted("t5")
    network.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == config_of("accept").num_trainable(WIDTH)
    card = (tmp_path / "README.md").read_text()
    assert "import softprompts.peft" in card and "KeyError: 'SOFTPROMPT'" in card and "library_name: peft" in card
    assert "More Information Needed" not in card and "- PEFT " in card
    network.save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == card, "saving twice says it twice"


def test_a_card_of_the_user_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nIntroduction.\n\n## Data\n\nOurs.\n")
    adapted("t5").save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    for kept in ("license: mit", "# Mine", "Introduction.", "## Data\n\nOurs.", "import softprompts.peft"):
        assert kept in card
    assert card.index("Introduction.") < card.index("import softprompts.peft") < card.index("## Data")


def test_without_the_import_peft_says_keyerror(tmp_path: Path) -> None:
    """If this fails, PEFT has learned to find types by itself: then the cards and the docs must say so."""
    network = adapted("t5")
    network.save_pretrained(str(tmp_path))
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "KeyError: 'SOFTPROMPT'" in done.stderr
    code = "import softprompts.peft; " + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model", ["t5", "llama", "bert-sequence", "bert-token"])
def test_adapters_of_attach_and_of_peft_are_the_same_files(model: str, tmp_path: Path) -> None:
    network, ids = prompted(model, "accept"), text()
    for head in adapters_of(network).heads:
        scatter(network.get_submodule(head), 0.5)
    expected = forward(network, ids)
    save_adapter(network, tmp_path / "ours", about={"task_type": TASKS[model]})
    backbone = twin(network, model).state_dict()

    def bare() -> Any:
        copy = build(model)
        copy.load_state_dict(backbone)
        return copy

    theirs = PeftModel.from_pretrained(bare(), str(tmp_path / "ours"))
    assert torch.equal(forward(theirs, ids), expected)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_adapter(bare(), tmp_path / "theirs")
    assert torch.equal(forward(again, ids), expected)


def test_what_the_command_line_trained_loads_with_plain_peft(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = "-s train.steps=3 -s train.batch_size=4 -s data.train_limit=16 -s data.validation_limit=8"
    run = [*small.split(), "-s", "data.test_limit=8", "-s", "method.prompt_length=4", "-s", "method.budget_tokens=8"]
    assert main(["train", "--task", "demo/mood", "--method", "accept", *run, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    folder = str(tmp_path / "run" / "adapter")
    network = AutoPeftModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32
    )  # the embedded backbone, by its name
    assert network.peft_config["default"].softprompt.prompt_length == 4
    from softprompts.trained import open_trained

    ours, ids = open_trained(tmp_path / "run").encoder.backbone.model, torch.randint(3, 4000, (2, 9))
    start = torch.zeros(2, 1, dtype=torch.long)
    expected = ours(input_ids=ids, decoder_input_ids=start).logits
    assert_close(network(input_ids=ids, decoder_input_ids=start).logits.float(), expected.float(), atol=1e-5, rtol=0)
    # Saved again by PEFT, it still knows its task.
    network.save_pretrained(str(tmp_path / "copy"))
    assert main(["predict", str(tmp_path / "copy"), "A lovely evening.", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])


def test_a_saved_adapter_does_not_need_what_it_started_from(tmp_path: Path) -> None:
    source = prompted("llama", "prompt_tuning")
    save_adapter(source, tmp_path / "source")
    config = config_of("spot", prompt_from=str(tmp_path / "source"))
    network, ids = get_peft_model(build("llama"), SoftPromptConfig(config, "CAUSAL_LM")).eval(), text()
    started = adapters_of(network.get_base_model()).method().state_dict()
    assert all(torch.equal(v, source.prompt_adapter.method().state_dict()[k]) for k, v in started.items())
    expected = forward(network, ids)
    network.save_pretrained(str(tmp_path / "target"))
    for file in (tmp_path / "source").iterdir():
        file.unlink()
    for trainable in (False, True):
        again = PeftModel.from_pretrained(twin(network, "llama"), str(tmp_path / "target"), is_trainable=trainable)
        assert torch.equal(forward(again.eval(), ids), expected)
        network = again


def test_a_saved_config_without_its_weights_is_loud(tmp_path: Path) -> None:
    adapted("llama").save_pretrained(str(tmp_path))
    network = get_peft_model(build("llama"), PeftConfig.from_pretrained(str(tmp_path)))
    assert forward(network, text()).isnan().all()


# ------------------------------------------------------------------------------------------------ heads


def test_each_adapter_has_its_own_head() -> None:
    network, ids = adapted("bert-sequence"), text(3)
    heads = network.get_base_model().classifier.modules_to_save
    network.add_adapter("second", SoftPromptConfig(config_of("adept"), "SEQ_CLS"))
    scatter(adapters_of(network.get_base_model()).method("second"))
    for name, spread in (("default", 0.5), ("second", 2.0)):
        scatter(heads[name], spread)
    first = forward(network, ids)
    network.set_adapter("second")
    second = forward(network, ids)
    with network.disable_adapter():
        bare = forward(network, ids)
    together = forward(network, ids, adapter_names=["second", "default", "__base__"])
    assert_close(together, torch.stack([second[0], first[1], bare[2]]), atol=1e-5, rtol=0)
    assert torch.equal(forward(network, ids), second), "the rows' heads stay for the next batch"


def test_heads_come_back_after_native_disable_and_enable() -> None:
    network, ids = build("bert-sequence"), text()
    bare = forward(network, ids)
    network.add_adapter(SoftPromptConfig(config_of("accept")))
    scatter(network.prompt_adapter)
    scatter(network.classifier.modules_to_save["default"])
    expected = forward(network.eval(), ids)
    network.disable_adapters()
    assert_close(forward(network, ids), bare, atol=1e-6, rtol=0)
    network.enable_adapters()
    assert torch.equal(forward(network, ids), expected)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_head_trains_in_fp32_on_a_bf16_backbone(task_type: str | None, tmp_path: Path) -> None:
    network = build("bert-sequence").to(torch.bfloat16)
    wrapped = get_peft_model(network, SoftPromptConfig(config_of("accept"), task_type))
    out = wrapped(input_ids=text(), labels=torch.tensor([0, 1]))
    out.loss.backward()
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and any("classifier" in name for name in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    wrapped.save_pretrained(str(tmp_path))
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert {p.dtype for p in wrapped.unload().parameters()} == {torch.bfloat16}


def test_unload_is_exact() -> None:
    for model in TASKS:
        network, ids = build(model), text()
        network.get_input_embeddings().weight.requires_grad_(False)
        before, trains = forward(network, ids), {name: p.requires_grad for name, p in network.named_parameters()}
        wrapped = adapted(model, base=network)
        assert not torch.equal(forward(wrapped, ids), before)
        assert wrapped.unload() is network and torch.equal(forward(network, ids), before)
        assert {name: p.requires_grad for name, p in network.named_parameters()} == trains
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


# ------------------------------------------------------------------------------------------------ refusals


def of_another_width(folder: Path) -> None:
    adapted("t5").save_pretrained(str(folder))
    network = build("t5")
    network.shared = nn.Embedding(60, 16)
    PeftModel.from_pretrained(network, str(folder))


def two_at_once(folder: Path) -> None:
    network = build("llama")
    network.add_adapter(SoftPromptConfig(config_of("accept")), "a")
    network.add_adapter(SoftPromptConfig(config_of("dept")), "b")
    network.set_adapter(["a", "b"])


def on_an_attached_model(folder: Path) -> None:
    get_peft_model(prompted("t5", "accept"), SoftPromptConfig(config_of("dept")))


def modules_that_are_not_there(folder: Path) -> None:
    adapted("bert-sequence", modules_to_save=["pooler", "clasifier"])


def the_name_of_a_lora(folder: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    below = get_peft_model(build("llama"), lora)
    with pytest.warns(UserWarning, match="for a second time"):
        get_peft_model(below, SoftPromptConfig(config_of("accept"), "CAUSAL_LM"))


def the_file_of_another_method(folder: Path) -> None:
    adapted("t5", "dept").save_pretrained(str(folder))
    adapted("t5", "accept").load_adapter(str(folder), "default")


def detached(folder: Path) -> None:
    detach(adapted("t5"))


def saved_without_peft(folder: Path) -> None:
    save_adapter(adapted("bert-sequence").get_base_model(), folder)


def attached_to_a_peft_model(folder: Path) -> None:
    attach(adapted("t5").get_base_model(), config_of("dept"), "second")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (of_another_width, "trained for width 32 .*this model has width 16"),
        (two_at_once, "one prompt is active at a time, not a, b; use adapter_names"),
        (modules_that_are_not_there, "modules_to_save names 'clasifier', which this model lacks"),
        (the_name_of_a_lora, "'default' names another adapter of this model .*its own adapter_name"),
        (the_file_of_another_method, "the file holds .*load it under another name"),
        (detached, "belong to PEFT; use its delete_adapter"),
        (saved_without_peft, "use its save_pretrained"),
        (on_an_attached_model, "attached without PEFT; detach"),
        (attached_to_a_peft_model, "belong to PEFT"),
        (lambda _: adapted("t5").merge_and_unload(), "cannot be merged.*softprompts export"),
        (lambda _: adapted("t5").merge_adapter(), "cannot be merged.*softprompts export"),
        (lambda _: forward(adapted("t5"), text(2), adapter_names=["defualt", "default"]), "did you mean 'default'"),
    ],
)
def test_what_is_refused(call: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"prompt_subspaces": 5}, {}, "does not divide the model width"),
        ({}, {"modules_to_save": ["sharde"]}, "names 'sharde', which this model lacks"),
    ],
)
def test_a_failed_injection_leaves_the_model_alone(changes: dict, options: dict, message: str) -> None:
    network, ids = build("t5"), text()
    before = forward(network, ids)
    with pytest.raises(UsageError, match=message):
        get_peft_model(network, SoftPromptConfig(config_of("accept", **changes), **options))
    assert not hasattr(network, "prompt_adapter") and torch.equal(forward(network, ids), before)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_config_serves_several_models() -> None:
    config = SoftPromptConfig("prompt_tuning", "SEQ_2_SEQ_LM")
    before = config.to_dict()
    get_peft_model(build("t5"), config)
    wide = type(build("t5"))(build("t5").config.__class__(**{**T5, "d_model": 64}))
    again = get_peft_model(wide, config)
    assert config.to_dict() == before and again.peft_config["default"].width == 64
    again.add_adapter("second", again.peft_config["default"])
    again.set_adapter("second")
    assert not forward(again, text()).isnan().any()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_heads_on_top_of_lora() -> None:
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    below, ids = get_peft_model(build("bert-sequence"), lora, "below").eval(), text()
    scatter(below.get_base_model().classifier.modules_to_save["below"])
    before = forward(below, ids)
    with pytest.warns(UserWarning, match="for a second time"):
        above = get_peft_model(below, SoftPromptConfig(config_of("accept"), "SEQ_CLS"), "above")
    heads = below.get_base_model().classifier
    assert heads.active_adapters == ["above"]
    forward(above, ids).sum().backward()
    assert all(p.grad is not None for p in heads.modules_to_save["above"].parameters())
    assert torch.equal(forward(above.unload().eval(), ids), before), "LoRA has its own trained head again"


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning")
@pytest.mark.parametrize("name", ["embed_tokens"])
def test_a_trained_copy_of_the_embeddings_is_used(name: str) -> None:
    network = get_peft_model(build("llama"), SoftPromptConfig(config_of("accept"), "CAUSAL_LM", modules_to_save=[name]))
    forward(network, text()).square().sum().backward()
    copies = network.get_base_model().model.embed_tokens.modules_to_save["default"]
    assert copies.weight.grad is not None and copies.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_lora_below_a_prompt_is_kept_when_the_prompt_goes() -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    below, ids = get_peft_model(build("llama"), lora, "below").eval(), text()
    before = forward(below, ids)
    with pytest.warns(UserWarning, match="for a second time"):  # PEFT's advice; here it is meant
        wrapped = get_peft_model(below, SoftPromptConfig(config_of("accept"), "CAUSAL_LM")).eval()
    scatter(adapters_of(below.get_base_model()))
    kinds = {("lora" if "lora" in name else "prompt") for name, p in wrapped.named_parameters() if p.requires_grad}
    assert kinds == {"lora", "prompt"} and not torch.equal(forward(wrapped, ids), before)
    assert torch.equal(forward(wrapped.unload(), ids), before)


def test_the_example(capsys: pytest.CaptureFixture) -> None:
    specification = importlib.util.spec_from_file_location("three_tasks", ROOT / "examples" / "three_tasks.py")
    assert specification is not None and specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    shown = capsys.readouterr().out
    assert shown.count("sentiment") == 3 and "positive" in shown and "negative" in shown
    assert example.worst < 1e-3
