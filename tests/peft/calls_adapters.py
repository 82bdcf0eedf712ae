"""Rows of the matrix: several adapters, none, transformers' own adapter calls, and company of LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from calls_generate import write
from cases import (
    PLAN,
    WRITERS,
    Case,
    batch,
    defined,
    far,
    gradients,
    near,
    run,
    same,
    scattered,
    side_of,
    text_logits,
    text_of,
    trainable,
)
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from registry_of_calls import call
from torch import Tensor

MIXED = ["default", "other", "__base__"]
LORA_TARGETS = {"t5": ["q", "v"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}


@call("disable_adapter, forward", "logits = the base model's; afterwards as before")
def check_disable(case: Case, folder: Path) -> None:
    network, (ids, mask) = case.peft(), batch()
    before = run(case, network, ids, mask)
    with network.disable_adapter():
        near(run(case, network, ids, mask), run(case, case.base(), ids, mask), "logits")
    same(run(case, network, ids, mask), before, "logits afterwards")


@call("disable_adapter, generate", "logits of every step = the base model's", archs=WRITERS)
def check_disable_generate(case: Case, folder: Path) -> None:
    network, (ids, mask) = case.peft(), batch(side_of(case))
    expected = write(case, case.base(), ids, mask)
    with network.disable_adapter():
        out = write(case, network, ids, mask)
    near(torch.stack(out.logits, 1), torch.stack(expected.logits, 1), "logits")
    same(out.sequences, expected.sequences, "tokens")


@call("add_adapter, set_adapter", "two adapters of different length take turns: logits = the definition of each")
def check_turns(case: Case, folder: Path) -> None:
    network, (ids, _) = case.two(), batch(rows=1)
    for name in ("default", "other", "default"):
        network.set_adapter(name)
        near(run(case, network, ids), defined(case, network, ids), f"logits with '{name}'")


@call("only the active adapter trains", "after add_adapter and after set_adapter")
def check_one_trains(case: Case, folder: Path) -> None:
    network = case.two()
    for name in ("default", "other", "default"):
        if name != "default" or network.active_adapter != "default":
            network.set_adapter(name)
        idle = [key for key, _ in trainable(network) if name not in key.split(".")]
        assert trainable(network) and not idle, f"with '{name}' active, {idle[:1]} trains too"


@call("delete_adapter", "its parameters are gone, the other adapter's logits unchanged")
def check_delete(case: Case, folder: Path) -> None:
    network, (ids, mask) = case.two(), batch()
    network.set_adapter("default")
    before = run(case, network, ids, mask)
    network.delete_adapter("other")
    left = [key for key, _ in network.named_parameters() if "other" in key.split(".")]
    assert not left and "other" not in network.peft_config, f"{left[:1]} is left"
    same(run(case, network, ids, mask), before, "logits")
    scattered(network, lambda: network.add_adapter("other", case.config(second=True)), seed=4)
    network.delete_adapter("default")
    network.set_adapter("other")
    near(run(case, network.eval(), ids[:1]), defined(case, network, ids[:1]), "logits of the one that is left")


@call("adapter_names, forward", "rows with different methods, lengths and none = the rows alone")
def check_mixed(case: Case, folder: Path) -> None:
    network, (ids, mask) = case.two(), batch()
    mixed = run(case, network, ids, mask, adapter_names=MIXED)
    alone = rows_alone(case, network, lambda model, row: run(case, model, text_of(ids, mask, row)))
    for row, expected in enumerate(alone):
        near(text_logits(case, mixed, mask, row), expected, f"row with '{MIXED[row]}'")


@call("adapter_names, generate", "greedy: logits and tokens = the rows alone", archs=WRITERS)
def check_mixed_generate(case: Case, folder: Path) -> None:
    network, (ids, mask) = case.two(), batch(side_of(case))
    mixed = write(case, network, ids, mask, adapter_names=MIXED)
    alone = rows_alone(case, network, lambda model, row: row_written(case, model, ids, mask, row))
    for row, expected in enumerate(alone):
        near(torch.stack(mixed.logits, 1)[row], torch.stack(expected.logits, 1)[0], f"logits with '{MIXED[row]}'")
        same(mixed["written"][row], expected["written"][0], f"tokens with '{MIXED[row]}'")


@call("adapter_names, beams", "tokens and scores = the rows alone", archs=WRITERS)
def check_mixed_beams(case: Case, folder: Path) -> None:
    network, (ids, mask) = case.two(), batch(side_of(case))
    plan = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    mixed = write(case, network, ids, mask, adapter_names=MIXED, **plan)
    alone = rows_alone(case, network, lambda model, row: row_written(case, model, ids, mask, row, **plan))
    for row, expected in enumerate(alone):
        rows = slice(2 * row, 2 * row + 2)
        near(mixed.sequences_scores[rows], expected.sequences_scores, f"scores with '{MIXED[row]}'")
        same(mixed["written"][rows], expected["written"], f"tokens with '{MIXED[row]}'")


def row_written(case: Case, network: Any, ids: Tensor, mask: Tensor, row: int, **plan: Any) -> Any:
    """Return what `generate` makes of one row without its padding."""
    text = text_of(ids, mask, row)
    return write(case, network, text, torch.ones_like(text), **plan)


def rows_alone(case: Case, network: Any, of: Any) -> Iterator[Any]:
    """Yield `of(model, row)` for the rows of `MIXED`: with that adapter active, or the bare base model."""
    for row, name in enumerate(MIXED):
        if name == "__base__":
            yield of(case.base(), row)
        else:
            network.set_adapter(name)
            yield of(network, row)


@call("unload", "the base model as it was: class, keys, logits (BERT: states below the head)")
def check_unload(case: Case, folder: Path) -> None:
    ids, mask = batch()
    base, plain = case.peft().unload(), case.base()
    assert type(base) is type(plain), f"a {type(base).__name__}"
    assert list(base.state_dict()) == list(plain.state_dict()), "other keys"
    if case.arch == "bert":
        base, plain = base.bert, plain.bert
        near(base(ids, mask)[0], plain(ids, mask)[0], "states")
        return
    same(run(case, base, ids, mask), run(case, plain, ids, mask), "logits")
    if case.arch in WRITERS:
        same(base.generate(ids[:1], **PLAN), plain.generate(ids[:1], **PLAN), "tokens")


@call("get_model_status", "enabled, active, available and trainable adapters, number of parameters")
def check_status(case: Case, folder: Path) -> None:
    network = case.two()
    network.set_adapter("default")
    status = network.get_model_status()
    trained = sum(parameter.numel() for _, parameter in trainable(network))
    report = (status.enabled, status.active_adapters, sorted(status.available_adapters), status.trainable_params)
    assert report == (True, ["default"], ["default", "other"], trained), str(report)
    assert status.requires_grad == {"default": True, "other": False}, str(status.requires_grad)
    with network.disable_adapter():
        assert network.get_model_status().enabled is False, "enabled inside disable_adapter"


@call("model.add_adapter", "transformers' own call: saved there, loaded by PEFT, logits equal")
def check_native_add(case: Case, folder: Path) -> None:
    network, (ids, mask) = native(case), batch()
    far(run(case, network, ids, mask), run(case, case.base(), ids, mask), "the adapter does not act")
    network.save_pretrained(folder)
    peft = PeftModel.from_pretrained(case.base(), folder).eval()
    same(run(case, peft, ids, mask), run(case, network, ids, mask), "logits")
    if case.arch in WRITERS:
        same(network.generate(ids[:1], **PLAN), peft.generate(input_ids=ids[:1], **PLAN), "tokens")


@call("model.load_adapter", "transformers' own call loads what PEFT saved: logits equal")
def check_native_load(case: Case, folder: Path) -> None:
    network, (ids, mask) = case.peft(), batch()
    network.save_pretrained(folder)
    base = case.base()
    base.load_adapter(str(folder))
    same(run(case, base.eval(), ids, mask), run(case, network, ids, mask), "logits")


@call(
    "model.disable_adapters",
    "logits = the base model's; enable_adapters: as before (not BERT: transformers forgets to switch heads on again)",
)
def check_native_disable(case: Case, folder: Path) -> None:
    network, (ids, mask) = native(case), batch()
    before = run(case, network, ids, mask)
    network.disable_adapters()
    near(run(case, network, ids, mask), run(case, case.base(), ids, mask), "logits")
    if case.arch == "bert":
        return
    network.enable_adapters()
    same(run(case, network, ids, mask), before, "logits afterwards")


@call("from_pretrained(adapter folder)", "transformers finds the base model and the adapter: logits equal")
def check_native_pretrained(case: Case, folder: Path) -> None:
    case.base().save_pretrained(folder / "base")
    kind = type(case.base())
    network, (ids, mask) = case.peft(kind.from_pretrained(folder / "base")), batch()
    network.save_pretrained(folder / "adapter")
    again = kind.from_pretrained(folder / "adapter").eval()
    same(run(case, again, ids, mask), run(case, network, ids, mask), "logits")


def native(case: Case) -> Any:
    """Return the model with an adapter added by transformers' own call."""
    base = case.base()
    scattered(base, lambda: base.add_adapter(case.config()), seed=3)
    return base.eval()


def lora(case: Case) -> LoraConfig:
    """Return a LoRA that touches the queries."""
    return LoraConfig(r=2, target_modules=LORA_TARGETS[case.arch])


def with_lora(case: Case) -> Any:
    """Return the model with a LoRA far from zero, as a PeftModel."""
    base = case.base()
    return scattered(base, lambda: get_peft_model(base, lora(case), "queries").eval(), seed=6, spread=0.5)


@contextmanager
def on_purpose() -> Iterator[None]:
    """Keep PEFT's warnings about a second adapter type on one model to ourselves: that is what these rows are about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield


def check_both(case: Case, network: Any) -> None:
    """Check a model with LoRA and prompt against a prompt on the model that LoRA was merged into."""
    ids, mask = batch()
    logits = run(case, network, ids, mask)
    near(logits, run(case, case.peft(with_lora(case).merge_and_unload()), ids, mask), "logits", 1e-4)
    far(logits, run(case, case.peft(), ids, mask), "LoRA does not act")
    gradients(case, network, ids, mask)
    names = [name for name, _ in trainable(network)]
    assert any("lora_" in name for name in names), "LoRA does not train"
    assert any("lora_" not in name for name in names), "the prompt does not train"


@call(
    "prompt on a LoRA PeftModel",
    "nested get_peft_model: logits = prompt on the merged model; both train; each saved and loaded: logits equal",
)
def check_nested(case: Case, folder: Path) -> None:
    with on_purpose():
        below = with_lora(case)
        above = case.peft(below)
        check_both(case, above)
        expected = run(case, above.eval(), *batch())
        below.save_pretrained(str(folder / "below"), selected_adapters=["queries"])
        above.save_pretrained(str(folder / "above"), selected_adapters=["default"])
        again = PeftModel.from_pretrained(case.base(), str(folder / "below" / "queries"), "queries")
        same(run(case, PeftModel.from_pretrained(again, str(folder / "above")).eval(), *batch()), expected, "reloaded")


@call("prompt injected into a LoRA PeftModel", "inject_adapter_in_model: the same")
def check_injected(case: Case, folder: Path) -> None:
    network = with_lora(case)
    with on_purpose():
        inside = network.get_base_model()
        scattered(inside, lambda: inject_adapter_in_model(case.config(), inside, "prompt"), seed=3)
        check_both(case, network.eval())


@call(
    "LoRA and prompt natively",
    "add_adapter twice, set_adapter([lora, prompt]): the same (not BERT: PEFT refuses two names beside a saved head)",
    archs=WRITERS,
)
def check_native_both(case: Case, folder: Path) -> None:
    base = case.base()
    with on_purpose():
        scattered(base, lambda: base.add_adapter(lora(case), "queries"), seed=6, spread=0.5)
        scattered(base, lambda: base.add_adapter(case.config(), "prompt"), seed=3)
        base.set_adapter(["queries", "prompt"])
        check_both(case, base.eval())
