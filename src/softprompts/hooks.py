"""What a prompted model does differently: forward hooks on the transformer below the head, and `generate`.

The hooks embed the ids, add the offset, prepend the prompt and extend the mask; on the way out they cut the prompt's
positions off again. So the head sees as many positions as the input has, and labels and answer spans need no
shifting. Three shapes:

    encoder-decoder   the encoder is prompted; the decoder only learns that its memory is P longer
    encoder only      text is moved to the front of its row, prompted, and put back where it was
    decoder only      prompt, positions counted in real tokens; later steps of a generation extend the mask

Padding changes nothing: encoders see `[prompt; text; padding]` whatever the padding side was, decoders get positions
counted over real tokens, and offsets follow the position in the text. A decoder's attention window counts slots,
padding too: rows longer than that are `[padding; prompt; text]`, each with its own prompt.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softprompts.core import SoftPrompt
from softprompts.errors import UsageError
from softprompts.generation import count_text, default_mask, option, with_text
from softprompts.masks import asked, extended_types, ones_for, positions, restarts, sorted_by, text_positions
from softprompts.memory import PromptMemory, can_share, new_cache, note_packed, slot_order
from softprompts.rows import Selection
from softprompts.shapes import (
    attention_window,
    averages_rows,
    check_embeddable,
    classifies_rows,
    decoder_body,
    is_decoder_only,
    is_encoder_decoder,
    position_limit,
    position_start,
)

IGNORED = -100
"""Label of the tokens that are no answer."""
UNFIT = {"prefill_chunk_size": None, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0}
"""Options of `generate` that would take the prompt for text, and the values that switch them off."""
NEED_TEXT = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


@dataclass
class Call:
    """What the hooks of one forward call leave for each other."""

    order: Tensor | None = None
    packed: Tensor | None = None
    cut: int = 0
    hide_cache: bool = False


class Hooks:
    """The hooks of one model.

    Args:
        model: which one.
        choose: says which adapters the rows of a batch use, None for none; its second argument is whether several
            rows may stand for one name (beams).
    """

    def __init__(self, model: Any, choose: Callable[[int, bool], Selection | None]) -> None:
        check_embeddable(model)
        self.model = model
        self._choose = choose
        self._handles: list[Any] = []
        # By thread: servers call one model from several.
        self._calls: dict[int, Call] = {}
        self._generating: set[int] = set()
        # By thread, for its next call: which of the last L tokens are the answer, (B, L).
        self.answers: dict[int, Tensor] = {}
        self._keep_front = classifies_rows(model) and not averages_rows(model)
        self._start = position_start(model)
        self.memory = PromptMemory(self._start)
        self._limit = position_limit(model)
        self._window = attention_window(model)

    @property
    def position_limit(self) -> int | None:
        """The most positions the backbone has, None if they have no end."""
        return self._limit

    def register(self) -> None:
        """Hook the model."""
        model = self.model
        if is_encoder_decoder(model):
            self._hook(model.get_encoder(), self._before_encoder)
            self._hook(model.get_decoder(), self._before_cross_attention)
        elif is_decoder_only(model):
            self._hook(decoder_body(model), self._before_decoder, self._after)
            if model.can_generate():
                model.generate = self.generate
                self._hook(model, self._before_head)
        else:
            self._hook(model.base_model, self._before_encoder, self._after)

    def remove(self) -> None:
        """Unhook the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.model.__dict__.pop("generate", None)

    def watch(self, head: nn.Module) -> None:
        """Give a head that is kept in fp32 its own dtype on a backbone of lower precision."""
        self._handles.append(head.register_forward_pre_hook(to_own_dtype))

    def _hook(self, module: nn.Module, before: Callable, after: Callable | None = None) -> None:
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            self._handles.append(module.register_forward_hook(after))

    def _chosen(self, ids: Tensor | None, embeds: Tensor | None) -> Selection | None:
        given = ids if embeds is None else embeds
        return None if given is None else self._choose(given.shape[0], self._is_generating())

    def _begin(self) -> Call:
        call = self._calls[thread()] = Call()
        return call

    def _embed(self, module: Any, ids: Tensor) -> Tensor:
        """Embed ids as the body does: some (Marian, Pegasus) scale the embeddings of ids themselves."""
        embedding = self.model.get_input_embeddings()
        scale = getattr(module, "embed_scale", None)
        embeds = embedding(ids)
        return embeds if scale is None or hasattr(embedding, "embed_scale") else embeds * scale

    def _before_encoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        kwargs = by_name(module, args, kwargs)
        ids, embeds, mask = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None), kwargs["attention_mask"]
        call = self._begin()
        selection = self._chosen(ids, embeds)
        if selection is None:
            return None
        types = kwargs.get("token_type_ids")
        refuse(kwargs.get("position_ids") is not None, "position_ids", "leave them out: they follow from the mask")
        if mask is not None:
            check_mask(mask)
            # Text first, padding last, so that nothing stands between the prompt and the text.
            call.order = (mask == 0).int().argsort(dim=1, stable=True)
            mask, ids, types, embeds = (sorted_by(call.order, x) for x in (mask, ids, types, embeds))
        embeds = self._embed(module, ids) if embeds is None else embeds
        mask = ones_for(embeds) if mask is None else mask
        self._check_length(selection, mask, embeds.shape[1])
        prompt, embeds = selection(embeds, None, mask)
        if prompt is not None:
            call.cut = prompt.shape[1]
            embeds, mask = torch.cat([prompt, embeds], 1), selection.extended(mask)
            types = extended_types(types, call.cut)
            if selection.mixed:
                # Prompts of several lengths: each row begins at the first position, as it would alone.
                call.packed = (mask == 0).int().argsort(dim=1, stable=True)
                mask, types, embeds = (sorted_by(call.packed, x) for x in (mask, types, embeds))
        kwargs.update(inputs_embeds=embeds, attention_mask=mask)
        if types is not None:
            kwargs["token_type_ids"] = types
        return (), kwargs

    def _before_cross_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        kwargs = by_name(module, args, kwargs)
        mask, memory = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        selection = None if memory is None else self._choose(memory.shape[0], True)
        if memory is None or selection is None:
            return None
        if mask is None and selection.mixed and memory.shape[1] > selection.length:
            mask = ones_for(memory, memory.shape[1] - selection.length)  # shorter prompts are filled up
        if mask is None or memory.shape[1] != mask.shape[1] + selection.length:
            return None  # bare, or the caller encoded without the prompt
        kwargs["encoder_attention_mask"] = selection.extended(mask).sort(dim=1, descending=True).values
        return (), kwargs

    def _before_head(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note which tokens have labels: they are the answer, at which a prompt made from the text must not look."""
        labels = by_name(module, args, kwargs).get("labels")
        if labels is not None and labels.dim() == 2:
            self.answers[thread()] = labels != IGNORED

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        kwargs = by_name(module, args, kwargs)
        ids, embeds, mask = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None), kwargs["attention_mask"]
        call, generating, answer = self._begin(), self._is_generating(), self.answers.pop(thread(), None)
        selection = self._chosen(ids, embeds)
        if selection is None:
            return None
        counted = kwargs.get("position_ids")
        if generating and self._start and counted is not None:
            kwargs["position_ids"] = counted + self._start  # `generate` counts from 0
        if generating and embeds is not None:  # which `generate` has prompted
            return ((), {**kwargs, "inputs_embeds": embeds}) if self._start else None
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        embeds = self._embed(module, ids) if embeds is None else embeds
        new = embeds.shape[1]
        if generating:
            at = text_positions(selection, embeds, mask, counted, past)
            kwargs["inputs_embeds"] = selection(embeds, at, ones_for(embeds), prepend=False)[1]
            return (), kwargs
        if mask is None:
            refuse(past == 0 and restarts(kwargs.get("position_ids")), "packed position_ids", "pass one text per row")
            mask = ones_for(embeds, new + max(past - selection.length, 0))
        check_mask(mask)
        at = positions(mask)[:, -new:]
        if past == 0:
            self._check_length(selection, mask, new)
            self._check_answer(module, selection, answer)
        crosses = self._window is not None and past + new + (selection.length if past == 0 else 0) > self._window
        typed = kwargs.get("token_type_ids") is not None  # the prompt has types of its own then
        shares = cache is None and not (crosses or typed) and self._shares(module, set(kwargs), selection, len(embeds))
        if shares:
            kwargs["past_key_values"] = self.memory.cache(module, selection, embeds, mask, len(embeds))
            call.hide_cache = not uses_cache(module, kwargs)
        prompt, embeds = selection(embeds, at, asked(mask[:, -new:], answer), prepend=past == 0 and not shares)
        mask = selection.extended(mask)
        if prompt is not None:
            embeds, call.cut = torch.cat([prompt, embeds], 1), prompt.shape[1]
        types = extended_types(kwargs.get("token_type_ids"), call.cut)
        if self._window is not None:
            # Where the order of the slots changes, the cache must say so: make it here.
            if past == 0 and crosses and cache is None and "past_key_values" in kwargs and uses_cache(module, kwargs):
                cache = kwargs["past_key_values"] = new_cache(module)
            order = slot_order(mask, cache, self._window, crosses)
            mask = mask if order is None else sorted_by(order, mask)
            if order is not None and past == 0:
                call.packed = order
                embeds, types = sorted_by(order, embeds), sorted_by(order, types)
        kwargs.update(inputs_embeds=embeds, attention_mask=mask)
        if types is not None:
            kwargs["token_type_ids"] = types
        kwargs.pop("cache_position", None)  # older releases pass it, counted without the prompt
        if "position_ids" in kwargs:
            kwargs["position_ids"] = positions(mask)[:, -embeds.shape[1] :] + self._start
        return (), kwargs

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        call = self._calls.pop(thread(), Call())
        if call.hide_cache and not isinstance(output, tuple):
            output["past_key_values"] = None
        if not call.cut and call.order is None and call.packed is None:
            return output
        hidden = text_of(call, output[0])
        # The model pooled the prompt's first vector; pool the text's first token, as without a prompt.
        pooled = pool(module, hidden) if call.cut else None
        if call.order is not None and not self._keep_front:
            hidden = sorted_by(call.order.argsort(dim=1), hidden)
        routers = None if isinstance(output, tuple) else output.get("router_logits")
        if routers is not None:  # (B*(P+T), E) of a mixture of experts, whose loss counts the text's tokens
            rows = (logits.view(len(hidden), -1, logits.shape[-1]) for logits in routers)
            output["router_logits"] = tuple(text_of(call, logits).flatten(0, 1) for logits in rows)
        if isinstance(output, tuple):
            rest = list(output[1:])
            if pooled is not None:
                rest[0] = pooled
            return (hidden, *rest)
        output["last_hidden_state"] = hidden
        if pooled is not None:
            output["pooler_output"] = pooled
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with a decoder-only model: its own `generate`, given the prompted embeddings of the first step.

        So caches of every kind have the right size and masks the right shape, while the logits processors and the
        result see the text alone; lengths (`max_length`, `min_length`) count the text, without the prompt.

        Raises:
            UsageError: an option that would look at the prompt as if it were text.
        """
        model = self.model
        plain = type(model).generate
        kwargs |= dict(zip(list(inspect.signature(plain).parameters)[1:], args, strict=False))
        if kwargs.get("inputs") is not None:
            kwargs["input_ids"] = kwargs.pop("inputs")
        ids, embeds, mask = (kwargs.pop(key, None) for key in ("input_ids", "inputs_embeds", "attention_mask"))
        if ids is None and embeds is None:
            bos = option(model, kwargs, "bos_token_id")
            refuse(bos is None, "generate() without any input", "pass input_ids or inputs_embeds")
            ids = torch.full((1, 1), bos, dtype=torch.long, device=model.device)
        selection = self._choose(len(ids if embeds is None else embeds), False)
        if selection is None or kwargs.get("custom_generate") is not None:
            given = {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask}
            # Bare rows too may become several for one name.
            with self._generation() if selection is None else nullcontext():
                return plain(model, **kwargs, **{key: value for key, value in given.items() if value is not None})
        refuse(kwargs.get("assistant_model") is not None, "assistant_model", "use prompt_lookup_num_tokens")
        lookup = option(model, kwargs, "prompt_lookup_num_tokens") is not None
        for name, off in UNFIT.items():
            refuse(option(model, kwargs, name) not in (None, off), name, "leave it out")
        for name, off in NEED_TEXT.items() if lookup else ():
            # Prompt lookup is given no ids, so these would not see the text.
            refuse(option(model, kwargs, name) not in (None, off), f"prompt lookup and {name}", "leave one out")
        embeds = self._embed(decoder_body(model), ids) if embeds is None else embeds
        mask = default_mask(model, kwargs, ids, embeds) if mask is None else mask
        check_mask(mask)
        refuse(lookup and not bool(mask.all()), "prompt lookup and padding", "generate one text at a time, unpadded")
        self._check_length(selection, mask, embeds.shape[1])
        text = embeds.shape[1] if ids is None else ids.shape[1]
        rows = len(embeds) * max(option(model, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))
        body = decoder_body(model)
        accepted = set(inspect.signature(body.forward).parameters)
        refuse("past_key_values" not in accepted, f"generate() of {type(model).__name__}", "take a model with a cache")
        count_text(model, kwargs, text)
        own = option(model, kwargs, "cache_implementation") is not None or kwargs.get("past_key_values") is not None
        own = own or kwargs.get("token_type_ids") is not None
        more = option(model, kwargs, "max_new_tokens") or self._window or 0  # unlimited rows cross any window
        crosses = self._window is not None and selection.length + embeds.shape[1] + more > self._window
        if not own and not lookup and not crosses and self._shares(body, accepted, selection, rows):
            kwargs["past_key_values"] = self.memory.cache(body, selection, embeds, mask, rows)
        prompt, embeds = selection(embeds, positions(mask), mask)
        types = kwargs.get("token_type_ids")
        if prompt is not None:
            embeds, types = torch.cat([prompt, embeds], 1), extended_types(types, prompt.shape[1])
        mask, cache = selection.extended(mask), kwargs.get("past_key_values")
        order = None if self._window is None else slot_order(mask, cache, self._window, crosses)
        if order is not None:
            mask, embeds, types = (sorted_by(order, x) for x in (mask, embeds, types))
        if types is not None:
            kwargs["token_type_ids"] = types
        kwargs.pop("position_ids", None)  # they follow from the mask
        # Prompt lookup crops the cache to the length of the ids, which must then be the length of the embeddings.
        if ids is not None and not lookup:
            kwargs["input_ids"] = ids
        with self._generation():
            out = plain(model, inputs_embeds=embeds, attention_mask=mask, **kwargs)
        if order is not None and cache is None:
            note_packed(getattr(out, "past_key_values", None), mask.shape[1])
        return with_text(out, ids) if lookup and ids is not None else out

    @contextmanager
    def _generation(self) -> Iterator[None]:
        new = {thread()} - self._generating  # a call inside another one leaves that as it is
        self._generating |= new
        try:
            yield
        finally:
            self._generating -= new

    def _is_generating(self) -> bool:
        # A compiled step is traced for all threads.
        return thread() in self._generating or (thread() == 0 and bool(self._generating))

    def _shares(self, body: nn.Module, accepted: set[str], selection: Selection, rows: int) -> bool:
        return can_share(body, accepted, selection, rows, self.memory.kept is not None)

    def _check_answer(self, module: nn.Module, selection: Selection, answer: Tensor | None) -> None:
        """Refuse to train a prompt that is made from the text where nobody said which part of it is the answer."""
        trains = module.training and torch.is_grad_enabled() and self.model.can_generate()
        if answer is None and trains and selection.per_row:
            raise UsageError(
                "this prompt is made from the text and must not see the answer; pass labels to the model, which say "
                "where it begins (a Trainer's label_smoothing_factor and compute_loss_func take them away)"
            )

    def _check_length(self, selection: Selection, mask: Tensor, slots: int) -> None:
        """Refuse texts beyond the offset's table or the model's positions. Looks at data only in doubt."""
        for number, method in enumerate(selection.methods):
            if method is not None:
                own = mask if selection.rows is None else mask[list(selection.rows[number])]
                check_length(method, own, slots, self._limit)


def thread() -> int:
    """Return whose call this is. A compiled model is traced once, for all threads."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def text_of(call: Call, values: Tensor) -> Tensor:
    """Return the text's part (B, T, D) of values (B, P+T, D) of prompt and text."""
    if call.packed is not None:
        values = sorted_by(call.packed.argsort(dim=1), values)
    return values[:, call.cut :]


def pool(module: Any, hidden: Tensor) -> Tensor | None:
    """Pool (B, T, D) states as the body does, None if it does not."""
    pooler = getattr(module, "pooler", None)
    if pooler is None:
        return None
    # ALBERT's pooler is a bare layer; the others take the first state themselves.
    activation = getattr(module, "pooler_activation", None)
    return pooler(hidden) if activation is None else activation(pooler(hidden[:, 0]))


def check_length(method: SoftPrompt, mask: Tensor, slots: int, limit: int | None) -> None:
    """Refuse rows (mask (B, T) of them in T = `slots`) that one adapter cannot take."""
    reach = method.positions
    if reach is not None and slots > reach and int(mask.sum(1).max()) > reach:
        longest = int(mask.sum(1).max())
        raise UsageError(
            f"a text of {longest} tokens is longer than offset_positions={reach}; truncate it, or train with "
            f"offset_positions={longest}"
        )
    if limit is not None and slots + method.length > limit:
        raise UsageError(
            f"prompt_length={method.length} and a text of {slots} tokens exceed the {limit} positions of "
            f"this model; truncate the text to {limit - method.length} tokens"
        )


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Return all arguments of a forward call by name, with the ones a prompt touches present where accepted."""
    names = list(inspect.signature(module.forward).parameters)
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    bound.setdefault("attention_mask", None)
    for name in ("position_ids", "past_key_values"):
        if name in names:
            bound.setdefault(name, None)
    return bound


def uses_cache(module: Any, kwargs: dict) -> bool:
    """Whether the caller of a decoder wants its cache back."""
    wanted = kwargs.get("use_cache")
    return bool(getattr(module.config, "use_cache", True) if wanted is None else wanted)


def check_mask(mask: Any) -> None:
    """Refuse masks that do not say which tokens are text."""
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    refuse(not isinstance(mask, Tensor) or mask.dim() != 2, f"an attention mask of shape {shape}", "pass a (B, T) mask")


def refuse(wrong: bool, what: str, way_out: str) -> None:
    """Raise UsageError if `wrong`."""
    if wrong:
        raise UsageError(f"a prompt cannot be used with {what}; {way_out}")


def to_own_dtype(module: nn.Module, args: tuple) -> tuple:
    """Pre-hook of a head kept in fp32 on a backbone of lower precision."""
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
