"""Save and load adapters in the PEFT layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softprompts.attach import adapters_of, attach, detach
from softprompts.card import write_card
from softprompts.core import MethodConfig, SoftPrompt
from softprompts.errors import UsageError
from softprompts.files import replace, write_text
from softprompts.registry import method_from_dict
from softprompts.results import ADAPTER
from softprompts.shapes import SLOT, head_modules

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_TYPE = "SOFTPROMPT"
ROOT = "base_model.model."
OWN = f"{ROOT}{SLOT}.softprompt_methods."


def save_adapter(
    model: Any, folder: str | Path, name: str | None = None, about: Mapping[str, Any] | None = None
) -> Path:
    """Write one adapter (by default the active one) and the trained head to `folder`, atomically.

    Args:
        model: a model with prompts attached.
        folder: created or replaced file by file.
        name: which adapter.
        about: further entries of the config, for example `base_model_name_or_path` and `task_type`.

    Raises:
        UsageError: no such adapter.
        SoftPromptsError: the disk refuses.
    """
    adapters = adapters_of(model)
    if not adapters.own:
        raise UsageError("this model's prompts belong to PEFT, and so do their heads; use its save_pretrained(folder)")
    method = adapters.method(name)
    config = adapters.configs[name or str(adapters.active)]
    heads = {
        f"{ROOT}{head}.{key}": value
        for head in adapters.heads
        for key, value in model.get_submodule(head).state_dict().items()
    }
    entries = {
        "task_type": None,
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "modules_to_save": list(adapters.heads) or None,
        **(about or {}),
    }
    return write_adapter(folder, config, adapters.width, method, heads, entries)


def write_adapter(
    folder: str | Path,
    config: MethodConfig,
    width: int,
    method: SoftPrompt,
    heads: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> Path:
    """Write an adapter with or without a model: its tensors, the head's (by their full keys), config and card.

    Raises:
        SoftPromptsError: the disk refuses.
    """
    entries = {
        "peft_type": PEFT_TYPE,
        "inference_mode": True,
        "width": width,
        "softprompt": config.to_dict(),
        **about,
    }
    folder = Path(folder)
    write_tensors(folder / WEIGHTS_FILE, {**{f"{OWN}{k}": v for k, v in method.state_dict().items()}, **heads})
    write_text(folder / CONFIG_FILE, json.dumps(entries, indent=2) + "\n")
    write_card(folder, entries)
    return folder


def load_adapter(model: Any, folder: str | Path, name: str = "default", *, trainable: bool = True) -> Any:
    """Attach the adapter saved in `folder` and, if one was saved, put its head on the model.

    Raises:
        UsageError: not an adapter of this package, damaged, or made for another model width or head.
    """
    folder = Path(folder)
    config, entries = read_config(folder)
    width = model.get_input_embeddings().weight.shape[1]
    if entries.get("width", width) != width:
        raise UsageError(
            f"{folder} was trained for width {entries['width']} ({entries.get('base_model_name_or_path')}), "
            f"this model has width {width}; load the model it was trained on"
        )
    saved = entries.get("modules_to_save") or ()
    further = [module for module in saved if module not in head_modules(model)]
    if unknown := [module for module in further if module not in dict(model.named_modules())]:
        raise UsageError(
            f"{folder} was trained with a module '{unknown[0]}', which this model lacks; load its own class"
        )
    attach(model, config, name, also_train=further, initialise=False)
    try:
        restore_adapter(model, folder, name)
    except UsageError:
        detach(model, name)
        raise
    if not trainable:
        for module in (adapters_of(model).method(name), *map(model.get_submodule, adapters_of(model).heads)):
            module.requires_grad_(False)
    return model


def restore_adapter(model: Any, folder: str | Path, name: str | None = None) -> None:
    """Put the weights saved in `folder` into an attached adapter of the same sizes, and into the head.

    Raises:
        UsageError: missing, damaged, or other sizes.
    """
    folder = Path(folder)
    adapters, tensors = adapters_of(model), read_tensors(folder)
    fill(adapters.method(name), {k: v for k, v in tensors.items() if k.startswith(("prompt.", "offset."))}, folder)
    for head in adapters.heads:
        fill(model.get_submodule(head), under(tensors, head), folder)


def warm_start(method: SoftPrompt, config: MethodConfig) -> None:
    """Copy prompt and offset from the adapters that `prompt_from` and `offset_from` name.

    Raises:
        UsageError: a source is missing where the method needs one, cannot be read, or has other sizes.
    """
    sources = config.sources()
    if config.source_required and sources["prompt"] is None:
        raise UsageError(f"{config.name} starts from a trained prompt; set prompt_from=FOLDER of a saved adapter")
    for part, source in sources.items():
        if source is None:
            continue
        module = getattr(method, part)
        if module is None:
            raise UsageError(f"{part}_from={source}: this {config.name} has no {part}; leave {part}_from out")
        start = under(read_tensors(adapter_folder(Path(source))), part)
        own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        theirs = {key: tuple(value.shape) for key, value in start.items()}
        if own != theirs:
            raise UsageError(
                f"{part}_from={source}: its {part} is {theirs or 'missing'}, this one needs {own}; give both the same "
                f"sizes (a part alone takes the whole budget, beside another part its share)"
            )
        module.load_state_dict(start)


def under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of one part or module, without its name in their keys."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load `tensors` into `module`, every key and shape as it must be."""
    own = module.state_dict()
    for key, value in own.items():
        if key not in tensors:
            raise UsageError(f"{folder / WEIGHTS_FILE} lacks '{key}'; it is damaged or of another model class")
        if tensors[key].shape != value.shape:
            raise UsageError(
                f"{folder / WEIGHTS_FILE}: '{key}' has shape {tuple(tensors[key].shape)}, "
                f"its config asks for {tuple(value.shape)}; it is damaged or of another model class"
            )
    if extra := set(tensors) - set(own):
        raise UsageError(f"{folder / WEIGHTS_FILE} holds unknown '{min(extra)}'; it is damaged or of another version")
    module.load_state_dict(tensors)


def adapter_folder(path: Path) -> Path:
    """Return the adapter inside a run's folder, or the folder itself if it is an adapter."""
    inner = path / ADAPTER
    return inner if inner.is_dir() else path


def read_config(folder: Path) -> tuple[MethodConfig, dict[str, Any]]:
    """Return (method settings, all entries) of a saved adapter.

    Raises:
        UsageError: no such folder, not JSON, or another kind of adapter.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(f"{folder} holds no adapter ({CONFIG_FILE} is missing); name the folder that `train` wrote")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); it is damaged, save the adapter again") from None
    if not isinstance(entries, dict) or "softprompt" not in entries:
        kind = entries.get("peft_type") if isinstance(entries, dict) else None
        raise UsageError(f"{path} is not an adapter of softprompts (peft_type={kind!r}); load it with PEFT itself")
    return method_from_dict(entries["softprompt"]), entries


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return an adapter's tensors by short name: `prompt.…`, `offset.…`, and the head's.

    Raises:
        UsageError: missing or damaged.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UsageError(f"{folder} holds no adapter weights ({WEIGHTS_FILE} is missing)")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read ({error}); it is damaged, save the adapter again") from None
    return {key.removeprefix(OWN).removeprefix(ROOT): value for key, value in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    ready = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    replace(path, lambda temporary: save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})}))
