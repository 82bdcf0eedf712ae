"""Transfer starts: the parts are trained alone on a source, both go on together, and the record says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import KillAt, Killed

from softprompts import results
from softprompts.config import RunSettings, resolve_tree
from softprompts.errors import SoftPromptsError, UsageError
from softprompts.registry import method_config
from softprompts.start import part_alone, source_task, stage
from softprompts.sweep import Planned, run_sweep
from softprompts.train import train
from softprompts.trained import open_trained

SIZES = {"name": "accept", "prompt_length": 4, "prompt_codewords": 3, "offset_positions": 64, "offset_codewords": 3}


def settings_for(
    kind: str, method: dict[str, Any] | None = None, target: str = "demo/mood", **start: Any
) -> RunSettings:
    return resolve_tree(
        {
            "task": target,
            "method": method or SIZES,
            "data": {"train_limit": 48, "validation_limit": 16, "test_limit": 16, "cache": False},
            "train": {"steps": 4, "eval_every": 2, "batch_size": 8, "warmup": 0},
            "start": {"kind": kind, **start},
            "eval": {"untuned": False},
        }
    )


@pytest.mark.parametrize(("kind", "source"), [("target", "demo/mood"), ("intermediate", "demo/request")])
def test_the_parts_start_from_their_own_runs(kind: str, source: str, tmp_path: Path) -> None:
    start = {"task": source} if kind == "intermediate" else {}
    out = tmp_path / "run"
    settings = settings_for(kind, steps=3, **start)
    # Without a step of their own the parts stay as they start.
    still = settings.updated(train=settings.train.updated(prompt_rate=0.0, offset_rate=0.0))
    record = train(settings, out)
    told = record["start"]
    assert (told["kind"], told["task"], told["steps"]) == (kind, source, 3)
    for part, other in (("prompt", "offset"), ("offset", "prompt")):
        stage_record = json.loads((out / "start" / part / "run.json").read_text())
        assert stage_record["task"] == source and stage_record["steps_done"] == 3
        assert told[part]["accuracy"] == stage_record["scores"]["validation"]["accuracy"]
        keys = load_file(out / "start" / part / "adapter" / "adapter_model.safetensors")
        assert all(f".{part}." in key and f".{other}." not in key for key in keys)
    assert record["settings"]["start"]["kind"] == kind
    train(still, tmp_path / "still")
    began = load_file(tmp_path / "still" / "adapter" / "adapter_model.safetensors")
    for part in ("prompt", "offset"):
        source_folder = tmp_path / "still" / "start" / part / "adapter"
        for key, value in load_file(source_folder / "adapter_model.safetensors").items():
            assert torch.equal(value, began[key])


def test_a_trained_adapter_does_not_need_its_start(tmp_path: Path) -> None:
    out = tmp_path / "run"
    record = train(settings_for("target"), out)
    shutil.rmtree(out / "start")
    assert open_trained(out).evaluate().scores == record["scores"]["test"]


def test_a_run_killed_in_a_stage_goes_on(tmp_path: Path) -> None:
    whole, out = train(settings_for("target"), tmp_path / "whole"), tmp_path / "killed"
    with pytest.raises(Killed):
        train(settings_for("target"), out, progress=KillAt(3))
    assert not (out / results.STATE).exists() and list(out.glob(f"start/*/{results.STATE}"))
    resumed = train(settings_for("target"), out, resume=True)
    assert resumed["scores"] == whole["scores"]
    ours, theirs = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_killed_after_its_stages_does_not_need_them(tmp_path: Path) -> None:
    whole, out = train(settings_for("target"), tmp_path / "whole"), tmp_path / "killed"
    with pytest.raises(Killed):
        train(settings_for("target"), out, progress=KillAt(3, training=2))
    assert (out / results.STATE).exists()
    shutil.rmtree(out / "start")
    resumed = train(settings_for("target"), out, resume=True)
    assert resumed["scores"] == whole["scores"] and resumed["start"] == whole["start"]
    assert not (out / "start").exists(), "the stages are not trained again"


def test_a_part_alone_keeps_its_size() -> None:
    config = method_config("accept")
    assert part_alone(config, "prompt", 768).num_trainable(768) == 44_160
    assert part_alone(config, "offset", 768).num_trainable(768) == 30_720
    assert part_alone(method_config("dept"), "offset", 768).num_trainable(768) == 30_720


def test_the_usual_sources() -> None:
    assert source_task(settings_for("intermediate", target="glue/rte")) == "glue/mnli"
    assert source_task(settings_for("intermediate", target="superglue/cb")) == "glue/mnli"
    assert source_task(settings_for("intermediate", target="mrqa/nq")) == "squad"


@pytest.mark.parametrize(
    ("method", "task", "message"),
    [
        ({"name": "prompt_tuning", "prompt_length": 4}, "demo/mood", "no two parts"),
        (SIZES, "glue/mnli", "no usual source for glue/mnli"),
        (SIZES, "demo/mood", "no usual source for demo/mood"),
        ({**SIZES, "prompt_from": "x"}, "glue/rte", "leave prompt_from and offset_from out"),
    ],
)
def test_refusals(method: dict[str, Any], task: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stage(settings_for("intermediate", method, task), "prompt")


def test_a_mistake_leaves_the_earlier_run_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(settings_for("random"), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for changes in (
        {"start": {"kind": "intermediate", "task": "demo/mod"}},
        {"train": {"rates": {"wieghts": 0.1}}},
        {"start": {"kind": "intermediate", "task": "demo/request"}, "data": {"shots": 1}},
    ):
        tree = settings_for("target").model_dump()
        for key, value in changes.items():
            tree[key] |= value
        with pytest.raises(UsageError):
            train(resolve_tree(tree), out, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_stage_that_diverges_ends_the_run(tmp_path: Path) -> None:
    wild = settings_for("target", steps=12)
    wild = wild.updated(train=wild.train.updated(prompt_rate=1e25, eval_every=6))
    with pytest.raises(SoftPromptsError, match=r"^start.kind=target: the loss is nan"):
        train(wild, tmp_path / "run")
    assert results.read_record(tmp_path / "run")["status"] == "failed"
    found = run_sweep([Planned("wild", wild, {"rate": 1e25})], tmp_path / "sweep")
    assert found["runs"][0]["status"] == "failed" and found["best_by_validation"] == []


def test_a_run_with_stages_can_be_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = train(settings_for("target"), out)
    again = train(settings_for("target", steps=2), out, overwrite=True)
    assert first["start"]["steps"] == 4 and again["start"]["steps"] == 2
    assert results.read_record(out / "start" / "prompt")["steps_done"] == 2


def test_a_finished_run_may_lose_its_stages_and_be_asked_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    record = train(settings_for("target"), out)
    shutil.rmtree(out / "start")
    assert train(settings_for("target"), out, resume=True)["scores"] == record["scores"]
    assert not (out / "start").exists()


def test_a_rate_of_one_part_is_not_asked_of_the_other(tmp_path: Path) -> None:
    settings = settings_for("target")
    rates = {"offset.codebook.weights": 0.01, "prompt.codebook.weights": 0.2}
    settings = settings.updated(train=settings.train.updated(rates=rates))
    assert stage(settings, "prompt").train.rates == {"prompt.codebook.weights": 0.2}
    assert stage(settings, "offset").train.rates == {"offset.codebook.weights": 0.01}
    train(settings, tmp_path / "run")


def test_a_sweep_goes_on_after_a_kill_in_a_stage(tmp_path: Path) -> None:
    planned = [Planned("one", settings_for("target"), {"seed": 42})]
    with pytest.raises(Killed):
        run_sweep(planned, tmp_path, progress=KillAt(1))
    assert run_sweep(planned, tmp_path)["runs"][0]["status"] == "done"


def test_starts_without_a_kind_are_refused() -> None:
    with pytest.raises(UsageError, match=r"give start\.kind"):
        settings_for("random", steps=3)
