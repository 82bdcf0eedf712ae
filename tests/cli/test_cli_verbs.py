"""Every verb on a small task."""

import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import SMALL, Answer, call, write_table

from softprompts import demo, results
from softprompts.checkpoint import CONFIG_FILE
from softprompts.loop import Run
from softprompts.trained import RUN_ENTRY

Train = Callable[..., Answer]
OFFLINE = """
import socket, sys
def refuse(*_): print("NETWORK", file=sys.stderr); raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
from softprompts.cli import main
sys.exit(main(sys.argv[1:]))
"""


# ------------------------------------------------------------------------------------------ train


def test_train_prints_scores_and_leaves_a_run(trained: tuple[Path, Answer]) -> None:
    folder, answer = trained
    record = results.read_record(folder)
    assert record["status"] == "done"
    assert record["settings"]["data"]["labels"] == {"0": "negative", "1": "positive"}
    for shown in ("accept on own/films", "accuracy", "majority", "untuned", "4,704 parameters", str(folder)):
        assert shown in answer.out
    assert {path.name for path in folder.iterdir()} == {"run.json", "steps.jsonl", "predictions.jsonl", "adapter"}


def test_train_reports_to_stderr_one_line_per_evaluation(trained: tuple[Path, Answer]) -> None:
    lines = trained[1].err.splitlines()
    assert next(line for line in lines if line.startswith("train ")).startswith("train 2/2  loss ")
    assert any("rows: train 16, validation 2, test 2" in line for line in lines)


def test_train_json_is_the_record(train_here: Train, tmp_path: Path) -> None:
    record = train_here("--json").json
    assert record.pop("folder") == str(tmp_path / "run")
    assert record == results.read_record(tmp_path / "run")


def test_default_folder_names_task_method_and_seed(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--method", "accept+dept", "--seed", "7", "-s", "train.steps=1", "-s", "data.max_source_tokens=64"]
    answer = call("train", "--data", table, "--target", "stars", *arguments)
    assert answer.code == 0, answer.err
    assert [path.name for path in Path("runs").iterdir()] == ["own-films-accept+dept-seed7"]


def test_settings_file_goes_below_options(table: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'seed = 3\n[data]\npath = "{table}"\ntarget = "stars"\nmax_source_tokens = 64\n'
        '[method]\nname = "dept"\nprompt_length = 4\noffset_positions = 64\nrank = 2\n[train]\nsteps = 9\n'
    )
    answer = call("train", file, "-s", "train.steps=1", "--seed", "5", "--out", tmp_path / "run", "--json")
    assert answer.code == 0, answer.err
    record = answer.json
    assert (record["method"], record["seed"], record["steps_done"]) == ("dept", 5, 1)


def test_several_seeds_give_mean_and_spread(train_here: Train, tmp_path: Path) -> None:
    answer = train_here("--seeds", "1,2", "--json")
    assert answer.code == 0, answer.err
    result = answer.json
    scores = [run["scores"]["test"]["accuracy"] for run in result["runs"]]
    assert [run["seed"] for run in result["runs"]] == [1, 2]
    assert result["summary"]["test"]["accuracy"]["mean"] == pytest.approx(sum(scores) / 2)
    assert result["summary"]["test"]["accuracy"]["n"] == 2
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"seed-1", "seed-2"}

    again = train_here("--seeds", "1,2", "--resume")
    assert "2 of 2 runs are done" in again.err
    assert "mean" in again.out and "sd" in again.out


def test_truncated_texts_are_counted_and_said(train_here: Train, tmp_path: Path) -> None:
    answer = train_here("-s", "data.max_source_tokens=4")
    assert "16 of 16 train texts were cut to 4 tokens (data.max_source_tokens)" in answer.err
    assert results.read_record(tmp_path / "run")["data"]["truncated"] == {"train": 16, "validation": 2, "test": 2}


def test_interrupted_run_says_how_to_go_on(train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "validate", interrupt)
        stopped = train_here("--overwrite")
    assert stopped.code == 130
    last = stopped.err.splitlines()[-1]
    assert last.startswith("stopped; go on with: softprompts train --data ") and last.endswith(" --resume")
    assert "--overwrite" not in last
    assert results.read_record(tmp_path / "run")["status"] == "running"

    resumed = call(*shlex.split(last.partition("softprompts ")[2]))
    assert resumed.code == 0, resumed.err
    assert results.read_record(tmp_path / "run")["status"] == "done"


def test_an_interrupted_sweep_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that is printed does not begin anew."""
    file, out = tmp_path / "s.toml", tmp_path / "out"
    file.write_text('task = "demo/mood"\n[train]\nsteps = 2\n[sweep]\nseed = [1, 2]\n')
    command = [
        "sweep",
        file,
        *SMALL,
        "-s",
        "data.train_limit=8",
        "-s",
        "data.test_limit=4",
        "--members",
        "1",
        "--out",
        out,
    ]
    finish = Run.finish

    def stop(self: Run) -> object:
        return interrupt() if self.members[0].out.name == "seed-2" else finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", stop)
        stopped = call(*command, "--overwrite")
    last = stopped.err.splitlines()[-1]
    assert stopped.code == 130 and last.startswith("stopped; go on with: softprompts sweep ")
    done = out / "seed-1" / "run.json"
    before = done.stat().st_mtime_ns
    again = call(*shlex.split(last.partition("softprompts ")[2]))
    assert again.code == 0, again.err
    assert done.stat().st_mtime_ns == before and results.read_record(out / "seed-2")["status"] == "done"


def test_resume_takes_the_settings_from_the_run(copied: Path) -> None:
    answer = call("train", "--resume", "--out", copied, "--json")
    assert answer.code == 0, answer.err
    assert "finished; nothing to resume" in answer.err
    assert answer.json["seed"] == 42


def test_nothing_reaches_for_the_network(table: Path, tmp_path: Path) -> None:
    arguments = ["train", "--data", str(table), "--target", "stars", *SMALL, "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr
    # Nothing of the libraries leaks either: every line is one of ours.
    ours = ("input column", "kind:", "label words:", "no validation or test", "train", "test:", "untuned:")
    assert all(line.startswith(ours) for line in done.stderr.splitlines()), done.stderr


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------------- eval, predict


def test_eval_repeats_the_scores_of_training(trained: tuple[Path, Answer]) -> None:
    folder, _ = trained
    record = results.read_record(folder)
    for split in ("test", "validation"):
        result = call("eval", folder, "--split", split, "--json").json
        assert result["scores"] == record["scores"][split]
        assert (result["scoring"], result["protocol"], result["split"]) == ("rank", "clean", split)


def test_eval_of_an_adapter_alone_on_other_data(trained: tuple[Path, Answer], tmp_path: Path) -> None:
    other = write_table(tmp_path / "other.csv", rows=20)
    answer = call("eval", trained[0] / "adapter", "--scoring", "generate", "-s", f"data.path={other}")
    assert answer.code == 0, answer.err
    assert "scoring generate" in answer.out
    assert any(line.split() == ["n", "40"] for line in answer.out.splitlines()), "none of them was trained on"
    assert call("eval", trained[0], "--data", other, "--json").json["scores"]["n"] == 40
    for name, rows, n in (("films.csv", 20, 4), ("one-class.csv", 6, 3)):
        again = write_table(tmp_path / name, rows)
        if name == "one-class.csv":
            again.write_text("".join(line for line in again.read_text().splitlines(True) if not line.endswith(",0\n")))
            n = rows
        answer = call("eval", trained[0], "--data", again, "--json")
        assert answer.json["scores"]["n"] == n, "a file of the name of the one trained on keeps its held-out tenth"
        assert ("took 1 in 10 training rows" in answer.err) == (name == "films.csv")
    answer = call("eval", trained[0], "--task", "demo/mood", "--labels", "0=a,1=b")
    assert answer.error.startswith("--input, --target, --labels and --kind describe data of your own")


def test_predict_from_arguments_stdin_and_file(
    trained: tuple[Path, Answer], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = trained
    texts = ["a lovely film", "an awful film"]
    given = call("predict", folder, *texts)
    assert given.code == 0, given.err
    lines = [json.loads(line) for line in given.out.splitlines()]
    assert [line["text"] for line in lines] == texts
    assert all((line["prediction"], line["label"]) in {("negative", "0"), ("positive", "1")} for line in lines)

    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts) + "\n"))
    assert call("predict", folder).out == given.out
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts) + "\n")
    assert call("predict", folder, "--file", file).out == given.out
    assert call("predict", folder, *texts, "--json").json == {"run": str(folder), "predictions": lines}

    rows = call("predict", folder, "--file", table).out.splitlines()
    assert len(rows) == 20
    assert json.loads(rows[0])["text"] == "review: a lovely film number 0"


@pytest.fixture
def bare(trained: tuple[Path, Answer], tmp_path: Path) -> Path:
    """The adapter of the run as PEFT would have saved it: it does not say how it was trained."""
    folder = Path(shutil.copytree(trained[0] / "adapter", tmp_path / "bare"))
    entries = json.loads((folder / CONFIG_FILE).read_text())
    del entries[RUN_ENTRY]
    (folder / CONFIG_FILE).write_text(json.dumps(entries))
    return folder


def test_eval_of_an_adapter_that_says_no_task(trained: tuple[Path, Answer], bare: Path, table: Path) -> None:
    own = ["--data", table, "--labels", "0=negative,1=positive", "-s", "model.dtype=fp32"]
    answer = call("eval", bare, *own, "-s", "data.max_source_tokens=64", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["scores"] == results.read_record(trained[0])["scores"]["test"]
    assert answer.json["task"] == "own/films"
    assert "target column: 'stars' (guessed; set --target to change)" in answer.err
    named = call("eval", bare, "--task", "demo/mood", "-s", "data.test_limit=4", "--json")
    assert (named.json["task"], named.json["scores"]["n"]) == ("demo/mood", 4)


def test_predict_with_an_adapter_that_says_no_task(bare: Path, table: Path) -> None:
    free = call("predict", bare, "a lovely film")
    assert free.code == 0, free.err
    assert set(json.loads(free.out)) == {"text", "prediction"}
    asked = json.loads(call("predict", bare, "--task", "demo/mood", "a lovely film").out)
    assert asked["prediction"] in ("bad", "good") and asked["label"] in ("negative", "positive")
    own = call("predict", bare, "--data", table, "--labels", "0=no,1=yes", "--model", "t5-nano", "a lovely film")
    assert json.loads(own.out)["prediction"] in ("no", "yes")


# ----------------------------------------------------------------------------------------- export


def test_export_writes_and_says_how_to_load(train_here: Train, tmp_path: Path) -> None:
    train_here("--method", "prompt_tuning", "-s", "method={name='prompt_tuning', prompt_length=4}")
    run = tmp_path / "run"
    answer = call("export", run, "--to", "prompt-tuning", "--out", tmp_path / "peft")
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[0] == f"wrote adapter_config.json, adapter_model.safetensors to {tmp_path / 'peft'}"
    assert "PeftModel.from_pretrained(model, " in answer.out
    back = call("export", tmp_path / "peft", "--to", "softprompts", "--out", tmp_path / "back", "--json").json
    assert "adapter_model.safetensors" in back["files"]
    texts = ["a lovely film number 3", "an awful film number 4"]
    columns = ["--data", tmp_path / "films.csv", "-s", "model.dtype=fp32"]
    write_table(tmp_path / "films.csv")
    again = call("predict", tmp_path / "back", *texts, *columns)
    assert [json.loads(line)["prediction"] for line in again.out.splitlines()] == [
        json.loads(line)["prediction"] for line in call("predict", run, *texts).out.splitlines()
    ]

    baked = call("export", run, "--to", "baked", "--out", tmp_path / "baked", "--dtype", "bf16", "--json").json
    assert (baked["to"], len(baked["prompt_ids"]), baked["tokenizer_adds_prompt"]) == ("baked", 4, True)
    assert {"config.json", "model.safetensors", "tokenizer.json", "softprompt.json"} <= set(baked["files"])
    shown = call("export", run, "--to", "baked", "--out", tmp_path / "baked32").out
    assert "ids 8192 to 8195, before every text" in shown and "puts them there by itself" in shown
    assert call("export", run, "--to", "embeds", "--out", tmp_path / "embeds").code == 0


# ---------------------------------------------------------------------------- list, explain, demo


def test_list_shows_methods_tasks_and_models() -> None:
    answer = call("list")
    for shown in ("accept", "74,880", "24,704", "glue/rte", "0 entailment, 1 not_entailment", "t5-nano"):
        assert shown in answer.out
    assert set(call("list", "--json").json) == {"methods", "tasks", "models"}
    assert set(call("list", "tasks", "--json").json) == {"tasks"}


def test_explain_a_method_with_its_sizes() -> None:
    about = call("explain", "accept", "--json").json
    assert about["num_trainable"] == 74_880
    assert about["parts"]["prompt"] == {
        "length": 60, "width": 768, "subspaces": 24, "codewords": 20, "num_trainable": 44_160,
    }  # fmt: skip
    meanings = {row["name"]: row["meaning"] for row in about["settings"]}
    assert meanings["method.prompt_length"] and all(meanings.values())
    shorter = call("explain", "accept", "--width", "256", "-s", "method.offset_positions=0", "--json").json
    assert list(shorter["parts"]) == ["prompt"]
    assert "74,880" in call("explain", "accept").out


def test_explain_a_combination() -> None:
    about = call("explain", "accept+dept", "--json").json
    names = {row["name"] for row in about["settings"]}
    assert {"method.prompt.prompt_codewords", "method.offset.rank", "method.prompt_from"} <= names
    assert not {"method.prompt.offset_codewords", "method.offset.prompt_from"} & names
    assert about["num_trainable"] == 74_880


def test_explain_a_task() -> None:
    about = call("explain", "rte", "--json").json
    assert about["template"] == "sentence1: {sentence1} sentence2: {sentence2}"
    assert list(about["protocols"]["paper"]["defects"]) == ["halved-validation"]
    assert about["protocols"]["clean"]["defects"] == {}
    assert "halved-validation" in call("explain", "rte").out


@pytest.mark.parametrize("group", ["train", "data", "model", "eval"])
def test_explain_a_group_of_settings(group: str) -> None:
    rows = call("explain", group, "--json").json["settings"]
    assert rows and all(row["meaning"] and row["name"].startswith(f"{group}.") for row in rows)


def test_demo_compares_methods_and_says_what_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {f"data.{split}_limit": 8 for split in ("train", "validation", "test")}
    monkeypatch.setattr(demo, "TASKS", ("demo/mood",))
    monkeypatch.setattr(demo, "METHODS", {name: demo.METHODS[name] for name in ("prompt_tuning", "accept")})
    monkeypatch.setattr(demo, "SHARED", {**demo.SHARED, **limits, "train.steps": 1})
    answer = call("demo", "--out", tmp_path)
    assert answer.code == 0, answer.err
    for shown in ("majority class", "untuned backbone", "prompt_tuning", "accept", "demo/mood (n=8)"):
        assert shown in answer.out
    commands = [shlex.split(line) for line in answer.out.splitlines() if line.startswith("  softprompts ")]
    assert [command[1] for command in commands] == ["predict", "train", "explain"]
    again = call("demo", "--out", tmp_path, "--json")  # replaces the first
    assert [row["name"] for row in again.json["rows"]][2:] == ["prompt_tuning", "accept"]
    tried = call(*commands[0][1:])
    assert json.loads(tried.out)["label"] in ("negative", "positive")


def test_only_the_first_of_several_processes_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    silent = call("list", "methods")
    assert (silent.code, silent.out, silent.err) == (0, "", "")
    assert call("list", "mehods").error, "errors are told by every process"
