"""Several prompts trained on one backbone at once: each as if alone, resumed, and dropped with a reason."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import SMALL, KillAt, Killed, settings_of
from tiny import GPT2
from torch.testing import assert_close
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from softprompts import loop, results, scored
from softprompts.backbone import embedded_path
from softprompts.checkpoint import WEIGHTS_FILE
from softprompts.config import resolve_tree
from softprompts.errors import SoftPromptsError, UsageError
from softprompts.loop import Progress, Run
from softprompts.member import Member
from softprompts.population import Halving, check_fit, fits
from softprompts.train import train, train_together

assert "model.dtype=fp32" in SMALL, "equality is meant to the last digits"

MEMBERS = (
    ("seed=1",),
    ("seed=2", "train.prompt_rate=0.1", "train.offset_rate=0.001"),
    ("seed=3", "method.init=gaussian", "train.warmup=5", "train.clip=0.1"),
    ("seed=4", "method={name='adept', prompt_length=9, rank=4, dropout=0.0}", "train.weight_decay=0.1"),
    ("seed=5", "data.shots=6", "data.shot_seed=7"),
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / results.ADAPTER / WEIGHTS_FILE)


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / results.STEPS).read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_each_member_is_as_if_alone(tmp_path: Path) -> None:
    steps = ("train.steps=50", "train.eval_every=25", "eval.untuned=true", "train.batch_size=3")
    settings = [settings_of(*steps, *more) for more in MEMBERS]
    together = train_together(settings, [tmp_path / f"together-{n}" for n in range(len(settings))])
    different = set()
    for number, one in enumerate(settings):
        folder, beside = tmp_path / f"alone-{number}", tmp_path / f"together-{number}"
        alone = train(one, folder)
        # fp32 sums in another order; AdamW carries the last digits on.
        assert_close(torch.tensor(losses(beside)[:5]), torch.tensor(losses(folder)[:5]), atol=1e-3, rtol=1e-3)
        assert_close(torch.tensor(losses(beside)), torch.tensor(losses(folder)), atol=1e-2, rtol=2e-2)
        for key, value in weights(folder).items():
            assert (weights(beside)[key] - value).norm() < 1e-2 * value.norm(), key
        record = together[number]
        assert record["scores"] == alone["scores"] and record["baselines"] == alone["baselines"]
        assert record["settings"] == alone["settings"] and record["data"] == alone["data"]
        assert record["cost"]["population"] == len(settings) and "population" not in alone["cost"]
        assert record["cost"]["tokens"] == alone["cost"]["tokens"]
        different.add(round(losses(beside)[-1], 5))
    assert len(different) == len(settings), "the members are told apart"


def test_no_member_cuts_the_texts_of_another(tmp_path: Path) -> None:
    """An offset of 8 positions cuts its own texts alone, at every step and in every score."""
    short = settings_of("method.offset_positions=8", "eval.untuned=true")
    long = settings_of("method={name='prompt_tuning', prompt_length=3}", "eval.untuned=true")
    together = train_together([short, long], [tmp_path / "short", tmp_path / "long"])
    for number, one in enumerate((short, long)):
        alone = train(one, tmp_path / f"alone-{number}")
        beside = together[number]
        folder = tmp_path / ("short", "long")[number]
        assert_close(
            torch.tensor(losses(folder)), torch.tensor(losses(tmp_path / f"alone-{number}")), atol=1e-3, rtol=1e-3
        )
        assert beside["scores"] == alone["scores"] and beside["baselines"] == alone["baselines"]
        assert beside["data"]["truncated"] == alone["data"]["truncated"]
    assert together[0]["data"]["truncated"]["train"] == 24 and together[1]["data"]["truncated"]["train"] == 0


@pytest.mark.parametrize("padding", ["dynamic", "max"])
@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_a_shorter_prompt_leaves_no_more_room_to_others(
    padding: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 positions, a prompt of 3 leaves 61 to its texts; behind one of 12 these would not fit."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_path("t5-nano"))
    GPT2LMHeadModel(GPT2Config(**{**GPT2, "vocab_size": len(tokenizer)})).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    texts = "".join(f"{'word and more of it ' * 20}{row},{row % 2}\n" for row in range(20))
    (tmp_path / "long.csv").write_text(f"text,label\n{texts}")
    tree = {
        "data": {"path": str(tmp_path / "long.csv"), "inputs": ["text"], "padding": padding},
        "model": {"name": str(tmp_path / "gpt2"), "dtype": "fp32"},
        "train": {"steps": 4, "batch_size": 2},
        "eval": {"untuned": False},
    }
    both = [resolve_tree({**tree, "method": {"name": "prompt_tuning", "prompt_length": n}}) for n in (3, 12)]
    if device != "cpu":  # there all rows go through the backbone at once
        monkeypatch.setattr(loop, "CHUNK_ROWS", 10_000)
        monkeypatch.setattr(loop, "PASS_SLOTS", 10_000)
    outs = [tmp_path / name for name in ("short", "long")]
    for one, out, beside in zip(both, outs, train_together(both, outs), strict=True):
        own = tmp_path / f"{out.name}-alone"
        alone = train(one, own)
        assert beside["scores"] == alone["scores"] and alone["data"]["truncated"]["train"] == 16
        assert_close(torch.tensor(losses(out)), torch.tensor(losses(own)), atol=1e-4, rtol=1e-4)


def test_the_untuned_backbone_answers_what_its_member_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few shots train less, so that fewer rows are scored."""
    monkeypatch.setitem(scored.LEAST, "untuned", 2)
    settings = [
        resolve_tree(
            {
                "task": "demo/request",
                "method": {"name": "prompt_tuning", "prompt_length": 3},
                "data": {"shots": shots, "validation_limit": 4},
                "train": {"steps": 20, "batch_size": 16, "eval_every": 20, "prompt_rate": 0.0},
                "model": {"dtype": "fp32"},
            }
        )
        for shots in (4, 64)
    ]
    together = train_together(settings, [tmp_path / "few", tmp_path / "more"])
    found = [record["baselines"]["untuned"]["n"] for record in together]
    assert found[0] < found[1] == train(settings[1], tmp_path / "alone")["baselines"]["untuned"]["n"]


def test_who_shares_a_pass() -> None:
    """Members of about equally long texts, on a CPU; all of them on an accelerator."""

    def passes(longest: list[int], rows: int = 16, device: str = "cpu") -> list[list[int]]:
        run: Any = SimpleNamespace(
            accelerator=SimpleNamespace(device=torch.device(device)),
            limit=None,
            slots=lambda member, part: member,
            has_room=lambda members, slots: True,
        )
        members: Any = longest
        return Run.chunks(run, members, [[0] * rows if length else [] for length in longest])

    assert passes([70, 70, 70, 70, 70, 70]) == [[0, 1, 2, 3], [4, 5]], "64 rows"
    assert passes([70, 200, 74, 75]) == [[0, 2, 3], [1]]
    assert passes([70, 78, 86]) == [[0, 1], [2]], "8 tokens x 16 rows are worth a pass, and no more"
    assert passes([70, 200, 0], rows=2) == [[0], [1]] and passes([70, 100], rows=2) == [[0, 1]]
    assert passes([70, 200, 0], device="cuda") == [[0, 1]]


def test_a_member_that_diverges_is_dropped_alone(tmp_path: Path) -> None:
    wild, tame = settings_of("train.prompt_rate=1e25", "train.warmup=0"), settings_of("train.warmup=0")
    first, second = train_together([wild, tame], [tmp_path / "wild", tmp_path / "tame"])
    assert first["status"] == "dropped" and "the loss is nan at step" in first["reason"]
    alone = train(tame, tmp_path / "alone")
    assert second["scores"] == alone["scores"] and second["steps_done"] == 12
    with pytest.raises(SoftPromptsError, match="the loss is nan at step"):
        train(wild, tmp_path / "wild-alone")
    assert results.read_record(tmp_path / "wild-alone")["status"] == "failed"


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    settings = [settings_of(*more) for more in MEMBERS[:3]]
    whole = [tmp_path / f"whole-{n}" for n in range(3)]
    train_together(settings, whole)
    outs = [tmp_path / f"killed-{n}" for n in range(3)]
    with pytest.raises(Killed):
        train_together(settings, outs, progress=KillAt(7))
    records = train_together(settings, outs, resume=True)
    for done, killed, record in zip(whole, outs, records, strict=True):
        assert (done / results.STEPS).read_bytes() == (killed / results.STEPS).read_bytes()
        for key, value in weights(done).items():
            assert torch.equal(weights(killed)[key], value), key
        assert record["scores"] == results.read_record(done)["scores"]
    assert train_together(settings, outs, resume=True) == records, "nothing is left to do"


def test_losers_are_dropped_and_it_is_said(tmp_path: Path) -> None:
    notes: list[str] = []

    class Listen(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    rates = ("train.prompt_rate=0.3", "train.prompt_rate=0", "train.prompt_rate=0.1", "train.prompt_rate=0.2")
    settings = [settings_of(rate, "train.offset_rate=0") for rate in rates]
    outs = [tmp_path / str(n) for n in range(4)]
    records = train_together(settings, outs, halving=Halving((1, 2)), progress=Listen())
    ended = [record["steps_done"] for record in records]
    assert sorted(ended) == [4, 4, 8, 12]
    for record, out in zip(records, outs, strict=True):
        assert results.read_record(out)["status"] == record["status"]
        if record["steps_done"] < 12:
            assert record["status"] == "dropped" and "test" not in record["scores"]
            assert "is not among the best" in record["reason"] and record["scores"]["validation"]["n"] == 8
            assert len(losses(out)) == record["steps_done"]
        else:
            assert record["status"] == "done" and record["scores"]["test"]["n"] == 8
    assert sum("dropped at step" in note for note in notes) == 3
    assert train_together(settings, outs, halving=Halving((1, 2)), resume=True) == records


def test_ties_keep_the_first_and_the_last_evaluation_drops_nobody() -> None:
    class Stub:
        def __init__(self, score: float, step: int) -> None:
            self.state = type("State", (), {"best_score": score, "step": step})
            self.plan = settings_of("train.eval_every=4").train

    def dropped(scores: list[float], step: int, **options: Any) -> list[int]:
        members: list[Any] = [Stub(score, step) for score in scores]
        return [members.index(member) for member, _ in Halving((1, 3), **options).losers(members)]

    assert dropped([0.5, 0.5, 0.5], 4) == [2] and dropped([0.1, 0.9, 0.5, 0.4], 4) == [3, 0]
    assert dropped([0.1, 0.9], 8) == [] and dropped([0.1, 0.9], 12) == [] and dropped([0.1, 0.9], 3) == []
    assert dropped([0.1, 0.9, 0.5, 0.4], 4, least=3) == [0] and dropped([], 4) == [] and dropped([0.1], 4) == []


def test_a_member_stops_by_itself(tmp_path: Path) -> None:
    settings = [
        settings_of("train.patience=1", "train.prompt_rate=0", "train.offset_rate=0", "train.eval_every=2"),
        settings_of("train.eval_every=2"),
    ]
    first, second = train_together(settings, [tmp_path / "a", tmp_path / "b"])
    assert (first["steps_done"], second["steps_done"]) == (4, 12)
    assert first["status"] == second["status"] == "done"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two folders have the same last name"):
        train_together([settings_of(), settings_of("seed=2")], [tmp_path / "a" / "run", tmp_path / "b" / "run"])
    one, other = settings_of(), settings_of("train.batch_size=5")
    with pytest.raises(UsageError, match=r"train\.batch_size=4 and train\.batch_size=5 cannot share a backbone"):
        train_together([one, other], [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "a").exists()
    check_fit([one, settings_of("seed=9", "method=dept")])
    assert fits(one, settings_of("train.prompt_rate=3")) and not fits(one, settings_of("train.steps=13"))


def test_the_backbone_runs_once_per_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = loop.Run.losses

    def counted(self: Any, training: Any, parts: Any) -> Any:
        encoder = self.backbone.model.get_encoder()
        handle = encoder.register_forward_hook(lambda module, args, out: calls.append(out[0].shape[0]))
        try:
            return plain(self, training, parts)
        finally:
            handle.remove()

    monkeypatch.setattr(loop.Run, "losses", counted)
    settings = [settings_of("train.steps=2", more[0]) for more in MEMBERS[:3]]
    train_together(settings, [tmp_path / str(n) for n in range(3)])
    assert calls == [3 * 4, 3 * 4] and isinstance(Member, type)
