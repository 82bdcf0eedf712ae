"""Attach prompts to an unmodified Hugging Face model, with forward hooks and one submodule.

`attach` freezes the model and adds `model.prompt_adapter`, which holds the adapters. Hooks on the transformer
below the head (the encoder, for encoder-decoder models) embed the ids, add the offset, prepend the prompt and
extend the mask; on the way out they cut the prompt's positions off again. So the head sees as many positions as
the input has, labels and answer spans need no shifting, and `generate` keeps working. Three shapes:

    encoder-decoder   the encoder is prompted; the decoder only learns that its memory is P longer
    encoder only      text is moved to the front of its row, prompted, and put back where it was
    decoder only      prompt, positions counted in real tokens; later steps of a generation extend the mask

Padding changes nothing: encoders see `[prompt; text; padding]` whatever the padding side was, decoders get
positions counted over real tokens, and offsets follow the position in the text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softprompts.core import MethodConfig, SoftPrompt
from softprompts.errors import UsageError, suggest
from softprompts.init import Vocabulary

SLOT = "prompt_adapter"
TASK_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


def attach(
    model: Any,
    config: MethodConfig,
    name: str = "default",
    *,
    tokenizer: Any = None,
    train_head: bool = True,
    also_train: Sequence[str] = (),
    initialise: bool = True,
) -> Any:
    """Add a trainable prompt to a model and freeze everything else. Returns the same model.

    Args:
        model: any Hugging Face model whose inputs are token ids; its class and its weights stay as they are.
        config: a method's settings, for example `AcceptConfig()`.
        name: under which name; several adapters may be attached, the last one attached is active.
        tokenizer: needed by `init="text"` alone.
        train_head: also train (in fp32) the classification or span head of models that have one.
        also_train: names of further modules to train and save in full: those the checkpoint had no weights for.
        initialise: False leaves the parameters for `checkpoint.load_adapter` to fill.

    Raises:
        UsageError: the name is taken, the sizes do not fit the model, or a start cannot be had.

    The logits have the input's length; hidden states and attentions, if asked for, stay as the backbone computed
    them, prompt first.
    """
    adapters = getattr(model, SLOT, None)
    if adapters is None:
        adapters = PromptAdapters(model, train_head, also_train)
        model.add_module(SLOT, adapters)
        adapters.hook(model)
    try:
        adapters.add(name, config, tokenizer, initialise)
    except Exception:
        if not adapters.softprompt_methods:
            detach(model)
        raise
    return model


def detach(model: Any, name: str | None = None) -> Any:
    """Remove one adapter, or all of them: then the model is exactly as before `attach`. Returns the model.

    Raises:
        UsageError: no such adapter.
    """
    adapters = adapters_of(model)
    if name is not None:
        adapters.remove(name)
        if adapters.softprompt_methods:
            return model
    adapters.unhook(model)
    delattr(model, SLOT)
    return model


def adapters_of(model: Any) -> PromptAdapters:
    """Return the adapters of a model.

    Raises:
        UsageError: none is attached.
    """
    adapters = getattr(model, SLOT, None)
    if not isinstance(adapters, PromptAdapters):
        raise UsageError("no prompt is attached to this model; call attach(model, config) first")
    return adapters


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Leave the prompt out inside the `with` block (a trained head stays)."""
    adapters = adapters_of(model)
    before, adapters.enabled = adapters.enabled, False
    try:
        yield
    finally:
        adapters.enabled = before


def is_encoder_decoder(model: Any) -> bool:
    """Whether the model has an encoder and a decoder of its own."""
    return bool(model.config.is_encoder_decoder)


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


class PromptAdapters(nn.Module):
    """The adapters of one model, and the hooks that apply the active one.

    The attribute names are the PEFT layout's: parameters live under `prompt_adapter.softprompt_methods`.
    """

    def __init__(self, model: Any, train_head: bool = True, also_train: Sequence[str] = ()) -> None:
        super().__init__()
        self.train(model.training)
        self.softprompt_methods = nn.ModuleDict()
        self.configs: dict[str, MethodConfig] = {}
        self.active: str | None = None
        self.enabled = True
        self.heads = (*(head_modules(model) if train_head else ()), *also_train)
        # Past nn.Module's bookkeeping: the embedding is the backbone's submodule, not ours.
        self._embedding: Any
        self.__dict__["_embedding"] = model.get_input_embeddings()
        self._before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._head_before = {
            f"{head}.{key}": value.detach().clone()
            for head in self.heads
            for key, value in model.get_submodule(head).state_dict().items()
        }
        self._handles: list[Any] = []
        self._order: Tensor | None = None
        self._cut = 0
        self._keep_front = type(model).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice"))
        self._limit = position_limit(model)
        model.requires_grad_(False)
        for head in self.heads:
            model.get_submodule(head).float().requires_grad_(True)

    @property
    def width(self) -> int:
        """D, the width of the token embeddings."""
        return self._embedding.weight.shape[1]

    @property
    def longest_text(self) -> int | None:
        """The most tokens a text may have beside the active prompt, None if there is no limit."""
        method = self.method()
        limits = [method.positions, None if self._limit is None else self._limit - method.length]
        return min((limit for limit in limits if limit is not None), default=None)

    def method(self, name: str | None = None) -> SoftPrompt:
        """Return an adapter, by default the active one.

        Raises:
            UsageError: no such adapter.
        """
        name = self.active if name is None else name
        if name is None or name not in self.softprompt_methods:
            known = list(self.softprompt_methods)
            raise UsageError(f"no adapter '{name}'{suggest(str(name), known)} (attached: {', '.join(known)})")
        return self.softprompt_methods[name]  # type: ignore[return-value]

    def add(self, name: str, config: MethodConfig, tokenizer: Any = None, initialise: bool = True) -> None:
        """Build an adapter, start it as its config says, and make it the active one."""
        if name in self.softprompt_methods:
            raise UsageError(f"an adapter '{name}' is attached already; take another name or detach it first")
        if self.configs and self.heads:
            head = ", ".join(self.heads)
            raise UsageError(f"the head ({head}) belongs to the adapter '{self.active}'; detach that one first")
        config = config.resolved(self.width)
        weight: Tensor = self._embedding.weight
        method = config.build(self.width)
        if initialise:
            encode = None
            if tokenizer is not None:
                encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
            config.initialise(method, self.width, Vocabulary(weight.detach().cpu(), encode))
            from softprompts.checkpoint import warm_start

            warm_start(method, config)
        self.softprompt_methods[name] = method.to(weight.device).train(self.training)
        self.configs[name] = config
        self.activate(name)

    def activate(self, name: str) -> None:
        """Make one adapter the active and only trainable one."""
        self.method(name)
        self.active = name
        for other, method in self.softprompt_methods.items():
            method.requires_grad_(other == name)

    def remove(self, name: str) -> None:
        """Drop an adapter; if it was active, the last remaining one becomes active."""
        self.method(name)
        del self.softprompt_methods[name], self.configs[name]
        if self.active == name:
            self.active = None
            if self.configs:
                self.activate(list(self.configs)[-1])

    def hook(self, model: Any) -> None:
        """Register the forward hooks."""
        for head in self.heads:
            self._handles.append(model.get_submodule(head).register_forward_pre_hook(to_own_dtype))
        if is_encoder_decoder(model):
            self._hook(model.get_encoder(), self._before_encoder)
            self._hook(model.get_decoder(), self._before_cross_attention)
            return
        body = model.base_model
        self._hook(body, self._before_decoder if is_decoder_only(model) else self._before_encoder, self._after)

    def _hook(self, module: nn.Module, before: Callable, after: Callable | None = None) -> None:
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            self._handles.append(module.register_forward_hook(after))

    def unhook(self, model: Any) -> None:
        """Remove the hooks and restore what `attach` changed: trainability, and the head's weights."""
        for handle in self._handles:
            handle.remove()
        parameters = dict(model.named_parameters())
        for name, trainable in self._before.items():
            if name in parameters:
                parameters[name].requires_grad_(trainable).grad = None
        for name, value in self._head_before.items():
            module, _, leaf = name.rpartition(".")
            tensor = getattr(model.get_submodule(module), leaf)
            tensor.data = value.to(tensor.device)

    def _current(self) -> SoftPrompt | None:
        return self.method() if self.enabled and self.active is not None else None

    def _before_encoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        method = self._current()
        if method is None:
            return None
        kwargs = by_name(module, args, kwargs)
        ids, embeds, mask = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None), kwargs["attention_mask"]
        types = kwargs.get("token_type_ids")
        refuse(kwargs.get("position_ids") is not None, "position_ids", "leave them out: they follow from the mask")
        self._order = None
        if mask is not None:
            check_mask(mask)
            # Text first, padding last, so that nothing stands between the prompt and the text.
            self._order = (mask == 0).int().argsort(dim=1, stable=True)
            mask, ids = mask.gather(1, self._order), None if ids is None else ids.gather(1, self._order)
            types = None if types is None else types.gather(1, self._order)
            if embeds is not None:
                embeds = embeds.gather(1, self._order.unsqueeze(-1).expand_as(embeds))
        embeds = self._embedding(ids) if embeds is None else embeds
        mask = ones_for(embeds) if mask is None else mask
        self._check_length(method, mask, embeds.shape[1])
        prompt, embeds = method(embeds, None, mask)
        self._cut = method.length
        if prompt is not None:
            embeds, mask = torch.cat([prompt, embeds], 1), extended(mask, method.length)
            if types is not None:
                types = torch.cat([types.new_zeros(len(types), method.length), types], 1)
        kwargs.update(inputs_embeds=embeds, attention_mask=mask)
        if types is not None:
            kwargs["token_type_ids"] = types
        return (), kwargs

    def _before_cross_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        method = self._current()
        kwargs = by_name(module, args, kwargs)
        mask, memory = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if method is None or mask is None or memory is None:
            return None
        if memory.shape[1] != mask.shape[1] + method.length:
            return None  # the caller encoded without the prompt
        kwargs["encoder_attention_mask"] = extended(mask.sort(dim=1, descending=True).values, method.length)
        return (), kwargs

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        method = self._current()
        if method is None:
            return None
        kwargs = by_name(module, args, kwargs)
        ids, embeds, mask = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None), kwargs["attention_mask"]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        embeds = self._embedding(ids) if embeds is None else embeds
        new = embeds.shape[1]
        if mask is None:
            refuse(past == 0 and restarts(kwargs.get("position_ids")), "packed position_ids", "pass one text per row")
            mask = ones_for(embeds, new + max(past - method.length, 0))
        check_mask(mask)
        at = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]
        if past == 0:
            self._check_length(method, mask, new)
        prompt, embeds = method(embeds, at, mask[:, -new:], prepend=past == 0)
        mask = extended(mask, method.length)
        self._cut = 0
        if prompt is not None:
            embeds, self._cut = torch.cat([prompt, embeds], 1), method.length
        kwargs.update(inputs_embeds=embeds, attention_mask=mask)
        kwargs.pop("cache_position", None)  # older releases pass it, counted without the prompt
        if "position_ids" in kwargs:
            kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        if kwargs.get("token_type_ids") is not None and self._cut:
            types = kwargs["token_type_ids"]
            kwargs["token_type_ids"] = torch.cat([types.new_zeros(len(types), self._cut), types], 1)
        return (), kwargs

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._current() is None:
            return output
        hidden = output[0][:, self._cut :]
        pooler = getattr(module, "pooler", None)
        pooled = None
        if pooler is not None and self._cut:
            # The model pooled the prompt's first vector; pool the text's first token, as without a prompt.
            pooled = pooler(hidden)
        order, self._order = self._order, None
        if order is not None and not self._keep_front:
            hidden = hidden.gather(1, order.argsort(dim=1).unsqueeze(-1).expand_as(hidden))
        if isinstance(output, tuple):
            rest = list(output[1:])
            if pooled is not None:
                rest[0] = pooled
            return (hidden, *rest)
        output["last_hidden_state"] = hidden
        if pooled is not None:
            output["pooler_output"] = pooled
        return output

    def _check_length(self, method: SoftPrompt, mask: Tensor, slots: int) -> None:
        """Refuse texts beyond the offset's table or the model's positions. Looks at data only in doubt."""
        reach = method.positions
        if reach is not None and slots > reach and int(mask.sum(1).max()) > reach:
            longest = int(mask.sum(1).max())
            raise UsageError(
                f"a text of {longest} tokens is longer than offset_positions={reach}; truncate it, or train with "
                f"offset_positions={longest}"
            )
        if self._limit is not None and slots + method.length > self._limit:
            raise UsageError(
                f"prompt_length={method.length} and a text of {slots} tokens exceed the {self._limit} positions of "
                f"this model; truncate the text to {self._limit - method.length} tokens"
            )


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Return all arguments of a forward call by name, with the ones a prompt touches present where accepted."""
    names = list(inspect.signature(module.forward).parameters)
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    bound.setdefault("attention_mask", None)
    if "position_ids" in names:
        bound.setdefault("position_ids", None)
    return bound


def position_limit(model: Any) -> int | None:
    """Return the number of positions of a model with a table of them, None where positions have no end."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    rotary = any(getattr(config, key, None) is not None for key in ("rope_parameters", "rope_scaling", "rope_theta"))
    if limit is None or rotary:
        return None
    # RoBERTa-like tables keep their first rows for padding.
    reserved = config.pad_token_id + 1 if "roberta" in str(config.model_type) else 0
    return limit - reserved


def extended(mask: Tensor, length: int) -> Tensor:
    """Put `length` ones before a (B, T) mask, in its own dtype."""
    return torch.cat([mask.new_ones(mask.shape[0], length), mask], 1) if length else mask


def ones_for(embeds: Tensor, length: int | None = None) -> Tensor:
    """Return the (B, T) mask of an input without padding."""
    return torch.ones(embeds.shape[0], length or embeds.shape[1], dtype=torch.long, device=embeds.device)


def check_mask(mask: Any) -> None:
    """Refuse masks that do not say which tokens are text."""
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    refuse(not isinstance(mask, Tensor) or mask.dim() != 2, f"an attention mask of shape {shape}", "pass a (B, T) mask")


def restarts(positions: Tensor | None) -> bool:
    """Whether explicit positions go back somewhere, as in packed sequences."""
    return positions is not None and bool((positions[:, 1:] < positions[:, :-1]).any())


def refuse(wrong: bool, what: str, way_out: str) -> None:
    """Raise UsageError if `wrong`."""
    if wrong:
        raise UsageError(f"a prompt cannot be used with {what}; {way_out}")


def to_own_dtype(module: nn.Module, args: tuple) -> tuple:
    """Pre-hook of a head kept in fp32 on a backbone of lower precision."""
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
