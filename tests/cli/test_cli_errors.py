"""What a user can get wrong: one line, the right exit code, nothing half written."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import SMALL, Answer, call

from softprompts import results
from softprompts.errors import SoftPromptsError

Train = Callable[..., Answer]


def name_of(value: tuple[str, ...] | str) -> str:
    """Name a case by its arguments."""
    return " ".join(value) if isinstance(value, tuple) else ""


SETTINGS = {
    ("-s", "train.step=3"): "train: unknown setting 'step'; did you mean 'steps'?",
    ("-s", "stepps=3"): "unknown setting 'stepps'",
    ("-s", "train.steps"): "-s 'train.steps' is not key=value; write for example -s train.steps=3000",
    ("-s", "train.steps=0"): "steps=0 cannot be used: input should be greater than or equal to 1",
    ("-s", "train.steps=many"): "steps='many' cannot be used: input should be a valid integer",
    ("-s", "method.prompt_lenght=3"): "unknown setting 'prompt_lenght'; did you mean 'prompt_length'?",
    ("-s", "seed.x=3", "--seed", "1"): "'seed.x' cannot be set: 'seed' is 1, not a table",
    ("--method", "acept"): "unknown method 'acept'; did you mean 'accept'? (known: accept, ",
    ("--method", "accept+depd"): "unknown method 'depd'; did you mean 'dept'?",
    ("--task", "glue/rte"): "name what to train on: either a task (--task glue/rte) or your own data (--data FILE)",
    ("--protocol", "papre"): "protocol='papre' cannot be used: input should be 'clean' or 'paper'",
    ("--input", "revew"): "--input: no column 'revew' in ",
    ("--target", "star"): "--target: no column 'star' in ",
    ("--labels", "0=no"): "--labels: fewer than two label words (0=no); add the others",
    ("--labels", "0=no,2=yes"): " has stars '1', which is not in the label words 0=no 2=yes",
    ("--shots", "1"): "shots=1 is fewer than the 2 classes; use shots=2 or more",
    ("--seeds", "1,1"): "--seeds 1,1 is no list of different numbers; write for example --seeds 1,2,3",
    ("--seeds", "1,2", "--seed", "3"): "--seed and --seeds cannot both be given; leave one out",
    ("--model", "no/such-folder"): "model 'no/such-folder' cannot be loaded (",
    ("-s", "method.prompt_subspaces=25"): "prompt_subspaces=25 does not divide the model width 256; try 16 or 32",
    ("-s", "method.budget_tokens=4"): "budget_tokens=4 leaves nothing for the offset beside prompt_length=4",
    (
        "-s",
        "method.budget_tokens=5",
    ): "offset_codewords: a budget of 1 x 256 = 256 numbers is too small for one codeword",
    ("--method", "none", "-s", "method={name='none'}"): "method 'none' trains nothing here",
    ("--prompt-from", "no/adapter"): "no/adapter holds no adapter",
}


@pytest.mark.parametrize(("arguments", "message"), SETTINGS.items(), ids=name_of)
def test_settings_that_cannot_be(arguments: tuple[str, ...], message: str, train_here: Train, tmp_path: Path) -> None:
    answer = train_here(*arguments)
    assert message in answer.error
    assert (answer.code, answer.out) == (2, "")
    assert list(tmp_path.iterdir()) == []


ELSEWHERE = {
    ("train", "--task", "glue/rtt"): "unknown task 'glue/rtt'; did you mean 'glue/rte'? 'softprompts list' shows all",
    ("train",): "name what to train on: either a task (--task glue/rte) or your own data (--data FILE)",
    ("train", "glue/rte"): "glue/rte is not a settings file; for a task write --task glue/rte, for own data --data",
    ("train", "none.toml"): "settings file none.toml cannot be read: No such file or directory",
    ("train", "--resume"): "--resume needs the run to go on with; name its folder with --out DIR",
    ("train", "--resume", "--out", "nowhere"): "nowhere is not the folder of a run (run.json is missing)",
    ("train", "--data", "none.csv"): "none.csv",
    (
        "train",
        "--task",
        "demo/mood",
        "--labels",
        "0=a,1=b",
    ): "data.labels describes data of your own",
    ("train", "--task", "demo/mood", "--prompt-from", "no/such", "-s", "method={name='dept'}"): "no/such",
    ("eval", "nowhere"): "nowhere holds no adapter (adapter_config.json is missing)",
    ("predict", "nowhere", "text"): "nowhere holds no adapter (adapter_config.json is missing)",
    ("predict", "nowhere", "text", "--file", "x.txt"): "give texts or --file, not both",
    ("predict", "nowhere", "--file", "x.txt"): "--file x.txt cannot be read: No such file or directory",
    ("eval", "nowhere", "--labels", "0"): "--labels",
    ("export", "nowhere", "--to", "embeds", "--out", "x"): "nowhere holds no adapter (adapter_config.json is missing)",
    ("export", "nowhere", "--to", "softprompts", "--out", "x"): "nowhere holds no PEFT checkpoint",
    (
        "export",
        "nowhere",
        "--to",
        "gguf",
        "--out",
        "x",
    ): "cannot export to 'gguf' (known: prompt-tuning, embeds, baked,",
    ("export", "nowhere", "--to", "baked", "--out", "x", "--dtype", "int8"): "a baked folder is fp32 or bf16",
    ("export", "nowhere", "--to", "embeds"): "missing option '--out'",
    ("list", "method"): "cannot list 'method'; did you mean 'methods'? (known: methods, tasks, models)",
    ("explain", "acept"): "nothing is called 'acept'; did you mean 'accept'? 'softprompts list' shows",
    ("explain", "accept", "--width", "257"): "prompt_codewords: a budget of 60 x 257 = 15420 numbers is too small",
    ("explain", "accept", "-s", "prompt_subspaces=25"): "does not divide the model width 768; try 24 or 32",
    ("trian",): "no such command 'trian'",
    ("train", "--methd", "x"): "no such option: --methd",
    ("train", "--seed", "x"): "invalid value for '--seed'",
    ("eval",): "missing argument 'RUN'",
}


@pytest.mark.parametrize(("arguments", "message"), ELSEWHERE.items(), ids=name_of)
def test_arguments_that_cannot_be(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call(*arguments)
    assert message in answer.error
    assert len(answer.err.splitlines()) == 1
    assert (answer.code, answer.out) == (2, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "review,stars\n"])
def test_empty_data(text: str, tmp_path: Path) -> None:
    data = tmp_path / "empty.csv"
    data.write_text(text)
    answer = call("train", "--data", data, "--out", tmp_path / "run")
    assert answer.code == 2
    assert "empty.csv" in answer.error
    assert not (tmp_path / "run").exists()


def test_an_output_folder_is_not_overwritten_unasked(copied: Path, table: Path) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    answer = call("train", "--data", table, *SMALL, "--out", copied)
    assert answer.code == 2
    assert answer.error == (
        f"output folder {copied} exists and is not empty; continue it with --resume, replace it with --overwrite, "
        "or name another with --out"
    )
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_overwrite_spares_a_folder_that_is_no_run(tmp_path: Path, table: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    answer = call("train", "--data", table, *SMALL, "--out", tmp_path, "--overwrite")
    assert answer.code == 2
    assert "is not the folder of a run (run.json is missing); it is left alone" in answer.error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "mine.txt").write_text("not a run's")
    answer = call("train", "--data", table, *SMALL, "--out", tmp_path, "--overwrite")
    assert "it is left alone" in answer.error and (tmp_path / "start" / "mine.txt").exists()


def test_resume_with_other_settings(copied: Path, table: Path) -> None:
    answer = call("train", "--data", table, *SMALL, "--out", copied, "--resume", "--seed", "1")
    assert answer.code == 2
    assert "was begun with other settings; resume with --out alone" in answer.error


# ------------------------------------------------------------------------------------- run folders


def test_damaged_weights(copied: Path) -> None:
    weights = copied / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    answer = call("predict", copied, "text")
    assert answer.code == 2
    assert "adapter_model.safetensors cannot be read (" in answer.error
    assert answer.error.endswith("it is damaged, save the adapter again")


def test_damaged_adapter_config(copied: Path) -> None:
    (copied / "adapter" / "adapter_config.json").write_text('{"peft_type": ')
    answer = call("eval", copied)
    assert answer.code == 2
    assert "it is damaged, save the adapter again" in answer.error


def test_foreign_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    answer = call("predict", tmp_path, "text")
    assert answer.code == 2
    assert answer.error.endswith("is not an adapter of softprompts (peft_type='LORA'); load it with PEFT itself")


def test_adapter_of_a_wider_model(copied: Path) -> None:
    path = copied / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "width": 768}))
    answer = call("predict", copied, "text")
    assert answer.code == 2
    assert "was trained for width 768 (t5-nano), this model has width 256" in answer.error


def test_eval_of_data_that_moved(copied: Path) -> None:
    answer = call("eval", copied, "-s", "data.path=gone.csv")
    assert answer.code == 2
    assert "gone.csv" in answer.error
    answer = call("eval", copied, "--split", "tset")
    assert (answer.code, answer.error) == (2, "unknown split 'tset'; use validation or test")


def test_export_of_an_offset_names_the_alternative(copied: Path, tmp_path: Path) -> None:
    answer = call("export", copied, "--to", "prompt-tuning", "--out", tmp_path / "out")
    assert answer.code == 2
    assert answer.error.startswith("accept adds an offset to the tokens, which PEFT's PROMPT_TUNING cannot hold; take")
    assert not (tmp_path / "out").exists()


def test_eval_without_a_task(copied: Path) -> None:
    path = copied / "adapter" / "adapter_config.json"
    entries = json.loads(path.read_text())
    del entries["softprompts_run"]
    path.write_text(json.dumps(entries))
    answer = call("eval", copied)
    assert (answer.code, answer.out) == (2, "")
    assert answer.error.endswith(
        "does not say for which task it was trained; give --task NAME, or --data FILE for your own data"
    )
    answer = call("eval", copied, "--task", "demo/mood", "--data", "x.csv")
    assert answer.error == "--task and --data exclude each other; leave one out"


def test_empty_text(copied: Path) -> None:
    answer = call("predict", copied, "fine", " ")
    assert (answer.code, answer.error) == (2, "text 2: column 'review' is empty; give it some words")
    assert answer.out == ""


# --------------------------------------------------------------------------------- while it trains


def test_a_loss_that_is_no_number(train_here: Train, tmp_path: Path) -> None:
    answer = train_here("-s", "train.prompt_rate=1e36", "-s", "train.offset_rate=1e36", "-s", "train.steps=3")
    assert answer.code == SoftPromptsError.exit_code == 1
    assert answer.error == (
        "the loss is nan at step 2 (train.prompt_rate=1e+36, train.offset_rate=1e+36, model.dtype=fp32); "
        "lower the rates or take fp32"
    )
    assert results.read_record(tmp_path / "run")["status"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()


def test_full_disk(train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full)
    answer = train_here()
    assert answer.code == 1
    assert answer.error == (
        f"cannot write {tmp_path}/run/run.json: No space left on device; free some space or name another --out"
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_full_disk_while_training(train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "append_step", full)
    answer = train_here()
    assert (answer.code, answer.out) == (1, "")
    assert answer.error == "no space left on the disk: steps.jsonl; free some, then go on with --resume"
    monkeypatch.undo()
    assert call("train", "--resume", "--out", tmp_path / "run").code == 0


def test_what_nobody_expected(train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "append_step", surprise)
    answer = train_here()
    assert (answer.code, answer.out) == (1, "")
    assert answer.error == "unexpected KeyError: 'odd'; run again with --debug for the traceback"
    told = train_here("--debug", "--overwrite")
    assert told.code == 1
    assert "Traceback (most recent call last)" in told.err
    assert told.err.splitlines()[-1] == "error: unexpected KeyError: 'odd'"


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "steps.jsonl")


def surprise(*_: object) -> None:
    raise KeyError("odd")
