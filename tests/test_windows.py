"""Decoders whose attention reaches over a window of slots: padding and sharing change nothing there either."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from test_evaluate import WORDS, encoder_of, rows_of
from tiny import LLAMA, PAD, SHAPES, VOCABULARY, WIDTH, build, config_of, scatter, text
from torch import Tensor, nn
from torch.testing import assert_close

from softprompts import hooks
from softprompts.attach import adapters_of, attach, disabled, remembering, using
from softprompts.errors import UsageError
from softprompts.evaluate import rank_causal, rank_whole
from softprompts.shapes import attention_window, decoder_body

ROUNDING = 1e-5
"""fp32 sums in another order; the logits are of order 1."""
LENGTHS = (7, 3, 5)
"""Tokens of the rows of a batch."""
P = 5
WINDOWS = (4, 8, 12, 64)
"""Shorter than the prompt; than prompt and text; than those and the padding; longer than anything here."""
ENDS = dict(bos_token_id=2, eos_token_id=1)
PLAN: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=PAD)
NAMES = ["short", "default", "__base__"]


def mistral(window: int) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=window))


def gemma3(window: int) -> Any:
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**LLAMA, **ENDS, head_dim=8, sliding_window=window, layer_types=layers)
    return transformers.Gemma3ForCausalLM(config)


def qwen2(window: int) -> Any:
    more = dict(use_sliding_window=True, sliding_window=window, max_window_layers=1)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA, **more))


def gpt_neo(window: int) -> Any:
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=2, num_heads=4, intermediate_size=64, window_size=window,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, pad_token_id=PAD, **ENDS,
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config)


def llama4(window: int) -> Any:
    config = transformers.Llama4TextConfig(
        **LLAMA, **ENDS, head_dim=8, intermediate_size_mlp=64, num_local_experts=2, moe_layers=[],
        attention_chunk_size=window, no_rope_layers=[1, 0],
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


MODELS = {"mistral": mistral, "gemma3": gemma3}
MORE = {"qwen2": qwen2, "gpt-neo": gpt_neo, "llama4": llama4}


def prompted(model: str, window: int, method: str = "accept") -> Any:
    """Return a tiny model with an adapter of P = 5 and one of P = 2, all numbers large enough to tell apart."""
    network = {**MODELS, **MORE}[model](window).eval()
    for weight in network.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, 0.0, 0.2)
    attach(network, config_of("dept", prompt_length=2), "short")
    attach(network, config_of(method))
    scatter(network.prompt_adapter)
    return network


def ragged(side: str, lengths: Sequence[int] = LENGTHS) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return (ids, mask, the rows as (1, T) by themselves)."""
    rows = [text(1, length) for length in lengths]
    ids = torch.full((len(rows), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(ids.shape[1] - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[number, place], mask[number, place] = row[0], 1
    return ids, mask, rows


def real(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the (1, T, V) logits of the text of each row."""
    return [row[own.bool()][None] for row, own in zip(logits, mask, strict=True)]


def assert_rows(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, atol=ROUNDING, rtol=ROUNDING)


def alone(network: Any, rows: Sequence[Tensor], names: Sequence[str] = ("default",) * 3) -> list[Tensor]:
    """Return the logits of each row by itself: one row is never shared nor padded."""
    found = []
    for row, name in zip(rows, names, strict=True):
        with using(network, [name]):
            found.append(network(input_ids=row).logits)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("model", [*MODELS, *MORE])
def test_padding_changes_nothing(model: str, window: int, side: str) -> None:
    network, (ids, mask, rows) = prompted(model, window), ragged(side)
    expected = alone(network, rows)
    assert_rows(real(network(input_ids=ids, attention_mask=mask).logits, mask), expected)
    assert_rows(real(network(input_ids=ids, attention_mask=mask, use_cache=False).logits, mask), expected)
    tuples = decoder_body(network)(input_ids=ids, attention_mask=mask, return_dict=False)
    assert_rows(real(network.lm_head(tuples[0]), mask), expected)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("model", MODELS)
def test_a_row_alone_is_the_bare_model_behind_a_prompt(model: str, window: int) -> None:
    network, ids = prompted(model, window, "prompt_tuning"), text(1)
    embeds = network.get_input_embeddings()(ids)
    prompt = adapters_of(network).method().prompt(embeds, torch.ones_like(ids))
    found = network(input_ids=ids).logits
    with disabled(network):
        whole = network(inputs_embeds=torch.cat([prompt[None], embeds], 1)).logits
    assert_close(found, whole[:, P:], atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_are_those_of_the_rows_alone(model: str, window: int, side: str) -> None:
    network, (ids, mask, rows) = prompted(model, window), ragged(side)

    def gradients() -> list[Tensor]:
        found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        network.zero_grad()
        return found

    total = sum(network(input_ids=row, labels=row).loss * (row.shape[1] - 1) for row in rows)
    (total / sum(row.shape[1] - 1 for row in rows)).backward()
    expected = gradients()
    # The first token of a row answers nothing; behind padding on the left it would.
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    loss = network(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert_close(loss, total / sum(row.shape[1] - 1 for row in rows), atol=ROUNDING, rtol=ROUNDING)
    found = gradients()
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("model", MODELS)
def test_rows_of_several_adapters_are_as_if_alone(model: str, window: int, side: str) -> None:
    network, (ids, mask, rows) = prompted(model, window), ragged(side)
    expected = alone(network, rows, NAMES)
    for _ in range(2):
        with using(network, NAMES), remembering(network):
            assert_rows(real(network(input_ids=ids, attention_mask=mask).logits, mask), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", WINDOWS)
def test_texts_are_classified_as_if_alone(window: int, side: str) -> None:
    config = transformers.MistralConfig(**LLAMA, sliding_window=window, initializer_range=0.2)
    network, (ids, mask, rows) = transformers.MistralForSequenceClassification(config).eval(), ragged(side)
    attach(network, config_of("accept"))
    scatter(network.prompt_adapter)
    expected = torch.cat([network(input_ids=row).logits for row in rows])
    assert_close(network(input_ids=ids, attention_mask=mask).logits, expected, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("window", [8, 12, 64])
def test_a_batch_shares_its_prompt_unless_it_crosses_the_window(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, ids = prompted("mistral", window), text(3)
    shared = network(input_ids=ids).logits
    seen: list[int] = []
    handle = network.base_model.layers[0].register_forward_pre_hook(
        lambda m, args: seen.append(args[0][..., 0].numel())
    )
    network(input_ids=ids)
    handle.remove()
    assert sum(seen) == (P + 3 * 7 if window >= P + 7 else 3 * (P + 7))
    monkeypatch.setattr(hooks, "can_share", lambda *args: False)
    assert_close(network(input_ids=ids).logits, shared, atol=ROUNDING, rtol=ROUNDING)


def by_steps(network: Any, ids: Tensor, mask: Tensor, more: Tensor, cache: Any = None) -> list[Tensor]:
    """Return the logits of a batch (B, T), then of `more` (B, M) in steps of two tokens, with one cache."""
    out = network(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    found = [out.logits]
    for tokens in more.split(2, 1):
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        out = network(input_ids=tokens, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return found


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [4, 8, 64])
@pytest.mark.parametrize("model", [*MODELS, *MORE])
def test_a_cache_goes_on_behind_padding(model: str, window: int, side: str, given: bool) -> None:
    network, (ids, mask, rows), more = prompted(model, window), ragged(side), text(3, 5)
    cache = transformers.DynamicCache(config=network.config) if given else None
    first, *later = by_steps(network, ids, mask, more, cache)
    whole = alone(network, [torch.cat([row, new[None]], 1) for row, new in zip(rows, more, strict=True)])
    assert_rows(real(first, mask), [logits[:, :-5] for logits in whole])
    assert_rows(list(torch.cat(later, 1).split(1)), [logits[:, -5:] for logits in whole])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", MODELS)
def test_several_adapters_go_on_behind_padding(model: str, side: str) -> None:
    network, (ids, mask, rows), more = prompted(model, 8), ragged(side), text(3, 4)
    with using(network, NAMES):
        later = by_steps(network, ids, mask, more)[1:]
    whole = alone(network, [torch.cat([row, new[None]], 1) for row, new in zip(rows, more, strict=True)], NAMES)
    assert_rows(list(torch.cat(later, 1).split(1)), [logits[:, -4:] for logits in whole])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_inside_a_cache_that_outgrows_the_window_is_refused(side: str) -> None:
    network, (ids, mask, _) = prompted("mistral", 12), ragged(side)
    out = network(input_ids=ids, attention_mask=mask, use_cache=True)  # 12 slots: shared, padding behind the prompt
    longer = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    message = r"padding inside a cache of 12 slots beyond the attention window of 12; pass the whole texts without"
    with pytest.raises(UsageError, match=message):
        network(input_ids=text(3, 1), attention_mask=longer, past_key_values=out.past_key_values)


def test_a_cache_without_padding_outgrows_the_window() -> None:
    network, ids, more = prompted("mistral", 12), text(3), text(3, 6)
    later = by_steps(network, ids, torch.ones_like(ids), more)[1:]
    assert_close(torch.cat(later, 1), network(input_ids=torch.cat([ids, more], 1)).logits[:, -6:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_used_again_is_not_taken_for_packed(side: str) -> None:
    """A cropped and refilled cache has the order of the mask again."""
    network, (ids, mask, rows) = prompted("mistral", 12), ragged(side)
    cache = transformers.DynamicCache()
    wide = nn.functional.pad(ids, (1, 0)), nn.functional.pad(mask, (1, 0))
    network(input_ids=wide[0], attention_mask=wide[1], past_key_values=cache)
    cache.crop(-cache.get_seq_length())
    network(input_ids=ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    assert cache.get_seq_length() == P + 6
    more = network(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=cache).logits
    expected = alone(network, rows)
    kept = mask[:, 6:].bool()[:, 0]
    assert_close(
        more[kept][:, 0], torch.cat([logits[:, -1] for logits in expected])[kept], atol=ROUNDING, rtol=ROUNDING
    )


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("window", [4, 8, 13, 64])
@pytest.mark.parametrize("model", MODELS)
def test_generation_of_each_row_is_as_if_alone(model: str, window: int, more: dict, mixed: bool) -> None:
    network, (ids, mask, rows) = prompted(model, window), ragged("left")
    plan = {**PLAN, **more, "max_new_tokens": 5}
    names = NAMES if mixed else ["default"] * 3
    for _ in range(2):
        with using(network, names), remembering(network):
            written = network.generate(ids, attention_mask=mask, **plan)[:, -5:]
    for row, name, found in zip(rows, names, written, strict=True):
        with disabled(network) if name == "__base__" else using(network, [name]):
            assert torch.equal(network.generate(row, **plan)[0, -5:], found)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", [*MODELS, *MORE])
def test_generation_writes_the_likeliest_words(model: str, side: str) -> None:
    """Beside the bare row: what is written must be what forward passes without any cache prefer."""
    network, (ids, mask, rows) = prompted(model, 8), ragged(side)
    out = network.generate(
        ids, attention_mask=mask, max_new_tokens=5, output_logits=True, return_dict_in_generate=True, **PLAN
    )
    whole = [torch.cat([row, new[None, -5:]], 1) for row, new in zip(rows, out.sequences, strict=True)]
    expected = torch.cat([logits[:, -6:-1] for logits in alone(network, whole)])
    assert_close(torch.stack(out.logits, 1), expected, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("model", MODELS)
def test_a_conversation_goes_on_behind_padding(model: str) -> None:
    network, (ids, mask, _) = prompted(model, 8), ragged("left")
    plan = {**PLAN, "max_new_tokens": 3}
    first = network.generate(ids, attention_mask=mask, return_dict_in_generate=True, **plan)
    longer = torch.cat([first.sequences, text(3, 2)], 1)
    wider = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
    again = network.generate(longer, attention_mask=wider, past_key_values=first.past_key_values, **plan)
    assert torch.equal(again, network.generate(longer, attention_mask=wider, **plan))


def test_a_conversation_that_outgrows_the_window_is_refused_behind_padding() -> None:
    network, (ids, mask, _) = prompted("mistral", 16), ragged("left")
    first = network.generate(ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, **PLAN)
    wider = torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], 1)
    with pytest.raises(UsageError, match="padding inside a cache of 14 slots beyond the attention window of 16"):
        network.generate(
            first.sequences, attention_mask=wider, past_key_values=first.past_key_values, max_new_tokens=3, **PLAN
        )


def test_windows_are_read_from_the_config() -> None:
    for name in ("mistral", "gemma3", "qwen2", "gpt-neo", "llama4"):
        assert attention_window({**MODELS, **MORE}[name](9)) == 9, name
    for name in (*SHAPES, "gpt2", "opt"):
        assert attention_window(build(name)) is None, name
    off = transformers.Qwen2Config(**LLAMA, sliding_window=9)
    full = transformers.Gemma3TextConfig(
        **LLAMA, **ENDS, head_dim=8, sliding_window=9, layer_types=["full_attention"] * 2
    )
    for config in (off, full, transformers.MistralConfig(**LLAMA, sliding_window=None)):
        with torch.device("meta"):
            assert attention_window(transformers.AutoModelForCausalLM.from_config(config)) is None


@pytest.mark.parametrize("window", [P + 10, P + 12, P + 14, 64])
@pytest.mark.parametrize("make", [mistral, gemma3, gpt_neo])
@torch.no_grad()
def test_ranking_is_that_of_each_row_alone(make: Any, window: int) -> None:
    """A batch within the window, whose words go beyond it: training scores the validation rows like this."""
    torch.manual_seed(0)
    network = attach(make(window).eval(), config_of("accept", prompt_length=P), initialise=False)
    scatter(adapters_of(network).method())
    encoder, rows = encoder_of(network, "causal"), rows_of((10, 3, 6))
    together = rank_causal(encoder, rows, [0, 1, 2], WORDS)
    for row in range(3):
        alone = rank_whole(encoder, rows, [row], WORDS)
        assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)
