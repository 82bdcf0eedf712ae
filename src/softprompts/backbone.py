"""Load a frozen backbone with its tokenizer, in the precision the hardware is fast at."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.models.auto import modeling_auto

from softprompts.config import ModelSettings
from softprompts.errors import UsageError
from softprompts.shapes import head_modules, is_encoder_decoder

Kind = Literal["seq2seq", "causal", "classification"]
EMBEDDED = "t5-nano"


@dataclass
class Backbone:
    """A model, its tokenizer, and how it answers."""

    model: Any
    tokenizer: Any
    kind: Kind
    name: str
    dtype: torch.dtype
    untrained: tuple[str, ...] = ()
    """Modules that the checkpoint has no weights for, beside the head: they must be trained and saved with it."""


def load_backbone(settings: ModelSettings, num_labels: int | None = None) -> Backbone:
    """Load the model and tokenizer of `settings.name`.

    Args:
        settings: name, head and precision.
        num_labels: outputs of a classification head (1 = regression); None if the task has no labels.

    Raises:
        UsageError: no such model, no files, or a model that cannot answer as asked.
    """
    source = embedded_path(settings.name)
    quiet()
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=settings.revision)
        kind = answer_kind(config, settings.head)
        if kind == "classification" and num_labels is None:
            raise UsageError(
                "a task with open answers needs a model that writes, such as T5 or GPT; this one answers through a "
                "classification head"
            )
        if kind == "classification":
            config.num_labels = num_labels
            if num_labels == 1:
                config.problem_type = "regression"
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=settings.revision)
        dtype = precision(settings.dtype)
        model, loaded = AUTO_CLASSES[kind].from_pretrained(
            source,
            config=config,
            revision=settings.revision,
            dtype=dtype,
            ignore_mismatched_sizes=kind == "classification",
            output_loading_info=True,
        )
    except UsageError:
        raise
    except Exception as error:  # transformers raises a dozen kinds for "no such model"
        raise UsageError(
            f"model '{settings.name}' cannot be loaded ({first_line(error)}); name a folder, a hub id that can be "
            f"reached, or the embedded '{EMBEDDED}'"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        # Greedy means greedy: a checkpoint's own penalties and length rules stay out.
        ids = ("decoder_start_token_id", "bos_token_id", "eos_token_id")
        own = {name: getattr(model.generation_config, name) for name in ids}
        model.generation_config = transformers.GenerationConfig(**own, pad_token_id=tokenizer.pad_token_id)
    model.requires_grad_(False).to(default_device())
    if settings.gradient_checkpointing:
        # transformers renamed it within release 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return Backbone(model, tokenizer, kind, settings.name, dtype, untrained_modules(model, loaded))


def default_device() -> torch.device:
    """Return where models run: the first accelerator, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def untrained_modules(model: Any, loaded: dict[str, Any]) -> tuple[str, ...]:
    """Return the modules that came out of loading with random weights, the head apart."""
    keys = [*loaded["missing_keys"], *(entry[0] for entry in loaded["mismatched_keys"])]
    names = dict.fromkeys(str(key).rpartition(".")[0] for key in keys)
    heads = tuple(head_modules(model))
    return tuple(name for name in names if not name.startswith(heads)) if heads else ()


AUTO_CLASSES: dict[Kind, Any] = {
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "causal": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
}


def answer_kind(config: Any, head: str) -> Kind:
    """Decide how a model answers: by writing if it can, else through a classification head."""
    writes: Kind | None = None
    if config.is_encoder_decoder and listed(config, "SEQ_TO_SEQ_CAUSAL_LM"):
        writes = "seq2seq"
    elif listed(config, "CAUSAL_LM") and not listed(config, "MASKED_LM"):
        writes = "causal"
    if head == "language" and writes is None:
        raise UsageError(f"head=language: a {config.model_type} model cannot write; use head=classification")
    return "classification" if head == "classification" or writes is None else writes


def listed(config: Any, kind: str) -> bool:
    """Whether transformers (or a library that registered itself there) has a class of that kind for a config.

    By the model type's name: listing the classes themselves would import every model there is.
    """
    names = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
    return config.model_type in names or type(config) in getattr(transformers, f"MODEL_FOR_{kind}_MAPPING")


def embedded_path(name: str) -> str:
    """Return the folder of the embedded backbone for its name, any other name unchanged."""
    if name == EMBEDDED and not Path(name).exists():
        return str(resources.files("softprompts") / "assets" / EMBEDDED)
    return name


def embedded_name(path: str) -> str:
    """Return the name of the embedded backbone for its folder, any other name unchanged."""
    return EMBEDDED if path == embedded_path(EMBEDDED) else path


def precision(name: str) -> torch.dtype:
    """Return the dtype of the backbone; `auto` is bf16 where the machine multiplies it natively."""
    if name == "auto":
        return torch.bfloat16 if fast_bf16() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def fast_bf16() -> bool:
    """Whether this machine has bf16 units: a CUDA device that supports it, or a CPU with AVX-512 BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.system() != "Linux":
        return False
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().split() if cpu.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def decoder_start(model: Any) -> int:
    """Return the id that starts every decoded text of an encoder-decoder model."""
    if not is_encoder_decoder(model):
        raise UsageError("only encoder-decoder models have a decoder start token")
    start = model.config.decoder_start_token_id
    return model.config.pad_token_id if start is None else start


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, short enough for one line of ours."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."


def quiet() -> None:
    """Keep transformers' progress bars and advice out of our output."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
