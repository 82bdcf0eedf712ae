"""No prompt: the bare backbone, for the comparison that every prompt must win.

    input = embeds (B, T, D)

**Cost.** No scalars of its own; with `model.head=classification` the head alone is trained.

**Relations.** What remains when a method is taken away. With a head it is the linear probe that a prompt on an
encoder must beat; without one there is nothing to train, and `train` says so.

**Differs.** Nothing to differ from.
"""

from __future__ import annotations

from typing import ClassVar

from softprompts.core import MethodConfig, SoftPrompt
from softprompts.registry import register


@register
class NoneConfig(MethodConfig):
    """No settings of its own."""

    name: ClassVar[str] = "none"

    def build(self, width: int) -> SoftPrompt:
        return SoftPrompt(None, None)
