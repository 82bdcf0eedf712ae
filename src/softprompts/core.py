"""The one idea: a method says what to put before the token embeddings and what to add to them.

    embeds (B, T, D)  ->  [ prompt (P, D) ; embeds + offset (B, T, D) ]  ->  (B, P+T, D)

The frozen backbone sees the right-hand side; nothing else about it changes. The two axes are independent:
a method fills one or both, and any prompt goes with any offset (`CombinedConfig`).

Axes, the same letters everywhere: B batch, T input tokens, P prompt length, D model width, K subspaces,
C codewords per codebook, S subspace width (S = D/K), R rank, N source prompts.

Reading order: this file, `codebook.py`, `methods/accept.py`, `rows.py`, `attach.py`, `hooks.py`, `train.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompts.errors import UsageError
from softprompts.init import Start, Vocabulary
from softprompts.settings import Settings


class Prompt(nn.Module, ABC):
    """What is prepended: P vectors, the same for every row or made from the row."""

    length: int
    per_row: ClassVar[bool] = False
    """Whether it is made from the row; else `forward` returns (P, D) whatever it is given."""

    @staticmethod
    @abstractmethod
    def count(**sizes: int) -> int:
        """Return the number of trainable scalars for the constructor's sizes, without building."""

    @abstractmethod
    def initialise(self, start: Start, vocabulary: Vocabulary) -> None:
        """Fill the parameters in place as `start` says."""

    @abstractmethod
    def forward(
        self, embeds: Float[Tensor, "B T D"], mask: Int[Tensor, "B T"]
    ) -> Float[Tensor, "P D"] | Float[Tensor, "B P D"]:
        """Return the prompt; `embeds` and `mask` (1 = text) serve prompts that depend on the input."""


class Offset(nn.Module, ABC):
    """What is added to the token embeddings: by position, or by token."""

    positions: int | None = None
    """Rows of a position-wise table, None if any length goes."""

    @staticmethod
    @abstractmethod
    def count(**sizes: int) -> int:
        """Return the number of trainable scalars for the constructor's sizes, without building."""

    @abstractmethod
    def initialise(self, start: Start, vocabulary: Vocabulary) -> None:
        """Fill the parameters in place as `start` says."""

    @abstractmethod
    def forward(
        self, embeds: Float[Tensor, "B T D"], at: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "T D"] | Float[Tensor, "B T D"]:
        """Return the offset of each token; `at` is its position in the text, None if that is 0..T-1."""


class PositionOffset(Offset):
    """An offset that depends on the position alone: a table of `positions` rows, however it is written."""

    positions: int

    @abstractmethod
    def table(self, rows: slice | Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        """Return some rows of the table."""

    def forward(
        self, embeds: Float[Tensor, "B T D"], at: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "T D"] | Float[Tensor, "B T D"]:
        if at is None:
            length = embeds.shape[1]
            if length <= self.positions:
                return self.table(slice(length))
            # Slots past the table can only be padding here (`attach` has checked), so they get nothing.
            return nn.functional.pad(self.table(slice(None)), (0, 0, 0, length - self.positions))
        inside = (at < self.positions).unsqueeze(-1)
        at = at.clamp(max=self.positions - 1)
        if at.numel() < self.positions:  # a step of a generation needs few rows
            return self.table(at.flatten()).unflatten(0, at.shape) * inside
        return self.table(slice(None))[at] * inside


class SoftPrompt(nn.Module):
    """One trained (or trainable) adapter: a prompt, an offset, or both."""

    def __init__(self, prompt: Prompt | None, offset: Offset | None) -> None:
        super().__init__()
        self.prompt = prompt
        self.offset = offset

    @property
    def length(self) -> int:
        """P, the number of prepended vectors."""
        return self.prompt.length if self.prompt is not None else 0

    @property
    def positions(self) -> int | None:
        """The longest text that the offset reaches, None if any."""
        return self.offset.positions if self.offset is not None else None

    def forward(
        self,
        embeds: Float[Tensor, "B T D"],
        at: Int[Tensor, "B T"] | None,
        mask: Int[Tensor, "B T"],
        prepend: bool = True,
    ) -> tuple[Float[Tensor, "B P D"] | None, Float[Tensor, "B T D"]]:
        """Return (prompt of every row or None, embeds + offset), both in the dtype of `embeds`.

        `prepend=False` spares the prompt, for the later steps of a generation.
        """
        prompt = None
        if self.prompt is not None and prepend:
            prompt = self.prompt(embeds, mask).to(embeds.dtype)
            if prompt.dim() == 2:
                prompt = prompt.expand(embeds.shape[0], -1, -1)
        if self.offset is not None:
            # Out of place: the embeddings may be shared with gradient checkpointing or the caller.
            embeds = embeds + self.offset(embeds, at).to(embeds.dtype)
        return prompt, embeds

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters by learning-rate group: `prompt` and `offset`."""
        parts = {"prompt": self.prompt, "offset": self.offset}
        return {name: list(part.parameters()) for name, part in parts.items() if part is not None}


@dataclass(frozen=True)
class Part:
    """A prompt or an offset that is sized but not built."""

    module: type[Prompt] | type[Offset]
    sizes: dict[str, int]
    options: dict[str, Any]
    start: Start

    @property
    def num_trainable(self) -> int:
        """Trainable scalars, from the formula."""
        return self.module.count(**self.sizes)

    def build(self) -> Any:
        """Return the module, with uninitialised parameters."""
        return self.module(**self.sizes, **self.options)


@runtime_checkable
class Saved(Protocol):
    """Reads saved adapters, from which methods start; `checkpoint.SavedAdapters` reads them from disk."""

    def part(self, source: str, part: str) -> dict[str, Tensor]:
        """Return the tensors of an adapter's `prompt` or `offset`, by name within it; {} if it has none."""

    def vectors(self, source: str) -> Float[Tensor, "P D"]:
        """Return an adapter's prompt as vectors, however they are written."""


class MethodConfig(Settings):
    """Settings of one method; a subclass says which parts it makes for a given model width."""

    name: ClassVar[str]
    source_required: ClassVar[bool] = False
    """Whether the prompt must start from a trained one."""
    changes_model: ClassVar[bool] = False
    """Whether the backbone itself is changed (`baselines`), not only what it sees."""
    task_parts: ClassVar[tuple[str, ...]] = ()
    """Parameters that each task has for itself when several are trained together; the others are shared by all."""

    prompt_from: str | None = None
    """Saved adapter whose prompt is the start. Read once, when attached: a saved adapter does not need it."""
    offset_from: str | None = None
    """Saved adapter whose offset is the start. Read once, when attached: a saved adapter does not need it."""

    def resolved(self, width: int) -> Any:
        """Return these settings with every derived size written out for the model width.

        Raises:
            UsageError: sizes that do not fit the width or the budget.
        """
        return self

    def prompt_part(self, width: int) -> Part | None:
        """Return the prepended part, None if this method has none."""
        return None

    def offset_part(self, width: int) -> Part | None:
        """Return the added part, None if this method has none."""
        return None

    def install(self, model: Any) -> list[str]:
        """Change the backbone in place, if that is what the method does, and start what is new.

        Returns the full names of the parameters that are trained and saved.
        """
        return []

    def num_trainable(self, width: int) -> int:
        """Return the number of trainable scalars for the model width, without building anything."""
        return sum(part.num_trainable for part in (self.prompt_part(width), self.offset_part(width)) if part)

    def sources(self) -> dict[str, str | None]:
        """Return the saved adapter that each part starts from, None where it starts afresh."""
        return {"prompt": self.prompt_from, "offset": self.offset_from}

    def check_sources(self) -> None:
        """Make sure that what the method must start from is named.

        Raises:
            UsageError: it is not.
        """
        if self.source_required and self.sources()["prompt"] is None:
            raise UsageError(f"{self.name} starts from a trained prompt; set prompt_from=FOLDER of a saved adapter")

    def start_from(self, method: SoftPrompt, saved: Saved) -> None:
        """Copy in place what starts from saved adapters; the rest stays as `initialise` left it.

        Raises:
            UsageError: a source is missing where the method needs one, cannot be read, or has other sizes.
        """
        self.check_sources()
        for part, source in self.sources().items():
            if source is None:
                continue
            module = getattr(method, part)
            if module is None:
                raise UsageError(f"{part}_from={source}: this {self.name} has no {part}; leave {part}_from out")
            start = saved.part(source, part)
            own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
            theirs = {key: tuple(value.shape) for key, value in start.items()}
            if own != theirs:
                raise UsageError(
                    f"{part}_from={source}: its {part} is {theirs or 'missing'}, this one needs {own}; give both the "
                    f"same sizes (a part alone takes the whole budget, beside another part its share)"
                )
            module.load_state_dict(start)

    def build(self, width: int) -> SoftPrompt:
        """Return the adapter with uninitialised parameters.

        Raises:
            UsageError: neither part is there, or the sizes do not fit.
        """
        prompt, offset = self.prompt_part(width), self.offset_part(width)
        if prompt is None and offset is None:
            raise UsageError(f"{self.name}: nothing to train; give it a prompt_length or offset_positions above 0")
        return SoftPrompt(prompt.build() if prompt else None, offset.build() if offset else None)

    def initialise(self, soft_prompt: SoftPrompt, width: int, vocabulary: Vocabulary) -> None:
        """Fill the parameters of `build(width)` in place."""
        with torch.no_grad():
            for module, part in (
                (soft_prompt.prompt, self.prompt_part(width)),
                (soft_prompt.offset, self.offset_part(width)),
            ):
                if module is not None and part is not None:
                    module.initialise(part.start, vocabulary)

    def kept_elsewhere(self) -> dict[str, str]:
        """Return the tensors that a saved adapter need not hold, by name: the saved adapter that holds the same."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which `registry.method_from_dict` makes an equal config."""
        return {"method": self.name, **{field: getattr(self, field) for field in type(self).model_fields}}


class CombinedConfig(MethodConfig):
    """The prompt of one method with the offset of another, written `accept+dept` on the command line."""

    prompt: MethodConfig
    """Method whose prepended part is used."""
    offset: MethodConfig
    """Method whose added part is used; it gets the budget that the prompt leaves."""

    @property
    def name(self) -> str:  # type: ignore[override]
        """The two names, joined by a plus sign."""
        return f"{self.prompt.name}+{self.offset.name}"

    @property
    def source_required(self) -> bool:  # type: ignore[override]
        """As the method of the prompt says."""
        return self.prompt.source_required

    @property
    def task_parts(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of either method that concern its part here."""
        prompt = [name for name in self.prompt.task_parts if name.startswith("prompt.")]
        return (*prompt, *(name for name in self.offset.task_parts if name.startswith("offset.")))

    def sources(self) -> dict[str, str | None]:
        return {
            "prompt": self.prompt_from or self.prompt.prompt_from,
            "offset": self.offset_from or self.offset.offset_from,
        }

    def start_from(self, method: SoftPrompt, saved: Saved) -> None:
        self.check_sources()
        # Each method sees its own part alone.
        sources = self.sources()
        prompt = self.prompt.updated(prompt_from=sources["prompt"], offset_from=None)
        offset = self.offset.updated(prompt_from=None, offset_from=sources["offset"])
        prompt.start_from(SoftPrompt(method.prompt, None), saved)
        offset.start_from(SoftPrompt(None, method.offset), saved)

    def resolved(self, width: int) -> CombinedConfig:
        # One length decides the split of the budget; a prompt that leaves it open takes the offset's.
        length = getattr(self.prompt, "prompt_length", None)
        if length is None:
            length = getattr(self.offset, "prompt_length", None)
        prompt, offset = self.prompt, self.offset
        if "prompt_length" in type(prompt).model_fields:
            prompt = prompt.updated(prompt_length=length)
        if "prompt_length" in type(offset).model_fields:
            offset = offset.updated(prompt_length=length)
        return self.updated(prompt=prompt.resolved(width), offset=offset.resolved(width))

    def prompt_part(self, width: int) -> Part | None:
        part = self.resolved(width).prompt.prompt_part(width)
        if part is None:
            raise UsageError(f"{self.name}: {self.prompt.name} prepends nothing as set; name another method first")
        return part

    def offset_part(self, width: int) -> Part | None:
        part = self.resolved(width).offset.offset_part(width)
        if part is None:
            raise UsageError(f"{self.name}: {self.offset.name} adds nothing; take dept, adept or accept second")
        return part

    def kept_elsewhere(self) -> dict[str, str]:
        prompt = {name: at for name, at in self.prompt.kept_elsewhere().items() if name.startswith("prompt.")}
        return prompt | {name: at for name, at in self.offset.kept_elsewhere().items() if name.startswith("offset.")}

    def to_dict(self) -> dict[str, Any]:
        own = {field: getattr(self, field) for field in MethodConfig.model_fields}
        return {"method": self.name, **own, "prompt": self.prompt.to_dict(), "offset": self.offset.to_dict()}


def left_for_offset(budget_tokens: int, prompt_length: int) -> int:
    """Return how many of the budget's free vectors the prompt leaves for the offset.

    Raises:
        UsageError: nothing is left.
    """
    if budget_tokens <= prompt_length:
        raise UsageError(
            f"budget_tokens={budget_tokens} leaves nothing for the offset beside prompt_length={prompt_length}; "
            f"raise budget_tokens, lower prompt_length, or give the offset's size yourself"
        )
    return budget_tokens - prompt_length
