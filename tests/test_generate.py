"""`generate` of prompted decoder-only models: caches of every kind, lengths, candidates, what it is given."""

from typing import Any

import pytest
import torch
from tiny import build, config_of, prompted, scatter, text
from torch.testing import assert_close
from transformers import GenerationConfig

from softprompts.attach import attach, detach, disabled
from softprompts.errors import UsageError

DECODERS = ("llama", "gpt2")
PLAN: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("method", ["accept", "adept", "prompt_tuning"])
@pytest.mark.parametrize("model", ["t5", *DECODERS])
def test_a_static_cache_changes_nothing(model: str, method: str) -> None:
    network, ids = prompted(model, method), text()
    for more in ({}, {"num_beams": 3}):
        plan = {**PLAN, **more, "max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
        dynamic = network.generate(input_ids=ids, **plan)
        static = network.generate(input_ids=ids, cache_implementation="static", **plan)
        assert torch.equal(static.sequences, dynamic.sequences)
        assert_close(static.logits, dynamic.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", DECODERS)
def test_candidates_from_the_text_change_nothing(model: str) -> None:
    network = prompted(model, "accept")
    for _ in range(6):
        ids = text(1, 5).repeat(1, 4)  # repetitive, so that candidates are found
        plan = {**PLAN, "max_new_tokens": 4}
        greedy = network.generate(input_ids=ids, **plan)
        assert torch.equal(network.generate(input_ids=ids, prompt_lookup_num_tokens=3, **plan), greedy)
        kept = network.generate(input_ids=ids, prompt_lookup_num_tokens=3, return_dict_in_generate=True, **plan)
        assert torch.equal(kept.sequences, greedy)


@pytest.mark.parametrize("model", DECODERS)
def test_lengths_count_the_text(model: str) -> None:
    network, ids = prompted(model, "prompt_tuning"), text(2, 7)
    expected = network.generate(input_ids=ids, max_new_tokens=6, **PLAN)
    assert expected.shape == (2, 13)
    assert torch.equal(network.generate(ids, max_length=13, **PLAN), expected)
    said = GenerationConfig(max_length=13, **PLAN)
    assert torch.equal(network.generate(ids, said), expected)
    assert torch.equal(network.generate(ids, generation_config=said), expected)
    network.generation_config.max_length = 13
    assert torch.equal(network.generate(ids, **PLAN), expected)
    with pytest.raises(UsageError, match="max_length=7 leaves nothing to generate after 7 tokens"):
        network.generate(ids, max_length=7, **PLAN)
    first = expected[0, 7].item()
    ends = {**PLAN, "eos_token_id": first}
    assert network.generate(ids[:1], max_length=13, **ends).shape == (1, 8)
    assert network.generate(ids[:1], max_length=13, min_length=12, **ends).shape[1] >= 12


@pytest.mark.parametrize("model", DECODERS)
def test_embeddings_instead_of_ids(model: str) -> None:
    network, ids = prompted(model, "accept"), text()
    expected = network.generate(input_ids=ids, max_new_tokens=4, **PLAN)
    embeds = network.get_input_embeddings()(ids)
    assert torch.equal(network.generate(inputs_embeds=embeds, max_new_tokens=4, **PLAN), expected[:, -4:])
    both = network.generate(input_ids=ids, inputs_embeds=embeds, max_new_tokens=4, **PLAN)
    assert torch.equal(both, expected)
    assert torch.equal(network.generate(inputs_embeds=embeds, max_length=11, **PLAN), expected[:, -4:])


@pytest.mark.parametrize("model", DECODERS)
def test_processors_see_the_text_alone(model: str) -> None:
    """A penalty on repeated tokens must see the text's tokens, and no prompt."""
    network, ids = prompted(model, "prompt_tuning"), text(1, 12)
    written = network.generate(ids, max_new_tokens=1, repetition_penalty=1e6, **PLAN)
    assert written[0, -1] not in ids
    logits = network(input_ids=ids).logits[0, -1]
    penalised = torch.where(logits > 0, logits / 1e6, logits * 1e6)
    assert written[0, -1] == torch.where(torch.isin(torch.arange(len(logits)), ids), penalised, logits).argmax()


@pytest.mark.parametrize("model", DECODERS)
def test_a_conversation_goes_on_with_its_cache(model: str) -> None:
    network, ids = prompted(model, "accept"), text(1)
    plan = {**PLAN, "max_new_tokens": 3}
    first = network.generate(input_ids=ids, return_dict_in_generate=True, **plan)
    longer = torch.cat([first.sequences, text(1, 2)], 1)
    again = network.generate(input_ids=longer, past_key_values=first.past_key_values, **plan)
    assert torch.equal(again, network.generate(input_ids=longer, **plan))


@pytest.mark.parametrize("model", DECODERS)
def test_step_by_step_with_a_cache_by_hand(model: str) -> None:
    network, ids = prompted(model, "accept"), text(2, 6)
    whole = network(input_ids=ids).logits
    out = network(input_ids=ids[:, :3], use_cache=True)
    steps = [out.logits]
    for column in range(3, 6):
        out = network(input_ids=ids[:, column : column + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=0)


def test_pads_in_the_ids_are_not_text_without_a_mask() -> None:
    network = prompted("llama", "accept")
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), text(1)], 1)
    plan = {**PLAN, "max_new_tokens": 4}
    assert torch.equal(network.generate(ids, **plan)[:, -4:], network.generate(ids[:, 3:], **plan)[:, -4:])


def test_the_model_generates_by_itself_again_when_bare() -> None:
    network, ids = build("llama"), text()
    plan = {**PLAN, "max_new_tokens": 4}
    bare = network.generate(ids, **plan)
    attach(network, config_of("accept"))
    scatter(network.prompt_adapter)
    assert not torch.equal(network.generate(ids, **plan), bare)
    with disabled(network):
        assert torch.equal(network.generate(ids, **plan), bare)
    detach(network)
    assert "generate" not in vars(network) and torch.equal(network.generate(ids, **plan), bare)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": object()}, "assistant_model; use prompt_lookup_num_tokens"),
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty; leave it out"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size; leave it out"),
        ({"guidance_scale": 2.0}, "guidance_scale; leave it out"),
        ({"prompt_lookup_num_tokens": 2, "repetition_penalty": 2.0}, "prompt lookup and repetition_penalty"),
        ({"attention_mask": torch.ones(2, 1, 7, 7)}, r"an attention mask of shape \(2, 1, 7, 7\)"),
    ],
)
def test_options_that_would_take_the_prompt_for_text_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prompted("llama", "accept").generate(text(), max_new_tokens=2, **options, **PLAN)
