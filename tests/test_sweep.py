"""Sweeps: the grid of a file, populations behind it, going on after a kill; and the search for rates."""

import json
import statistics
from pathlib import Path

import pytest
from test_train import SMALL, KillAt, Killed, settings_of

from softprompts import results, search, sweep
from softprompts.arguments import assignments
from softprompts.cli import main
from softprompts.config import parse_assignment, resolve
from softprompts.errors import SoftPromptsError, UsageError
from softprompts.loop import Progress
from softprompts.population import fits
from softprompts.scored import ROW_COST, TOKEN_COST
from softprompts.show import output, show_runs
from softprompts.train import train

HEAD = """
task = "demo/request"
method = "prompt_tuning"
[train]
steps = 4
eval_every = 2
batch_size = 4
[data]
train_limit = 8
validation_limit = 6
test_limit = 6
[sweep]
"""


def write(folder: Path, lists: str, head: str = HEAD) -> Path:
    file = folder / "sweep.toml"
    file.write_text(head + lists)
    return file


def small(file: Path) -> list[sweep.Planned]:
    return sweep.plan(file, [parse_assignment("method.budget_tokens=4")])


def test_a_plan_is_the_grid_of_its_lists(tmp_path: Path) -> None:
    planned = small(write(tmp_path, 'seed = [1, 2]\n"method.name" = ["dept", "accept"]\n[sweep.train]\nclip = [0.5]\n'))
    assert [run.name for run in planned] == [
        "seed-1_method-dept_clip-0.5", "seed-1_method-accept_clip-0.5", "seed-2_method-dept_clip-0.5",
        "seed-2_method-accept_clip-0.5",
    ]  # fmt: skip
    third = planned[2].settings
    assert (third.seed, third.method["name"], third.train.clip, third.train.batch_size) == (2, "dept", 0.5, 4)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ("", "sweeps over nothing"),
        ("seed = 3", "sweeps over nothing"),
        ("seed = [1, 1]", "names the same run twice: seed-1"),
        ('"train.promt_rate" = [1]', "did you mean 'prompt_rate'"),
        ('task = ["demo/mood", "demo/moood"]', "unknown task 'demo/moood'"),
    ],
)
def test_a_plan_that_cannot_be(lists: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        small(write(tmp_path, lists))


def test_options_take_the_place_of_lists(tmp_path: Path) -> None:
    file = write(tmp_path, 'seed = [1, 2]\nmethod = ["dept", "accept"]\n"train.prompt_rate" = [0.1]\n')
    given = assignments(["seed=7", "train.prompt_rate=[0.3, 0.4]", "method=accept", "train.batch_size=3"])
    planned = sweep.plan(file, given)
    assert [run.name for run in planned] == [
        "seed-7_method-accept_prompt_rate-0.3",
        "seed-7_method-accept_prompt_rate-0.4",
    ]
    assert [run.settings.train.prompt_rate for run in planned] == [0.3, 0.4]
    assert {run.settings.train.batch_size for run in planned} == {3}


def test_whole_methods_are_swept_too(tmp_path: Path) -> None:
    tables = '[{name = "prompt_tuning", prompt_length = 5}, {name = "accept", prompt_length = 10}]'
    file = write(tmp_path, f"method = {tables}\n")
    planned = sweep.plan(file)
    assert [run.settings.method["name"] for run in planned] == ["prompt_tuning", "accept"]
    with pytest.raises(UsageError, match="the sweep's list of whole methods exclude each other"):
        sweep.plan(file, assignments(["method=accept"]))


def test_tables_take_the_place_of_lists_too(tmp_path: Path) -> None:
    file = write(tmp_path, '"train.prompt_rate" = [0.1, 0.2]\n"method.name" = ["prompt_tuning", "accept"]\n')
    planned = sweep.plan(file, assignments(["train={prompt_rate=0.5, steps=4}", "method={name='dept', rank=3}"]))
    assert [(run.settings.train.prompt_rate, run.settings.method) for run in planned] == [
        (0.5, {"name": "dept", "rank": 3})
    ]


def test_a_run_that_cannot_be_is_named(tmp_path: Path) -> None:
    head = HEAD.replace('task = "demo/request"\n', "").replace("[data]", f'[data]\npath = "{tmp_path / "no.csv"}"')
    with pytest.raises(UsageError, match=r"^seed-1, seed-2: no file"):
        sweep.run_sweep(small(write(tmp_path, "seed = [1, 2]\n", head)), tmp_path / "out")


def test_runs_that_fit_share_a_backbone(tmp_path: Path) -> None:
    planned = small(write(tmp_path, 'seed = [1, 2, 3]\n"train.batch_size" = [2, 4]\n'))
    together = [[run.name for run in group] for group in sweep.groups(planned, 2)]
    assert together == [
        ["seed-1_batch_size-2", "seed-2_batch_size-2"], ["seed-1_batch_size-4", "seed-2_batch_size-4"],
        ["seed-3_batch_size-2"], ["seed-3_batch_size-4"],
    ]  # fmt: skip
    heads = small(write(tmp_path, 'seed = [1, 2]\n"model.head" = ["classification"]\n'))
    assert fits(heads[0].settings, heads[1].settings) and len(sweep.groups(heads, 8)) == 2


def test_a_sweep_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    planned = small(write(tmp_path, 'seed = [1, 2, 3]\n"train.prompt_rate" = [0.1, 0.5]\n'))
    whole = sweep.run_sweep(planned, tmp_path / "whole", most=4)
    assert len(whole["runs"]) == 6 and all(row["status"] == "done" for row in whole["runs"])
    assert [entry["n"] for entry in whole["settings"]] == [3, 3]
    best = max(whole["settings"], key=lambda entry: entry["validation"]["mean"])
    assert whole["best_by_validation"] == [best]
    with pytest.raises(Killed):
        # The second population has begun: 4 steps and 4 tests of 6 rows with one baseline, then 3 more steps.
        sweep.run_sweep(planned, tmp_path / "killed", most=4, progress=KillAt(4 + 5 * 6 + 3))
    states = sorted(path.parent.name for path in (tmp_path / "killed").rglob(results.STATE))
    assert states == ["seed-3_prompt_rate-0.1"], "one population was done, the other had saved its state"
    again = sweep.run_sweep(planned, tmp_path / "killed", most=4)
    assert again == whole
    untouched = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    assert sweep.run_sweep(planned, tmp_path / "killed", most=4) == whole
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched, "what is done is not run again"
    more = small(write(tmp_path, 'seed = [1, 2, 3, 4]\n"train.prompt_rate" = [0.1, 0.5]\n'))
    longer = sweep.run_sweep(more, tmp_path / "killed", most=4)
    assert len(longer["runs"]) == 8 and longer["runs"][:6] == whole["runs"]
    with pytest.raises(UsageError, match="was run with other settings"):
        sweep.run_sweep(other_steps(planned), tmp_path / "killed")


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("most", [1, 2])
def test_a_run_that_diverges_does_not_end_the_sweep(most: int, warmup: int, tmp_path: Path) -> None:
    file = write(tmp_path, '"train.prompt_rate" = [1e25, 0.3]\n')
    own = ("method={name='accept', prompt_length=6, budget_tokens=16}", "train.steps=12", f"train.warmup={warmup}")
    planned = sweep.plan(file, [parse_assignment(text) for text in (*own, "train.batch_size=4")])
    found = sweep.run_sweep(planned, tmp_path / "out", most=most)
    wild, tame = found["runs"]
    assert (wild["status"], tame["status"]) == ("failed" if most == 1 else "dropped", "done")
    assert wild["test"] is None and tame["test"] is not None
    assert [entry["values"]["train.prompt_rate"] for entry in found["best_by_validation"]] == ["0.3"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("run.json")}
    assert sweep.run_sweep(planned, tmp_path / "out", most=most) == found
    assert {path: path.stat().st_mtime_ns for path in written} == written, "it would diverge again"


def test_a_stopped_sweep_may_grow(tmp_path: Path) -> None:
    """What was killed goes on in the company it had; other runs are trained beside each other, whatever `most` says."""
    two, three = (small(write(tmp_path, f"seed = {seeds}\n")) for seeds in ("[1, 2]", "[3, 1, 2]"))
    whole = sweep.run_sweep(three, tmp_path / "whole", most=1)
    with pytest.raises(Killed):
        sweep.run_sweep(two, tmp_path / "killed", most=2, progress=KillAt(3))
    assert [[run.name for run in group] for group in sweep.interrupted(three, tmp_path / "killed")] == [
        ["seed-1", "seed-2"]
    ]
    notes: list[str] = []

    class Listen(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    grown = sweep.run_sweep(three, tmp_path / "killed", most=8, progress=Listen())
    assert grown == whole and "resumed at step 2" in notes
    with pytest.raises(Killed):
        sweep.run_sweep(two, tmp_path / "shrunk", most=2, progress=KillAt(3))
    left = sweep.run_sweep(two[:1], tmp_path / "shrunk", progress=Listen())
    assert left["runs"] == whole["runs"][1:2] and notes.count("resumed at step 2") == 2


def test_halving_says_where_it_has_nothing_to_drop(tmp_path: Path) -> None:
    notes: list[str] = []

    class Listen(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    lists = '"train.prompt_rate" = [0.0, 0.3, 0.1]\n"train.eval_every" = [1]\n"train.offset_rate" = [0.0]\n'
    planned = small(write(tmp_path, lists))
    found = sweep.run_sweep(planned, tmp_path / "out", halving=True, progress=Listen())
    assert sorted(row["status"] for row in found["runs"]) == ["done", "done", "dropped"]
    assert sum("dropped at step 2" in note for note in notes) == 1
    notes.clear()
    sweep.run_sweep(planned, tmp_path / "alone", most=1, halving=True, progress=Listen())
    assert sum("there is nothing to halve" in note for note in notes) == 3


def test_settings_that_lost_runs_do_not_win_by_the_survivors(tmp_path: Path) -> None:
    planned = small(write(tmp_path, 'seed = [1, 2]\n"train.prompt_rate" = [0.1, 0.5]\n'))

    def record(run: sweep.Planned) -> dict:
        metric = {"select": "f1", "report": "f1"}
        rate, seed = run.values["train.prompt_rate"], run.values["seed"]
        scores = {"validation": {"f1": 0.9 if rate == 0.5 else 0.7}, "test": {"f1": 0.5}}
        status = "dropped" if (rate, seed) == (0.5, 2) else "done"
        return {"status": status, "steps_done": 4, "metric": metric, "scores": scores}

    found = sweep.summary(planned, {run.name: record(run) for run in planned})
    assert [(entry["values"]["train.prompt_rate"], entry["n"]) for entry in found["best_by_validation"]] == [("0.1", 2)]


def test_seeds_that_are_done_stay_done(tmp_path: Path) -> None:
    out = tmp_path / "seeds"
    given = ["train", *(part for text in SMALL for part in ("-s", text)), "--out", str(out), "--json"]
    assert main([*given, "--seeds", "1,2"]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main([*given, "--seeds", "1,2,3", "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert results.read_record(out / "seed-3")["status"] == "done"


def test_seeds_that_diverge_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    wild = ["-s", "train.prompt_rate=1e25", "-s", "train.warmup=0"]
    given = ["train", *(part for text in SMALL for part in ("-s", text)), *wild, "--seeds", "1,2"]
    assert main([*given, "--out", str(tmp_path / "all")]) == 1
    assert "no seed was left: the loss is nan" in capsys.readouterr().err
    runs = [
        {"seed": 1, "status": "dropped"},
        {"seed": 2, "status": "done", "method": "m", "task": "t", "model": "b", "protocol": "clean",
         "scores": {"test": {"f1": 0.25, "n": 4}}},
    ]  # fmt: skip
    summary = {"validation": {}, "test": {"f1": {"mean": 0.25, "sd": None, "n": 1}}}
    show_runs(output(), {"runs": runs, "summary": summary, "folder": "f"})
    shown = capsys.readouterr().out
    assert "seed 1 (dropped)" in shown and "0.2500" in shown


def test_draws_of_few_shots_are_repetitions_like_seeds(tmp_path: Path) -> None:
    lists = 'seed = [1, 2]\n"data.shot_seed" = [0, 1, 2]\n"data.shots" = [4, 8]\n'
    planned = small(write(tmp_path, lists))

    def record(run: sweep.Planned) -> dict:
        data = run.settings.data
        score = (data.shots or 0) / 10 + data.shot_seed / 100 + run.settings.seed / 1000
        scores = {"validation": {"accuracy": score}, "test": {"accuracy": score / 2}}
        metric = {"select": "accuracy", "report": "accuracy"}
        return {"status": "done", "steps_done": 4, "metric": metric, "scores": scores}

    found = sweep.summary(planned, {run.name: record(run) for run in planned})
    assert [(entry["values"], entry["n"]) for entry in found["settings"]] == [
        ({"data.shots": "4"}, 6), ({"data.shots": "8"}, 6)
    ]  # fmt: skip
    scores = [0.401, 0.402, 0.411, 0.412, 0.421, 0.422]
    of_four = found["settings"][0]
    assert of_four["validation"]["mean"] == pytest.approx(statistics.mean(scores))
    assert of_four["validation"]["sd"] == pytest.approx(statistics.stdev(scores))
    assert of_four["test"]["sd"] == pytest.approx(statistics.stdev(scores) / 2)
    assert found["best_by_validation"] == [found["settings"][1]] and len(found["runs"]) == 12


def test_the_best_setting_is_found_for_each_task(tmp_path: Path) -> None:
    lists = 'task = ["demo/mood", "demo/request"]\n"train.prompt_rate" = [0.1, 0.5]\nseed = [1, 2]\n'
    planned = small(write(tmp_path, lists))
    known = {("demo/mood", 0.1): 0.9, ("demo/mood", 0.5): 0.8, ("demo/request", 0.1): 0.3, ("demo/request", 0.5): 0.4}

    def record(run: sweep.Planned) -> dict:
        score = {"f1": known[run.values["task"], run.values["train.prompt_rate"]]}
        metric = {"select": "f1", "report": "f1"}
        return {"status": "done", "steps_done": 4, "metric": metric, "scores": {"validation": score, "test": score}}

    found = sweep.summary(planned, {run.name: record(run) for run in planned})
    assert [entry["values"] for entry in found["best_by_validation"]] == [
        {"task": "demo/mood", "train.prompt_rate": "0.1"}, {"task": "demo/request", "train.prompt_rate": "0.5"}
    ]  # fmt: skip


def other_steps(planned: list[sweep.Planned]) -> list[sweep.Planned]:
    first = planned[0]
    changed = first.settings.updated(train=first.settings.train.updated(steps=6))
    return [sweep.Planned(first.name, changed, first.values)]


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(tmp_path, "seed = [1, 2]\n")
    command = ["sweep", str(file), "--out", str(tmp_path / "out"), "-s", "method.budget_tokens=4", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in found["runs"]] == ["seed-1", "seed-2"]
    assert results.read_record(tmp_path / "out" / "seed-1")["cost"]["population"] == 2
    assert main([*command[:-1]]) == 0
    shown = capsys.readouterr().out
    assert "Mean over seeds and draws" in shown and "best on validation: the one setting" in shown


# ---------------------------------------------------------------------------------------------- search


def test_candidates_cover_the_ranges() -> None:
    settings = settings_of("seed=5")
    found = search.candidates(settings, 9)
    assert found[0] == settings and search.candidates(settings, 9) == found
    prompt = sorted(one.train.prompt_rate for one in found[1:])
    offset = sorted(one.train.offset_rate for one in found[1:])
    for rates, (low, high) in ((prompt, search.PROMPT_RATES), (offset, search.OFFSET_RATES)):
        edges = [low * (high / low) ** (n / 8) for n in range(9)]
        assert all(a * 0.99 <= rate <= b * 1.01 for rate, a, b in zip(rates, edges, edges[1:], strict=False))
    assert {one.method.get("init") for one in found[1:]} == {"kaiming", "vocabulary"}
    assert search.candidates(settings_of("seed=6"), 9)[1:] != found[1:]
    alone = search.candidates(settings_of("method={name='prompt_tuning', prompt_length=3}"), 3)
    assert len({one.train.prompt_rate for one in alone}) == 3 and len({one.train.offset_rate for one in alone}) == 1


def test_the_cost_is_at_most_half_a_run() -> None:
    for count in (2, 3, 4, 8, 16):
        settings = settings_of("train.steps=1000", "train.batch_size=16", "data.validation_limit=300")
        steps, alive, spent = search.steps_per_rung(settings, count), count, 0.0
        for _ in range(search.RUNGS):
            spent += alive * (steps + search.VALIDATION_ROWS * ROW_COST / 16)
            alive = max(2, -(-alive // 2))
        assert 0.9 * 500 < spent <= 500
    costs = [
        search.row_cost(settings_of(*more)) for more in ((), ("eval.scoring=generate",), ("eval.beams=4", "task=squad"))
    ]
    assert costs == pytest.approx([ROW_COST, ROW_COST + 20 * TOKEN_COST, ROW_COST + 80 * TOKEN_COST])
    with pytest.raises(UsageError, match=r"--search 8 needs at least train\.steps=\d+"):
        search.steps_per_rung(settings_of("train.steps=60"), 8)
    with pytest.raises(UsageError, match="nothing to choose from"):
        search.steps_per_rung(settings_of(), 1)


def test_a_search_takes_the_best_on_validation(tmp_path: Path) -> None:
    # At a rate of 0 nothing is learned: the settings as given must lose.
    settings = settings_of("train.steps=200", "train.prompt_rate=0", "train.offset_rate=0", "data.train_limit=64",
                           "data.validation_limit=32", "train.batch_size=8")  # fmt: skip
    chosen, outcome = search.find(settings, 4, tmp_path / "run")
    trials = outcome["trials"]
    assert len(trials) == 4 and outcome["rows"] == 32 and outcome["chosen"] != 0
    assert {trial["status"] for trial in trials} == {"done", "dropped"}
    finalists = [trial for trial in trials if trial["status"] == "done"]
    assert trials[outcome["chosen"]]["score"] == max(trial["score"] for trial in finalists)
    assert chosen.train.prompt_rate == trials[outcome["chosen"]]["prompt_rate"] > 0
    assert chosen.train.updated(prompt_rate=0, offset_rate=0) == settings.train
    assert search.find(settings, 4, tmp_path / "run", resume=True) == (chosen, outcome)
    with pytest.raises(UsageError, match="begun with other settings"):
        search.find(settings, 5, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / results.TRIALS).exists()


def test_a_search_sees_every_class(tmp_path: Path) -> None:
    """Rows sorted by class: the first 64 are all of one."""
    for split, count in (("train", 40), ("validation", 100), ("test", 4)):
        rows = [{"text": f"the film number {n}", "label": n * 2 // count} for n in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [
        "data.path=" + str(tmp_path),
        "train.steps=60",
        "train.batch_size=16",
        "method={name='prompt_tuning', prompt_length=2}",
    ]
    settings = resolve(None, [parse_assignment(text) for text in own])
    record = train(search.trial(settings, 5), tmp_path / "run")
    assert record["scores"]["validation"]["n"] == 64
    assert record["data"]["sizes"]["validation"] == 100
    given = search.trial(settings.updated(data=settings.data.updated(validation_limit=30)), 5)
    assert given.data.validation_limit == 30


def test_a_candidate_that_diverges_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("train.steps=90", "train.batch_size=8", "train.prompt_rate=1e25", "train.warmup=0")
    outcome = search.find(settings, 2, tmp_path / "run")[1]
    text = (tmp_path / "run" / results.SEARCH).read_text()
    assert "Infinity" not in text and outcome["trials"][0]["score"] is None
    assert outcome["chosen"] == 1 and [trial["status"] for trial in outcome["trials"]] == ["dropped", "done"]
    monkeypatch.setattr(search, "candidates", lambda settings, count: [settings] * count)
    with pytest.raises(SoftPromptsError, match="no candidate was left; the first the loss is nan"):
        search.find(settings, 2, tmp_path / "none")


def test_a_search_that_cannot_begin_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = [part for text in SMALL for part in ("-s", text)]
    assert main(["train", *given, "--out", str(out), "--json"]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for wrong in (["--search", "4"], ["--search", "2", "-s", "train.steps=90", "-s", "task=demo/requests"]):
        assert main(["train", *given, *wrong, "--overwrite", "--out", str(out)]) == 2
        assert main(["train", *given, *wrong, "--out", str(tmp_path / "new")]) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="a classification head"):
        search.find(settings_of("train.steps=90", "model.head=classification"), 2, tmp_path / "new")
    more = ["-s", "train.steps=70", "-s", "train.batch_size=8"]
    assert main(["train", *given, *more, "--search", "2", "--overwrite", "--out", str(out)]) == 0
    assert results.read_record(out)["steps_done"] == 70 and (out / results.SEARCH).exists()


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    settings = settings_of("train.steps=90", "train.batch_size=8", "data.train_limit=32")
    whole = search.find(settings, 2, tmp_path / "whole")
    with pytest.raises(Killed):
        search.find(settings, 2, tmp_path / "killed", progress=KillAt(whole[1]["trials"][0]["steps"] - 1))
    assert search.unfinished_search(tmp_path / "killed") == (settings, 2)
    resumed = search.find(settings, 2, tmp_path / "killed", resume=True)
    assert resumed[0] == whole[0]
    assert {**resumed[1], "seconds": 0} == {**whole[1], "seconds": 0}


def test_the_option(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    given = [part for text in (*SMALL, "train.steps=70", "train.batch_size=8") for part in ("-s", text)]
    assert main(["train", *given, "--search", "2", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert "search: prompt_rate=" in captured.err
    assert len(record["search"]["trials"]) == 2 and record["search"]["seconds"] > 0
    found = record["search"]["trials"][record["search"]["chosen"]]
    assert record["settings"]["train"]["prompt_rate"] == found["prompt_rate"] and record["steps_done"] == 70
    assert main(["train", "--resume", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["search"] == record["search"]
    plain = tmp_path / "plain"
    assert main(["train", *given, "--out", str(plain)]) == 0
    assert main(["train", *given, "--search", "2", "--resume", "--out", str(plain)]) == 2
    assert f"{plain} was begun without --search; resume with --out alone" in capsys.readouterr().err
    assert not (plain / results.SEARCH).exists() and main(["train", "--resume", "--out", str(plain)]) == 0
    capsys.readouterr()
    assert main(["train", *given, "--search", "2", "--seeds", "1,2"]) == 2
    assert "--search and --seeds" in capsys.readouterr().err
