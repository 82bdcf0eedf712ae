"""Give a tokenizer P new tokens, and let it put them before every text: what makes a baked folder ordinary to use."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer

from softprompts.files import write_text

SAMPLE_TEXT = "A text, another."
CONFIG_FILE = "tokenizer_config.json"
GENERAL_CLASS = "PreTrainedTokenizerFast"
"""The tokenizer class that takes tokenizer.json as it is."""


def add_tokens(tokenizer: Any, length: int) -> tuple[list[str], list[int]]:
    """Add P special tokens and, where it can be told so, make the tokenizer put them before every text."""
    known = tokenizer.get_vocab()
    # A folder that was baked before has some already; the new ones go in front of those.
    first = next(number for number in itertools.count() if f"<softprompt_{number}>" not in known)
    tokens = [f"<softprompt_{number}>" for number in range(first, first + length)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokens and isinstance(backend, Tokenizer):
        tree = json.loads(backend.to_str())
        changed = with_prompt(tree.get("post_processor"), tokens, ids)
        if changed is not None:
            tree["post_processor"] = changed
            backend.post_processor = Tokenizer.from_str(json.dumps(tree)).post_processor
    return tokens, ids


def with_prompt(processor: Any, tokens: list[str], ids: list[int]) -> dict[str, Any] | None:
    """Return a tokenizer's post-processor that puts `tokens` first, None if this kind cannot be changed so."""
    kind = processor and processor["type"]
    if kind is None or kind == "ByteLevel":
        template = with_prompt(template_of("", ""), tokens, ids)
        return template if kind is None else {"type": "Sequence", "processors": [processor, template]}
    if kind == "Sequence":
        parts = processor["processors"]
        places = [i for i, part in enumerate(parts) if part["type"] not in ("Sequence", "ByteLevel")]
        if len(places) != 1:
            return None
        changed = with_prompt(parts[places[0]], tokens, ids)
        return changed and {**processor, "processors": [*parts[: places[0]], changed, *parts[places[0] + 1 :]]}
    if kind in ("BertProcessing", "RobertaProcessing"):
        (sep, sep_id), (cls, cls_id) = processor["sep"], processor["cls"]
        template = template_of(cls, sep, second_type=kind == "BertProcessing", twice=kind == "RobertaProcessing")
        template["special_tokens"] = {
            name: {"id": name, "ids": [number], "tokens": [name]} for name, number in ((sep, sep_id), (cls, cls_id))
        }
        changed = with_prompt(template, tokens, ids)
        if kind == "BertProcessing":
            return changed
        options = {key: processor[key] for key in ("add_prefix_space", "trim_offsets")}
        return {"type": "Sequence", "processors": [{"type": "ByteLevel", "use_regex": True, **options}, changed]}
    if kind != "TemplateProcessing":
        return None
    front = {"SpecialToken": {"id": tokens[0], "type_id": 0}}
    special = {**processor["special_tokens"], tokens[0]: {"id": tokens[0], "ids": ids, "tokens": tokens}}
    return {
        **processor,
        "single": [front, *processor["single"]],
        "pair": [front, *processor["pair"]],
        "special_tokens": special,
    }


def template_of(cls: str, sep: str, second_type: bool = True, twice: bool = False) -> dict[str, Any]:
    """Return a template post-processor: `cls A sep` and `cls A sep B sep`, each left out if empty."""
    second = int(second_type)

    def token(name: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": name, "type_id": type_id}}] if name else []

    single = [*token(cls, 0), {"Sequence": {"id": "A", "type_id": 0}}, *token(sep, 0)]
    between = token(sep, second) if twice else []
    pair = [*single, *between, {"Sequence": {"id": "B", "type_id": second}}, *token(sep, second)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}}


def save_tokenizer(tokenizer: Any, folder: Path, expected: Sequence[int]) -> bool:
    """Save the tokenizer; return whether, loaded from the folder, it reads `SAMPLE_TEXT` as `expected`."""
    tokenizer.save_pretrained(folder)
    path = folder / CONFIG_FILE
    if reads_as(folder, expected):
        return True
    if not (path.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    own = path.read_text(encoding="utf-8")
    # Some classes (T5's, RoBERTa's) rebuild what they put around a text when loaded; the general one does not.
    write_text(path, json.dumps({**json.loads(own), "tokenizer_class": GENERAL_CLASS}, indent=2) + "\n")
    if reads_as(folder, expected):
        return True
    write_text(path, own)
    return False


def reads_as(folder: Path, expected: Sequence[int]) -> bool:
    """Whether the tokenizer of a folder reads `SAMPLE_TEXT` as `expected`."""
    return transformers.AutoTokenizer.from_pretrained(folder)(SAMPLE_TEXT)["input_ids"] == list(expected)
