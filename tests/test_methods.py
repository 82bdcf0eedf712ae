"""Starts of the methods, parameter groups, saving and loading, warm starts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import MODELS, NAMES, SHAPES, WIDTH, build, config_of, forward, prompted, scatter, text
from torch.testing import assert_close

from softprompts.attach import adapters_of, attach
from softprompts.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from softprompts.errors import SoftPromptsError, UsageError
from softprompts.init import Vocabulary
from softprompts.registry import method_config, methods


class Words:
    """A tokenizer of three words."""

    def __call__(self, words: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [{"good": 7, "or": 8, "bad": 9}[word] for word in words.split()]}


def test_every_registered_method_has_tiny_sizes() -> None:
    """The contract suites run over NAMES: a new method must be listed there."""
    prompts = {name for name, kind in methods().items() if not kind.changes_model}
    assert prompts - {"none"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_starts_are_finite_and_seeded(name: str) -> None:
    embedding = torch.randn(50, WIDTH)
    config = config_of(name)

    def start(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        method = config.build(WIDTH)
        config.initialise(method, WIDTH, Vocabulary(embedding))
        return [p.detach().clone() for p in method.parameters()]

    first, again, other = start(1), start(1), start(2)
    assert all(p.isfinite().all() for p in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["dept", "adept"])
def test_offsets_of_dept_and_adept_start_at_zero(name: str) -> None:
    network, ids = build("t5"), text()
    attach(network, config_of(name))
    method = adapters_of(network).method()
    embeds = network.get_input_embeddings()(ids)
    assert method.offset(embeds, None).abs().max() == 0


def test_vocabulary_start_uses_rows() -> None:
    network = build("llama")
    attach(network, config_of("prompt_tuning"))
    rows = network.get_input_embeddings().weight
    for vector in adapters_of(network).method().prompt.vectors:
        assert (rows == vector).all(1).any()


@pytest.mark.parametrize("name", ["prompt_tuning", "dept", "accept"])
def test_text_start_repeats_the_text(name: str) -> None:
    network = build("t5")
    more = {"prompt_codewords": 5} if name == "accept" else {}
    attach(network, config_of(name, init="text", init_text="good or bad", **more), tokenizer=Words())
    ids = torch.tensor([7, 8, 9, 7, 8])
    expected = network.get_input_embeddings().weight[ids]
    method = adapters_of(network).method()
    assert_close(method.prompt(expected[None], torch.ones(1, 5, dtype=torch.long)), expected, atol=1e-4, rtol=1e-4)


def test_groups_hold_every_parameter_once() -> None:
    method = adapters_of(prompted("t5", "accept")).method()
    groups = method.groups()
    assert set(groups) == {"prompt", "offset"}
    assert [p for ps in groups.values() for p in ps] == list(method.parameters())


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_saved_and_loaded_gives_the_same(model: str, method: str, tmp_path: Path) -> None:
    network, ids = prompted(model, method), text()
    before = forward(network, ids)
    save_adapter(network, tmp_path / "a")
    other = build(model)
    state = network.state_dict()
    other.load_state_dict({key: state[key] for key in other.state_dict()})
    for head in adapters_of(network).heads:
        scatter(other.get_submodule(head))
    load_adapter(other, tmp_path / "a", "elsewhere")
    assert torch.equal(forward(other, ids), before)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]


def test_saved_files_have_the_peft_layout(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    network = prompted("bert-sequence", "accept")
    save_adapter(network, tmp_path)
    keys = set(load_file(tmp_path / WEIGHTS_FILE))
    root = "base_model.model."
    assert f"{root}prompt_adapter.softprompt_methods.prompt.codebook.weights" in keys
    assert f"{root}classifier.weight" in keys and all(key.startswith(root) for key in keys)
    entries = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert entries["peft_type"] == "SOFTPROMPT" and entries["modules_to_save"] == ["classifier"]
    assert entries["softprompt"]["method"] == "accept"


@pytest.mark.parametrize("model", SHAPES)
def test_warm_start_takes_each_part_from_its_own_source(model: str, tmp_path: Path) -> None:
    for name, changes in (("scpp", {"offset_positions": 0}), ("scap", {"prompt_length": 0})):
        source = build(model)
        attach(source, config_of("accept", **changes))
        scatter(source.prompt_adapter)
        save_adapter(source, tmp_path / name)
        if name == "scpp":
            prompt = source.prompt_adapter.method().prompt.codebook()
        else:
            offset = source.prompt_adapter.method().offset.table(slice(24))
    network = build(model)
    both = {"prompt_from": str(tmp_path / "scpp"), "offset_from": str(tmp_path / "scap")}
    attach(network, config_of("accept", **both))
    method = network.prompt_adapter.method()
    assert torch.equal(method.prompt.codebook(), prompt) and torch.equal(method.offset.table(slice(24)), offset)


def test_saved_adapter_does_not_need_its_source(tmp_path: Path) -> None:
    source = prompted("t5", "prompt_tuning")
    save_adapter(source, tmp_path / "source")
    network, ids = build("t5"), text()
    attach(network, config_of("spot", prompt_from=str(tmp_path / "source")))
    assert torch.equal(network.prompt_adapter.method().prompt.vectors, source.prompt_adapter.method().prompt.vectors)
    save_adapter(network, tmp_path / "target")
    shutil.rmtree(tmp_path / "source")
    before = forward(network, ids)
    twin = build("t5")
    twin.load_state_dict({key: network.state_dict()[key] for key in twin.state_dict()})
    load_adapter(twin, tmp_path / "target")
    assert torch.equal(forward(twin, ids), before)


def test_a_source_of_other_sizes_is_refused(tmp_path: Path) -> None:
    save_adapter(prompted("t5", "prompt_tuning"), tmp_path)
    with pytest.raises(UsageError, match=r"prompt_from=.*its prompt is .*\(5, 32\).* needs .*\(4, 32\)"):
        attach(build("t5"), config_of("prompt_tuning", prompt_length=4, prompt_from=str(tmp_path)))
    with pytest.raises(UsageError, match="has no offset"):
        attach(build("t5"), config_of("prompt_tuning", offset_from=str(tmp_path)))


def test_a_combination_starts_from_the_sources_of_its_parts(tmp_path: Path) -> None:
    source = prompted("t5", "spot")
    save_adapter(source, tmp_path)
    network = build("t5")
    given = {"prompt": {"prompt_length": 5, "prompt_from": str(tmp_path)}, "offset": {"rank": 3}}
    attach(network, method_config("spot+adept", given))
    assert torch.equal(network.prompt_adapter.method().prompt.vectors, source.prompt_adapter.method().prompt.vectors)
    with pytest.raises(UsageError, match=r"spot\+adept starts from a trained prompt"):
        attach(build("t5"), method_config("spot+adept", {"offset": {"rank": 3}}))


def test_one_head_belongs_to_one_adapter(tmp_path: Path) -> None:
    network = prompted("bert-sequence", "accept")
    with pytest.raises(UsageError, match=r"the head \(classifier\) belongs to the adapter 'default'"):
        attach(network, config_of("dept"), "second")
    save_adapter(network, tmp_path)
    frozen = build("bert-sequence")
    load_adapter(frozen, tmp_path, trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_modules_without_weights_are_saved_too(tmp_path: Path) -> None:
    network, ids = build("bert-sequence"), text()
    attach(network, config_of("accept"), also_train=["bert.pooler.dense"])
    scatter(network.bert.pooler)
    before = forward(network, ids)
    save_adapter(network, tmp_path)
    twin = build("bert-sequence")
    twin.load_state_dict({key: network.state_dict()[key] for key in twin.state_dict()})
    scatter(twin.bert.pooler)
    load_adapter(twin, tmp_path)
    assert torch.equal(forward(twin, ids), before)


def damage(folder: Path, how: str) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    if how == "no config":
        (folder / CONFIG_FILE).unlink()
    elif how == "not json":
        (folder / CONFIG_FILE).write_text("{")
    elif how == "foreign":
        (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA"}))
    elif how == "no weights":
        (folder / WEIGHTS_FILE).unlink()
    elif how == "cut":
        data = (folder / WEIGHTS_FILE).read_bytes()
        (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])
    elif how == "width":
        (folder / CONFIG_FILE).write_text(json.dumps({**config, "width": 768}))
    elif how == "sizes":
        config["softprompt"]["prompt_length"] = 6
        (folder / CONFIG_FILE).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "holds no adapter"),
        ("not json", "damaged, save the adapter again"),
        ("foreign", "not an adapter of softprompts (peft_type='LORA')"),
        ("no weights", "holds no adapter weights"),
        ("cut", "damaged, save the adapter again"),
        ("width", "was trained for width 768"),
        ("sizes", "has shape (5, 1, 3), its config asks for (6, 1, 3)"),
    ],
)
def test_damaged_adapters_say_so_and_leave_the_model_alone(how: str, message: str, tmp_path: Path) -> None:
    network = build("t5")
    attach(network, config_of("accept", prompt_subspaces=1))
    save_adapter(network, tmp_path)
    damage(tmp_path, how)
    fresh = build("t5")
    with pytest.raises(UsageError) as caught:
        load_adapter(fresh, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not hasattr(fresh, "prompt_adapter") and all(p.requires_grad for p in fresh.parameters())


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("softprompts.checkpoint.save_file", full)
    with pytest.raises(SoftPromptsError, match="No space left on device; free some space"):
        save_adapter(prompted("t5", "accept"), tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_unknown_method_in_a_saved_adapter(tmp_path: Path) -> None:
    save_adapter(prompted("t5", "accept"), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["softprompt"]["method"] = "acept"
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(UsageError, match="did you mean 'accept'"):
        load_adapter(build("t5"), tmp_path)


def test_combinations_name_both_parts() -> None:
    assert method_config("accept+adept").name == "accept+adept"
