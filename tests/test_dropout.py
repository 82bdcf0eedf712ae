"""The backbone's dropout on a CPU: torch's distribution, torch's seeds, the same mask on the way back."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import KillAt, Killed, settings_of
from tiny import BERT, GPT2, T5, forward, scatter, text
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from softprompts import dropout as module
from softprompts import results
from softprompts.attach import attach, disabled
from softprompts.backbone import embedded_path
from softprompts.checkpoint import WEIGHTS_FILE
from softprompts.dropout import Masked, draw, drawing, fast_dropout
from softprompts.methods.prompt_tuning import PromptTuningConfig
from softprompts.train import train

SIZE = (60, 700)
SIGMAS = 5.0
"""One test in a million fails by chance, and seeds are fixed."""


@pytest.fixture(params=[512, 524_288], ids=["blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "BLOCK", request.param)
    yield


def fast(x: Tensor, p: float, training: bool = True, **more: Any) -> Tensor:
    with drawing():
        return functional.dropout(x, p, training, **more)


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten().double(), other.flatten().double()]))[0, 1])


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.usefixtures("blocks")
def test_rate_scale_mean_and_variance(p: float) -> None:
    x = torch.ones(SIZE, dtype=torch.float64)
    out = fast(x, p)
    n = x.numel()
    kept = out != 0
    assert abs(int(kept.sum()) - n * (1 - p)) < SIGMAS * math.sqrt(n * p * (1 - p)) + n * 2**-17
    assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-12, atol=0)
    spread = math.sqrt(p / (1 - p))
    assert abs(float(out.mean()) - 1) < SIGMAS * spread / math.sqrt(n) + 2**-17 / (1 - p)
    fourth = (p**4 + p * (1 - p) ** 3) / (1 - p) ** 3 - spread**4  # variance of the squared deviation
    assert abs(float((out - 1).square().mean()) - spread**2) < SIGMAS * math.sqrt(fourth / n) + 2**-16 / (1 - p) ** 2


def test_the_rate_is_exact_to_16_bits() -> None:
    """All 65,536 values of a draw, once each: as many are kept as 1 - p says."""

    class Counting:
        def __init__(self, seed: int) -> None:
            pass

        def random_raw(self, words: int) -> Any:
            return torch.arange(65_536, dtype=torch.int32).to(torch.uint16).numpy().view("uint64")

    for p in (0.1, 0.25, 1e-4, 1 - 1e-6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.np.random, "SFC64", Counting)
            kept = int(draw(torch.Size([65_536]), p).sum())
        assert abs(kept / 65_536 - (1 - p)) <= 2**-16 and kept > 0, (p, kept)


def test_elements_and_draws_are_independent() -> None:
    """Correlations between neighbours in either direction, at distances of the words and blocks, and between draws."""
    p = 0.3
    one, other = draw(torch.Size(SIZE), p), draw(torch.Size(SIZE), p)
    bound = SIGMAS / math.sqrt(one.numel())
    assert abs(correlation(one, other)) < bound
    flat = one.flatten()
    for distance in (1, 2, 3, 4, 5, 8, 16, 32, SIZE[1], 4096):
        assert abs(correlation(flat[:-distance], flat[distance:])) < bound * 1.1, distance
    counts = one.view(-1, 4).sum(1).bincount(minlength=5)
    expected = torch.tensor([math.comb(4, k) * (1 - p) ** k * p ** (4 - k) for k in range(5)]) * counts.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 30, "chi squared with 4 degrees of freedom"


def test_consecutive_seeds_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = iter(range(400))
    monkeypatch.setattr(torch.Tensor, "random_", lambda self: self.fill_(next(seeds)))
    masks = torch.stack([module.draw(torch.Size([256]), 0.1).double() for _ in range(400)])
    found = correlation(masks[:-1], masks[1:])
    assert abs(found) < SIGMAS / math.sqrt(masks[1:].numel())


@pytest.mark.usefixtures("blocks")
def test_the_seed_decides() -> None:
    x = torch.rand(SIZE) + 1
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append((fast(x, 0.2), fast(x, 0.2)))
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])
    assert not torch.equal(outs[0][0], outs[2][0]) and not torch.equal(outs[0][0], outs[0][1])


def test_blocks_and_threads_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    outs = []
    for block, threads in ((524_288, 1), (1024, 1), (524_288, 2)):
        monkeypatch.setattr(module, "BLOCK", block)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        outs.append(fast(torch.ones(SIZE), 0.1))
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_a_saved_random_state_continues() -> None:
    x = torch.ones(SIZE)
    fast(x, 0.1)
    state = torch.get_rng_state()
    before = [fast(x, 0.1) for _ in range(3)]
    torch.manual_seed(99)
    torch.set_rng_state(state)
    assert all(torch.equal(fast(x, 0.1), each) for each in before)


@pytest.mark.usefixtures("blocks")
def test_the_gradient_uses_the_same_mask() -> None:
    x = torch.randn(SIZE, requires_grad=True)
    out = fast(x, 0.4)
    upstream = torch.randn(SIZE)
    out.backward(upstream)
    assert x.grad is not None
    kept = out != 0
    assert 0.5 < float(kept.double().mean()) < 0.7
    assert_close(x.grad, torch.where(kept, upstream / 0.6, 0.0))
    double = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    keep = draw(double.shape, 0.5)
    assert torch.autograd.gradcheck(lambda x: Masked.apply(x, keep, 2.0), double)
    assert torch.autograd.gradgradcheck(lambda x: Masked.apply(x, keep, 2.0), double)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    x = torch.randn(SIZE, dtype=dtype, requires_grad=True)
    out = fast(x, 0.1)
    out.sum().backward()
    assert out.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    kept = out != 0
    assert_close(out[kept], (x.detach().double() / 0.9).to(dtype)[kept])
    assert abs(float(kept.double().mean()) - 0.9) < 0.01


def test_shapes_and_layouts() -> None:
    x = torch.randn(6, 10, 8).transpose(0, 1)
    out = fast(x, 0.5)
    assert out.shape == x.shape and torch.equal(out[out != 0], (2 * x)[out != 0])
    for shape in ((), (1,), (0, 4), (3,), (5, 1, 7)):
        assert fast(torch.ones(shape), 0.5).shape == shape


def test_what_is_torchs_own() -> None:
    """Evaluation, p of 0 and 1, in place, integers: as outside."""
    x = torch.randn(8, 8)
    layer = nn.Dropout(0.5)
    with drawing():
        assert layer.eval()(x) is x or torch.equal(layer(x), x)
        assert not torch.equal(layer.train()(x), x)
        assert torch.equal(functional.dropout(x, 0.0), x) and not functional.dropout(x, 1.0).any()
        state = torch.get_rng_state()
        changed = x.clone()
        functional.dropout(changed, 0.5, True, True)
        torch.set_rng_state(state)
    expected = x.clone()
    functional.dropout(expected, 0.5, True, True)
    assert torch.equal(changed, expected)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fast(x, 1.5)


def test_after_the_block_all_is_as_before() -> None:
    x = torch.ones(50)

    def plain() -> Tensor:
        torch.manual_seed(1)
        return functional.dropout(x, 0.5)

    before = plain()
    with pytest.raises(RuntimeError), drawing():
        assert not torch.equal(plain(), before)
        raise RuntimeError
    assert torch.equal(plain(), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_draw_the_same(reentrant: bool) -> None:
    """Checkpointing restores torch's random state and runs the layer again inside the backward pass."""
    layer = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.5))
    x = torch.randn(32, 16)
    found = []
    for recompute in (False, True):
        torch.manual_seed(5)
        source = x.clone().requires_grad_()
        with drawing():
            out = checkpoint(layer, source, use_reentrant=reentrant) if recompute else layer(source)
            out.square().sum().backward()
        found.append((out.detach(), source.grad, layer[0].weight.grad.clone()))
        layer.zero_grad()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 1.0},
    "added": {"attn_mask": torch.arange(81.0).view(1, 1, 9, 9).sin()},
    "hidden": {"attn_mask": torch.ones(9, 9, dtype=torch.bool).triu(-2)},
}


@pytest.mark.parametrize("case", SCORES)
def test_attention_is_torchs_with_another_mask(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropping anything the same outputs and gradients; with it the mean over many draws is the same."""
    more = SCORES[case]
    inputs = [torch.randn(1, 3, 9, 4, requires_grad=True) for _ in range(3)]
    expected = functional.scaled_dot_product_attention(*inputs, **more)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    with drawing():
        many = functional.scaled_dot_product_attention(
            *(x.expand(4000, -1, -1, -1) for x in inputs), dropout_p=0.2, **more
        )
        error = (many.mean(0) - expected[0]).abs() / (many.std(0) / 4000**0.5)
        assert float(error.detach().max()) < SIGMAS and float(many.std(0).detach().min()) > 0
        monkeypatch.setattr(module, "draw", lambda shape, p: torch.ones(shape, dtype=torch.uint8))
        out = functional.scaled_dot_product_attention(*inputs, dropout_p=1e-9, **more)
    assert_close(out, expected)
    for mine, theirs in zip(torch.autograd.grad(out.square().sum(), inputs), wanted, strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fill", [False, -torch.inf])
def test_rows_that_see_nothing_are_torchs_own(fill: Any) -> None:
    mask = torch.ones(5, 5, dtype=torch.bool) if fill is False else torch.zeros(5, 5)
    mask[2] = fill
    inputs = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    with drawing():
        out = functional.scaled_dot_product_attention(*inputs, attn_mask=mask, dropout_p=0.1)
    assert out.isfinite().all() and not out[:, :, 2].any()


def dropping(kind: str) -> Any:
    """Return a tiny model with dropout everywhere."""
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(**{**T5, "dropout_rate": 0.1}))
    if kind == "bert":
        return BertForSequenceClassification(
            BertConfig(**{**BERT, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})
        )
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    return GPT2LMHeadModel(GPT2Config(**{**GPT2, **rates}))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["t5", "bert", "gpt2"])
def test_nothing_in_a_model_draws_the_slow_way(kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Bernoulli numbers are drawn in a step, and the mean over many draws is that of torch's dropout."""
    model = dropping(kind)
    model.set_attn_implementation(implementation)
    attach(model, PromptTuningConfig(prompt_length=3))
    scatter(model.prompt_adapter, 0.5)
    ids = text(2, 6)
    model.train()
    with torch.profiler.profile() as profile, fast_dropout(model):
        forward(model, ids).square().mean().backward()
    names = {event.key for event in profile.key_averages()}
    assert not {name for name in names if "bernoulli" in name or "native_dropout" in name}, names
    assert "Masked" in names
    rows = 400
    # Without the prompt: what decoders compute of it once is dropped alike in all rows, by torch too.
    with torch.no_grad(), disabled(model):
        with fast_dropout(model):
            mine = forward(model, ids.repeat(rows, 1))
        theirs = forward(model, ids.repeat(rows, 1))
    mine, theirs = (out.view(rows, -1) for out in (mine, theirs))
    error = (mine.mean(0) - theirs.mean(0)).abs() / ((mine.var(0) + theirs.var(0)) / rows).sqrt()
    assert float(error.max()) < SIGMAS
    assert 0.8 < float(mine.var(0).mean() / theirs.var(0).mean()) < 1.25


def test_where_it_is_used() -> None:
    def used(model: Any, **more: Any) -> bool:
        with fast_dropout(model, **more):
            return functional.dropout is module.dropout

    assert used(dropping("t5")) and not used(dropping("t5"), compiled=True)
    assert not used(T5ForConditionalGeneration(T5Config(**T5))), "nothing to drop"
    assert not used(dropping("t5").to("meta")), "not on the CPU"


def test_other_threads_have_torchs_own() -> None:
    """Two threads inside, one outside; torch's functions are back when the last one leaves."""
    own, x = functional.dropout, torch.ones(1000)

    def drawn(inside: bool) -> Tensor:
        torch.manual_seed(1)
        with drawing() if inside else nullcontext():
            return functional.dropout(x, 0.5)

    mine, theirs = drawn(True), drawn(False)
    assert not torch.equal(mine, theirs)
    with ThreadPoolExecutor(1) as pool, drawing():
        assert torch.equal(pool.submit(drawn, False).result(), theirs)
        assert torch.equal(pool.submit(drawn, True).result(), mine)
        with drawing():
            pass
        assert torch.equal(drawn(False), mine), "still inside"
    assert functional.dropout is own and not module._inside


def test_gradients_of_a_checkpointed_model_are_those_of_a_plain_one() -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = dropping("t5")
        attach(model, PromptTuningConfig(prompt_length=3))
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        ids = torch.arange(3, 15).view(2, 6)
        torch.manual_seed(1)
        with fast_dropout(model):
            forward(model, ids, use_cache=False).square().mean().backward()
        found.append(model.prompt_adapter.method().prompt.vectors.grad)
    assert found[0].abs().sum() > 0
    assert_close(found[0], found[1], atol=1e-7, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 with dropout and the embedded tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_path("t5-nano"))
    path = tmp_path_factory.mktemp("models") / "t5"
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**{**T5, "vocab_size": len(tokenizer), "dropout_rate": 0.1})).save_pretrained(
        path
    )
    tokenizer.save_pretrained(path)
    return path


def test_killed_and_resumed_equals_uninterrupted(folder: Path, tmp_path: Path) -> None:
    settings = settings_of(f"model.name={folder}")
    train(settings, tmp_path / "whole")
    with pytest.raises(Killed):
        train(settings, tmp_path / "killed", progress=KillAt(6))
    train(settings, tmp_path / "killed", resume=True)
    for name in (results.STEPS, f"{results.ADAPTER}/{WEIGHTS_FILE}"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_training_steps_draw_fast_and_evaluations_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    plain = module.draw
    monkeypatch.setattr(module, "draw", lambda shape, p: drawn.append(1) or plain(shape, p))
    train(settings_of(f"model.name={folder}", "train.steps=4"), tmp_path)
    # Encoder and decoder: embeddings, end, and per layer one in the feed-forward part beside those of each block.
    assert len(drawn) == 4 * (2 + 2 * (2 + 2) + 2 + 2 * (4 + 2))
    assert functional.dropout is not module.dropout
