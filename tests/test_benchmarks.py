"""The measurements of benchmarks/ run, compare equal things, and their page shows the committed numbers.

No time is asserted here: only that both sides of a comparison compute the same, and that the arithmetic is counted
right.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROUNDING = 1e-4
"""Relative; fp32 sums over padding and without, in another order."""
SHARES = ("share_of_limit", "share_of_best", "share_of_own_limit")
ROWS = {
    "train_step": {"seconds", "faster_than_reference", "faster_than_peft", *SHARES},
    "decoder_step": {"seconds", "faster_than_peft", *SHARES},
    "population": {"seconds", "relative_to_alone"},
    "mixed_serving": {"seconds", "faster_than_rows", "faster_than_tasks", "faster_than_peft"},
    "scaling": {"seconds", "time_to_first"},
    "start_up": {"seconds", "to_peer"},
    "memory": {"peak_mib", "peak_to_ours", "kept_mib", "kept_to_ours"},
}
"""The measured figures of each benchmark's rows."""
SPREAD = {"n", "median", "q1", "q3", "min", "max"}
COST = {"train_seconds": 1.5, "eval_seconds": 0.5, "seconds": 2.0}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import scripts of the folder, and forget them: their names are those of scripts, not of packages."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.parametrize("name", ROWS)
def test_a_quick_run_says_what_it_promises(name: str, load: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    script, place = load(name), tmp_path / "record.json"
    before = torch.get_num_threads()
    record = script.main(["--quick", "--json", str(place)])
    assert torch.get_num_threads() == before
    assert json.loads(place.read_text()) == record, "what is written is what was measured"
    assert set(load("common").FIELDS) <= set(record) and record["quick"] and record["threads"] == 1
    assert record["rows"]
    for row in record["rows"]:
        for field in ROWS[name]:
            assert set(row[field]) == SPREAD and row[field]["n"] == 1, field
    columns, cells = script.table(record)
    printed = capsys.readouterr().out
    assert all(len(line) == len(columns) for line in cells) and all(cell in printed for cell in cells[0])
    text = place.read_text()
    assert str(Path.home()) not in text and str(tmp_path) not in text
    assert record["checks"] or name in ("memory", "scaling", "start_up")
    for key, apart in checks(record["checks"]):
        if key == "same_tokens":
            assert apart == 1.0
        elif key == "different_tasks":
            assert apart > 100 * ROUNDING, "with another adapter the answers are others"
        else:
            assert apart < ROUNDING, key


def test_a_default_run_says_what_evaluating_took(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script, place = load("default_run"), tmp_path / "record.json"
    record = script.main(["--quick", "--task", "demo/request", "--json", str(place)])
    (row,) = record["rows"]
    assert row["steps"] == 2 and row["of_test_rows"] == row["test_rows"] == 4 and row["with_search"] is None
    assert "demo/request (rank)" in capsys.readouterr().out
    # The shares follow from the seconds; these are fixed, since a run of two steps takes too few to divide by.
    own = script.train
    monkeypatch.setattr(script, "find", lambda settings, count, folder: (settings, {"seconds": 3.0}))
    monkeypatch.setattr(script, "train", lambda settings, folder: own(settings, folder) | {"cost": COST})
    settings = script.resolve(None, [("task", "demo/request"), *script.QUICK.items()])
    found = script.one_run(settings, tmp_path, 2)
    assert found["with_search"] == 2.5 and found["eval_share"] == 0.25


def test_default_runs_of_other_tasks_stay_in_the_record(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, place = load("default_run"), tmp_path / "record.json"
    arguments = ["--quick", "--json", str(place)]
    monkeypatch.setattr(script, "one_run", lambda settings, folder, count: {"task": settings.task, "by": "first"})
    monkeypatch.setattr(script, "table", lambda record: ((), []))
    script.main([*arguments, "--task", "demo/mood"])
    record = script.main([*arguments, "--task", "demo/request"])
    assert [row["task"] for row in record["rows"]] == ["demo/request", "demo/mood"]
    monkeypatch.setattr(script, "one_run", lambda settings, folder, count: {"task": settings.task, "by": "second"})
    record = script.main([*arguments, "--task", "demo/mood"])
    assert [row["by"] for row in record["rows"]] == ["first", "second"]
    found = json.loads(place.read_text())
    place.write_text(json.dumps(found | {"skipped": {"squad": "its data are not here", "demo/mood": "not yet"}}))
    record = script.main([*arguments, "--task", "demo/mood"])
    assert record["skipped"] == {"squad": "its data are not here"}, "what is measured now is not skipped"
    place.write_text(place.read_text().replace('"threads": 1', '"threads": 3'))
    record = script.main([*arguments, "--task", "demo/mood"])
    assert [row["task"] for row in record["rows"]] == ["demo/mood"], "rows of another machine do not mix"
    place.write_text(place.read_text()[:40])
    assert len(script.main([*arguments, "--task", "demo/mood"])["rows"]) == 1, "a record cut short is replaced"


def checks(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in found.items():
        if isinstance(value, dict):
            yield from checks(value)
        else:
            yield key, value


def test_the_comparison_with_the_reference_way_can_fail(load: Any) -> None:
    script, peers = load("train_step"), load("peers")
    size = script.plan(quick=True)
    models = load("models")
    lengths = models.text_lengths(size["rows"], 12, size["source"])
    loop = models.Loop(
        models.build(size["model"]), [size["method"]], models.texts(lengths, 2, 64), [range(size["batch"])], "cpu"
    )
    reference = peers.Reference(models.build(size["model"]), loop.model, size["source"], size["target"])
    assert max(script.agreement(loop, reference).values()) < ROUNDING
    with torch.no_grad():
        reference.offset.weights[0] += 1.0
    assert max(script.agreement(loop, reference).values()) > 10 * ROUNDING


def counted(step: Any) -> int:
    """Multiply-adds that torch itself counts."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() // 2


# Eager attention multiplies what a causal mask hides, and the prompt's last layer, which nothing reads.
@pytest.mark.parametrize("target", [2, 6])
def test_the_arithmetic_of_a_t5_step_is_what_torch_counts(target: int, load: Any) -> None:
    models, work = load("models"), load("work")
    config = models.T5Config(**{**models.TINY_T5.to_dict(), "d_ff": 128, "vocab_size": 500})
    config._attn_implementation = "eager"
    method = load("softprompts").AcceptConfig(offset_positions=24, **models.QUICK_METHOD)
    rows = models.texts([17, 17, 17], target, 500)
    loop = models.Loop(models.build(config), [method], rows, [range(3)], "cpu")
    loop.step()
    codebooks = 3 * (5 + 17) * 32 * 3
    assert counted(loop.step) - codebooks == pytest.approx(work.t5_step(config, 3, 5 + 17, target), rel=0.01)


@pytest.mark.parametrize("shared", [True, False])
def test_the_arithmetic_of_a_decoder_step_is_what_torch_counts(shared: bool, load: Any) -> None:
    models, work, peers = load("models"), load("work"), load("peers")
    config = models.LlamaConfig(**{**models.TINY_LLAMA.to_dict(), "vocab_size": 500})
    config._attn_implementation = "eager"
    rows = models.texts([9, 9, 9], 3, 500)
    if shared:
        method = load("softprompts.registry").method_config("prompt_tuning", {"prompt_length": 10})
        loop = models.Loop(models.build(config), [method], rows, [range(3)], "cpu")
        step, kept = loop.step, 4
    else:
        peft = peers.Peft(models.build(config), 10)
        step, kept = (lambda: peft.step(rows)), 22
    step()
    found, said = counted(step), work.llama_step(config, 3, 10, 12, kept, shared)
    # Torch counts the whole of the masked products; ours the half that a causal model needs.
    assert found > said and found == pytest.approx(said, rel=0.12)


def test_spread_and_ratio(load: Any) -> None:
    common = load("common")
    assert common.spread([4.0, 1.0, 2.0, 3.0]) == {
        "n": 4,
        "median": 2.5,
        "q1": 1.75,
        "q3": 3.25,
        "min": 1.0,
        "max": 4.0,
    }
    assert common.ratio([2.0, 9.0], [1.0, 3.0])["median"] == 2.5, "round by round, not of the medians"
    assert common.limit_share(100, [100.0], [4.0])["median"] == 0.25
    assert common.figure(common.spread([0.5]), 0, 100) == "50 (50-50)"


def test_the_sides_take_turns(load: Any) -> None:
    seen: list[str] = []
    sides = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    seconds = load("common").interleaved(sides, 2, "cpu", warmup=1)
    assert "".join(seen) == "ba" + "ab" + "ba" and {name: len(each) for name, each in seconds.items()} == {
        "a": 2,
        "b": 2,
    }


def test_what_others_take_of_the_machine(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    common = load("common")
    monkeypatch.setattr(common, "processor_seconds", lambda: (30.0, 18.0, 9.0))
    assert common.others_share((10.0, 4.0, 2.0)) == 0.35, "14 in use, 7 of them ours, of 20"
    assert common.others_share(None) is None


def test_lines(load: Any) -> None:
    line = load("scaling").line
    assert line([1, 2, 4], [3.0, 5.0, 9.0]) == {
        "slope": 0.6667, "r2": 1.0, "worst_at": line([1, 2, 4], [3.0, 5.0, 9.0])["worst_at"], "worst": 0.0,
        "straight": True,
    }  # fmt: skip
    bent = line([1, 2, 3, 10], [1.0, 2.0, 3.0, 100.0])
    assert not bent["straight"] and bent["r2"] < 0.99


def test_lengths_have_the_mean_and_the_batch_is_typical(load: Any) -> None:
    models = load("models")
    for mean in (25, 70, 200):
        lengths = models.text_lengths(1024, mean, 256)
        assert sum(lengths) / 1024 == pytest.approx(mean, rel=0.01) and max(lengths) <= 256 and min(lengths) >= 4
        chosen, padded = models.typical_batch(lengths, 16)
        assert len(chosen) == 16 and max(lengths[i] for i in chosen) == pytest.approx(padded, rel=0.05)


def test_the_page_shows_the_committed_numbers(load: Any) -> None:
    docs: ModuleType = load("docs")
    assert docs.main(["--check"]) == 0, "run python benchmarks/docs.py"
    stale = "<!-- speed:machine -->\nold\n<!-- /speed -->"
    assert "old" not in docs.filled(stale)
    page = docs.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- speed:{name} -->" in page and f"benchmarks/{name}.py" in page for name in docs.NAMES)
    for name in docs.NAMES:
        record = docs.record_of(name)
        assert record is None or not record["quick"], "quick runs are no results"


def test_the_targets_are_judged_by_the_records(load: Any) -> None:
    targets = load("targets")
    row = {"dtype": "fp32", "text_tokens": 70, "faster_than_reference": {"median": 4.26}}
    first, second = targets.TARGETS[:2]
    assert first.row({"rows": [row]})[1:] == ["4.26 x at 70 tokens", "reached"]
    assert first.row({"rows": [{**row, "faster_than_reference": {"median": 3.99}}]})[2] == "missed"
    assert second.row({"rows": [row]})[1:] == second.row(None)[1:] == ["not measured here", "open"]
    evaluating = next(target for target in targets.TARGETS if target.benchmark == "default_run")
    rows = [{"task": "a", "eval_share": 0.05}, {"task": "b", "eval_share": 0.11}]
    assert evaluating.row({"rows": rows})[1:] == ["5.0 % (a); 11.0 % (b)", "partly"]
    known = load("docs").record_of
    assert all(known(target.benchmark) is not None and target.figures(known(target.benchmark)) is not None
               for target in targets.TARGETS)  # fmt: skip


def test_bf16_is_left_out_with_a_reason(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    common = load("common")
    monkeypatch.setattr("softprompts.backbone.cpu_bf16", lambda: False)
    assert "bf16" in common.no_bf16("cpu")
    monkeypatch.setattr("softprompts.backbone.cpu_bf16", lambda: True)
    assert common.no_bf16("cpu") is None
