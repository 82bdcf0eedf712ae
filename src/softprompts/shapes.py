"""What kind of model is it, where is its head, and how far do its positions reach?"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from softprompts.errors import UsageError

SLOT = "prompt_adapter"
"""Name of the one submodule that `attach` adds. PEFT's prefix, `softprompt_`, must not be part of it."""
WINDOWS = {"sliding_window": "sliding", "attention_chunk_size": "chunked", "window_size": "local"}
"""Settings of attention layers that reach over some slots alone, and what such layers are called."""
TASK_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


def is_encoder_decoder(model: Any) -> bool:
    """Whether the model has an encoder and a decoder of its own; UMT5's encoder alone has the same config."""
    return bool(model.config.is_encoder_decoder) and "EncoderModel" not in type(model.base_model).__name__


def is_decoder_only(model: Any) -> bool:
    """Whether the model reads left to right, with or without a language-modelling head."""
    if is_encoder_decoder(model):
        return False
    import transformers

    config = type(model.config)
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.keys()
    masked = transformers.MODEL_FOR_MASKED_LM_MAPPING.keys()
    # BERT-like models are listed as causal too, for use as decoders; `is_decoder` says when they are.
    return config in causal and (config not in masked or bool(getattr(model.config, "is_decoder", False)))


def decoder_body(model: Any) -> Any:
    """Return the transformer that a decoder-only model's forward pass calls.

    OPT keeps it inside another module, which it passes by.

    Raises:
        UsageError: the decoder of an encoder-decoder model (BART) by itself, whose positions count the padding.
    """
    inner = getattr(model, "model", None)
    if model.base_model is model and isinstance(inner, nn.Module) and getattr(model, "lm_head", None) is not None:
        return inner  # Llama 4's text model is looked for under the name it has beside images
    inner = getattr(model.base_model, "decoder", None)
    if not isinstance(inner, nn.Module) or model.base_model is model:
        return model.base_model
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise UsageError(f"{type(model).__name__} counts positions over padding; take the whole model, or another")
    return inner


def head_modules(model: Any) -> dict[str, nn.Module]:
    """Return the task head (classifier, span head) of a model, by module name; empty for language models."""
    if not type(model).__name__.endswith(TASK_HEADS):
        return {}
    body = {id(module) for module in (model.base_model, model.get_input_embeddings()) if module is not model}
    for name in ("encoder", "decoder"):
        body.add(id(getattr(model, name, None)))
    return {
        name: child
        for name, child in model.named_children()
        if id(child) not in body and name != SLOT and any(True for _ in child.parameters())
    }


def classifies_rows(model: Any) -> bool:
    """Whether the model has one answer per row, so that the order of its tokens' states does not matter."""
    return type(model).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice"))


def averages_rows(model: Any) -> bool:
    """Whether a row's one answer is made from all its tokens, by the caller's mask (ModernBERT, EuroBERT)."""
    return getattr(model.config, "classifier_pooling", None) in ("mean", "late")


def check_embeddable(model: Any) -> None:
    """Make sure that a model reads embeddings as it reads ids.

    Raises:
        UsageError: it makes more of the ids than their embeddings.
    """
    config = model.config.get_text_config()
    absolute = getattr(config, "position_embedding_type", None) == "absolute"
    masks = config.model_type == "esm" and (absolute or getattr(config, "token_dropout", False))
    if masks or getattr(config, "hidden_size_per_layer_input", None):
        raise UsageError(
            f"{type(model).__name__} makes more of token ids than their embeddings, which a prompt has none of; take "
            f"another model"
        )


def keeps_more_than_states(model: Any) -> bool:
    """Whether a decoder keeps more of its past than keys and values: recurrent layers, which padding runs through."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=decoder_body(model).config).layers
    return any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def attention_window(model: Any) -> int | None:
    """Return over how many slots the narrowest layer of a decoder reaches, None if all reach everywhere.

    It is 1 where no padding may ever stand between prompt and text: for recurrent layers, and for models that count
    slots instead of taking positions (MPT).
    """
    if not is_decoder_only(model):
        return None
    counts_slots = "position_ids" not in inspect.signature(decoder_body(model).forward).parameters
    if counts_slots or keeps_more_than_states(model):
        return 1
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)  # GPT-Neo's name
    found = []
    for layer in getattr(config, "per_layer_config", None) or [config]:
        for name, kind in WINDOWS.items():
            size = getattr(layer, name, None)
            # Configs without a list of layers have one kind alone; GPT-Neo's setting means nothing without its list.
            used = kind != "local" if kinds is None else any(kind in str(other) for other in kinds)
            off = kind == "sliding" and getattr(layer, "use_sliding_window", None) is False
            if isinstance(size, int) and size > 0 and used and not off:
                found.append(size)
    return min(found, default=None)


def position_start(model: Any) -> int:
    """Return the number of a text's first position: RoBERTa-like tables keep their first rows for padding."""
    tables = (m for name, m in model.base_model.named_modules() if name.endswith("position_embeddings"))
    padding = getattr(next(tables, None), "padding_idx", None)
    return 0 if padding is None else padding + 1


def position_limit(model: Any) -> int | None:
    """Return the number of positions of a model with a table of them, None where positions have no end."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    rotary = any(getattr(config, key, None) is not None for key in ("rope_parameters", "rope_scaling", "rope_theta"))
    if limit is None or rotary or limit <= 0:
        return None
    return limit - position_start(model)
