"""Load a frozen backbone with its tokenizer, in the precision the hardware is fast at."""

from __future__ import annotations

import importlib.util
import logging
import platform
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.utils import is_bitsandbytes_available

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
        UsageError: no such model, no files, a model that cannot answer as asked, or no bitsandbytes to quantise it.
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
        check_tokenizer(tokenizer, settings.name)
        dtype = precision(settings.dtype)
        small = {} if settings.quantization == "none" else quantized(settings.quantization, config, kind, dtype)
        model, loaded = AUTO_CLASSES[kind].from_pretrained(
            source,
            config=config,
            revision=settings.revision,
            dtype=dtype,
            ignore_mismatched_sizes=kind == "classification",
            output_loading_info=True,
            **small,
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
    model.requires_grad_(False)
    if not small:  # bitsandbytes packs the weights on their device: they are there
        model.to(default_device())
    if settings.gradient_checkpointing:
        # transformers renamed it within release 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return Backbone(model, tokenizer, kind, settings.name, dtype, untrained_modules(model, loaded))


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Make sure that a tokenizer was saved with the model: where there is none, transformers makes up an empty one.

    Raises:
        UsageError: it has nothing but special tokens.
    """
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if not any(character.isalnum() for token in tokenizer.get_vocab() if token not in special for character in token):
        raise UsageError(
            f"model '{name}' has no tokenizer (or one without words); save the model's own into its folder "
            f"(tokenizer.save_pretrained)"
        )


def quantized(quantization: str, config: Any, kind: Kind, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` must be told to keep the linear layers in 8 or 4 bits.

    The embeddings, which prompts read, are no linear layers; the output layer, task heads and poolers stay floating:
    the heads train, and a pooler does where the checkpoint has none. 4 bits are NF4, multiplied in `dtype`.

    Raises:
        UsageError: no bitsandbytes, or one that cannot use this machine's device.
    """
    device = default_device().type
    check_bitsandbytes(quantization, device)
    with torch.device("meta"):
        bare = AUTO_CLASSES[kind].from_config(config)
    output = bare.get_output_embeddings()
    kept = {name for name, module in bare.named_modules() if module is output or name.endswith("pooler")}
    options = transformers.BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        llm_int8_skip_modules=sorted({*kept, *head_modules(bare)}),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    # By number, as accelerate compares it with its own device.
    return {
        "quantization_config": options,
        "device_map": {"": torch.cuda.current_device() if device == "cuda" else device},
    }


def check_bitsandbytes(quantization: str, device: str) -> None:
    """Make sure that bitsandbytes is there and supports a type of device.

    Raises:
        UsageError: it is not, is too old for transformers, or does not.
    """
    asked = f"model.quantization={quantization}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"{asked} needs bitsandbytes; run pip install 'softprompts[quant]', or set it to none")
    if not is_bitsandbytes_available():
        raise UsageError(f"{asked} needs a newer bitsandbytes; run pip install -U 'softprompts[quant]'")
    import bitsandbytes

    # Each call in 8 bits would say that it casts bf16 to fp16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if device not in supported:
        raise UsageError(
            f"{asked}: the installed bitsandbytes {bitsandbytes.__version__} supports {', '.join(sorted(supported))}, "
            f"not this machine's {device}; upgrade it, or set it to none"
        )


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
    return cpu_bf16()


def cpu_bf16() -> bool:
    """Whether the processor has AVX-512 BF16 or AMX."""
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
