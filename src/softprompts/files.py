"""Files are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from softprompts.errors import SoftPromptsError


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def replace(path: Path, write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place: all of it or nothing.

    Raises:
        SoftPromptsError: no space, no permission.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise SoftPromptsError(f"cannot write {path}: {reason}; free some space or name another --out") from None
