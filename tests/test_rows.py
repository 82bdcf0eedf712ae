"""One batch, a prompt per row: every method and length beside every other, on every architecture, as if alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import MODELS, NAMES, NEED_SOURCES, WRITERS, build, config_of, forward, padded, prompted, scatter, text
from torch.testing import assert_close

from softprompts.attach import adapters_of, attach, disabled, using
from softprompts.errors import UsageError
from softprompts.rows import BASE, select

ROUNDING = 1e-5
"""fp32 sums in another order; the logits are of order 1."""


def several(model: str):
    """A tiny model with an adapter per method, of prompt lengths 5, 2 and 0; without a head, which stays as it is."""
    network = build(model)
    for number, name in enumerate(name for name in NAMES if name != "spot"):
        config = config_of(name)
        if name == "dept":
            config = config_of(name, prompt_length=2)
        if name == "accept+adept":
            config = config_of("accept", prompt_length=0)
        attach(network, config, name, train_head=False, initialise=name not in NEED_SOURCES)
        scatter(adapters_of(network).method(name), 0.5 + 0.1 * number)
    return network


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", MODELS)
def test_each_row_is_as_if_alone(model: str, side: str) -> None:
    network = several(model)
    adapters = adapters_of(network)
    names = [BASE, *adapters.configs, BASE]
    ids, mask = padded(text(len(names), 7), side, 3)
    # Rows of different lengths: the last text of the batch has no padding.
    ids[-1], mask[-1] = text(1, 10), 1
    with using(network, names):
        mixed = forward(network, ids, mask)
    for row, name in enumerate(names):
        one, own = ids[row : row + 1], mask[row : row + 1]
        if name == BASE:
            # The bare model does not count positions over real tokens by itself.
            bare = one[:, own[0] == 1]
            with disabled(network):
                alone = forward(network, bare)
            together = mixed[row : row + 1]
            if together.shape[1] == ids.shape[1] and "sequence" not in model and model != "t5":
                together = together[:, own[0] == 1]
        else:
            adapters.activate(name)
            alone, together = forward(network, one, own), mixed[row : row + 1]
            if alone.shape[1] == ids.shape[1] and "sequence" not in model and model != "t5":
                alone, together = alone[:, own[0] == 1], together[:, own[0] == 1]
        assert_close(together, alone, atol=ROUNDING, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("model", WRITERS)
def test_generation_of_each_row_is_as_if_alone(model: str, beams: int) -> None:
    network = several(model)
    adapters = adapters_of(network)
    names = [*adapters.configs, BASE]
    ids, mask = padded(text(len(names)), "left", 2)
    plan = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, num_beams=beams)
    plan |= dict(return_dict_in_generate=True, output_logits=True)
    with using(network, names):
        together = network.generate(input_ids=ids, attention_mask=mask, **plan)
    for row, name in enumerate(names):
        one = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        adapters.activate(None if name == BASE else name)
        alone = network.generate(**one, **plan)
        assert torch.equal(together.sequences[row, -5:], alone.sequences[0, -5:]), name
        for step in range(5):
            own = together.logits[step][row * beams : (row + 1) * beams]
            assert_close(own, alone.logits[step], atol=ROUNDING, rtol=0)
    first = together.logits[0][::beams]
    assert torch.cdist(first, first).fill_diagonal_(9).min() > 1e-2, "the adapters are not told apart"


def test_names_follow_their_rows_through_beams_and_returned_sequences() -> None:
    network, ids = several("llama"), text(2)
    plan = dict(max_new_tokens=4, num_beams=4, num_return_sequences=2, do_sample=False, eos_token_id=None)
    with using(network, ["accept", BASE]):
        both = network.generate(input_ids=ids, pad_token_id=0, **plan)
    adapters_of(network).activate("accept")
    assert torch.equal(both[:2], network.generate(input_ids=ids[:1], pad_token_id=0, **plan))
    with disabled(network):
        assert torch.equal(both[2:], network.generate(input_ids=ids[1:], pad_token_id=0, **plan))


@pytest.mark.parametrize("model", ["t5", "llama", "bert-token"])
def test_every_named_adapter_gets_its_rows_gradient(model: str) -> None:
    network, ids = several(model), text(2, 24)
    adapters = adapters_of(network)
    gradients = {}
    for name in ("accept", "dept"):
        adapters.activate(name)
        forward(network, ids[:1] if name == "accept" else ids[1:]).square().sum().backward()
        gradients |= {id(p): p.grad.clone() for p in adapters.method(name).parameters()}
    network.zero_grad()
    adapters.softprompt_methods.requires_grad_(True)
    with using(network, ["accept", "dept"]):
        forward(network, ids).square().sum().backward()
    for name, method in adapters.methods().items():
        for parameter in method.parameters():
            expected = gradients.get(id(parameter))
            if expected is None:
                assert parameter.grad is None, f"{name} has no row in the batch"
            else:
                assert_close(parameter.grad, expected, atol=1e-4, rtol=1e-4)


def test_using_ends_and_nests() -> None:
    network, ids = several("t5"), text()
    adapters_of(network).activate("dept")
    before = forward(network, ids)
    with using(network, ["accept", "adept"]):
        with using(network, [BASE, BASE]):
            bare = forward(network, ids)
        inside = forward(network, ids)
    with disabled(network):
        assert torch.equal(forward(network, ids), bare)
    assert torch.equal(forward(network, ids), before) and not torch.equal(inside, before)


def test_misuse_is_one_line_with_the_way_out() -> None:
    network, ids = several("t5"), text(3)
    with pytest.raises(UsageError, match=r"no adapter 'acept'; did you mean 'accept'"), using(network, ["acept"]):
        pass
    with pytest.raises(UsageError, match="2 adapter names for a batch of 3 rows"), using(network, ["accept", BASE]):
        forward(network, ids)
    with pytest.raises(UsageError, match="0 adapter names"):
        select(adapters_of(network).methods(), [], 3)
    with pytest.raises(UsageError, match="2 adapter names for a batch of 4"), using(network, ["accept", BASE]):
        forward(network, text(4))
    assert adapters_of(network).names == {}


@pytest.mark.parametrize("name", ["a.b", "", "keys", BASE])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name an adapter"):
        attach(build("t5"), config_of("accept"), name)


def test_threads_do_not_disturb_each_other() -> None:
    """A server's threads: other rows, other lengths, one generating while others read."""
    network = several("llama")
    encoder = several("bert-token")
    batches = [(text(2, length), ["accept", "dept"] if length % 2 else [BASE, "adept"]) for length in range(3, 9)]
    plan = dict(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)

    def read(model, ids, names):
        with using(model, names), torch.no_grad():
            return forward(model, ids)

    def write(ids, names):
        with using(network, names):
            return network.generate(ids, **plan)

    jobs = []
    for ids, names in batches:
        jobs += [(read, network, ids, names), (read, encoder, ids, names), (write, ids, names)]
    alone = [job[0](*job[1:]) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(8):
            together = list(pool.map(lambda job: job[0](*job[1:]), jobs))
            for one, other in zip(alone, together, strict=True):
                assert_close(one, other, atol=ROUNDING, rtol=0)


def test_bare_rows_alone_have_beams_too() -> None:
    network, ids = prompted("llama", "accept"), text(2)
    plan = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, num_beams=3)
    with disabled(network):
        bare = network.generate(ids, **plan)
    with using(network, ["__base__", "__base__"]):
        assert torch.equal(network.generate(ids, **plan), bare)
