"""Tokens of large splits, kept between runs: tokenising 66,000 sentences takes longer than 100 steps of a small model.

One safetensors file per split and tokenizer, named by a hash of everything that the tokens depend on. A file that is
damaged or not ours counts as missing; one that cannot be written is done without. The oldest files make room.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from softprompts.errors import SoftPromptsError
from softprompts.files import replace

if TYPE_CHECKING:
    from softprompts.data import Encoder
    from softprompts.tasks import Example

FORMAT = 1
"""Raised whenever `Encoder.tokenise` or the layout of a file changes."""
LEAST_ROWS = 2_000
"""Smaller splits are tokenised faster than they are looked up."""
MOST_BYTES = 2**30
"""Size of the folder, beyond which the files longest unused go."""
NAMES = ("source_ids", "source_lengths", "target_ids", "target_lengths", "counts")


@dataclass(frozen=True)
class Tokens:
    """Ids of sources and targets, and how many of either were cut."""

    sources: list[list[int]]
    targets: list[list[int]]
    truncated: int = 0
    targets_cut: int = 0


def cached_tokens(encoder: Encoder, examples: Sequence[Example]) -> Tokens:
    """Return `encoder.tokenise(examples)`, from the cache if it is there; large splits are put there."""
    if len(examples) < LEAST_ROWS or not getattr(encoder.backbone.tokenizer, "is_fast", False):
        return encoder.tokenise(examples)
    key = key_of(encoder, examples)
    path = cache_folder() / "tokens" / f"{key}.safetensors"
    found = read(path, key)
    if found is None or len(found.sources) != len(examples):
        found = encoder.tokenise(examples)
        with suppress(SoftPromptsError, OSError):
            write(path, key, found)
            make_room(path)
    return found


def cache_folder() -> Path:
    """Return the folder of everything kept between runs: SOFTPROMPTS_CACHE, or the user's cache."""
    own = os.environ.get("SOFTPROMPTS_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "softprompts"


def key_of(encoder: Encoder, examples: Sequence[Example]) -> str:
    """Return a hash of the texts, the tokenizer, the lengths and the format.

    The protocol speaks through the texts that it renders, the backbone through its tokenizer and its kind.
    """
    tokenizer = encoder.backbone.tokenizer
    about = {
        "format": FORMAT,
        "versions": [transformers.__version__, tokenizers.__version__],
        "class": type(tokenizer).__name__,
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids)],
        "kind": encoder.backbone.kind,
        "lengths": [encoder.max_source, encoder.max_target, encoder.cuts_targets],
        "texts": [[example.source, example.target] for example in examples],
    }
    digest = hashlib.sha256(json.dumps(about).encode())
    # Vocabulary, merges, normaliser and post-processor of the tokenizer.
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def read(path: Path, key: str) -> Tokens | None:
    """Return the tokens of a file, None if it is missing, damaged or not that key's; a hit makes it young again."""
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in NAMES}
        if about.get("key") != key or about.get("sha256") != checksum(arrays):
            return None
        os.utime(path)
        truncated, targets_cut = arrays["counts"].tolist()
        sources, targets = (split(arrays[f"{name}_ids"], arrays[f"{name}_lengths"]) for name in ("source", "target"))
    except (OSError, SafetensorError, ValueError, TypeError):
        return None
    return Tokens(sources, targets, truncated, targets_cut)


def write(path: Path, key: str, tokens: Tokens) -> None:
    """Write the tokens to a file, whole or not at all.

    Raises:
        SoftPromptsError: no space, no permission.
    """
    arrays = {"counts": np.array([tokens.truncated, tokens.targets_cut], np.int64)}
    for name, rows in (("source", tokens.sources), ("target", tokens.targets)):
        arrays[f"{name}_ids"] = np.array([token for row in rows for token in row], np.int32)
        arrays[f"{name}_lengths"] = np.array([len(row) for row in rows], np.int32)
    about = {"key": key, "sha256": checksum(arrays)}
    replace(path, lambda temporary: save_file(arrays, temporary, about))


def checksum(arrays: dict[str, Any]) -> str:
    """Return a hash of the contents: safetensors has none of its own."""
    digest = hashlib.sha256()
    for name in NAMES:
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def split(ids: Any, lengths: Any) -> list[list[int]]:
    """Cut flat ids into rows."""
    flat, rows, start = ids.tolist(), [], 0
    for length in lengths.tolist():
        rows.append(flat[start : start + length])
        start += length
    return rows


def make_room(latest: Path) -> None:
    """Remove the files longest unused until the folder is small enough; never the latest."""
    files = sorted(latest.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    size = sum(path.stat().st_size for path in files)
    for path in files:
        if size <= MOST_BYTES:
            return
        if path != latest:
            size -= path.stat().st_size
            path.unlink(missing_ok=True)
