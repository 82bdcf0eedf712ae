"""Few shots: the draws on real labels, the sweep of the paper's table, batches larger than the data, own data."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_train import settings_of, weights

from softprompts import results, sweep
from softprompts.attach import attach
from softprompts.backbone import load_backbone
from softprompts.checkpoint import WEIGHTS_FILE, save_adapter
from softprompts.config import ModelSettings, RunSettings, parse_assignment
from softprompts.data import load_data, make_encoder
from softprompts.errors import UsageError
from softprompts.scored import scored_rows
from softprompts.tasks import load_task
from softprompts.tasks.own import load_own
from softprompts.tasks.splits import sample_shots
from softprompts.train import train

ROOT = Path(__file__).parents[1]
FEWSHOT = ROOT / "experiments" / "fewshot.toml"
SHOTS, DRAWS = (4, 16, 32), (0, 1, 2)
LIMITED = [
    "model.name=t5-nano", "model.dtype=fp32", "method.prompt_length=4", "method.budget_tokens=12",
    "method.offset_positions=32", "data.max_source_tokens=32", "data.validation_limit=4", "data.test_limit=4",
    "data.cache=false", "train.steps=2", "train.warmup=0", "train.prompt_rate=1e-4", "train.offset_rate=1e-4",
    "eval.untuned=false",
]  # fmt: skip


def shared_data(*names: str) -> str:
    """Return the folder of real data sets, or skip."""
    folder = os.environ.get("SOFTPROMPTS_DATA")
    if not folder or not all((Path(folder) / name / "train.jsonl.gz").is_file() for name in names):
        pytest.skip(f"needs SOFTPROMPTS_DATA with {', '.join(names)}")
    return folder


# ------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("name", ["boolq", "cb", "rte", "stsb"])
def test_clean_draws_of_real_labels_are_balanced_and_exact(name: str) -> None:
    whole = load_task(name, "clean", shared_data(name), splits=["train"])
    labels, classes = whole.task.shot_classes(whole.train, "clean")
    for k in SHOTS:
        draws = [sample_shots(labels, k, seed, "clean", classes) for seed in DRAWS]
        for rows in draws:
            share, more = divmod(k, classes)
            counts = Counter(labels[row] for row in rows)
            assert [counts[label] for label in range(classes)] == [share + (label < more) for label in range(classes)]
        assert len({frozenset(rows) for rows in draws}) == 3
        loaded = load_task(name, "clean", shared_data(name), shots=k, shot_seed=1)
        assert loaded.train == [whole.train[row] for row in draws[1]]
        assert tuple(map(len, (loaded.validation, loaded.test))) == whole.task.sizes[1:], "only train is few"
        assert loaded.provenance["train"]["examples"] == k and not loaded.notes


@pytest.mark.parametrize(
    ("name", "unbalanced"),
    [("rte", (142, 163, 159)), ("boolq", (175, 181, 177)), ("mrpc", (172, 193, 190)), ("cola", (179, 213, 224))],
)
def test_paper_draws_of_real_labels_are_as_often_unbalanced(name: str, unbalanced: tuple[int, ...]) -> None:
    """Of 300 draws: 47 to 54 % of RTE, 58 to 60 of BoolQ, 57 to 64 of MRPC, 60 to 75 of CoLA."""
    data = load_task(name, "paper", shared_data(name), splits=["train"])
    labels, _ = data.task.shot_classes(data.train, "paper")
    for k, expected in zip(SHOTS, unbalanced, strict=True):
        draws = [sample_shots(labels, k, seed, "paper", 2) for seed in range(300)]
        assert all(len(rows) == k for rows in draws)
        assert sum(2 * sum(labels[row] for row in rows) != k for rows in draws) == expected


def test_a_draw_that_falls_short_says_so() -> None:
    rows = [{"premise": f"p{i}", "hypothesis": "h", "label": i % 3} for i in range(90)]
    for protocol, drawn in (("clean", 32), ("paper", 30)):
        data = load_task("cb", protocol, read=lambda file: (rows, file), shots=32)
        assert len(data.train) == data.provenance["train"]["examples"] == drawn
        assert ("superglue/cb: 30 of the 32 shots asked for could be drawn" in data.notes) == (drawn < 32)


def test_draws_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="shot_seed=-1 cannot be used; draws are numbered from 0"):
        sample_shots([0, 1], 2, -1, "clean")
    rows = [{"premise": f"p{i}", "hypothesis": "h", "label": int(i < 3)} for i in range(90)]
    with pytest.raises(UsageError, match=r"^shots=9 needs rows of every class, but there are none of class neutral; "):
        load_task("cb", read=lambda file: (rows, file), shots=9)
    rows[0]["label"] = 2
    with pytest.raises(UsageError, match=r"^shots=9 needs 3 rows of class contradiction, but there are 2; use fewer"):
        load_task("cb", read=lambda file: (rows, file), shots=9)


def test_own_data_of_three_classes(tmp_path: Path) -> None:
    file = tmp_path / "colours.csv"
    names = ("red", "green", "blue")
    file.write_text("text,colour,size\n" + "".join(f"thing {i},{names[i % 3]},{i}.5\n" for i in range(120)))
    draws = [load_own(file, ["text"], "colour", shots=7, shot_seed=seed) for seed in DRAWS]
    for data in draws:
        assert sorted(Counter(example.target for example in data.train).values()) == [2, 2, 3]
        assert (len(data.validation), len(data.test)) == (12, 12)
        assert not {example.source for example in data.train} & {
            example.source for example in (*data.validation, *data.test)
        }
    assert len({tuple(example.source for example in data.train) for data in draws}) == 3
    for kind, target in (("text", "colour"), ("number", "size")):
        with pytest.raises(UsageError, match=r"^shots: own/colours has no table of classes to draw from; leave shots"):
            load_own(file, ["text"], target, kind=kind, shots=4)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- training


def test_a_batch_larger_than_the_data_is_all_of_it(tmp_path: Path) -> None:
    few = ("data.shots=4", "train.steps=6", "train.eval_every=3")
    large = train(settings_of(*few, "train.batch_size=16"), tmp_path / "large")
    exact = train(settings_of(*few, "train.batch_size=4"), tmp_path / "exact")
    assert large["steps_done"] == exact["steps_done"] == 6 and large["data"]["sizes"]["train"] == 4
    assert weights(tmp_path / "large") == weights(tmp_path / "exact")
    assert large["cost"]["tokens"] == exact["cost"]["tokens"] and large["scores"] == exact["scores"]
    halves = train(settings_of(*few, "train.batch_size=16", "train.accumulate=16"), tmp_path / "pieces")
    assert halves["cost"]["tokens"] == exact["cost"]["tokens"]
    one, other = (load_file(tmp_path / run / results.ADAPTER / WEIGHTS_FILE) for run in ("pieces", "exact"))
    for key, value in other.items():
        assert (one[key] - value).norm() < 1e-3 * value.norm(), key


def test_the_draw_is_not_the_seed_of_the_training(tmp_path: Path) -> None:
    def drawn(*more: str) -> Any:
        return load_data(settings_of("data.shots=8", *more)).provenance["train"]["sha256"]

    assert drawn("seed=1") == drawn("seed=2") == drawn("data.shot_seed=0")
    assert len({drawn(f"data.shot_seed={seed}") for seed in DRAWS}) == 3


# ------------------------------------------------------------------------------------------- sweep


def planned(*more: str) -> list[sweep.Planned]:
    return sweep.plan(FEWSHOT, [parse_assignment(text) for text in more])


def test_the_sweep_is_two_tasks_three_sizes_three_draws() -> None:
    runs = planned("method.prompt_from=runs/mnli", "method.offset_from=runs/mnli")
    assert len(runs) == 18
    assert {(r.settings.task, r.settings.data.shots, r.settings.data.shot_seed) for r in runs} == {
        (f"superglue/{task}", k, seed) for task in ("boolq", "cb") for k in SHOTS for seed in DRAWS
    }
    assert {run.settings.method["name"] for run in runs} == {"accept"} and {run.settings.seed for run in runs} == {42}
    assert runs[0].settings.method_config().sources() == {"prompt": "runs/mnli", "offset": "runs/mnli"}
    assert "prompt_from" not in planned()[0].settings.method


def test_the_sweep_runs_from_a_source(tmp_path: Path) -> None:
    folder = shared_data("boolq", "cb")
    source = tmp_path / "source"
    starts = [f"method.{part}_from={source}" for part in ("prompt", "offset")]
    runs = planned(*LIMITED, f"data.folder={folder}", *starts)
    start_from(runs[0].settings, source)
    summary = sweep.run_sweep(runs, tmp_path / "out", most=9)
    assert [row["status"] for row in summary["runs"]] == ["done"] * 18
    assert [entry["values"] for entry in summary["settings"]] == [
        {"task": f"superglue/{task}", "data.shots": str(k)} for task in ("boolq", "cb") for k in SHOTS
    ]
    assert all(entry["n"] == 3 and entry["test"]["sd"] is not None for entry in summary["settings"])
    begun = load_file(source / WEIGHTS_FILE)
    for run in runs:
        record = results.read_record(tmp_path / "out" / run.name)
        assert record["data"]["sizes"] == {"train": run.settings.data.shots, "validation": 4, "test": 4}
        for key, value in load_file(tmp_path / "out" / run.name / results.ADAPTER / WEIGHTS_FILE).items():
            moved = (value - begun[key]).abs().max()
            assert 0 < moved < 5e-4, f"{run.name}: two steps of 1e-4 away from the source"
    hashes = {record_of(tmp_path, run)["data"]["provenance"]["train"]["sha256"] for run in runs}
    assert len(hashes) == 18


def record_of(folder: Path, run: sweep.Planned) -> dict[str, Any]:
    return results.read_record(folder / "out" / run.name)


def start_from(settings: RunSettings, folder: Path) -> None:
    """Save an untrained adapter of the sizes of these settings."""
    model = load_backbone(ModelSettings(name="t5-nano", dtype="fp32")).model
    attach(model, settings.method_config().updated(prompt_from=None, offset_from=None))
    save_adapter(model, folder)


def test_the_sweep_scores_the_whole_validation_split() -> None:
    run = planned("model.name=t5-nano", f"data.folder={shared_data('boolq')}", "data.cache=false")[0].settings
    data, backbone = load_data(run), load_backbone(run.model, 2)
    encoder = make_encoder(backbone, data.task, run.data)
    splits = {name: encoder.encode(getattr(data, name)) for name in ("train", "validation", "test")}
    assert len(scored_rows(run, encoder, splits)[0]["validation"]) == len(data.validation) == 1_635
    left_open = run.updated(eval=run.eval.updated(validation_rows=None))
    assert len(scored_rows(left_open, encoder, splits)[0]["validation"]) < 1_635
