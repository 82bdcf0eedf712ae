"""Bake a prompt into the weights: an ordinary Hugging Face folder that every engine serves.

    prompt                P new vocabulary rows, put before each input as tokens
    token-wise offset     E'[v] = E[v] + f(E[v]) for every row v of the embedding table
    position-wise offset  added to the rows P, P+1, ... of the table of absolute positions

The model keeps its class; the order of an input is padding (if on the left), prompt, text. Before anything is left in
the output folder, it is loaded as anybody would load it and its answers are compared with the prompted model's.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from softprompts.attach import adapters_of, detach
from softprompts.backbone import embedded_path, first_line, precision, quiet
from softprompts.card import CLASSES
from softprompts.checkpoint import load_adapter
from softprompts.core import PositionOffset, SoftPrompt
from softprompts.errors import UsageError
from softprompts.export import Adapter, is_tokenwise, new_folder, read_adapter
from softprompts.files import write_text
from softprompts.prompt_tokens import SAMPLE_TEXT, add_tokens, save_tokenizer
from softprompts.shapes import classifies_rows, head_modules, is_decoder_only, is_encoder_decoder

ABOUT_FILE = "softprompt.json"
POSITION_TABLES = ("position_embeddings", "wpe")
"""What models call their table of absolute positions: BERT's kind, and GPT-2's."""
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest difference to the prompted model, as a share of the largest answer."""
SAMPLE_TOKENS = 8
CHUNK = 4096
"""Vocabulary rows that are offset at a time."""


@dataclass(frozen=True)
class Baked:
    """A baked folder, and what stands before every input."""

    folder: Path
    prompt_ids: tuple[int, ...]
    prompt_tokens: tuple[str, ...]
    tokenizer_adds_prompt: bool
    """Whether the folder's tokenizer puts the prompt in front by itself."""
    difference: float
    """Largest difference of an answer (logit) to the prompted model's, on a few tokens."""


def bake(adapter: str | Path, out: str | Path, model: str | None = None, dtype: str = "fp32") -> Baked:
    """Write an adapter and its backbone as one ordinary model folder, with equal logits over the old vocabulary.

    Args:
        adapter: a run's folder or a bare adapter.
        out: a new or empty folder.
        model: folder or hub id of the backbone in place of the one that the adapter names.
        dtype: precision of the folder, fp32 or bf16; in bf16 the prompt is rounded.

    Raises:
        UsageError: this prompt cannot be part of this model's weights; says why and what to do instead.
    """
    if dtype not in TOLERANCE:
        raise UsageError(f"dtype={dtype} cannot be used: a baked folder is fp32 or bf16")
    source, out = read_adapter(adapter), new_folder(out)
    table = source.table
    network, tokenizer = load_whole(source, model or source.base, dtype)
    refuse_what_cannot_be(network, source)
    load_adapter(network, source.folder, trainable=False).eval()
    method, heads = adapters_of(network).method(), adapters_of(network).heads
    sample = sample_ids(tokenizer, network, method)
    expected = answers(network, sample)
    # Detaching puts the backbone's own head back.
    trained = {head: {k: v.clone() for k, v in network.get_submodule(head).state_dict().items()} for head in heads}
    detach(network)
    for head, state in trained.items():
        network.get_submodule(head).load_state_dict(state)
    with torch.no_grad():
        if isinstance(method.offset, PositionOffset):
            add_to_positions(network, method)
        elif method.offset is not None:
            fold_into_table(network, method)
        read = tokenizer(SAMPLE_TEXT)["input_ids"]
        tokens, ids = add_tokens(tokenizer, len(table))
        add_rows(network, table, ids)
    network.to(precision(dtype))

    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        network.save_pretrained(work)
        adds = save_tokenizer(tokenizer, work, [*ids, *read])
        kind = type(network)
        del network
        reloaded = kind.from_pretrained(work, dtype=precision(dtype)).eval()
        difference = compare(expected, answers(reloaded, sample, ids), ids, TOLERANCE[dtype], source)
        baked = Baked(out, tuple(ids), tuple(tokens), adds, difference)
        about = {"method": source.config.name, "base_model_name_or_path": model or source.base, **asdict(baked)}
        del about["folder"]
        write_text(work / ABOUT_FILE, json.dumps(about, indent=2) + "\n")
        work.chmod(0o755)
        if out.exists():
            out.rmdir()
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return baked


# ------------------------------------------------------------------------------------------- loading


def load_whole(source: Adapter, name: str | None, dtype: str) -> tuple[Any, Any]:
    """Return (model of the class that the adapter was trained on, tokenizer).

    Raises:
        UsageError: no name, or nothing that can be loaded under it.
    """
    if name is None:
        raise UsageError(f"{source.folder} does not name its backbone; give it with --model NAME")
    place, revision = embedded_path(name), source.entries.get("revision") if name == source.base else None
    quiet()
    try:
        config = transformers.AutoConfig.from_pretrained(place, revision=revision)
        kind = model_class(source, config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=revision)
        if source.entries.get("modules_to_save"):
            config.num_labels = head_outputs(kind, config, source)
        network = kind.from_pretrained(
            place,
            config=config,
            revision=revision,
            dtype=precision(dtype),
            ignore_mismatched_sizes=bool(source.entries.get("modules_to_save")),
        )
    except UsageError:
        raise
    except Exception as error:  # transformers raises a dozen kinds for "no such model"
        raise UsageError(
            f"model '{name}' cannot be loaded ({first_line(error)}); give its folder or hub id with --model"
        ) from error
    return network.eval(), tokenizer


def model_class(source: Adapter, config: Any) -> Any:
    """Return the class to load: by the task type, else the class that was wrapped, else the checkpoint's own."""
    task_type = source.entries.get("task_type")
    if task_type in CLASSES:
        return getattr(transformers, CLASSES[task_type])
    wrapped = (source.entries.get("auto_mapping") or {}).get("base_model_class")
    names = [wrapped, *(config.architectures or ())]
    return next((getattr(transformers, name) for name in names if name and hasattr(transformers, name)), None) or (
        transformers.AutoModel
    )


def head_outputs(kind: Any, config: Any, source: Adapter) -> int:
    """Return how many outputs the saved head has, from the shape of its last layer."""
    with torch.device("meta"):
        empty = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    for head, module in reversed(head_modules(empty).items()):
        last = f"{head}.{list(module.state_dict())[-1]}"
        if last in source.tensors:
            return source.tensors[last].shape[0]
    return config.num_labels


def refuse_what_cannot_be(network: Any, source: Adapter) -> None:
    """Refuse adapters whose effect no weights of this model can have."""
    name, offset, kind = source.config.name, source.method.offset, type(network).__name__
    if classifies_rows(network) and not is_decoder_only(network):
        raise UsageError(
            f"{kind} answers from the first token, which would be the prompt's in a baked folder; keep the adapter "
            f"(softprompts.load_adapter, softprompts.peft)"
        )
    if offset is None:
        return
    if is_encoder_decoder(network):
        raise UsageError(
            f"{name} adds an offset to the encoder's tokens alone, but {kind} has one table for encoder and decoder, "
            f"tied again on every load; give the plain model what softprompts.export.encoder_outputs returns"
        )
    if isinstance(offset, PositionOffset):
        if position_table(network) is None:
            raise UsageError(
                f"{name} adds an offset by position, but {kind} has no table of absolute positions to add it to; take "
                f"--to embeds, keep the adapter (softprompts.peft), or train with adept, whose offset goes by token"
            )
    elif not is_tokenwise(offset, source.width):
        raise UsageError(
            f"{name} adds an offset that depends on the whole text, which no table holds; take "
            f"softprompts.export.prompt_embeds, or keep the adapter (softprompts.peft)"
        )


# ------------------------------------------------------------------------------------------- weights


def fold_into_table(network: Any, method: SoftPrompt) -> None:
    """Add a token-wise offset to every row of the embedding table; a tied output layer keeps the old rows."""
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    table, scale = embedding.weight, embedding_scale(network.get_input_embeddings())
    if head is not None and head.weight is table:
        head.weight = nn.Parameter(table.detach().clone())
        network.config.tie_word_embeddings = False
    folded = table.detach().clone()
    for ids in torch.arange(len(table), device=table.device).split(CHUNK):
        # One token a row: what the offset sees in use is the embedding module's answer, scale and all.
        embeds = embedding(ids).unsqueeze(1)
        ones = torch.ones(embeds.shape[:2], dtype=torch.long, device=table.device)
        folded[ids] = method(embeds, None, ones, prepend=False)[1][:, 0] / scale
    table.copy_(folded)


def add_to_positions(network: Any, method: SoftPrompt) -> None:
    """Add a position-wise offset to the positions that the text has behind the prompt."""
    found, offset = position_table(network), method.offset
    assert found is not None and isinstance(offset, PositionOffset), "refused before"
    table, first = found
    start = first + method.length
    rows = min(offset.positions, len(table) - start)
    table[start : start + rows] += offset.table(slice(rows)).to(table)


def position_table(network: Any) -> tuple[Tensor, int] | None:
    """Return the table of absolute positions and its row of position 0, None if the model has no such table."""
    for name, module in network.base_model.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in POSITION_TABLES:
            if module.embedding_dim != network.get_input_embeddings().weight.shape[1]:
                return None
            # RoBERTa-like tables keep their first rows for padding.
            return module.weight, 0 if module.padding_idx is None else module.padding_idx + 1
    return None


def embedding_scale(embedding: nn.Module) -> float:
    """Return by what an embedding module multiplies its rows (Gemma 3; 1 elsewhere)."""
    weight: Any = embedding.weight
    row = int(weight.detach().float().norm(dim=1).argmax())
    own, given = weight[row].float(), embedding(torch.tensor([row], device=weight.device))[0].float()
    return float(given @ own / (own @ own))


def add_rows(network: Any, table: Tensor, ids: Sequence[int]) -> None:
    """Make the prompt's vectors the embeddings of the new ids, and keep those from being written."""
    if not ids:
        return
    if max(ids) >= len(network.get_input_embeddings().weight):
        network.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    embedding.weight[list(ids)] = (table / embedding_scale(embedding)).to(embedding.weight)
    if head is not None and head.weight is not embedding.weight:
        head.weight[list(ids)] = 0
    if network.can_generate():
        known = network.generation_config.suppress_tokens or []
        network.generation_config.suppress_tokens = sorted({*known, *ids})


# ------------------------------------------------------------------------------------------- the check


def sample_ids(tokenizer: Any, network: Any, method: SoftPrompt) -> Tensor:
    """Return a few ids (1, T) of ordinary tokens, as many as the prompt leaves room for."""
    rows = min(len(tokenizer), len(network.get_input_embeddings().weight))
    special = {*tokenizer.all_special_ids, network.config.pad_token_id}
    ordinary = [i for i in range(rows) if i not in special] or list(range(rows))
    limit = adapters_of(network).longest_text
    length = min(SAMPLE_TOKENS, len(ordinary), SAMPLE_TOKENS if limit is None else limit)
    return torch.tensor([ordinary[:: max(1, len(ordinary) // length)][:length]], device=network.device)


@torch.no_grad()
def answers(network: Any, ids: Tensor, prompt_ids: Sequence[int] = ()) -> list[Tensor]:
    """Return a model's logits for a text, one tensor for each that its head gives, the prompt's positions cut off."""
    front = torch.tensor([list(prompt_ids)], dtype=torch.long, device=ids.device)
    inputs: dict[str, Any] = {"input_ids": torch.cat([front, ids], 1)}
    if is_encoder_decoder(network):
        start = network.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start or 0, *ids[0, :3].tolist()]], device=ids.device)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    out = network(**inputs)
    names = [name for name in ("logits", "start_logits", "end_logits") if name in out] or ["last_hidden_state"]
    found = [out[name].float() for name in names]
    by_token = not is_encoder_decoder(network) and (found[0].dim() == 3 or len(found) == 2)
    return [x[:, front.shape[1] :] if by_token else x for x in found]


def compare(
    expected: list[Tensor], found: list[Tensor], ids: Sequence[int], tolerance: float, source: Adapter
) -> float:
    """Return the largest difference of two models' answers over the old vocabulary.

    Raises:
        UsageError: they are not equal.
    """
    largest = 0.0
    for before, after in zip(expected, found, strict=True):
        old = before.shape[-1]
        # Rows of the table that the tokenizer did not use may have become the prompt's.
        gap = (before - after[..., :old]).abs()
        gap[..., [i for i in ids if i < old and gap.dim() == 3]] = 0
        difference = float(gap.max())
        largest = max(largest, difference)
        if not difference <= tolerance * max(1.0, float(before.abs().max())):
            raise UsageError(
                f"baking {source.config.name} into this model changes its answers (by {difference:.2g}), so nothing "
                f"was written; keep the adapter (softprompts.load_adapter, softprompts.peft)"
            )
    return largest
