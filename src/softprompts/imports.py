"""Bring a prompt in that PEFT trained: a PROMPT_TUNING checkpoint becomes an adapter of this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from softprompts.backbone import embedded_name
from softprompts.checkpoint import CONFIG_FILE, PEFT_TYPE, WEIGHTS_FILE, write_adapter
from softprompts.errors import UsageError
from softprompts.export import new_folder
from softprompts.methods.prompt_tuning import PromptTuningConfig

OLD_WEIGHTS_FILE = "adapter_model.bin"
TABLES = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING")
"""PEFT types whose checkpoint is a table of prompt vectors, or makes one."""


def import_prompt_tuning(
    folder: str | Path, out: str | Path, model: str | None = None, task_id: int | None = None
) -> Path:
    """Turn a PEFT PROMPT_TUNING checkpoint, or one task of a MULTITASK_PROMPT_TUNING one, into an adapter of ours.

    The answers are plain PEFT's on texts without padding or padded on the right. Of a T5 checkpoint with two
    "submodules" the encoder's half is taken: the other one is untrained (PROMPT_TUNING), or in use in training but
    not in `generate` (MULTITASK_PROMPT_TUNING).

    Args:
        folder: the checkpoint.
        out: a new or empty folder.
        model: backbone in place of the one that the checkpoint names.
        task_id: which task of a multitask checkpoint; may be left out if it has one.

    Raises:
        UsageError: another kind of checkpoint, a damaged one, one with a head, or no such task.
    """
    folder, out = Path(folder), new_folder(out)
    entries, tensors = read_peft(folder)
    rows = entries.get("num_virtual_tokens")
    table = tensors.get("prompt_embeddings")
    if table is None or table.dim() != 2 or not isinstance(rows, int) or not len(table) or len(table) % rows:
        shape = None if table is None else tuple(table.shape)
        raise UsageError(f"{folder} is damaged: prompt_embeddings has shape {shape} for {rows} virtual tokens")
    table = table[:rows].float()
    if entries["peft_type"] == "MULTITASK_PROMPT_TUNING":
        table = table * task_factor(tensors, task_id, folder)[:rows]
    elif task_id is not None:
        raise UsageError(f"{folder} holds one prompt for all tasks; leave --task-id out")
    config = PromptTuningConfig(prompt_length=rows)
    method = config.build(table.shape[1])
    method.load_state_dict({"prompt.vectors": table})
    base = model or entries.get("base_model_name_or_path")
    about = {
        "task_type": entries.get("task_type"),
        "base_model_name_or_path": base and embedded_name(base),
        "modules_to_save": None,
        "revision": None if model else entries.get("revision"),
    }
    return write_adapter(out, config, table.shape[1], method, {}, about)


def read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config entries and tensors of a PEFT checkpoint that holds a table of prompt vectors.

    Raises:
        UsageError: another kind of checkpoint, a damaged one, or one with a head.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(f"{folder} holds no PEFT checkpoint ({CONFIG_FILE} is missing)")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        kind = entries.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); it is damaged") from None
    if kind == PEFT_TYPE:
        raise UsageError(f"{folder} is an adapter of softprompts already; use it as it is")
    if kind not in TABLES:
        raise UsageError(
            f"{folder} is a PEFT checkpoint of type {kind}, which is no prompt before the input; only "
            f"{' and '.join(TABLES)} can be imported, use this one with PEFT itself"
        )
    try:
        if (folder / WEIGHTS_FILE).is_file():
            tensors = load_file(folder / WEIGHTS_FILE)
        else:
            tensors = torch.load(folder / OLD_WEIGHTS_FILE, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no weights ({WEIGHTS_FILE} is missing)") from None
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UsageError(f"the weights in {folder} cannot be read ({error}); they are damaged") from None
    if heads := [key for key in tensors if key.startswith("base_model.")]:
        raise UsageError(
            f"{folder} has a trained head ({heads[0]}), which PEFT trained on the prompt's positions; softprompts cuts "
            f"them off, so the answers would differ: use this one with PEFT itself"
        )
    return entries, tensors


def task_factor(tensors: Mapping[str, Tensor], task_id: int | None, folder: Path) -> Tensor:
    """Return what one task multiplies the shared prompt with, (rows, D)."""
    try:
        columns, rows = tensors["prefix_task_cols"].float(), tensors["prefix_task_rows"].float()
    except KeyError as error:
        raise UsageError(f"{folder} is damaged: {error} is missing") from None
    if task_id is None and len(columns) > 1:
        raise UsageError(
            f"{folder} holds prompts of {len(columns)} tasks; choose one with --task-id 0 to {len(columns) - 1}"
        )
    if task_id is not None and not 0 <= task_id < len(columns):
        raise UsageError(f"--task-id {task_id}: {folder} holds tasks 0 to {len(columns) - 1}")
    return columns[task_id or 0] @ rows[task_id or 0]
