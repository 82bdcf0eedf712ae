"""Models that are built otherwise: recurrent layers, slots for positions, experts, pooling, tables of their own."""

import threading
from typing import Any

import pytest
import torch
import transformers
from tiny import BERT, GPT2, LLAMA, PAD, T5, VOCABULARY, WIDTH, config_of, padded, prompted, scatter, text, unpadded
from torch import Tensor, nn
from torch.testing import assert_close

from softprompts.attach import adapters_of, attach, remembering, using
from softprompts.errors import UsageError
from softprompts.shapes import attention_window, is_encoder_decoder, position_start

ROUNDING = 1e-5
"""fp32 sums in another order; the logits are of order 1."""
ENDS = dict(bos_token_id=2, eos_token_id=1)
PLAN: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=PAD)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
CONFIGS: dict[str, Any] = {
    "qwen3-next": lambda: transformers.Qwen3NextConfig(
        **LLAMA, **ENDS, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    ),
    "lfm2": lambda: transformers.Lfm2Config(
        **LLAMA, **ENDS, block_ff_dim=64, layer_types=["conv", "full_attention"], conv_L_cache=3
    ),
    "falcon-h1": lambda: transformers.FalconH1Config(**LLAMA, **ENDS, **MAMBA, mamba_d_ssm=64, head_dim=8),
    "mpt": lambda: transformers.MptConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, n_heads=4, n_layers=2, max_seq_len=64, pad_token_id=PAD, **ENDS
    ),
}  # fmt: skip


def decoder(model: str) -> Any:
    """Return a tiny model whose numbers are large enough to tell apart, with prompts of 5 and of 2."""
    network = transformers.AutoModelForCausalLM.from_config(CONFIGS[model]()).eval()
    for weight in network.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, 0.0, 0.15)
    attach(network, config_of("prompt_tuning", prompt_length=2), "short")
    attach(network, config_of("accept"))
    scatter(network.prompt_adapter)
    return network


def rows_alone(network: Any, ids: Tensor, names: list[str]) -> Tensor:
    found = []
    for row, name in zip(ids, names, strict=True):
        with using(network, [name]):
            found.append(network(input_ids=row[None]).logits)
    return torch.cat(found)


@pytest.mark.parametrize("names", [["default"] * 3, ["default", "short", "__base__"]])
@pytest.mark.parametrize("model", CONFIGS)
@torch.no_grad()
def test_a_batch_is_its_rows(model: str, names: list[str]) -> None:
    network, ids = decoder(model), text(3)
    expected = rows_alone(network, ids, names)
    with using(network, names):
        assert_close(network(input_ids=ids).logits, expected, atol=ROUNDING, rtol=0)
        for side in ("left", "right"):
            wide, mask = padded(ids, side, 4)
            found = network(input_ids=wide, attention_mask=mask).logits
            assert_close(unpadded(found, expected, side, 4), expected, atol=ROUNDING, rtol=0)
    assert (expected - rows_alone(network, ids, ["__base__"] * 3))[0].abs().max() > 1e-3


@pytest.mark.parametrize("model", [name for name in CONFIGS if name != "falcon-h1"])  # not from embeddings there
@torch.no_grad()
def test_what_is_written_is_what_a_whole_pass_says(model: str) -> None:
    network, ids = decoder(model), text(3)
    wide, mask = padded(ids, "left", 3)
    out = network.generate(wide, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **PLAN)
    for row, new, logits in zip(ids, out.sequences[:, -5:], torch.stack(out.logits, 1), strict=True):
        whole = network(input_ids=torch.cat([row, new])[None]).logits[0, 6:11]
        assert_close(logits, whole, atol=ROUNDING, rtol=0)


def test_gradients_of_a_recurrent_decoder_are_those_of_its_rows() -> None:
    network, ids = decoder("qwen3-next"), text(3)
    parameters = list(adapters_of(network).method().parameters())
    together = torch.autograd.grad(network(input_ids=ids).logits.square().sum(), parameters)
    apart = torch.autograd.grad(sum(network(input_ids=row[None]).logits.square().sum() for row in ids), parameters)
    for one, other in zip(together, apart, strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_loss_of_experts_counts_the_text(rows: int) -> None:
    """The router's logits are cut as the states are: the head masks them by the text's tokens."""
    more = dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5)
    network = transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, **more))
    attach(network.train(), config_of("accept"), initialise=False)
    scatter(network.prompt_adapter)
    ids, mask = padded(text(rows), "left", 2)
    outs = []
    for checkpointing in (False, True):  # several rows share a prompt, recomputed ones do not
        if checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        outs.append(network(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)))
        outs[-1].loss.backward()
        assert all(logits.shape == (rows * 9, 4) for logits in outs[-1].router_logits)
    assert_close(outs[1].aux_loss, outs[0].aux_loss, atol=ROUNDING, rtol=0)
    unpadded_rows = network(input_ids=ids[:, 2:]).router_logits
    for out in outs:
        for padded_rows, expected in zip(out.router_logits, unpadded_rows, strict=True):
            assert_close(padded_rows.view(rows, 9, 4)[:, 2:].flatten(0, 1), expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_head_that_averages_sees_the_text_where_its_mask_is(pooling: str) -> None:
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        classifier_pooling=pooling, local_attention=8, initializer_range=0.3, pad_token_id=PAD, **ENDS,
        cls_token_id=2, sep_token_id=1,
    )  # fmt: skip
    network, ids = transformers.ModernBertForSequenceClassification(config).eval(), text(3)
    attach(network, config_of("accept"), initialise=False)
    scatter(network.prompt_adapter)
    expected = network(input_ids=ids).logits
    for side in ("left", "right"):
        wide, mask = padded(ids, side, 4)
        assert_close(network(input_ids=wide, attention_mask=mask).logits, expected, atol=ROUNDING, rtol=0)


def test_token_types_of_a_decoder_leave_its_rows_alone() -> None:
    network, ids = prompted("gpt2", "prompt_tuning"), text(3)
    types = torch.randint(3, 9, ids.shape)
    apart = torch.cat(
        [network(input_ids=a[None], token_type_ids=b[None]).logits for a, b in zip(ids, types, strict=True)]
    )
    assert_close(network(input_ids=ids, token_type_ids=types).logits, apart, atol=1e-6, rtol=0)
    assert (network(input_ids=ids).logits - apart).abs().max() > 1e-5


def refused() -> dict[str, Any]:
    small = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    esm = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        pad_token_id=PAD, mask_token_id=4, max_position_embeddings=40,
    )  # fmt: skip
    gemma = dict(**small, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8, laurel_rank=8,
                 vocab_size_per_layer_input=VOCABULARY, altup_num_inputs=2, num_kv_shared_layers=0)  # fmt: skip
    return {
        "esm": transformers.EsmForMaskedLM(transformers.EsmConfig(**esm)),
        "gemma3n": transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**gemma)),
    }


@pytest.mark.parametrize("model", ["esm", "gemma3n"])
def test_models_that_read_more_than_embeddings_are_refused(model: str) -> None:
    network = refused()[model]
    with pytest.raises(UsageError, match="makes more of token ids than their embeddings"):
        attach(network, config_of("accept"), initialise=False)
    assert not hasattr(network, "prompt_adapter")


def test_a_decoder_whose_table_begins_with_padding() -> None:
    """RoBERTa counts from the row behind the one of padding."""
    config = transformers.RobertaConfig(**{**BERT, "is_decoder": True, "pad_token_id": 1, **ENDS, "eos_token_id": 3})
    network, ids = transformers.RobertaForCausalLM(config).eval(), text(2)
    bare = network(input_ids=ids).logits
    assert position_start(network) == 2
    attach(network, config_of("accept", prompt_length=0), initialise=False)
    for parameter in network.prompt_adapter.parameters():
        nn.init.zeros_(parameter)
    assert_close(network(input_ids=ids).logits, bare, atol=ROUNDING, rtol=0)
    attach(network, config_of("accept"), "prompted", initialise=False)
    scatter(adapters_of(network).method("prompted"))
    alone = torch.cat([network(input_ids=row[None]).logits for row in ids])
    assert_close(network(input_ids=ids).logits, alone, atol=ROUNDING, rtol=0)
    out = network.generate(ids, output_logits=True, return_dict_in_generate=True, **{**PLAN, "pad_token_id": 1})
    whole = network(input_ids=out.sequences).logits[:, 6:11]
    assert_close(torch.stack(out.logits, 1), whole, atol=ROUNDING, rtol=0)


def test_what_keeps_its_past_otherwise_does_not_write() -> None:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, state_size=8, num_hidden_layers=2, pad_token_id=PAD, **ENDS
    )
    network, ids = transformers.MambaForCausalLM(config).eval(), text(2)
    attach(network, config_of("accept"), initialise=False)
    scatter(network.prompt_adapter)
    alone = torch.cat([network(input_ids=row[None]).logits for row in ids])
    assert_close(network(input_ids=ids).logits, alone, atol=ROUNDING, rtol=0)
    with pytest.raises(UsageError, match=r"generate\(\) of MambaForCausalLM; take a model with a cache"):
        network.generate(ids, **PLAN)


def test_an_encoder_alone_is_no_pair() -> None:
    config = transformers.UMT5Config(**T5)
    assert is_encoder_decoder(transformers.UMT5ForConditionalGeneration(config))
    network, ids = transformers.UMT5EncoderModel(config).eval(), text(2)
    assert not is_encoder_decoder(network)
    attach(network, config_of("accept"), initialise=False)
    assert network(input_ids=ids).last_hidden_state.shape == (*ids.shape, WIDTH)


def test_checkpointing_below_the_body_is_noticed() -> None:
    """RemBERT keeps the flag on its encoder."""
    config = transformers.RemBertConfig(
        **{**BERT, "is_decoder": True, **ENDS}, input_embedding_size=WIDTH, output_embedding_size=WIDTH,
        classifier_dropout_prob=0.0,
    )  # fmt: skip
    network, ids = transformers.RemBertForCausalLM(config).train(), text(3)
    attach(network, config_of("accept"), initialise=False)
    scatter(network.prompt_adapter)
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        network.zero_grad()
        out = network(input_ids=ids, labels=ids)
        out.loss.backward()
        losses.append(torch.cat([p.grad.flatten() for p in adapters_of(network).method().parameters()]))
    assert_close(losses[1], losses[0], atol=ROUNDING, rtol=1e-4)


def test_models_without_a_window_of_their_own() -> None:
    assert all(attention_window(decoder(model)) == 1 for model in CONFIGS)
    assert attention_window(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))) is None


# ------------------------------------------------------------------------------------ calls


def test_threads_that_remember_leave_nothing_behind() -> None:
    """They leave in the order they came; a third one trains meanwhile, and a prompt changed later has changed."""
    network, ids = prompted("llama", "prompt_tuning"), text(3)
    adapters, inside, outside = adapters_of(network), threading.Event(), threading.Event()

    def first() -> None:
        with remembering(network):
            network(input_ids=ids)
            inside.wait()
        outside.set()

    def second() -> None:
        with remembering(network):
            inside.set()
            outside.wait()
            network(input_ids=ids)

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    with remembering(network):
        trained = threading.Thread(target=lambda: network(input_ids=ids, labels=ids).loss.backward())
        trained.start()
        trained.join()
    for thread in threads:
        thread.join()
    assert adapters.hooks.memory.kept is None and adapters.method().prompt.vectors.grad is not None
    before = network(input_ids=ids).logits
    with torch.no_grad():
        adapters.method().prompt.vectors.mul_(-3)
    assert (network(input_ids=ids).logits - before).abs().max() > 1e-2


def test_a_generation_inside_a_generation_changes_nothing() -> None:
    network, (ids, mask) = prompted("llama", "accept"), padded(text(2), "left", 2)

    class Asks(transformers.LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            network.generate(ids, attention_mask=mask, **PLAN)
            return scores

    more = dict(attention_mask=mask, output_logits=True, return_dict_in_generate=True, **PLAN)
    plain, asked = network.generate(ids, **more), network.generate(ids, logits_processor=[Asks()], **more)
    assert torch.equal(plain.sequences, asked.sequences)
    assert_close(asked.logits, plain.logits, atol=ROUNDING, rtol=0)
