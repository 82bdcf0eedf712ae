"""Rows of the matrix: forward passes and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import (
    Case,
    Ours,
    batch,
    cut,
    defined,
    far,
    given,
    gradients,
    near,
    near_all,
    objective,
    run,
    scatter,
    seeded,
    slopes,
    targets,
    text_logits,
    text_of,
    trainable,
)
from registry_of_calls import call
from tiny import VOCABULARY, padded
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@call("trainable parameters", "the adapter (and the head) alone; every row of every tensor gets gradient")
def check_trainable(case: Case, folder: Path) -> None:
    bare = case.base()
    base = {id(parameter) for parameter in bare.parameters()}
    network = case.peft(bare)
    with seeded(2):
        ids = torch.randint(3, VOCABULARY, (2, 24))
    alive: dict[str, Tensor] = {}
    for seed in range(6):  # a hidden unit may be off for one draw of its weights
        scatter(trainable(network), seed)
        pairs = zip(trainable(network), gradients(case, network, ids, torch.ones_like(ids)), strict=True)
        for (name, _), slope in pairs:
            rows = slope.reshape(len(slope), -1).abs().sum(1)
            alive[name] = rows + alive.get(name, torch.zeros_like(rows))
        if all(rows.all() for rows in alive.values()):
            break
    for name, rows in alive.items():
        dead = int((rows == 0).sum())
        assert not dead, f"{dead} of {len(rows)} rows of {name.split('.')[0]} get no gradient"
    for name, parameter in network.named_parameters():
        new = id(parameter) not in base
        assert parameter.requires_grad == new, f"{name}: requires_grad={parameter.requires_grad}"
        assert new or parameter.grad is None, f"{name} has a gradient"


@call("forward", "logits = the bare model on [prompt; embeddings + offset]")
def check_forward(case: Case, folder: Path) -> None:
    ids, mask = batch()
    network = case.peft()
    logits = run(case, network, ids, mask)
    for row in range(len(ids)):
        expected = defined(case, network, text_of(ids, mask, row))
        near(text_logits(case, logits, mask, row), expected, f"row padded by {row}")
    if case.task != "SEQ_CLS":
        far(logits, run(case, case.base(), ids, mask), "against the model without a prompt")


@call("length of the logits", "as many as input tokens (on BERT: token classification)", archs=("llama", "bert"))
def check_length(case: Case, folder: Path) -> None:
    case = case.on("bert-token") if case.arch == "bert" else case
    ids, mask = batch()
    assert (length := case.peft()(**given(case, ids, mask)).logits.shape[1]) == 7, f"{length} logits for 7 tokens"


@call("embeddings instead of ids", "forward with inputs_embeds = with input_ids")
def check_embeddings(case: Case, folder: Path) -> None:
    network = case.peft()
    ids, mask = batch()
    inputs = given(case, ids, mask)
    embeds = network.get_input_embeddings()(inputs.pop("input_ids"))
    with torch.no_grad():
        out = network(inputs_embeds=embeds, **inputs)
    near(cut(case, out, 7), run(case, network, ids, mask), "logits")


def check_padding(case: Case, sides: tuple[str, ...]) -> None:
    network = case.peft()
    ids, _ = batch(rows=1)
    bare = run(case, network, ids)
    for side in sides:
        for amount in (1, 9):
            more, mask = padded(ids, side, amount)
            logits = run(case, network, more, mask)
            near(text_logits(case, logits, mask, 0), bare, f"padding of {amount} on the {side}")


@call("padding on the right", "any amount: logits = without padding")
def check_right(case: Case, folder: Path) -> None:
    check_padding(case, ("right",))


@call("padding on the left", "any amount: logits = without padding (for plain T5 and Llama too)", archs=("t5", "llama"))
def check_left(case: Case, folder: Path) -> None:
    check_padding(case, ("left",))


@call("padding on the left, BERT", "the same, though plain BERT itself depends on it", archs=("bert",))
def check_left_bert(case: Case, folder: Path) -> None:
    check_padding(case, ("left",))


@call("step with past_key_values", "by hand, in two pieces = in one piece", archs=("t5", "llama"))
def check_past(case: Case, folder: Path) -> None:
    network = case.peft()
    ids, mask = batch("left" if case.arch == "llama" else "right")
    # A prompt made from the text is made from the first piece: the second is its answer.
    more = {"labels": ids.index_fill(1, torch.arange(4), -100)} if case.arch == "llama" else {}
    whole = run(case, network, ids, mask, **more)
    with torch.no_grad():
        if case.arch == "llama":
            first = network(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
            rest = network(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
            near(rest.logits, whole[:, 4:], "second piece")
        else:
            start = given(case, ids)["decoder_input_ids"]
            first = network(input_ids=ids, attention_mask=mask, decoder_input_ids=start[:, :1], use_cache=True)
            rest = network(
                attention_mask=mask, encoder_outputs=(first.encoder_last_hidden_state,),
                decoder_input_ids=start[:, 1:], past_key_values=first.past_key_values,
            )  # fmt: skip
            near(rest.logits, whole[:, 1:], "second piece")


@call("task_type=None", "forward = with the task type")
def check_no_task(case: Case, folder: Path) -> None:
    ids, mask = batch()
    near(run(case, case.peft(task_type=None), ids, mask), run(case, case.peft(), ids, mask), "logits")


@call(
    "bf16 model, fp32 adapter",
    "logits = the definition in bf16; prompt, offset and gradients stay fp32 (with ours the head's too)",
)
def check_bf16(case: Case, folder: Path) -> None:
    network = case.peft(case.base().to(torch.bfloat16))
    ids, _ = batch(rows=1)
    if case.task == "CAUSAL_LM" or case.arch == "t5":
        expected = defined(case, network, ids, case.base().to(torch.bfloat16))
        near(run(case, network, ids), expected, "logits", tolerance=2**-6)
    near(run(case, network, ids), run(case, case.peft(), ids), "logits against fp32", tolerance=2**-4)
    found = gradients(case, network, ids, torch.ones_like(ids))
    for (name, parameter), slope in zip(trainable(network), found, strict=True):
        if "modules_to_save" in name and not isinstance(case, Ours):
            continue  # PEFT keeps heads in the model's precision, for every method
        assert parameter.dtype == slope.dtype == torch.float32, f"{name} is {parameter.dtype}"


@call("gradient checkpointing", "non-reentrant: gradients = without")
def check_recompute(case: Case, folder: Path) -> None:
    network, (ids, mask) = case.peft().train(), batch()
    more: dict[str, Any] = {} if case.arch == "bert" else {"use_cache": False}
    if case.task == "CAUSAL_LM":  # in training, a prompt made from the text has to know where the answer begins
        more["labels"] = torch.cat([torch.full_like(ids[:, :-1], -100), ids[:, -1:]], 1)
    plain = gradients(case, network, ids, mask, **more)
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    near_all(gradients(case, network, ids, mask, **more), plain, "gradients", tolerance=1e-4)


def head_loss(case: Case, out: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the loss of a head from its logits, by hand."""
    if case.task == "QUESTION_ANS":
        pairs = [(out.start_logits, inputs["start_positions"]), (out.end_logits, inputs["end_positions"])]
        return torch.stack([cross_entropy(logits[:, -7:], at) for logits, at in pairs]).mean()
    logits = cut(case, out, 7)
    return cross_entropy(logits.flatten(0, -2), inputs["labels"].flatten())


def check_head(case: Case, folder: Path) -> None:
    """Logits by definition, loss from the logits, trained head in the file and back from it."""
    from peft import PeftModel

    network = case.peft()
    ids, mask = batch()
    inputs = given(case, ids, mask)
    if case.task == "QUESTION_ANS":
        inputs |= {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([3, 3, 4])}
    else:
        inputs["labels"] = targets(case, ids, mask)
    logits = run(case, network, ids, mask)
    for row in range(len(ids)):
        expected = defined(case, network, text_of(ids, mask, row))
        near(text_logits(case, logits, mask, row), expected, f"logits of the row padded by {row}")
    out = network(**inputs)
    near(out.loss, head_loss(case, out, inputs), "loss against the loss of the logits by hand")
    out.loss.backward()
    pairs = zip(trainable(network), slopes(network), strict=True)
    heads = [slope for (name, _), slope in pairs if "modules_to_save" in name]
    assert heads and all(slope.any() for slope in heads), "the head does not train"
    network.save_pretrained(folder)
    again = PeftModel.from_pretrained(case.base(), folder).eval()
    near(again(**inputs).loss, out.loss, "loss after reloading")


@call("BERT, sequence classification", "logits, loss by hand; trained head saved, reloaded: same loss", archs=("bert",))
def check_sequence(case: Case, folder: Path) -> None:
    check_head(case.on("bert-sequence"), folder)


@call("BERT, token classification", "the same", archs=("bert",))
def check_tokens(case: Case, folder: Path) -> None:
    check_head(case.on("bert-token"), folder)


@call("BERT, question answering", "the same; spans count the text's tokens", archs=("bert",))
def check_spans(case: Case, folder: Path) -> None:
    check_head(case.on("bert-span"), folder)


@call("Llama, sequence classification", "the same", archs=("llama",))
def check_llama_sequence(case: Case, folder: Path) -> None:
    check_head(case.on("llama-sequence"), folder)


@call("torch.compile", "fullgraph, forward and backward = eager, no graph break", processes=1)
def check_compile(case: Case, folder: Path) -> None:
    network, (ids, mask) = case.peft(), batch()
    plain, expected = run(case, network, ids, mask), gradients(case, network, ids, mask)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    network.zero_grad()
    logits = cut(case, compiled(**given(case, ids, mask)), 7)
    near(logits, plain, "logits")
    objective(case, logits, mask).backward()
    near_all(slopes(network), expected, "gradients", tolerance=1e-4)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    assert not breaks, f"{breaks} graph breaks"


class PromptedEncoder(nn.Module):
    """What `torch.export` gets: ids and mask to the encoder's states."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.network(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :1]).encoder_last_hidden_state


@call("torch.export", "the prompted T5 encoder, any batch and length = eager (non-strict)", archs=("t5",), processes=1)
def check_export(case: Case, folder: Path) -> None:
    encoder, (ids, mask) = PromptedEncoder(case.peft()).eval(), batch()
    sizes = {0: torch.export.Dim("rows", min=2, max=64), 1: torch.export.Dim("length", min=3, max=24)}
    with torch.no_grad():
        program = torch.export.export(encoder, (ids, mask), dynamic_shapes=(sizes, sizes), strict=False)
        for rows, length in ((3, 7), (5, 12)):
            ids, mask = batch(rows=rows, length=length)
            near(program.module()(ids, mask), encoder(ids, mask), f"{rows} rows of {length} tokens")
