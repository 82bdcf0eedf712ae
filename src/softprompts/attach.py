"""Attach prompts to an unmodified Hugging Face model, with forward hooks and one submodule.

`attach` freezes the model and adds `model.prompt_adapter`, which holds the adapters. The model keeps its class, its
`generate` and its heads; what it does differently is in `hooks.py`. One adapter is active; `using` says for each row
of a batch which one it uses instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softprompts.core import MethodConfig, SoftPrompt
from softprompts.errors import UsageError, suggest
from softprompts.hooks import Hooks, thread
from softprompts.init import Vocabulary
from softprompts.rows import BASE, Selection, select
from softprompts.shapes import SLOT, head_modules


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
    them, prompt first (behind the padding, in a decoder whose attention window the row exceeds).
    """
    adapters = getattr(model, SLOT, None)
    if adapters is None:
        adapters = PromptAdapters(model, (*(head_modules(model) if train_head else ()), *also_train))
        model.add_module(SLOT, adapters)
        adapters.freeze(model)
    elif not adapters.own:
        raise UsageError("this model's prompts belong to PEFT; add this one with its add_adapter, or unload() first")
    try:
        if adapters.configs and (config.changes_model or adapters.changes_model):
            raise UsageError(
                f"{config.name} cannot stand beside '{adapters.active}': what changes the backbone itself has a model "
                f"of its own; load the model again"
            )
        if adapters.configs and adapters.heads:
            head = ", ".join(adapters.heads)
            raise UsageError(
                f"the head ({head}) belongs to the adapter '{adapters.active}'; detach that one first, or use "
                f"softprompts.peft, which keeps a head per adapter"
            )
        adapters.add(name, config, tokenizer, initialise)
        adapters.activate(name)
    except Exception:
        if not adapters.softprompt_methods:
            detach(model)
        raise
    return model


def detach(model: Any, name: str | None = None) -> Any:
    """Remove one adapter, or all of them: then the model is exactly as before `attach`. Returns the model.

    Raises:
        UsageError: no such adapter, or one that has changed the backbone itself.
    """
    adapters = adapters_of(model)
    if not adapters.own:
        raise UsageError("this model's prompts belong to PEFT; use its delete_adapter(name) or unload()")
    if adapters.changes_model:
        raise UsageError(f"{adapters.configs[str(adapters.active)].name} has changed the model; load the model again")
    if name is not None:
        adapters.remove(name)
        if adapters.softprompt_methods:
            return model
    adapters.restore(model)
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
    """Leave the prompt out inside the `with` block (a trained head stays).

    Raises:
        UsageError: the adapter has changed the backbone itself.
    """
    adapters = adapters_of(model)
    if adapters.changes_model:
        raise UsageError("a baseline that changes the backbone cannot be left out; load the model again")
    before, adapters.enabled = adapters.enabled, False
    try:
        yield
    finally:
        adapters.enabled = before


@contextmanager
def using(model: Any, names: Sequence[str]) -> Iterator[None]:
    """Use another adapter for each row of the batches inside the `with` block, in forward passes and `generate`.

    Args:
        model: with adapters attached.
        names: one adapter name per row, `"__base__"` for none. Beams and returned sequences follow their row. Only
            the active adapter trains, unless the others' parameters are made to require gradients.

    Raises:
        UsageError: an unknown name, or (in the forward pass) a number of names that does not divide the batch.
    """
    adapters = adapters_of(model)
    select(adapters.methods(), names, len(names))
    before = adapters.names.get(thread())
    adapters.names[thread()] = tuple(names)
    try:
        yield
    finally:
        if before is None:
            del adapters.names[thread()]
        else:
            adapters.names[thread()] = before


@contextmanager
def remembering(model: Any) -> Iterator[None]:
    """Compute the keys and values of each prompt once inside the `with` block, for decoder-only models.

    For answering many batches: nothing may train, load or switch the backbone's weights (LoRA) inside.
    """
    with adapters_of(model).hooks.memory.keeping(), torch.no_grad():
        yield


class PromptAdapters(nn.Module):
    """The adapters of one model, which of them is active, and which one each row uses.

    The attribute names are the PEFT layout's: parameters live under `prompt_adapter.softprompt_methods`.
    """

    own = True
    """Whether `attach` manages this model; PEFT does otherwise."""

    def __init__(self, model: Any, heads: Sequence[str] = ()) -> None:
        super().__init__()
        self.train(model.training)
        self.softprompt_methods = nn.ModuleDict()
        self.configs: dict[str, MethodConfig] = {}
        self.active: str | None = None
        self.enabled = True
        self.names: dict[int, tuple[str, ...]] = {}
        self.heads = tuple(heads)
        self.weights: tuple[str, ...] = ()
        """Parameters outside this module that a baseline trains, by their full names."""
        self.num_backbone = sum(parameter.numel() for parameter in model.parameters())
        """The number of parameters that the model had before."""
        self._before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._head_before = {
            f"{head}.{key}": value.detach().clone()
            for head in self.heads
            for key, value in model.get_submodule(head).state_dict().items()
        }
        self.hooks = Hooks(model, self.selection)
        self.hooks.register()

    @property
    def _embedding(self) -> Any:
        # Asked each time: PEFT or the user may have put another module there.
        return self.hooks.model.get_input_embeddings()

    @property
    def width(self) -> int:
        """D, the width of the token embeddings."""
        return self._embedding.weight.shape[1]

    @property
    def longest_text(self) -> int | None:
        """The most tokens a text may have beside the active prompt, None if there is no limit."""
        return self.reach()

    def reach(self, name: str | None = None) -> int | None:
        """Return the most tokens a text may have beside an adapter's prompt, None if there is no limit."""
        method, limit = self.method(name), self.hooks.position_limit
        limits = [method.positions, None if limit is None else limit - method.length]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def changes_model(self) -> bool:
        """Whether the one adapter here changes the backbone itself."""
        return any(config.changes_model for config in self.configs.values())

    def methods(self) -> dict[str, SoftPrompt]:
        """Return every adapter by name."""
        return dict(self.softprompt_methods.items())  # type: ignore[arg-type]

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

    def selection(self, batch: int, beams: bool = False) -> Selection | None:
        """Return which adapters the rows of a batch use (several rows for one name with `beams`), None if none."""
        if not self.enabled:
            return None
        # A compiled model is traced for all threads, and takes the names there are.
        who = thread() or next(iter(self.names), 0)
        if self.names and (names := self.names.get(who)) is not None:
            return select(self.methods(), names, batch, beams)
        # Nothing here depends on the batch, so that a compiled model is not specialised to its size.
        return None if self.active is None else Selection([self.method()])

    def add(self, name: str, config: MethodConfig, tokenizer: Any = None, initialise: bool = True) -> None:
        """Build an adapter and start it as its config says; it becomes neither active nor trainable.

        Without `initialise` its parameters are on the meta device if that is torch's default there, else empty.
        """
        if name in self.softprompt_methods:
            raise UsageError(f"an adapter '{name}' is attached already; take another name or remove it first")
        if name == BASE or not name or "." in name or hasattr(self.softprompt_methods, name):
            raise UsageError(f"'{name}' cannot name an adapter; take another name, without dots")
        config = config.resolved(self.width)
        if config.changes_model:
            # What trains is kept in fp32, and so is what it computes with.
            if getattr(self.hooks.model, "is_quantized", False):
                raise UsageError(f"{config.name} cannot train a quantised backbone; set model.quantization=none")
            dtype = self.hooks.model.dtype
            try:
                self.weights = tuple(config.install(self.hooks.model.float()))
            except Exception:
                self.hooks.model.to(dtype)
                raise
        weight: Tensor = self._embedding.weight
        method = config.build(self.width)
        if initialise:
            encode = None
            if tokenizer is not None:
                encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
            scale = getattr(self._embedding, "embed_scale", 1.0)  # Gemma's table is scaled where it is read
            config.initialise(method, self.width, Vocabulary(weight.detach().cpu() * float(scale), encode))
            from softprompts.checkpoint import SavedAdapters

            config.start_from(method, SavedAdapters())
        if not any(parameter.is_meta for parameter in method.parameters()):
            method.to(weight.device)
        self.softprompt_methods[name] = method.train(self.training).requires_grad_(False)
        self.configs[name] = config

    def activate(self, name: str | None) -> None:
        """Make one adapter the active and only trainable one, or none."""
        if name is not None:
            self.method(name)
        self.active = name
        for other, method in self.softprompt_methods.items():
            method.requires_grad_(other == name)
        for weight in self.weights:
            self.hooks.model.get_parameter(weight).requires_grad_(name is not None)

    def remove(self, name: str) -> None:
        """Drop an adapter; if it was active, the last remaining one becomes active."""
        self.method(name)
        del self.softprompt_methods[name], self.configs[name]
        if self.active == name:
            self.activate(list(self.configs)[-1] if self.configs else None)

    def freeze(self, model: Any) -> None:
        """Freeze the backbone; the heads train, in fp32."""
        model.requires_grad_(False)
        for head in self.heads:
            module = model.get_submodule(head)
            module.float().requires_grad_(True)
            self.hooks.watch(module)

    def restore(self, model: Any) -> None:
        """Remove the hooks and restore what was changed: trainability, and the head's weights."""
        self.hooks.remove()
        parameters = dict(model.named_parameters())
        for name, trainable in self._before.items():
            if name in parameters:
                parameters[name].requires_grad_(trainable).grad = None
        for name, value in self._head_before.items():
            module, _, leaf = name.rpartition(".")
            tensor = getattr(model.get_submodule(module), leaf)
            tensor.data = value.to(tensor.device)
