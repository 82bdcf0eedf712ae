"""Sizes from the budget: the paper's Table 12, the other published counts, and formula = what is built."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import NAMES, WIDTH, config_of

from softprompts.errors import UsageError
from softprompts.methods.accept import AcceptConfig
from softprompts.methods.adept import ADePTConfig
from softprompts.methods.attempt import AttemptConfig
from softprompts.methods.dept import DePTConfig
from softprompts.methods.mpt import MPTConfig
from softprompts.methods.prompt_tuning import PromptTuningConfig
from softprompts.methods.tpt import TPTConfig
from softprompts.registry import method_config, method_from_dict, methods

T5_BASE = 768

# Paper: Table 12. Subspaces, codewords, total parameters as printed.
SCPP_ROWS = [
    (48, 12, 74_496), (24, 20, 74_880), (12, 30, 75_360), (8, 36, 75_648), (6, 40, 75_840), (4, 45, 76_080),
    (3, 48, 76_224), (2, 51, 76_008), (1, 55, 76_260),
]  # fmt: skip
SCAP_ROWS = [
    (48, 2, 72_192), (24, 4, 73_728), (12, 8, 76_800), (8, 10, 74_240), (6, 13, 76_032), (4, 17, 76_544),
    (3, 20, 76_800), (2, 24, 76_800), (1, 30, 76_800),
]  # fmt: skip


@pytest.mark.parametrize(("subspaces", "codewords", "printed"), SCPP_ROWS)
def test_table_12_scpp_with_the_low_rank_half(subspaces: int, codewords: int, printed: int) -> None:
    config = method_config("accept+dept", {"prompt": {"prompt_subspaces": subspaces}})
    assert config.resolved(T5_BASE).prompt.prompt_codewords == codewords
    assert config.num_trainable(T5_BASE) == printed


@pytest.mark.parametrize(("subspaces", "codewords", "printed"), SCAP_ROWS)
def test_table_12_scap_with_the_free_prompt(subspaces: int, codewords: int, printed: int) -> None:
    config = method_config("prompt_tuning+accept", {"offset": {"offset_subspaces": subspaces}})
    assert config.resolved(T5_BASE).offset.offset_codewords == codewords
    assert config.num_trainable(T5_BASE) == printed


@pytest.mark.parametrize(
    ("config", "width", "count"),
    [
        (AcceptConfig(), 768, 74_880),
        (AcceptConfig(offset_positions=348), 768, 44_160 + 29_280),
        (AcceptConfig(prompt_length=40, offset_positions=512), 768, 74_176),
        (AcceptConfig(prompt_length=40, offset_positions=256), 512, 50_304),
        (AcceptConfig(), 512, 49_920),
        (AcceptConfig(), 1024, 98_816),
        (PromptTuningConfig(), 768, 76_800),
        (DePTConfig(), 768, 76_800),
        (DePTConfig(prompt_length=40), 768, 76_800),
        (DePTConfig(prompt_length=80), 768, 76_800),
        (DePTConfig(offset_positions=512), 768, 76_800),
        (DePTConfig(offset_positions=348, rank=30), 768, 79_560),
        (DePTConfig(prompt_length=40, rank=60, offset_positions=64), 4096, 413_440),
        (ADePTConfig(), 768, 76_051),
        (ADePTConfig(prompt_length=40), 768, 76_061),
        (ADePTConfig(prompt_length=20), 768, 76_071),
        (ADePTConfig(prompt_length=80), 768, 76_041),
        (AttemptConfig(), 768, 76_800 + 153_600),
        (AttemptConfig(source_prompts=("a",) * 6), 768, 230_400),
        (MPTConfig(), 768, 77_668),
        (TPTConfig(), 768, 537_600),
        (TPTConfig(prompt_length=0), 768, 460_800),
    ],
)
def test_published_counts(config, width: int, count: int) -> None:
    assert config.num_trainable(width) == count


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_is_what_is_built(name: str) -> None:
    for config, width in ((config_of(name), WIDTH), (method_config(name), T5_BASE)):
        assert sum(p.numel() for p in config.build(width).parameters()) == config.num_trainable(width)


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_being_written(name: str) -> None:
    config = config_of(name).resolved(WIDTH)
    assert method_from_dict(config.to_dict()) == config
    assert config.resolved(WIDTH) == config


@given(
    prompt=st.integers(1, 90), positions=st.integers(1, 600), k=st.sampled_from([1, 2, 4, 8, 16]),
    width=st.sampled_from([64, 128, 512, 768]),
)  # fmt: skip
def test_the_budget_is_used_but_never_exceeded(prompt: int, positions: int, k: int, width: int) -> None:
    config = AcceptConfig(
        prompt_length=prompt, prompt_subspaces=k, offset_positions=positions, offset_subspaces=k, budget_tokens=100
    )
    try:
        count = config.num_trainable(width)
    except UsageError as error:
        assert "too small for one codeword" in str(error)
        return
    assert count <= 100 * width
    for change in ({"prompt_codewords": 1}, {"offset_codewords": 1}):
        sized = config.resolved(width)
        one_more = {key: getattr(sized, key) + more for key, more in change.items()}
        part = "prompt_part" if "prompt_codewords" in change else "offset_part"
        share = prompt if part == "prompt_part" else 100 - prompt
        assert getattr(sized.updated(**one_more), part)(width).num_trainable > share * width


def test_parts_alone_take_the_whole_budget() -> None:
    scpp, scap = AcceptConfig(offset_positions=0), AcceptConfig(prompt_length=0)
    assert scpp.resolved(768).prompt_codewords == 34 and scpp.num_trainable(768) == 34 * (768 + 60 * 24)
    assert scap.resolved(768).offset_codewords == 60 and scap.num_trainable(768) == 76_800


@pytest.mark.parametrize(
    ("name", "settings", "width", "message"),
    [
        ("accpet", {}, 768, "unknown method 'accpet'; did you mean 'accept'?"),
        ("accept", {"prompt_lenght": 3}, 768, "unknown setting 'prompt_lenght'; did you mean 'prompt_length'?"),
        ("accept", {"prompt_length": -3}, 768, "prompt_length=-3 cannot be used"),
        ("accept", {"weighting": "mean"}, 768, "weighting='mean' cannot be used"),
        ("accept", {"prompt_subspaces": 25}, 768, "prompt_subspaces=25 does not divide the model width 768; try 24"),
        ("accept", {"offset_subspaces": 3}, 512, "offset_subspaces=3 does not divide the model width 512; try 2 or 4"),
        ("accept", {"budget_tokens": 60}, 768, "budget_tokens=60 leaves nothing for the offset"),
        ("accept", {"budget_tokens": 61}, 768, "too small for one codeword"),
        ("dept", {"budget_tokens": 61}, 768, "too small for rank 1"),
        ("adept", {"budget_tokens": 61}, 768, "too small for rank 1"),
        ("accept+dept", {"rank": 3}, 768, "in 'accept+dept' write prompt.rank or offset.rank"),
        ("accept+prompt_tuning", {}, 768, "prompt_tuning adds nothing"),
        ("accept+dept", {"prompt": {"prompt_length": 0}}, 768, "accept prepends nothing"),
        ("tpt", {"top_k": 601}, 768, "top_k=601 vectors cannot be taken from a bank of bank_size=600"),
    ],
)
def test_impossible_sizes_say_the_way_out(name: str, settings: dict, width: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        method_config(name, settings).build(width)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to train"):
        AcceptConfig(prompt_length=0, offset_positions=0).build(768)
    assert "none" in methods()
