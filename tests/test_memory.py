"""One prompt for all rows of a causal model: the same loss and gradients, fewer tokens."""

from typing import Any

import pytest
import torch
from tiny import NAMES, PAD, config_of, padded, prompted, scatter, text
from torch import Tensor
from torch.testing import assert_close

from softprompts import hooks
from softprompts.attach import adapters_of, attach, remembering, using
from softprompts.core import Prompt

DECODERS = ("llama", "gpt2", "llama-sequence")
LONG = 24


def step(network: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return (loss, logits, gradients) of a batch."""
    network.zero_grad()
    per_row = "Sequence" in type(network).__name__
    labels = torch.arange(len(ids)) % 2 if per_row else ids.masked_fill(mask == 0, -100)
    out = network(input_ids=ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    return out.loss, out.logits, [p.grad.clone() for p in network.parameters() if p.grad is not None]


def tokens_through(network: Any, run: Any) -> int:
    """Count the tokens that the first layer sees while `run` runs."""
    seen = []
    layer = network.base_model.layers[0] if hasattr(network.base_model, "layers") else network.base_model.h[0]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    run()
    handle.remove()
    return sum(seen)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("model", DECODERS)
def test_shared_and_prepended_are_the_same(model: str, method: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, (ids, mask) = prompted(model, method), padded(text(3, LONG - 4), side, 4)
    if model == "llama-sequence":
        network.config.pad_token_id = PAD
    shared = step(network, ids, mask)
    monkeypatch.setattr(hooks, "can_share", lambda *args: False)
    prepended = step(network, ids, mask)
    real = mask.bool() if shared[1].dim() == 3 else slice(None)
    assert_close(shared[0], prepended[0], atol=1e-5, rtol=0)
    assert_close(shared[1][real], prepended[1][real], atol=1e-5, rtol=0)
    assert len(shared[2]) == len(prepended[2]) > 0
    for one, other in zip(shared[2], prepended[2], strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_prompt_is_computed_once_per_step(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, ids = prompted(model, "accept"), text(4, 7)
    count = lambda: tokens_through(network, lambda: network(input_ids=ids))  # noqa: E731
    assert count() == 5 + 4 * 7
    monkeypatch.setattr(hooks, "can_share", lambda *args: False)
    assert count() == 4 * (5 + 7)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_adapters_of_a_mixed_batch_are_computed_once_each(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = prompted(model, "accept")
    attach(network, config_of("dept", prompt_length=2), "short")
    scatter(adapters_of(network).method("short"))
    adapters_of(network).softprompt_methods.requires_grad_(True)
    ids, mask = padded(text(4, LONG - 2), "left", 2)
    with using(network, ["short", "default", "__base__", "short"]):
        assert tokens_through(network, lambda: network(input_ids=ids, attention_mask=mask)) == 3 * 5 + 4 * LONG
        shared = step(network, ids, mask)
        monkeypatch.setattr(hooks, "can_share", lambda *args: False)
        prepended = step(network, ids, mask)
    assert_close(shared[0], prepended[0], atol=1e-5, rtol=0)
    for one, other in zip(shared[2], prepended[2], strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_cache_is_the_callers_only_if_wanted() -> None:
    network, ids = prompted("llama", "accept"), text()
    assert network(input_ids=ids, use_cache=False).past_key_values is None
    cache = network(input_ids=ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 5 + 7
    network.base_model.config.use_cache = False
    assert network(input_ids=ids).past_key_values is None


class OfTheText(Prompt):
    """A prompt that depends on the row."""

    length = 2
    per_row = True

    @staticmethod
    def count(**sizes: int) -> int:
        return 0

    def initialise(self, start: Any, vocabulary: Any) -> None:
        pass

    def forward(self, embeds: Tensor, mask: Tensor) -> Tensor:
        return embeds[:, :2] * 3


def test_prompts_that_depend_on_the_row_are_prepended_to_it() -> None:
    network, ids = prompted("llama", "prompt_tuning"), text(3)
    adapters_of(network).method().prompt = OfTheText()
    assert tokens_through(network, lambda: network(input_ids=ids)) == 3 * (2 + 7)
    whole = network(input_ids=ids).logits
    for row in range(3):
        assert_close(network(input_ids=ids[row : row + 1]).logits, whole[row : row + 1], atol=1e-5, rtol=0)


def test_recomputed_activations_fall_back() -> None:
    network, ids = prompted("llama", "accept"), text(3)
    expected = step(network, ids, torch.ones_like(ids))
    network.train()
    network.activation_checkpointing_enable({"use_reentrant": False})
    assert tokens_through(network, lambda: network(input_ids=ids, use_cache=False)) == 3 * (5 + 7)
    for one, other in zip(step(network, ids, torch.ones_like(ids))[2], expected[2], strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_remembered_prompts_answer_the_same(model: str, beams: int) -> None:
    network, (ids, mask) = prompted(model, "accept"), padded(text(3), "left", 2)
    attach(network, config_of("dept", prompt_length=2), "short")
    scatter(adapters_of(network).method("short"))
    plan = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=PAD, num_beams=beams)
    names = ["short", "default", "__base__"]

    def answers() -> list[Tensor]:
        found = []
        for name in ("default", "short"):
            adapters_of(network).activate(name)
            found += [network.generate(ids, attention_mask=mask, **plan) for _ in range(2)]
            found.append(network(input_ids=ids, attention_mask=mask).logits)
        with using(network, names):
            found.append(network.generate(ids, attention_mask=mask, **plan))
        return found

    plain = answers()
    with remembering(network):
        spent = tokens_through(network, lambda: plain_equal(plain, answers()))
        again = tokens_through(network, lambda: plain_equal(plain, answers()))
    assert spent - again == 5 + 2, "each adapter once, also for the mixture"
    assert adapters_of(network).hooks.memory.kept is None


def test_one_row_is_answered_from_memory() -> None:
    """The commonest service: one request after the other."""
    network, ids = prompted("llama", "accept"), text(1)
    plan = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    plain = [network(input_ids=ids).logits, network.generate(ids, **plan)]
    with remembering(network):
        first = tokens_through(network, lambda: plain_equal(plain[:1], [network(input_ids=ids).logits]))
        again = tokens_through(network, lambda: plain_equal(plain[:1], [network(input_ids=ids).logits]))
        assert first - again == 5 and again == ids.shape[1]
        plain_equal(plain[1:], [network.generate(ids, **plan)])


def plain_equal(plain: list[Tensor], remembered: list[Tensor]) -> None:
    for one, other in zip(plain, remembered, strict=True):
        assert_close(one, other, atol=1e-5, rtol=0)
