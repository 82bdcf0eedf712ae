"""Codebooks shared over tasks: taken from another adapter, frozen, and saved as a copy or as a reference."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_train import KillAt, Killed
from tiny import WIDTH, build, config_of, forward, scatter, text
from torch import nn

from softprompts import AcceptConfig, attach, load_adapter, save_adapter
from softprompts.attach import adapters_of
from softprompts.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    SavedAdapters,
    digest,
    prompt_vectors,
    read_tensors,
    restore_adapter,
)
from softprompts.config import parse_assignment, resolve
from softprompts.core import MethodConfig
from softprompts.errors import UsageError
from softprompts.export import read_adapter
from softprompts.peft import SoftPromptConfig
from softprompts.registry import method_config
from softprompts.results import ADAPTER
from softprompts.train import train

BOTH = ("prompt.codebook.codebooks", "offset.codebook.codebooks")
FROZEN_TINY = 5 * 4 * 3 + 24 * 2 * 3
"""P*K*C + T*K'*C' of the tiny sizes."""


def source(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with random codebooks; return its tensors."""
    network = build("t5")
    attach(network, config_of("accept", **changes))
    scatter(network.prompt_adapter)
    save_adapter(network, folder)
    return read_tensors(folder)


def shared(folder: Path | str, **changes: Any) -> MethodConfig:
    """Tiny settings whose frozen codebooks are those of `folder`."""
    return config_of("accept", codebooks_from=str(folder), freeze_codebooks=True, **changes)


def target(folder: Path, config: MethodConfig) -> Any:
    """Attach, spread what trains, and save; return the model."""
    network = build("t5")
    attach(network, config)
    for parameter in network.prompt_adapter.parameters():
        nn.init.normal_(parameter)
    save_adapter(network, folder)
    return network


def twin(network: Any) -> Any:
    """A bare model with the same backbone."""
    copy, state = build("t5"), network.state_dict()
    copy.load_state_dict({key: state[key] for key in copy.state_dict()})
    return copy


def weights_of(folder: Path) -> set[str]:
    return {key.partition("softprompt_methods.")[2] for key in load_file(folder / WEIGHTS_FILE)}


def says(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert all(part in message for part in parts) and "\n" not in message, message


# ------------------------------------------------------------------------------------------- counts, freezing


def test_frozen_codebooks_leave_the_weights_to_train() -> None:
    config = AcceptConfig(codebooks_from="anywhere", freeze_codebooks=True, prompt_subspaces=24)
    assert config.num_trainable(768) == 60 * 24 * 20 + 256 * 2 * 24 == 28_800 + 12_288
    assert AcceptConfig(prompt_subspaces=24).num_trainable(768) == 44_160 + 30_720
    tiny = shared("anywhere")
    method = tiny.build(WIDTH)
    assert sum(p.numel() for p in method.parameters()) == tiny.num_trainable(WIDTH) == FROZEN_TINY
    assert set(BOTH) <= set(method.state_dict()) and {name for name, _ in method.named_buffers()} == set(BOTH)
    assert {len(group) for group in method.groups().values()} == {1}


def test_the_parameters_that_tasks_own_exist() -> None:
    names = {name for name, _ in config_of("accept").build(WIDTH).named_parameters()}
    assert set(AcceptConfig.task_parts) | set(BOTH) == names
    assert config_of("accept+dept").task_parts == ("prompt.codebook.weights",)


def test_nothing_makes_frozen_codebooks_train(tmp_path: Path) -> None:
    source(tmp_path)
    network = build("t5")
    attach(network, shared(tmp_path))
    network.requires_grad_(True)
    adapters_of(network).activate("default")
    forward(network, text()).sum().backward()
    method = adapters_of(network).method()
    assert not any(buffer.requires_grad or buffer.grad is not None for buffer in method.buffers())
    assert [name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0] == [
        "prompt.codebook.weights", "offset.codebook.weights"
    ]  # fmt: skip


def test_codebooks_are_the_start_and_weights_are_fresh(tmp_path: Path) -> None:
    saved = source(tmp_path)
    for config in (config_of("accept", codebooks_from=str(tmp_path)), shared(tmp_path)):
        network = build("t5")
        attach(network, config)
        state = adapters_of(network).method().state_dict()
        assert all(torch.equal(state[key], saved[key]) for key in BOTH)
        assert state["prompt.codebook.weights"].abs().max() <= 12**-0.5 < saved["prompt.codebook.weights"].abs().max()
    thawed = config_of("accept", codebooks_from=str(tmp_path))
    assert thawed.num_trainable(WIDTH) == config_of("accept").num_trainable(WIDTH)


def test_other_numbers_of_vectors_share_the_same_codebooks(tmp_path: Path) -> None:
    saved = source(tmp_path)
    network = build("t5")
    attach(network, shared(tmp_path, prompt_length=2, offset_positions=9))
    state = adapters_of(network).method().state_dict()
    assert state["prompt.codebook.weights"].shape == (2, 4, 3) and torch.equal(state[BOTH[0]], saved[BOTH[0]])


def test_a_part_that_the_source_lacks_starts_afresh_unless_frozen(tmp_path: Path) -> None:
    saved = source(tmp_path, offset_positions=0)
    network = build("t5")
    attach(network, config_of("accept", codebooks_from=str(tmp_path)))
    assert torch.equal(adapters_of(network).method().prompt.codebook.codebooks, saved[BOTH[0]])
    with pytest.raises(UsageError) as caught:
        attach(build("t5"), shared(tmp_path))
    says(caught, f"codebooks_from={tmp_path}: no codebooks for the offset")
    attach(build("t5"), shared(tmp_path, offset_positions=0))
    with pytest.raises(UsageError, match="no codebooks for the offset"):
        attach(build("t5"), config_of("accept", codebooks_from=str(tmp_path), prompt_length=0))


def test_a_run_moves_the_weights_alone_and_resumes_without_the_source(tmp_path: Path) -> None:
    small = (
        "task=demo/mood", "model.dtype=fp32", "method.prompt_length=6", "method.budget_tokens=16",
        "method.offset_positions=64", "data.max_source_tokens=64", "data.train_limit=12", "data.validation_limit=4",
        "data.test_limit=4", "train.batch_size=4", "train.eval_every=3", "train.save_every=1", "train.steps=3",
        "train.warmup=0", "eval.untuned=false",
    )  # fmt: skip
    train(resolve(None, map(parse_assignment, small)), tmp_path / "source")
    saved = read_tensors(tmp_path / "source" / ADAPTER)
    more = (f"method.codebooks_from={tmp_path / 'source'}", "method.freeze_codebooks=true")
    settings = resolve(None, map(parse_assignment, (*small, *more)))
    with pytest.raises(Killed):
        train(settings, tmp_path / "run", progress=KillAt(2))
    shutil.rmtree(tmp_path / "source")
    record = train(settings, tmp_path / "run", resume=True)
    method = settings.method_config()
    assert record["num_trainable"] == method.num_trainable(256) and record["num_trainable_head"] == 0
    trained = read_tensors(tmp_path / "run" / ADAPTER)
    assert all(torch.equal(trained[key], saved[key]) for key in BOTH)
    # Three steps of AdamW at 0.3 from a start within 1/sqrt(K*C).
    assert trained["prompt.codebook.weights"].abs().max() > 0.3
    assert trained["offset.codebook.weights"].abs().max() > 0.002


# --------------------------------------------------------------------------------------------- copy, reference


def test_a_copy_needs_no_other_adapter(tmp_path: Path) -> None:
    source(tmp_path / "source")
    network, ids = target(tmp_path / "target", shared(tmp_path / "source")), text()
    shutil.rmtree(tmp_path / "source")
    assert set(BOTH) <= weights_of(tmp_path / "target")
    assert torch.equal(forward(load_adapter(twin(network), tmp_path / "target"), ids), forward(network, ids))


def test_a_reference_leaves_out_exactly_the_codebooks(tmp_path: Path) -> None:
    saved = source(tmp_path / "source")
    config = shared(tmp_path / "source", codebooks_stored="reference")
    network, ids = target(tmp_path / "target", config), text()
    target(tmp_path / "copy", shared(tmp_path / "source"))
    assert weights_of(tmp_path / "copy") - weights_of(tmp_path / "target") == set(BOTH)
    assert sum(t.numel() for t in load_file(tmp_path / "target" / WEIGHTS_FILE).values()) == FROZEN_TINY
    sizes = [(tmp_path / name / WEIGHTS_FILE).stat().st_size for name in ("copy", "target")]
    codebooks = sum(saved[key].numel() * 4 for key in BOTH)
    assert codebooks <= sizes[0] - sizes[1] < codebooks + 400, "the rest is their entries in the file's header"
    again = load_adapter(twin(network), tmp_path / "target")
    assert torch.equal(forward(again, ids), forward(network, ids))
    entry = json.loads((tmp_path / "target" / CONFIG_FILE).read_text())["kept_elsewhere"]
    assert set(entry) == set(BOTH) and entry[BOTH[0]]["sha256"] == digest(saved[BOTH[0]])
    # All that reads adapters reads this one.
    restore_adapter(again, tmp_path / "target")
    assert torch.equal(read_adapter(tmp_path / "target").table, prompt_vectors(tmp_path / "target"))
    assert torch.equal(read_tensors(tmp_path / "target")[BOTH[1]], saved[BOTH[1]])


def test_a_reference_survives_moving_and_other_working_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    source(Path("runs/source"))
    network, ids = target(Path("runs/target"), shared("runs/source", codebooks_stored="reference")), text()
    expected = forward(network, ids)
    monkeypatch.chdir(tmp_path)
    os.rename("first", "second")
    assert torch.equal(forward(load_adapter(twin(network), "second/runs/target"), ids), expected), "by its own folder"
    shutil.move("second/runs/target", "alone")
    monkeypatch.chdir(tmp_path / "second")
    assert torch.equal(forward(load_adapter(twin(network), tmp_path / "alone"), ids), expected), "by the directory"


def test_a_missing_or_changed_source_is_one_line(tmp_path: Path) -> None:
    source(tmp_path / "source")
    target(tmp_path / "target", shared(tmp_path / "source", codebooks_stored="reference"))
    os.rename(tmp_path / "source", tmp_path / "elsewhere")
    fresh = build("t5")
    with pytest.raises(UsageError) as caught:
        load_adapter(fresh, tmp_path / "target")
    says(caught, "keeps 'prompt.codebook.codebooks' in ../source or", "is missing; put it back", "'kept_elsewhere'")
    assert not hasattr(fresh, "prompt_adapter")
    source(tmp_path / "source")
    with pytest.raises(UsageError) as caught:
        load_adapter(fresh, tmp_path / "target")
    says(caught, f"in {tmp_path / 'source'}, which has changed since; put it back as it was, or name the folder")
    # The way out that the message names.
    path = tmp_path / "target" / CONFIG_FILE
    path.write_text(path.read_text().replace("../source", "../elsewhere"))
    load_adapter(fresh, tmp_path / "target")
    entries = json.loads(path.read_text())
    path.write_text(json.dumps({**entries, "kept_elsewhere": {BOTH[0]: "../elsewhere"}}))
    with pytest.raises(UsageError, match="does not say where it is; it is damaged"):
        load_adapter(build("t5"), tmp_path / "target")


def test_nothing_is_left_out_that_would_be_lost(tmp_path: Path) -> None:
    """Saved over its own source, or after the source has changed, an adapter keeps its codebooks."""
    saved = source(tmp_path / "source")
    config = shared(tmp_path / "source", codebooks_stored="reference")
    network = target(tmp_path / "target", config)
    save_adapter(network, tmp_path / "source")
    assert torch.equal(read_tensors(tmp_path / "source")[BOTH[0]], saved[BOTH[0]])
    load_adapter(twin(network), tmp_path / "target")
    source(tmp_path / "source")
    save_adapter(network, tmp_path / "target")
    assert set(BOTH) <= weights_of(tmp_path / "target")
    assert "kept_elsewhere" not in json.loads((tmp_path / "target" / CONFIG_FILE).read_text())


def test_a_reference_to_a_reference_names_the_adapter_that_holds_the_codebooks(tmp_path: Path) -> None:
    saved = source(tmp_path / "first")
    target(tmp_path / "second", shared(tmp_path / "first", codebooks_stored="reference"))
    network = target(tmp_path / "third", shared(tmp_path / "second", codebooks_stored="reference"))
    shutil.rmtree(tmp_path / "second")
    load_adapter(twin(network), tmp_path / "third")
    assert torch.equal(read_tensors(tmp_path / "third")[BOTH[1]], saved[BOTH[1]])
    # The first would refer to itself by way of the others.
    attach(again := build("t5"), shared(tmp_path / "third", codebooks_stored="reference"))
    save_adapter(again, tmp_path / "first")
    assert set(BOTH) <= weights_of(tmp_path / "first")


def test_the_half_of_a_combination_shares_too(tmp_path: Path) -> None:
    saved = source(tmp_path / "source", offset_positions=0)
    prompt = {
        "prompt_length": 5, "prompt_codewords": 3, "prompt_subspaces": 4, "freeze_codebooks": True,
        "codebooks_from": str(tmp_path / "source"), "codebooks_stored": "reference",
    }  # fmt: skip
    config = method_config("accept+dept", {"prompt": prompt, "offset": {"offset_positions": 24, "rank": 3}})
    assert config.num_trainable(WIDTH) == 5 * 4 * 3 + 3 * (24 + 32)
    network, ids = target(tmp_path / "target", config), text()
    assert weights_of(tmp_path / "target") == {"prompt.codebook.weights", "offset.left", "offset.right"}
    assert torch.equal(adapters_of(network).method().prompt.codebook.codebooks, saved[BOTH[0]])
    assert torch.equal(forward(load_adapter(twin(network), tmp_path / "target"), ids), forward(network, ids))


# ---------------------------------------------------------------------------------------------------- refusals


def test_frozen_codebooks_must_come_from_somewhere(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        attach(build("t5"), config_of("accept", freeze_codebooks=True))
    says(caught, "freeze_codebooks=true needs trained codebooks; set codebooks_from=ADAPTER")
    with pytest.raises(UsageError) as caught:
        attach(build("t5"), shared(tmp_path / "nowhere"))
    says(caught, f"{tmp_path / 'nowhere'} holds no adapter weights")
    with pytest.raises(UsageError) as caught:
        config_of("accept", codebooks_from="anywhere", codebooks_stored="reference")
    says(caught, "codebooks_stored='reference' needs codebooks that do not train; set freeze_codebooks=true too")


def test_sizes_must_agree(tmp_path: Path) -> None:
    source(tmp_path)
    with pytest.raises(UsageError) as caught:
        attach(build("t5"), shared(tmp_path, prompt_codewords=2, prompt_subspaces=8))
    says(
        caught,
        "its prompt has 4 codebooks of 3 codewords of 8 numbers, this one needs 8 codebooks of 2 codewords of 4",
        "set prompt_subspaces=4 and prompt_codewords=3",
    )
    attach(build("t5"), shared(tmp_path, prompt_codewords=3, prompt_subspaces=4))
    with pytest.raises(UsageError, match="name an adapter of the same model width"):
        config = shared(tmp_path)
        config.start_from(config.build(64), SavedAdapters())


def test_a_fitted_start_and_given_codebooks_exclude_each_other(tmp_path: Path) -> None:
    source(tmp_path)
    with pytest.raises(UsageError) as caught:
        attach(build("t5"), shared(tmp_path, init="vocabulary"))
    says(caught, "init='vocabulary' fits the codebooks", "leave one of them out")


# -------------------------------------------------------------------------------------------------------- PEFT


def test_peft_saves_frozen_codebooks_and_reads_references(tmp_path: Path) -> None:
    source(tmp_path / "source")
    config = shared(tmp_path / "source", codebooks_stored="reference")
    network, ids = target(tmp_path / "target", config), text()
    expected = forward(network, ids)
    read = PeftModel.from_pretrained(twin(network), str(tmp_path / "target"))
    assert torch.equal(forward(read.eval(), ids), expected)
    read.save_pretrained(str(tmp_path / "peft"))
    assert set(BOTH) <= weights_of(tmp_path / "peft"), "PEFT saves everything"
    shutil.rmtree(tmp_path / "source")
    again = PeftModel.from_pretrained(twin(network), str(tmp_path / "peft"))
    assert torch.equal(forward(again.eval(), ids), expected)
    with pytest.raises(UsageError, match=r"keeps 'prompt\.codebook\.codebooks' in .* which is missing"):
        PeftModel.from_pretrained(twin(network), str(tmp_path / "target"))


def test_peft_trains_the_weights_alone(tmp_path: Path) -> None:
    source(tmp_path)
    model = get_peft_model(build("t5"), SoftPromptConfig(shared(tmp_path), "SEQ_2_SEQ_LM"))
    assert model.get_nb_trainable_parameters()[0] == FROZEN_TINY


def test_peft_says_so_where_a_reference_cannot_be_followed(tmp_path: Path) -> None:
    source(tmp_path / "source")
    network = target(tmp_path / "target", shared(tmp_path / "source", codebooks_stored="reference"))
    bare = twin(network)
    with pytest.raises(UsageError) as caught:
        bare.load_adapter(str(tmp_path / "target"))  # transformers' own loader reads config and tensors by itself
    says(caught, "keeps tensors in another one; load it with PeftModel from a local folder")
    assert not hasattr(bare, "prompt_adapter")
