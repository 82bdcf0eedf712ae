"""Several tasks at once: what they share, how rows are mixed, what is left behind, what teachers teach."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import KillAt, Killed
from tiny import PAD, WIDTH, build, config_of, forward, scatter, text

from softprompts.attach import adapters_of, attach, using
from softprompts.config import RunSettings, resolve_tree
from softprompts.errors import UsageError
from softprompts.multitask import TasksRun, distance, mean_of, mixture, share
from softprompts.search import find
from softprompts.train import train
from softprompts.trained import open_trained

TASKS = "demo/mood,demo/request"
SMALL = {"train_limit": 48, "validation_limit": 16, "test_limit": 16, "cache": False}
SHORT = {"steps": 6, "eval_every": 3, "batch_size": 8, "warmup": 0}


def settings_for(method: str, task: str = TASKS, **train_settings: Any) -> RunSettings:
    sizes: dict[str, Any] = {"prompt_tuning": {"prompt_length": 4}, "mpt": {"prompt_length": 4}, "accept": {
        "prompt_length": 4, "prompt_codewords": 3, "offset_positions": 64, "offset_codewords": 3}}[method]  # fmt: skip
    return resolve_tree(
        {
            "task": task,
            "method": {"name": method, **sizes},
            "data": SMALL,
            "train": {**SHORT, **train_settings},
            "eval": {"untuned": False},
        }
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key.rpartition("default.")[2]: value for key, value in load_file(folder / "adapter_model.safetensors").items()
    }


@pytest.fixture(scope="module")
def mpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mpt") / "run"
    train(settings_for("mpt"), out)
    return out


def own(folder: Path, name: str) -> torch.Tensor:
    found = [value for key, value in weights(folder).items() if key.endswith(f".{name}")]
    assert len(found) == 1
    return found[0]


def test_tasks_share_what_is_not_their_own(mpt: Path) -> None:
    tasks = [mpt / "tasks" / name / "adapter" for name in ("demo-mood", "demo-request")]
    mood, request = tasks
    assert torch.equal(own(mood, "shared"), own(request, "shared"))
    assert not torch.equal(own(mood, "columns"), own(request, "columns"))
    average = mpt / "adapter"
    assert torch.equal(own(average, "shared"), own(mood, "shared"))
    expected = (own(mood, "columns") + own(request, "columns")) / 2
    assert torch.allclose(own(average, "columns"), expected, atol=1e-7)


def test_the_record_has_every_task_and_the_means(mpt: Path) -> None:
    record = json.loads((mpt / "run.json").read_text())
    assert record["status"] == "done" and set(record["tasks"]) == {"demo/mood", "demo/request"}
    scores = [entry["scores"]["test"]["accuracy"] for entry in record["tasks"].values()]
    assert record["scores"]["test"] == {"mean": pytest.approx(sum(scores) / 2), "n": 32}
    # 4*256 shared numbers once, and 4 + 256 for each task.
    assert record["num_trainable"] == 4 * 256 + 2 * (4 + 256)
    alone = json.loads((mpt / "tasks" / "demo-mood" / "run.json").read_text())
    assert alone["num_trainable"] == 4 * 256 + 4 + 256
    assert alone["trained_with"] == ["demo/mood", "demo/request"]


def test_each_task_can_be_used_alone(mpt: Path) -> None:
    for name in ("demo-mood", "demo-request"):
        folder = mpt / "tasks" / name
        recorded = json.loads((folder / "run.json").read_text())["scores"]["test"]
        assert open_trained(folder).evaluate().scores == recorded


def test_a_new_task_starts_from_the_mean(mpt: Path, tmp_path: Path) -> None:
    settings = settings_for("mpt", "demo/mood", steps=1, prompt_rate=0.0)
    settings = settings.updated(method={**settings.method, "prompt_from": str(mpt)})
    train(settings, tmp_path / "target")
    for name in ("shared", "rows", "columns"):
        assert torch.equal(own(tmp_path / "target" / "adapter", name), own(mpt / "adapter", name))


def test_a_killed_run_ends_as_one_that_was_not(mpt: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        train(settings_for("mpt"), out, progress=KillAt(4))
    train(settings_for("mpt"), out, resume=True)
    for name in ("adapter", "tasks/demo-mood/adapter", "tasks/demo-request/adapter"):
        ours, theirs = weights(mpt / name), weights(out / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    records = [json.loads((folder / "run.json").read_text()) for folder in (mpt, out)]
    assert records[0]["scores"] == records[1]["scores"]
    assert records[0]["tasks"]["demo/mood"]["scores"] == records[1]["tasks"]["demo/mood"]["scores"]


def test_a_mixed_step_is_the_mean_over_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The joint loss equals the rows' own losses, each under its own task's adapter, over all target tokens."""
    seen: list[tuple[float, float]] = []
    update = TasksRun.update

    def compare(self: TasksRun, training: Any, losses: Any) -> None:
        joint = float(torch.stack(list(losses)).sum())
        total = count = 0.0
        with torch.no_grad():
            for member in training:
                rows = self.parts[member.out]
                single = self.losses([member], [rows])[0]
                total, count = total + float(single), count + member.weight(rows)
        seen.append((joint, total / count))
        update(self, training, losses)

    monkeypatch.setattr(TasksRun, "update", compare)
    losses = TasksRun.losses

    def without_dropout(self: TasksRun, training: Any, parts: Any) -> Any:
        self.backbone.model.eval()
        return losses(self, training, parts)

    monkeypatch.setattr(TasksRun, "losses", without_dropout)
    train(settings_for("accept", steps=3, offset_rate=0.1), tmp_path / "run")
    assert len(seen) == 3
    for joint, single in seen:
        assert joint == pytest.approx(single, abs=2e-5)


def test_rows_are_drawn_by_size_and_temperature() -> None:
    sizes = torch.tensor([1000.0, 10.0])
    assert mixture(sizes, 1.0).tolist() == pytest.approx([1000 / 1010, 10 / 1010])
    hot = mixture(sizes, 10.0)
    assert float(hot[0] / hot[1]) == pytest.approx(100**0.1)


def test_every_row_of_a_task_comes_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, list[int]] = {"demo-mood": [], "demo-request": []}
    step = TasksRun.step

    def note(self: TasksRun, training: Any) -> None:
        step(self, training)
        for out, part in self.parts.items():
            rows[out.name] += part
        assert sum(map(len, self.parts.values())) == 8

    monkeypatch.setattr(TasksRun, "step", note)
    train(settings_for("prompt_tuning", steps=14, eval_every=14), tmp_path / "run")
    for drawn in rows.values():
        assert len(drawn) > 40
        epoch = drawn[:48]
        assert len(set(epoch)) == len(epoch)


def test_sharing_ties_tensors_and_keeps_the_own_apart() -> None:
    torch.manual_seed(0)
    model = build("t5")
    config = config_of("accept")
    for name in ("a", "b"):
        attach(model, config, name)
    methods = adapters_of(model).methods()
    share(methods["a"], methods["b"], config.task_parts)
    assert methods["b"].prompt.codebook.codebooks is methods["a"].prompt.codebook.codebooks  # type: ignore[union-attr]
    assert methods["b"].prompt.codebook.weights is not methods["a"].prompt.codebook.weights  # type: ignore[union-attr]
    scatter(methods["a"])
    before = methods["b"].prompt.codebook.weights.clone()  # type: ignore[union-attr]
    mean = mean_of(config, WIDTH, list(methods.values()))
    assert torch.equal(mean.prompt.codebook.codebooks, methods["a"].prompt.codebook.codebooks)  # type: ignore[union-attr]
    expected = (methods["a"].prompt.codebook.weights + before) / 2  # type: ignore[union-attr]
    assert torch.allclose(mean.prompt.codebook.weights, expected)  # type: ignore[union-attr]
    with using(model, ["a", "b"]):
        both = forward(model, ids := text())
    assert not torch.allclose(both[0], both[1]) and ids.shape[0] == 2 and PAD not in ids


def test_the_distance_from_a_teacher() -> None:
    torch.manual_seed(0)
    logits, hidden = torch.randn(5, 7), torch.randn(5, 4)
    assert distance(logits, logits, hidden, hidden).abs().max() < 1e-6
    other = torch.randn(5, 7)
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), other.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    error = (hidden - 2 * hidden).square().mean(-1) / (2 * hidden).square().mean(-1)
    assert torch.allclose(distance(logits, other, hidden, 2 * hidden), divergence + error, atol=1e-6)


def test_a_student_comes_nearer_to_its_teachers(mpt: Path, tmp_path: Path) -> None:
    teachers = []
    for task in ("demo/mood", "demo/request"):
        out = tmp_path / task.replace("/", "-")
        train(settings_for("prompt_tuning", task, steps=8, prompt_rate=3.0), out)
        teachers.append(str(out))
    record = train(settings_for("mpt", teachers=teachers), tmp_path / "student")
    assert record["status"] == "done"
    plain = weights(mpt / "adapter")
    taught = weights(tmp_path / "student" / "adapter")
    assert any(not torch.equal(plain[key], taught[key]) for key in plain)
    record = train(settings_for("mpt", teachers=teachers, distillation=0.0), tmp_path / "deaf")
    deaf = weights(tmp_path / "deaf" / "adapter")
    # Without weight the teachers change nothing: the same losses, the same steps.
    assert all(torch.allclose(plain[key], deaf[key], atol=1e-5) for key in plain)


def test_pieces_of_a_batch_learn_the_same_of_teachers(tmp_path: Path) -> None:
    teachers = []
    for task in ("demo/mood", "demo/request"):
        teachers.append(str(tmp_path / task.replace("/", "-")))
        train(settings_for("prompt_tuning", task, steps=2), teachers[-1])
    for pieces in (1, 2):
        train(settings_for("mpt", teachers=teachers, accumulate=pieces), tmp_path / str(pieces))
    one, two = (weights(tmp_path / name / "adapter") for name in ("1", "2"))
    assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)


def test_a_killed_run_can_be_begun_again(mpt: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(settings_for("mpt"), tmp_path / "run", progress=KillAt(5))
    assert list((tmp_path / "run").rglob("state.safetensors"))
    train(settings_for("mpt"), tmp_path / "run", overwrite=True)
    fresh, again = weights(mpt / "adapter"), weights(tmp_path / "run" / "adapter")
    assert all(torch.equal(fresh[key], again[key]) for key in fresh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "demo/mood,demo/mood"}, "names a task twice"),
        ({"task": "demo/mood,"}, "or none"),
        ({"train": {"teachers": ["x"]}}, "names 1 adapters for 2 tasks"),
        ({"task": "demo/mood,demo/moood"}, "demo/moood"),
        ({"task": "demo/mood,mood"}, "names a task twice"),
        ({"method": {"name": "none"}}, "trains nothing here"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tree = {"task": TASKS, "method": {"name": "prompt_tuning", "prompt_length": 4}, "data": SMALL, **changes}
    with pytest.raises(UsageError, match=message):
        train(resolve_tree(tree), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["ia3", "hyperformer"])
def test_a_baseline_learns_several_tasks(method: str, tmp_path: Path) -> None:
    """One set of weights for all tasks; each task's folder is complete and knows its number."""
    out = tmp_path / "run"
    tree = {"task": TASKS, "method": {"name": method}, "data": SMALL, "train": SHORT, "eval": {"untuned": False}}
    record = train(resolve_tree(tree), out)
    folders = [out / "tasks" / name for name in ("demo-mood", "demo-request")]
    for folder in folders:
        recorded = json.loads((folder / "run.json").read_text())
        assert recorded["num_trainable"] == record["num_trainable"] > 0
        assert open_trained(folder).evaluate().scores == recorded["scores"]["test"]
    numbers = [json.loads((f / "adapter" / "adapter_config.json").read_text())["softprompt"] for f in folders]
    if method == "hyperformer":
        assert [entry["task_number"] for entry in numbers] == [0, 1]
        assert numbers[0]["tasks"] == 2


def test_the_whole_is_not_used_in_place_of_a_task(mpt: Path) -> None:
    with pytest.raises(UsageError, match="name one of demo-mood, demo-request"):
        open_trained(mpt)


def test_tasks_and_a_compiled_model_or_a_search_exclude_each_other(tmp_path: Path) -> None:
    tree = {"task": TASKS, "method": {"name": "prompt_tuning"}, "model": {"compile": True}}
    with pytest.raises(UsageError, match="compiles anew"):
        train(resolve_tree(tree), tmp_path / "run")
    with pytest.raises(UsageError, match="leave --search out"):
        find(settings_for("mpt"), 2, tmp_path / "run")
    assert not (tmp_path / "run").exists()
