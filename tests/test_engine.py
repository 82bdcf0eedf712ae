"""The engine on every method and architecture: padding, generation, heads, freezing, detaching."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from tiny import MODELS, NAMES, SHAPES, WRITERS, build, config_of, forward, padded, prompted, scatter, text, unpadded
from torch import Tensor
from torch.testing import assert_close
from transformers import CompileConfig

from softprompts.attach import adapters_of, attach, detach, disabled, using
from softprompts.errors import UsageError

ROUNDING = 1e-5
"""fp32 sums in another order; the logits are of order 1."""


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_padding_does_not_matter(model: str, method: str) -> None:
    network, ids = prompted(model, method), text()
    bare = forward(network, ids)
    for side in ("left", "right"):
        for amount in (1, 9):
            logits = forward(network, *padded(ids, side, amount))
            assert_close(unpadded(logits, bare, side, amount), bare, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_rows_of_different_lengths_equal_the_rows_alone(model: str) -> None:
    network, long, short = prompted(model, "accept"), text(1, 9), text(1, 4)
    for side in ("left", "right"):
        ids, mask = padded(short, side, 5)
        batch = forward(network, torch.cat([long, ids]), torch.cat([torch.ones_like(long), mask]))
        assert_close(batch[:1], forward(network, long), atol=ROUNDING, rtol=0)
        alone = forward(network, short)
        assert_close(unpadded(batch[1:], alone, side, 5), alone, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_the_prompt_matters_and_detach_restores(model: str, method: str) -> None:
    network, ids = build(model), text()
    before, state = forward(network, ids), copy.deepcopy(network.state_dict())
    network.get_input_embeddings().weight.requires_grad_(False)
    trains = {name: p.requires_grad for name, p in network.named_parameters()}
    attach(network, config_of(method), initialise=False)
    scatter(network.prompt_adapter)
    for head in adapters_of(network).heads:
        scatter(network.get_submodule(head))
    assert (forward(network, ids) - before).abs().max() > 1e-3
    detach(network)
    assert torch.equal(forward(network, ids), before)
    assert {name: p.requires_grad for name, p in network.named_parameters()} == trains
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("model", SHAPES)
def test_every_parameter_trains_and_the_backbone_does_not(model: str, method: str) -> None:
    network = prompted(model, method)
    forward(network, text(2, 24)).sum().backward()
    heads = tuple(adapters_of(network).heads)
    for name, parameter in network.named_parameters():
        if name.startswith(("prompt_adapter", *heads)):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("model", SHAPES)
def test_rows_do_not_see_each_other(model: str, method: str) -> None:
    network, ids = prompted(model, method), text(3)
    assert_close(forward(network, ids)[1:2], forward(network, ids[1:2]), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("model", WRITERS)
def test_generation_equals_teacher_forcing(model: str, method: str) -> None:
    network, ids = prompted(model, method), text()
    plan = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    written = network.generate(input_ids=ids, **plan)
    if network.config.is_encoder_decoder:
        logits = network(input_ids=ids, decoder_input_ids=written).logits
    else:
        # What was written is the answer: a prompt made from the text does not see it.
        labels = torch.cat([torch.full_like(ids, -100), written[:, ids.shape[1] :]], 1)
        logits = network(input_ids=written, labels=labels).logits
    assert torch.equal(logits[:, -7:-1].argmax(-1), written[:, -6:])
    assert torch.equal(network.generate(input_ids=ids, use_cache=False, **plan), written)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("model", WRITERS)
def test_generation_ignores_padding(model: str, method: str) -> None:
    network, ids = prompted(model, method), text()
    shifted, mask = padded(ids, "left", 4)
    for plan in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "top_k": 20}):
        plan |= {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
        torch.manual_seed(1)
        plain = network.generate(input_ids=ids, **plan)
        torch.manual_seed(1)
        assert torch.equal(network.generate(input_ids=shifted, attention_mask=mask, **plan)[:, -5:], plain[:, -5:])


@pytest.mark.parametrize("model", WRITERS)
def test_beams_find_what_an_exhaustive_search_finds(model: str) -> None:
    """Two steps and as many beams as tokens leave nothing to miss."""
    network, ids = prompted(model, "accept"), text(1)
    vocabulary = network.config.vocab_size
    plan = dict(max_new_tokens=2, do_sample=False, num_beams=vocabulary, eos_token_id=None, pad_token_id=0)
    best = network.generate(input_ids=ids, **plan)[0, -2:].tolist()

    def next_logp(so_far: list[int]) -> Tensor:
        if network.config.is_encoder_decoder:
            out = network(input_ids=ids, decoder_input_ids=torch.tensor([[0, *so_far]]))
        else:
            out = network(input_ids=torch.cat([ids, torch.tensor([so_far], dtype=torch.long)], 1))
        return out.logits[0, -1].log_softmax(-1)

    first = next_logp([])
    total = torch.stack([first[token] + next_logp([token]) for token in range(vocabulary)])
    assert best == list(divmod(int(total.argmax()), vocabulary))


@pytest.mark.parametrize("model", MODELS)
def test_embeddings_instead_of_ids_give_the_same(model: str) -> None:
    if model == "llama-sequence":
        pytest.skip("this head finds the last token by its id, so transformers itself needs the ids")
    network, ids = prompted(model, "accept"), text()
    embeds = network.get_input_embeddings()(ids)
    more = {"decoder_input_ids": torch.tensor([[0, 5, 9]]).expand(2, -1)} if model == "t5" else {}
    out = network(inputs_embeds=embeds, **more)
    assert_close(out.start_logits if "start_logits" in out else out.logits, forward(network, ids))
    assert torch.equal(embeds, network.get_input_embeddings()(ids)), "the caller's embeddings were changed"


def test_labels_and_spans_need_no_shifting() -> None:
    ids = text()
    tokens = prompted("bert-token", "accept")
    labels = torch.randint(0, 2, ids.shape)
    out = tokens(input_ids=ids, labels=labels)
    assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
    spans = prompted("bert-span", "accept")
    start, end = torch.tensor([1, 2]), torch.tensor([3, 6])
    out = spans(input_ids=ids, start_positions=start, end_positions=end)
    assert out.start_logits.shape == ids.shape
    both = [torch.nn.functional.cross_entropy(*pair) for pair in ((out.start_logits, start), (out.end_logits, end))]
    assert_close(out.loss, sum(both) / 2)
    llama = prompted("llama", "accept")
    out = llama(input_ids=ids, labels=ids)
    assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_several_adapters_take_turns() -> None:
    network, ids = prompted("t5", "accept"), text()
    first = forward(network, ids)
    attach(network, config_of("dept"), "second")
    second = forward(network, ids)
    adapters = adapters_of(network)
    assert adapters.active == "second" and not torch.allclose(first, second)
    adapters.activate("default")
    assert torch.equal(forward(network, ids), first)
    assert not any(p.requires_grad for p in adapters.method("second").parameters())
    detach(network, "default")
    assert torch.equal(forward(network, ids), second)


def test_disabled_is_the_bare_backbone() -> None:
    network, ids = build("t5"), text()
    bare, bare_text = forward(network, ids), network.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    attach(network, config_of("accept"))
    scatter(network.prompt_adapter)
    with disabled(network):
        assert_close(forward(network, ids), bare, atol=ROUNDING, rtol=0)
        assert torch.equal(network.generate(input_ids=ids, max_new_tokens=5, do_sample=False), bare_text)
    assert (forward(network, ids) - bare).abs().max() > 1e-3


@pytest.mark.parametrize("model", SHAPES)
def test_a_copy_is_independent(model: str) -> None:
    network, ids = prompted(model, "accept"), text()
    before, twin = forward(network, ids), copy.deepcopy(network)
    scatter(twin.prompt_adapter)
    assert torch.equal(forward(network, ids), before)
    assert not torch.allclose(forward(twin, ids), before)


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_gradient_checkpointing_changes_no_gradient(model: str) -> None:
    network, ids = prompted(model, "accept"), text()
    network.train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            network.activation_checkpointing_enable({"use_reentrant": False})
        network.zero_grad()
        forward(network, ids, use_cache=False).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.prompt_adapter.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(plain, recomputed, atol=ROUNDING, rtol=1e-4)


@pytest.mark.skipif(not os.environ.get("JAXTYPING_DISABLE"), reason="shape checks break graphs; see test_compile")
@pytest.mark.parametrize("model", SHAPES)
def test_compiled_forward_and_gradients_are_the_same(model: str) -> None:
    network, ids = prompted(model, "accept"), text()
    plain = forward(network, ids)
    plain.square().sum().backward()
    gradients = [p.grad.clone() for p in network.prompt_adapter.parameters()]
    network.zero_grad()
    compiled = torch.compile(network, backend="aot_eager")
    more = {"decoder_input_ids": torch.tensor([[0, 5, 9]]).expand(2, -1)} if model == "t5" else {}
    logits = compiled(input_ids=ids, **more).logits
    logits.square().sum().backward()
    assert_close(logits, plain, atol=ROUNDING, rtol=0)
    for parameter, expected in zip(network.prompt_adapter.parameters(), gradients, strict=True):
        assert_close(parameter.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not os.environ.get("JAXTYPING_DISABLE"), reason="shape checks break graphs; see test_compile")
@pytest.mark.parametrize("model", SHAPES)
def test_compiled_forward_of_rows_with_a_prompt_each(model: str) -> None:
    network, ids = prompted(model, "accept"), text()
    if not adapters_of(network).heads:  # a head belongs to one
        attach(network, config_of("accept"), "other")
        scatter(adapters_of(network).method("other"))
    other = "default" if adapters_of(network).heads else "other"
    compiled = torch.compile(network, backend="aot_eager")
    more = {"decoder_input_ids": torch.tensor([[0, 5, 9]]).expand(2, -1)} if model == "t5" else {}
    for names in (["default", "__base__"], ["__base__", other]):
        with torch.no_grad(), using(network, names):
            assert_close(compiled(input_ids=ids, **more).logits, forward(network, ids), atol=ROUNDING, rtol=0)


@pytest.mark.skipif(not os.environ.get("JAXTYPING_DISABLE"), reason="shape checks break graphs; see test_compile")
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_compiled_forward_of_a_static_cache(model: str) -> None:
    """What transformers does by itself on an accelerator."""
    network, (ids, mask) = prompted(model, "accept"), padded(text(), "left", 2)
    plan = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    plan |= dict(output_logits=True, return_dict_in_generate=True)
    plain = network.generate(ids, **plan)
    how = CompileConfig(backend="eager", fullgraph=False, dynamic=None, mode=None)
    how._compile_all_devices = True
    static = network.generate(ids, cache_implementation="static", compile_config=how, **plan)
    assert torch.equal(static.sequences, plain.sequences)
    assert_close(static.logits, plain.logits, atol=ROUNDING, rtol=0)


def test_compile() -> None:
    """The compiled tests above, in a process without the run-time shape checks."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "compiled_forward", "-n", "0"],
        env={**os.environ, "JAXTYPING_DISABLE": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout[-2000:]


def test_a_bf16_backbone_keeps_an_fp32_prompt_and_head() -> None:
    network = build("bert-sequence").to(torch.bfloat16)
    attach(network, config_of("accept"))
    out = network(input_ids=text(), labels=torch.tensor([0, 1]))
    out.loss.backward()
    kinds = {p.dtype for p in network.parameters() if p.requires_grad}
    assert kinds == {torch.float32} and out.logits.dtype == torch.float32
    detach(network)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


def test_offsets_reach_only_their_table() -> None:
    network = prompted("t5", "accept")
    with pytest.raises(UsageError, match=r"a text of 25 tokens is longer than offset_positions=24"):
        forward(network, text(1, 25))
    ids, mask = padded(text(1, 20), "right", 20)
    assert_close(forward(network, ids, mask), forward(network, ids[:, :20]), atol=ROUNDING, rtol=0)
    writer = prompted("llama", "accept")
    assert writer.generate(input_ids=text(1, 20), max_new_tokens=9, do_sample=False, eos_token_id=None).shape[1] == 29


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attach(build("t5"), config_of("accept", prompt_subspaces=5)), "does not divide the model width 32"),
        (lambda: attach(build("t5"), config_of("spot")), "set prompt_from=FOLDER"),
        (lambda: attach(build("t5"), config_of("dept", init="text", init_text="good or bad")), "needs the tokenizer"),
        (lambda: attach(build("t5"), config_of("dept", init="text")), "set init_text"),
        (lambda: attach(prompted("t5", "dept"), config_of("dept")), "'default' is attached already"),
        (lambda: detach(build("t5")), "no prompt is attached"),
        (lambda: adapters_of(prompted("t5", "dept")).activate("defualt"), "did you mean 'default'"),
        (lambda: forward(prompted("llama", "dept"), text(), torch.ones(2, 1, 7, 7)), r"shape \(2, 1, 7, 7\)"),
        (
            lambda: prompted("llama", "dept")(input_ids=text(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]])),
            "packed position_ids",
        ),
        (lambda: forward(prompted("bert-sequence", "adept"), text(1, 60)), "exceed the 64 positions"),
    ],
)
def test_misuse_is_one_line_with_the_way_out(call, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_failed_attach_leaves_the_model_alone() -> None:
    network, ids = build("t5"), text()
    before = forward(network, ids)
    with pytest.raises(UsageError):
        attach(network, config_of("accept", prompt_subspaces=5))
    assert not hasattr(network, "prompt_adapter") and torch.equal(forward(network, ids), before)
    assert all(p.requires_grad for p in network.parameters())


def other_models() -> dict:
    from transformers import (
        AlbertConfig,
        AlbertForSequenceClassification,
        BartConfig,
        BartForConditionalGeneration,
        CamembertConfig,
        CamembertForTokenClassification,
        MarianConfig,
        MarianMTModel,
    )

    pair = dict(vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
                decoder_start_token_id=0, scale_embedding=True, forced_eos_token_id=None)  # fmt: skip
    small = dict(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                 max_position_embeddings=40)  # fmt: skip
    return {
        "marian": lambda: MarianMTModel(MarianConfig(**pair)),
        "bart": lambda: BartForConditionalGeneration(BartConfig(**pair)),
        "albert": lambda: AlbertForSequenceClassification(AlbertConfig(**small, embedding_size=32)),
        "camembert": lambda: CamembertForTokenClassification(CamembertConfig(**small, pad_token_id=1)),
    }


@pytest.mark.parametrize("model", ["marian", "bart", "albert", "camembert"])
def test_a_prompt_of_nothing_is_the_bare_model(model: str) -> None:
    """An offset of zeros and no prompt: whatever a model does with its embeddings must be done here too."""
    network, ids = other_models()[model]().eval(), text()
    bare = forward(network, ids)
    attach(network, config_of("accept", prompt_length=0), initialise=False)
    for parameter in network.prompt_adapter.parameters():
        torch.nn.init.zeros_(parameter)
    assert_close(forward(network, ids), bare, atol=ROUNDING, rtol=0)
    attach(detach(network), config_of("accept"), initialise=False)
    scatter(network.prompt_adapter)
    prompted_logits = forward(network, ids)
    assert prompted_logits.shape == bare.shape and not torch.allclose(prompted_logits, bare)
    if model == "camembert":
        assert adapters_of(network).longest_text == min(24, 40 - 2 - 5)
