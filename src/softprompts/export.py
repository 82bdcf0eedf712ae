"""Take a trained prompt elsewhere: to PEFT's PROMPT_TUNING, to engines that take embeddings, into a model folder.

What leaves this package depends on what the adapter is:

    prompt-tuning   a table of P vectors without an offset, as a checkpoint that plain PEFT loads
    embeds          the prompt (P, D) as a tensor; `prompt_embeds` gives whole inputs, with the offset in them
    baked           prompt and offset inside an ordinary model folder, see `bake.py`
    softprompts     the other way: a PROMPT_TUNING checkpoint becomes an adapter of this package, see `imports.py`

For encoder-decoder models, `encoder_outputs` hands the prompted encoder's states to the plain model's `generate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutput

from softprompts.attach import adapters_of
from softprompts.backbone import embedded_path
from softprompts.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_folder,
    fill,
    read_config,
    read_tensors,
    write_tensors,
)
from softprompts.core import MethodConfig, Offset, PositionOffset, SoftPrompt
from softprompts.errors import UsageError, suggest
from softprompts.files import write_text
from softprompts.hooks import check_length
from softprompts.shapes import is_decoder_only, is_encoder_decoder

OPTIONS = {
    "prompt-tuning": ("--model",),
    "embeds": (),
    "baked": ("--model", "--dtype"),
    "softprompts": ("--model", "--task-id"),
}
"""What can be exported to, and the options each takes."""
TARGETS = tuple(OPTIONS)
EMBEDS_FILE = "prompt_embeds.safetensors"
WRITERS = ("SEQ_2_SEQ_LM", "CAUSAL_LM")


@dataclass
class Adapter:
    """A saved adapter, without its backbone."""

    folder: Path
    config: MethodConfig
    entries: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    method: SoftPrompt
    width: int

    @property
    def base(self) -> str | None:
        """The backbone it was trained on, as far as it says."""
        return self.entries.get("base_model_name_or_path")

    @property
    def table(self) -> Tensor:
        """The prompt (P, D), with P=0 if there is none.

        Raises:
            UsageError: the prompt depends on the input.
        """
        if self.method.prompt is None:
            return torch.zeros(0, self.width)
        with torch.no_grad():
            prompt = self.method.prompt(torch.zeros(1, 1, self.width), torch.ones(1, 1, dtype=torch.long))
        if prompt.dim() != 2:
            raise UsageError(
                f"{self.config.name} makes its prompt from each text, so there is no table to export; keep the adapter "
                f"(softprompts.peft), or compute inputs with softprompts.export.prompt_embeds"
            )
        return prompt.float()


def read_adapter(source: str | Path) -> Adapter:
    """Read the adapter of a run's folder, or a bare adapter folder.

    Raises:
        UsageError: no adapter there, damaged, or saved without its width.
    """
    folder = adapter_folder(Path(source))
    config, entries = read_config(folder)
    if config.changes_model:
        raise UsageError(
            f"{folder} holds the baseline {config.name}, no prompt that could be exported; use softprompts.load_adapter"
        )
    width = entries.get("width")
    if width is None:
        raise UsageError(f"{folder / CONFIG_FILE} lacks 'width'; load the adapter and save it again")
    method, tensors = config.build(width), read_tensors(folder)
    fill(method, {key: value for key, value in tensors.items() if key.startswith(("prompt.", "offset."))}, folder)
    return Adapter(folder, config, entries, tensors, method.float().eval().requires_grad_(False), width)


def export(
    source: str | Path,
    to: str,
    out: str | Path,
    model: str | None = None,
    dtype: str = "fp32",
    task_id: int | None = None,
) -> dict[str, Any]:
    """Carry out one export of the command line; returns what was written, as plain data.

    Args:
        source: a run's folder or an adapter; for `to="softprompts"` a PEFT checkpoint.
        to: one of `TARGETS`.
        out: a new or empty folder.
        model: backbone in place of the one that the adapter names.
        dtype: precision of a baked folder.
        task_id: which task's prompt of a multitask checkpoint.

    Raises:
        UsageError: what cannot be exported, with the reason and the alternative.
    """
    if to not in TARGETS:
        raise UsageError(f"cannot export to '{to}'{suggest(to, TARGETS)} (known: {', '.join(TARGETS)})")
    given = {"--model": model, "--dtype": None if dtype == "fp32" else dtype, "--task-id": task_id}
    for option, value in given.items():
        if value is not None and option not in OPTIONS[to]:
            raise UsageError(f"--to {to} takes no {option}; leave it out")
    about: dict[str, Any] = {}
    if to == "prompt-tuning":
        to_prompt_tuning(Path(source), Path(out), model)
    elif to == "embeds":
        to_embeds(Path(source), Path(out))
    elif to == "softprompts":
        from softprompts.imports import import_prompt_tuning

        import_prompt_tuning(Path(source), Path(out), model, task_id)
    else:
        from softprompts.bake import bake

        baked = bake(Path(source), Path(out), model, dtype)
        about = {
            "prompt_ids": list(baked.prompt_ids),
            "prompt_tokens": list(baked.prompt_tokens),
            "tokenizer_adds_prompt": baked.tokenizer_adds_prompt,
            "difference": baked.difference,
        }
    files = sorted(path.name for path in Path(out).iterdir())
    return {"source": str(source), "to": to, "out": str(out), "files": files, **about}


def to_prompt_tuning(adapter: str | Path, out: str | Path, model: str | None = None) -> Path:
    """Write a PEFT PROMPT_TUNING checkpoint, which plain PEFT loads and answers with equally.

    Equally means without padding or with padding on the right: in plain PEFT padding on the left changes the answers,
    and a decoder-only model's logits are P longer, prompt first.

    Raises:
        UsageError: an offset, a head, or a prompt that depends on the input.
    """
    source, out = read_adapter(adapter), new_folder(out)
    name, offset, table = source.config.name, source.method.offset, source.table
    if offset is not None:
        way = (
            "fold it into the model with --to baked"
            if is_tokenwise(offset, source.width)
            else "take --to embeds (or --to baked, for a model with a table of positions such as BERT or GPT-2)"
        )
        raise UsageError(
            f"{name} adds an offset to the tokens, which PEFT's PROMPT_TUNING cannot hold; {way}, or load the adapter "
            f"as it is with softprompts.peft"
        )
    if not len(table):
        raise UsageError(f"{source.folder} has no prompt to export")
    if source.entries.get("modules_to_save"):
        raise UsageError(
            f"{source.folder} has a trained head, to which plain PEFT would also give the prompt's positions; load it "
            f"with softprompts.peft, or bake a head for tokens or spans with --to baked"
        )
    config = backbone_config(model or source.base, source.entries.get("revision"))
    task_type = source.entries.get("task_type")
    if task_type is None and config is not None:
        task_type = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
    if task_type not in WRITERS:
        raise UsageError(
            f"PEFT's PROMPT_TUNING is exported for models that write, {source.folder} says task_type={task_type}; "
            f"give the backbone with --model, or load the adapter with softprompts.peft"
        )
    entries = {
        "peft_type": "PROMPT_TUNING",
        "task_type": task_type,
        "base_model_name_or_path": model or source.base,
        "revision": source.entries.get("revision"),
        "inference_mode": True,
        "num_virtual_tokens": len(table),
        "token_dim": source.width,
        # One, also for encoder-decoder models: only the encoder is prompted.
        "num_transformer_submodules": 1,
        # PEFT takes what is null from the model that it loads onto.
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
    }
    write_tensors(out / WEIGHTS_FILE, {"prompt_embeddings": table})
    write_text(out / CONFIG_FILE, json.dumps(entries, indent=2) + "\n")
    return out


def to_embeds(adapter: str | Path, out: str | Path) -> Path:
    """Write `prompt_embeds.safetensors`: the prompt (P, D), and a position-wise offset's table (N, D) beside it.

    The file's metadata say how to put an input together from them.

    Raises:
        UsageError: a prompt that depends on the input.
    """
    source, out = read_adapter(adapter), new_folder(out)
    tensors, offset = {"prompt_embeds": source.table}, source.method.offset
    rule = "none: the input is [prompt_embeds; token embeddings]"
    if isinstance(offset, PositionOffset):
        tensors["offset_embeds"] = offset.table(slice(None)).float()
        rule = "by position: add row i of offset_embeds to the embedding of text token i, nothing past the last row"
    elif offset is not None:
        rule = "computed from the tokens: call softprompts.export.prompt_embeds on a model with the adapter attached"
    metadata = {
        "model": source.base or "",
        "method": source.config.name,
        "prompt_length": str(len(source.table)),
        "width": str(source.width),
        "offset": rule,
    }
    write_tensors(out / EMBEDS_FILE, tensors, metadata)
    return out


@torch.no_grad()
def prompt_embeds(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
    """Return each row's input as embeddings, [prompt ; text + offset] (P+T, D) without its padding.

    For engines that take embeddings in place of ids (vLLM's `prompt_embeds`, SGLang's `input_embeds`): the bare
    decoder-only model answers them as the prompted one answers the ids. Tokens that the engine generates then get no
    offset, unlike here; for offsets that reach generated tokens (ADePT's all, position-wise ones to the end of their
    table) generated texts may differ from the second token on. Bake such an adapter instead.

    Args:
        model: with the adapter attached and active.
        input_ids: (B, T), padded on either side.
        attention_mask: (B, T), 1 = text; None if nothing is padded.

    Raises:
        UsageError: no prompt attached, or a text longer than the offset's table.
    """
    if not is_decoder_only(model):
        raise UsageError("prompt_embeds is for decoder-only models; for encoder-decoder models take encoder_outputs")
    adapters, embedding = adapters_of(model), model.get_input_embeddings()
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    selection = adapters.selection(len(input_ids))
    methods: list[SoftPrompt | None] = [None] * len(input_ids)
    for number, method in enumerate(selection.methods if selection is not None else ()):
        for row in range(len(methods)) if selection is None or selection.rows is None else selection.rows[number]:
            methods[row] = method
    inputs = []
    for ids, real, own in zip(input_ids, mask.bool(), methods, strict=True):
        embeds = embedding(ids[real]).unsqueeze(0)
        prompt = None
        if own is not None:
            ones = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            check_length(own, ones, embeds.shape[1], None)
            prompt, embeds = own(embeds, None, ones)
        inputs.append((embeds if prompt is None else torch.cat([prompt, embeds], 1))[0])
    return inputs


@torch.no_grad()
def encoder_outputs(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
    """Return what the plain encoder-decoder model needs to answer as the prompted one: `generate(**these)`.

    Args:
        model: an encoder-decoder model with the adapter attached.
        input_ids: (B, T), padded on either side.
        attention_mask: (B, T), 1 = text; None if nothing is padded.

    Returns:
        `encoder_outputs`, the prompted encoder's states (B, P+T, D), padding last, and their `attention_mask`.

    Raises:
        UsageError: no prompt attached, or another kind of model.
    """
    if not is_encoder_decoder(model):
        raise UsageError("encoder_outputs is for encoder-decoder models; for this one take prompt_embeds")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    selection = adapters_of(model).selection(len(input_ids))
    states = model.get_encoder()(input_ids=input_ids, attention_mask=mask)[0]
    if selection is not None:
        mask = selection.extended(mask).sort(dim=1, descending=True).values
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": mask}


def is_tokenwise(offset: Offset, width: int) -> bool:
    """Whether each token's offset depends on that token alone; found out by moving tokens about."""
    if offset.positions is not None:
        return False
    tokens = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
    late = torch.arange(90, 94).unsqueeze(0)
    with torch.no_grad():
        together = offset(tokens, None).expand_as(tokens)
        moved = offset(tokens.flip(1), None).expand_as(tokens).flip(1)
        later = offset(tokens, late).expand_as(tokens)
        alone = torch.cat([offset(token, None).expand_as(token) for token in tokens.split(1, dim=1)], 1)
    return all(torch.allclose(together, other, atol=1e-4, rtol=1e-4) for other in (moved, later, alone))


def backbone_config(name: str | None, revision: str | None) -> Any:
    """Return a backbone's config, None if it cannot be had: it only fills in what PEFT would find out itself."""
    if name is None:
        return None
    try:
        return AutoConfig.from_pretrained(embedded_path(name), revision=revision)
    except (OSError, ValueError):
        return None


def new_folder(out: str | Path) -> Path:
    """Return the folder to write to; makes nothing.

    Raises:
        UsageError: something is there.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists and is not empty; remove it or name another")
    return out
