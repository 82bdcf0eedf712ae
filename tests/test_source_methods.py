"""ATTEMPT, MPT and TPT: prompts made from those of other tasks, and what each takes from where."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_evaluate import EXACT, WORDS, encoder_of, rows_of
from test_train import KillAt, Killed, settings_of
from tiny import LLAMA, WIDTH, WRITERS, build, config_of, forward, padded, prompted, scatter, text
from torch import Tensor
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from softprompts import results
from softprompts.attach import adapters_of, attach, remembering
from softprompts.backbone import embedded_path
from softprompts.checkpoint import WEIGHTS_FILE, load_adapter, read_tensors, save_adapter, write_adapter
from softprompts.core import MethodConfig
from softprompts.errors import UsageError
from softprompts.evaluate import rank_causal, rank_whole
from softprompts.export import encoder_outputs, export, prompt_embeds
from softprompts.loss import hide_answer
from softprompts.peft import SoftPromptConfig
from softprompts.registry import method_config
from softprompts.search import candidates, start_choices
from softprompts.train import train, train_together

ROUNDING = 1e-5
"""fp32 sums in another order; the logits are of order 1."""
OF_THE_TEXT = ("attempt", "tpt")
"""Methods whose prompt depends on the row."""


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, ...]:
    """Return the folders of three saved prompts of length 5."""
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder in folders:
        save_adapter(prompted("t5", "prompt_tuning"), folder)
    return tuple(map(str, folders))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random decoder-only model with the embedded tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("decoder"), AutoTokenizer.from_pretrained(embedded_path("t5-nano"))
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def vectors(folder: str) -> Tensor:
    return read_tensors(Path(folder))["prompt.vectors"]


def attached(config: MethodConfig, model: str = "t5") -> Any:
    return attach(build(model), config)


def prompt_of(network: Any) -> Any:
    return adapters_of(network).method().prompt


def twin_of(network: Any, model: str = "t5") -> Any:
    """Return the same backbone without a prompt."""
    twin, state = build(model), network.state_dict()
    twin.load_state_dict({key: state[key] for key in twin.state_dict()})
    return twin


# ------------------------------------------------------------------------------- what they look at


@pytest.mark.parametrize("name", OF_THE_TEXT)
def test_padding_is_not_text(name: str) -> None:
    prompt = prompt_of(prompted("t5", name, spread=0.3))
    embeds, mask = torch.randn(3, 6, WIDTH), torch.ones(3, 6, dtype=torch.long)
    pads, none = torch.full((3, 4, WIDTH), 9.0), torch.zeros(3, 4, dtype=torch.long)
    bare = prompt(embeds, mask)
    for order in ((1, 0), (0, 1)):
        texts = torch.cat([(embeds, pads)[i] for i in order], 1)
        masks = torch.cat([(mask, none)[i] for i in order], 1)
        assert_close(prompt(texts, masks), bare, atol=ROUNDING, rtol=0)
        assert (prompt(texts, torch.ones_like(masks)) - bare).abs().max() > 1e-2, "the padding would show"
    assert prompt(pads, none).isfinite().all(), "a row without any text"


@pytest.mark.parametrize("name", OF_THE_TEXT)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_answer_is_not_looked_at(model: str, name: str) -> None:
    """Decoder-only models read text and answer as one; the text's last logits must not depend on the answer."""
    network, ids = prompted(model, name), text(3)
    unlabelled = torch.full_like(ids, -100)

    def last(answer: Tensor, how: str) -> Tensor:
        whole = torch.cat([ids, answer], 1)
        labels = {"labels": torch.cat([unlabelled, answer], 1)} if how == "labels" else {}
        if how == "said":
            hide_answer(network, torch.ones_like(answer, dtype=torch.bool))
        with torch.no_grad():
            return network(input_ids=whole, **labels).logits[:, ids.shape[1] - 1]

    one, other, alone = text(3, 4), text(3, 4), network(input_ids=ids).logits[:, -1]
    for how in ("labels", "said"):
        assert_close(last(one, how), alone, atol=ROUNDING, rtol=0)
        assert_close(last(other, how), alone, atol=ROUNDING, rtol=0)
    assert (last(one, "not said") - last(other, "not said")).abs().max() > 1e-3, "the answer would show"
    assert adapters_of(network).hooks.answers == {}, "what is said holds for one call"


@pytest.mark.parametrize("name", OF_THE_TEXT)
def test_training_where_the_answer_is_not_said_is_refused(name: str) -> None:
    network, ids = prompted("llama", name), text(3)
    network.train()
    with pytest.raises(UsageError, match="must not see the answer; pass labels"):
        network(input_ids=ids)
    network(input_ids=ids, labels=ids).loss.backward()
    hide_answer(network, torch.ones(3, 2, dtype=torch.bool))
    network(input_ids=ids)
    with torch.no_grad():
        network(input_ids=ids)
    other = prompted("llama", "accept").train()
    other(input_ids=ids).logits.sum().backward()


def test_a_trainer_that_takes_the_labels_away_is_refused(tmp_path: Path) -> None:
    network, rows = prompted("llama", "attempt"), [{"input_ids": ids, "labels": ids} for ids in text(4).tolist()]
    settings = TrainingArguments(
        str(tmp_path), max_steps=1, label_smoothing_factor=0.1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    collate = lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}  # noqa: E731
    with pytest.raises(UsageError, match="label_smoothing_factor"):
        Trainer(network, settings, train_dataset=rows, data_collator=collate).train()


@pytest.mark.parametrize("name", OF_THE_TEXT)
@torch.no_grad()
def test_ranking_does_not_look_at_the_words(name: str) -> None:
    network = prompted("llama", name)
    encoder, rows = encoder_of(network, "causal"), rows_of()
    expected = rank_causal(encoder, rows, [0, 1, 2, 3], WORDS)
    assert_close(rank_whole(encoder, rows, [0, 1, 2, 3], WORDS), expected, **EXACT)


@pytest.mark.parametrize("name", OF_THE_TEXT)
def test_training_does_not_look_at_the_answer(
    name: str, monkeypatch: pytest.MonkeyPatch, decoder: Path, tmp_path: Path
) -> None:
    """The loop's own batches of a decoder-only model: as many tokens are looked at as the sources have."""
    from softprompts.data import Encoder
    from softprompts.methods.attempt import text_maximum

    looked, given = [], []

    def watched(embeds: Tensor, mask: Tensor) -> Tensor:
        looked.append(mask.sum(1).tolist())
        return text_maximum(embeds, mask)

    def batch(self: Encoder, rows: Any, chosen: Any) -> Any:
        given.append([len(rows.sources[i]) for i in chosen])
        return plain(self, rows, chosen)

    plain = Encoder.batch
    monkeypatch.setattr(Encoder, "batch", batch)
    monkeypatch.setattr(f"softprompts.methods.{name}.text_maximum", watched)
    settings = settings_of(*small_run(name, tmp_path, WIDTH), f"model.name={decoder}", "train.steps=2")
    train(settings, tmp_path / "run")
    assert looked[:2] == given[:2]


@pytest.mark.parametrize("name", OF_THE_TEXT)
@pytest.mark.parametrize("model", WRITERS)
def test_each_row_has_its_own_prompt(model: str, name: str) -> None:
    more = {"bank_size": 200} if name == "tpt" else {}  # out of a few rows all texts choose the same
    network, ids = attach(build(model), config_of(name, **more), initialise=False), text(3, 3)
    prompt = prompt_of(network)
    scatter(prompt, 0.3)
    with torch.no_grad():
        made = prompt(network.get_input_embeddings()(ids), torch.ones_like(ids))
    assert made.shape == (3, prompt.length, WIDTH)
    assert min((made[i] - made[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4
    plan = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    plain = network.generate(input_ids=ids, **plan)
    with remembering(network):
        assert torch.equal(network.generate(input_ids=ids, **plan), plain)
        shifted, mask = padded(ids, "left", 3)
        assert torch.equal(network.generate(input_ids=shifted, attention_mask=mask, **plan)[:, -4:], plain[:, -4:])


# ----------------------------------------------------------------------------------------- ATTEMPT


def test_attempt_reads_its_sources_and_starts_from_the_first(sources: tuple[str, ...]) -> None:
    config = config_of("attempt", source_prompts=sources)
    network = attached(config)
    prompt = prompt_of(network)
    for row, folder in zip(prompt.source_prompts, sources, strict=True):
        assert torch.equal(row, vectors(folder))
    assert torch.equal(prompt.target, vectors(sources[0]))
    assert not prompt.source_prompts.requires_grad
    assert sum(p.numel() for p in prompt.parameters()) == config.num_trainable(WIDTH) == 5 * 32 + 2 * 32 * 6
    assert method_config("attempt", {"source_prompts": f"{sources[0]}, {sources[1]}"}).source_prompts == sources[:2]


def test_the_target_enters_twice() -> None:
    """Where the attention is all on the target, the prompt is twice the target."""
    network = attach(build("t5"), config_of("attempt", temperature=1e-3), initialise=False)
    prompt, ids = prompt_of(network), text(1)
    scatter(network.prompt_adapter)
    with torch.no_grad():
        embeds, ones = network.get_input_embeddings()(ids), torch.ones_like(ids)
        query = torch.nn.functional.silu(embeds.amax(1) @ prompt.down) @ prompt.up
        prompt.target += 50 * query.sign()  # its largest entries point where the query does
        assert prompt.attention(embeds, ones)[0, -1] > 0.999
        assert_close(prompt(embeds, ones)[0], 2 * prompt.target, atol=1e-3, rtol=1e-3)


def test_the_temperature_follows_the_width() -> None:
    config = method_config("attempt", {"source_prompts": ("a",)})
    assert config.resolved(768).temperature == 2087 and config.resolved(512).temperature == 1391
    assert method_config("attempt", {"temperature": 7}).resolved(768).temperature == 7


def test_attention_trained_elsewhere_goes_with_other_sources(sources: tuple[str, ...], tmp_path: Path) -> None:
    before = attached(config_of("attempt", source_prompts=sources))
    scatter(prompt_of(before))
    save_adapter(before, tmp_path / "before")
    other = config_of("attempt", source_prompts=sources[1:], attention_from=str(tmp_path / "before"))
    prompt = prompt_of(attached(other))
    assert torch.equal(prompt.down, prompt_of(before).down) and torch.equal(prompt.up, prompt_of(before).up)
    assert torch.equal(prompt.target, vectors(sources[1])) and len(prompt.source_prompts) == 2
    whole = prompt_of(attached(config_of("attempt", source_prompts=sources, prompt_from=str(tmp_path / "before"))))
    assert torch.equal(whole.target, prompt_of(before).target) and torch.equal(whole.up, prompt_of(before).up)
    assert torch.equal(whole.source_prompts[2], vectors(sources[2])), "the sources are those named"


# --------------------------------------------------------------------------------------------- MPT


def test_mpt_starts_at_its_shared_prompt() -> None:
    network = attached(config_of("mpt"))
    prompt, ids = prompt_of(network), text()
    made = prompt(network.get_input_embeddings()(ids), torch.ones_like(ids))
    assert torch.equal(made, prompt.shared)
    rows = network.get_input_embeddings().weight
    assert all((rows == vector).all(1).any() for vector in made)
    forward(network, text(2, 24)).sum().backward()
    assert all((parameter.grad != 0).all() for parameter in (prompt.rows, prompt.columns))


def test_mpt_equals_pefts() -> None:
    """The prompt vectors of PEFT's multitask prompt tuning, of one task out of three, and their gradients."""
    settings = peft.MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, num_transformer_submodules=1, token_dim=WIDTH, num_tasks=3
    )
    theirs = peft.get_peft_model(build("t5"), settings).prompt_encoder["default"]
    ours = prompt_of(prompted("t5", "mpt"))
    with torch.no_grad():
        theirs.embedding.weight.copy_(ours.shared)
        theirs.prefix_task_cols[1].copy_(ours.rows.unsqueeze(1))
        theirs.prefix_task_rows[1].copy_(ours.columns.unsqueeze(0))
    expected = theirs(torch.arange(5).unsqueeze(0), torch.tensor([1]))[0]
    made = ours(torch.zeros(1, 1, WIDTH), torch.ones(1, 1, dtype=torch.long))
    assert_close(made, expected, atol=1e-6, rtol=0)
    made.square().sum().backward()
    expected.square().sum().backward()
    assert_close(ours.rows.grad, theirs.prefix_task_cols.grad[1, :, 0], atol=1e-4, rtol=1e-5)
    assert_close(ours.columns.grad, theirs.prefix_task_rows.grad[1, 0], atol=1e-4, rtol=1e-5)


def test_mpt_goes_on_with_the_shared_prompt_and_the_factors(tmp_path: Path) -> None:
    before = prompted("t5", "mpt")
    save_adapter(before, tmp_path)
    prompt = prompt_of(attached(config_of("mpt", prompt_from=str(tmp_path))))
    for name in ("shared", "rows", "columns"):
        assert torch.equal(getattr(prompt, name), getattr(prompt_of(before), name))


# --------------------------------------------------------------------------------------------- TPT


def test_only_the_chosen_rows_of_the_bank_move() -> None:
    network, ids = prompted("t5", "tpt"), text(1, 12)
    prompt = prompt_of(network)
    embeds, ones = network.get_input_embeddings()(ids), torch.ones_like(ids)
    chosen = prompt.chosen(embeds, ones)[0].tolist()
    scores = (prompt.bank @ embeds[0].amax(0)).tolist()
    assert chosen == sorted(sorted(range(8), key=lambda row: -scores[row])[:4]) and chosen != list(range(4))
    made = prompt(embeds, ones)[0]
    assert torch.equal(made, torch.cat([prompt.bank[chosen], prompt.soft]))
    before = prompt.bank.detach().clone()
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.1, weight_decay=0.0)
    forward(network, ids).square().sum().backward()
    optimizer.step()
    moved = (prompt.bank != before).any(1).nonzero().squeeze(1).tolist()
    assert moved == chosen


def test_the_bank_alone_and_then_with_soft_vectors(sources: tuple[str, ...], tmp_path: Path) -> None:
    first = attached(config_of("tpt", prompt_length=0))
    prompt = prompt_of(first)
    assert prompt.length == 4 and prompt.soft is None and [name for name, _ in prompt.named_parameters()] == ["bank"]
    forward(first, text()).sum().backward()
    save_adapter(first, tmp_path / "bank")
    config = config_of("tpt", prompt_length=5, bank_from=str(tmp_path / "bank"), soft_from=sources[1])
    second = prompt_of(attached(config))
    assert torch.equal(second.bank, prompt.bank) and torch.equal(second.soft, vectors(sources[1]))
    assert second.length == 4 + 5 and config.num_trainable(WIDTH) == (8 + 5) * WIDTH


def test_a_text_starts_the_soft_vectors_but_not_the_bank() -> None:
    network = build("t5")
    words = lambda text, add_special_tokens: {"input_ids": [7, 8]}  # noqa: E731
    attach(network, config_of("tpt", prompt_length=4, init="text", init_text="good bad"), tokenizer=words)
    prompt, rows = prompt_of(network), network.get_input_embeddings().weight
    assert torch.equal(prompt.soft, rows[[7, 8, 7, 8]])
    assert len({tuple(row.tolist()) for row in prompt.bank}) == 8, "a bank of repetitions offers no choice"


# ------------------------------------------------------------------------------------ all of them


def started(name: str, sources: tuple[str, ...], tmp_path: Path) -> MethodConfig:
    """Return a config that starts from everything it can start from."""
    if name == "attempt":
        return config_of(name, source_prompts=sources)
    if name == "tpt":
        save_adapter(prompted("t5", "tpt"), tmp_path / "bank")
        return config_of(name, prompt_length=5, bank_from=str(tmp_path / "bank"), soft_from=sources[0])
    save_adapter(prompted("t5", "mpt"), tmp_path / "shared")
    return config_of(name, prompt_from=str(tmp_path / "shared"))


@pytest.mark.parametrize("name", ["attempt", "mpt", "tpt"])
def test_a_saved_adapter_needs_nothing_it_started_from(name: str, sources: tuple[str, ...], tmp_path: Path) -> None:
    network, ids = attached(started(name, sources, tmp_path)), text()
    wrapped = peft.get_peft_model(twin_of(network), SoftPromptConfig(started(name, sources, tmp_path), "SEQ_2_SEQ_LM"))
    before, before_peft = forward(network, ids), forward(wrapped.eval(), ids)
    keep = tmp_path / "kept"
    save_adapter(network, keep / "ours")
    wrapped.save_pretrained(keep / "peft")
    for folder in tmp_path.iterdir():
        if folder != keep:
            shutil.rmtree(folder)
    assert torch.equal(forward(load_adapter(twin_of(network), keep / "ours"), ids), before)
    again = peft.PeftModel.from_pretrained(twin_of(network), keep / "peft")
    assert torch.equal(forward(again.eval(), ids), before_peft)
    with pytest.raises(UsageError, match="holds no adapter"):
        attached(adapters_of(network).configs["default"])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("attempt", {"source_prompts": ()}, r"attempt mixes trained prompts; set source_prompts=FOLDER,FOLDER"),
        ("attempt", {"prompt_length": 4}, r"source_prompts=.*one: its prompt is \(5, 32\).* needs \(4, 32\).*length=4"),
        ("attempt", {"source_prompts": ("nowhere",)}, "nowhere holds no adapter"),
        ("attempt", {"attention_from": "one"}, r"attention_from=.*one: its 'down' is missing, .* needs \(32, 6\)"),
        ("attempt", {"attention_from": "tried"}, r"attention_from=.*: its 'down' is \(32, 4\), .* needs \(32, 6\)"),
        ("attempt", {"source_prompts": ("tried",)}, "the prompt of attempt depends on the text"),
        ("tpt", {"bank_from": "one"}, r"bank_from=.*one: its 'bank' is missing, this one needs \(8, 32\)"),
        ("tpt", {"soft_from": "one"}, r"soft_from=.*one: its prompt is \(5, 32\) .* needs \(2, 32\)"),
        ("tpt", {"soft_from": "one", "prompt_length": 0}, "prompt_length=0 leaves no soft vectors"),
        ("mpt", {"prompt_from": "one"}, r"its prompt is \{'vectors': \(5, 32\)\}, this one needs \{'shared'"),
    ],
)
def test_what_cannot_be_a_start_is_refused(
    name: str, settings: dict, message: str, sources: tuple[str, ...], tmp_path: Path
) -> None:
    save_adapter(attached(config_of("attempt", source_prompts=sources, attention_width=4)), tmp_path / "tried")
    here = lambda value: str(tmp_path / value) if value in ("one", "tried") else value  # noqa: E731
    more = {key: here(value) if isinstance(value, str) else value for key, value in settings.items()}
    if name == "attempt":
        more["source_prompts"] = tuple(map(here, more.get("source_prompts", sources)))
    network = build("t5")
    with pytest.raises(UsageError, match=message) as caught:
        attach(network, config_of(name, **more))
    assert "\n" not in str(caught.value) and not hasattr(network, "prompt_adapter")


COMBINED: dict[str, dict[str, Any]] = {
    "attempt+dept": {
        "prompt": {"prompt_length": 5, "attention_width": 6},
        "offset": {"offset_positions": 24, "rank": 3},
    },
    "mpt+accept": {"prompt": {"prompt_length": 5}, "offset": {"offset_positions": 24, "offset_codewords": 3}},
    "tpt+adept": {"prompt": {"prompt_length": 2, "bank_size": 8, "top_k": 4}, "offset": {"rank": 3, "dropout": 0.0}},
}


@pytest.mark.parametrize("model", ["t5", "llama", "bert-sequence"])
@pytest.mark.parametrize("name", COMBINED)
def test_combined_with_an_offset(name: str, model: str, sources: tuple[str, ...], tmp_path: Path) -> None:
    settings = {key: dict(value) for key, value in COMBINED[name].items()}
    if name == "attempt+dept":
        settings["prompt"]["source_prompts"] = sources
    config = method_config(name, settings)
    network, ids = attached(config, model), text(2, 12)
    method = adapters_of(network).method()
    assert sum(p.numel() for p in method.parameters()) == config.num_trainable(WIDTH)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    for _ in range(2):  # an offset that starts at zero hides its first factor for one step
        optimizer.zero_grad()
        forward(network, ids).square().sum().backward()
        optimizer.step()
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key]) == (key == "prompt.source_prompts"), key
    save_adapter(network, tmp_path / "saved")
    expected = forward(network, ids)
    assert torch.equal(forward(load_adapter(twin_of(network, model), tmp_path / "saved"), ids), expected)
    pads, mask = padded(ids, "left", 5)
    logits = forward(network, pads, mask)
    assert_close(logits[:, -expected.shape[1] :] if model == "llama" else logits, expected, atol=1e-4, rtol=1e-4)


def test_combinations_share_the_length_of_the_offset() -> None:
    assert method_config("attempt+dept").resolved(768).prompt.prompt_length == 60
    assert method_config("mpt+accept").num_trainable(768) == 60 * 768 + 60 + 768 + 30_720
    assert method_config("tpt+adept").num_trainable(768) == 660 * 768 + 29_971
    assert method_config("attempt", {"prompt_length": 7}).resolved(768).prompt_length == 7


@pytest.mark.parametrize("name", ["attempt", "mpt", "tpt", *COMBINED])
def test_parts_of_a_task_are_parameters(name: str) -> None:
    config = method_config(name)
    method = config.build(WIDTH * 4)
    assert config.task_parts and set(config.task_parts) <= set(dict(method.named_parameters()))


def test_exports_refuse_prompts_of_the_text(tmp_path: Path) -> None:
    for name in OF_THE_TEXT:
        about = {"base_model_name_or_path": "t5-nano", "task_type": "SEQ_2_SEQ_LM"}
        save_adapter(prompted("t5", name), tmp_path / name, about=about)
        for target in ("prompt-tuning", "embeds", "baked"):
            with pytest.raises(UsageError, match=f"{name} makes its prompt from each text, so there is no table"):
                export(tmp_path / name, target, tmp_path / "out")
        network, ids = prompted("llama", name), text()
        inputs = torch.stack(prompt_embeds(network, ids))
        with torch.no_grad():
            logits = twin_of(network, "llama")(inputs_embeds=inputs).logits[:, -ids.shape[1] :]
        assert_close(logits, forward(network, ids).detach(), atol=ROUNDING, rtol=0)
        encoder, start = prompted("t5", name), torch.tensor([[0, 5, 9]]).expand(2, -1)
        plain = twin_of(encoder)(**encoder_outputs(encoder, ids), decoder_input_ids=start).logits
        assert_close(plain, forward(encoder, ids), atol=ROUNDING, rtol=0)
    save_adapter(prompted("t5", "mpt"), tmp_path / "mpt", about=about)
    assert export(tmp_path / "mpt", "prompt-tuning", tmp_path / "plain")["files"]
    table, p = read_table(tmp_path / "plain"), read_tensors(tmp_path / "mpt")
    assert_close(table, p["prompt.shared"] * torch.outer(p["prompt.rows"], p["prompt.columns"]))


def read_table(folder: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS_FILE)["prompt_embeddings"]


# ----------------------------------------------------------------------------------------- training


def small_run(name: str, folder: Path, width: int = 256) -> tuple[str, ...]:
    """Return the settings of a short run; ATTEMPT's sources are made first."""
    if name == "mpt":
        return ("method={name='mpt', prompt_length=4}", "train.rates={rows=0.4, columns=0.4}")
    if name == "tpt":
        return ("method={name='tpt', prompt_length=2, bank_size=12, top_k=4}",)
    made = [str(folder / f"source-{number}") for number in range(2)]
    for path in made:
        if not Path(path).exists():
            config = method_config("prompt_tuning", {"prompt_length": 4})
            method = config.build(width)
            scatter(method, 0.5)
            write_adapter(path, config, width, method, {}, {})
    return (f"method={{name='attempt', prompt_length=4, attention_width=5, source_prompts={json.dumps(made)}}}",)


def test_killed_and_resumed_without_its_sources(tmp_path: Path) -> None:
    settings = settings_of(*small_run("attempt", tmp_path))
    whole = train(settings, tmp_path / "whole")
    with pytest.raises(Killed):
        train(settings, tmp_path / "run", progress=KillAt(6))
    for number in range(2):
        shutil.rmtree(tmp_path / f"source-{number}")
    record = train(settings, tmp_path / "run", resume=True)
    weights = [(tmp_path / run / results.ADAPTER / WEIGHTS_FILE).read_bytes() for run in ("whole", "run")]
    assert weights[0] == weights[1] and record["scores"] == whole["scores"]
    assert record["num_trainable"] == 4 * 256 + 2 * 256 * 5


def test_members_of_a_population_are_as_if_alone(tmp_path: Path) -> None:
    names = ("attempt", "mpt", "tpt", "attempt")
    every = [settings_of(*small_run(name, tmp_path), f"seed={seed}") for seed, name in enumerate(names)]
    together = train_together(every, [tmp_path / f"together-{n}" for n in range(4)])
    for number, settings in enumerate(every):
        alone = train(settings, tmp_path / f"alone-{number}")
        steps = [(tmp_path / f"{how}-{number}" / results.STEPS).read_text() for how in ("alone", "together")]
        mine, beside = ([json.loads(line)["loss"] for line in lines.splitlines() if "loss" in line] for lines in steps)
        # fp32 sums in another order; AdamW carries the last digits on.
        assert_close(torch.tensor(beside), torch.tensor(mine), atol=1e-2, rtol=2e-2)
        assert together[number]["num_trainable"] == alone["num_trainable"]


@pytest.mark.parametrize("name", ["attempt", "mpt", "tpt"])
def test_the_search_has_candidates(name: str, tmp_path: Path) -> None:
    found = candidates(settings_of(*small_run(name, tmp_path)), 3)
    assert len({one.train.prompt_rate for one in found}) == 3


@pytest.mark.parametrize("name", OF_THE_TEXT)
def test_a_compiled_decoder_cannot_be_told_the_answer(name: str, decoder: Path, tmp_path: Path) -> None:
    settings = settings_of(*small_run(name, tmp_path, WIDTH), f"model.name={decoder}", "model.compile=true")
    with pytest.raises(UsageError, match=f"model.compile=true: the prompt of {name} is made from the text"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_search_tries_only_starts_that_can_be_had() -> None:
    assert start_choices(method_config("accept")) == ["kaiming", "vocabulary"]
    assert start_choices(method_config("accept", {"weighting": "softmax"})) == []
    assert start_choices(method_config("accept", {"codebooks_from": "somewhere"})) == []
