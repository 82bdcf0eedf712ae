"""Fill the tables of docs/speed.md from results/*.json.

    python benchmarks/docs.py            rewrite the page
    python benchmarks/docs.py --check    exit code 1 if it is out of date

A table stands between `<!-- speed:train_step -->` and `<!-- /speed -->`; `speed:machine` says what was measured on.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import targets
from common import markdown, place

PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
BLOCK = re.compile(r"(<!-- speed:(\w+) -->\n).*?(<!-- /speed -->)", re.DOTALL)
NAMES = ("train_step", "decoder_step", "memory", "population", "mixed_serving", "default_run", "start_up", "scaling")
DEVICES = ("cpu", "cuda")


def record_of(name: str, device: str = "cpu") -> dict[str, Any] | None:
    """Return a measurement's record, None if there is none."""
    file = place(name, device)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def block(name: str) -> str:
    """Return the text of one block."""
    if name == "machine":
        return machines()
    if name == "targets":
        return markdown(*targets.table(record_of))
    records = {device: record for device in DEVICES if (record := record_of(name, device)) is not None}
    if not records:
        return "Not measured.\n"
    parts = [described(name, record) for record in records.values()]
    if "cuda" in records:
        parts[-1] = f"On {records['cuda']['machine']['accelerator']}:\n\n{parts[-1]}"
    return "\n".join(parts)


def described(name: str, record: dict[str, Any]) -> str:
    """Return a record's table and what has to be said with it."""
    text = markdown(*importlib.import_module(name).table(record))
    notes = [f"Not measured: {what} ({reason})." for what, reason in record["skipped"].items()]
    if record["others_share"] is not None:
        notes.append(f"Other processes took {record['others_share']:.0%} of the machine meanwhile.")
    notes += [f"Same numbers on both sides: {said(record['checks'])}."] if record["checks"] else []
    return "\n".join([text, *(f"{note}\n" for note in notes)])


def said(checks: dict[str, Any]) -> str:
    """Write how far the sides are apart in numbers, relative to the largest one."""
    parts = []
    for key, value in checks.items():
        if isinstance(value, dict):
            parts.append(f"{key} ({said(value)})")
        else:
            parts.append(SAID[key].format(value))
    return ", ".join(part for part in parts if part)


SAID = {
    "loss": "loss {:.0e} apart",
    "gradients": "gradients {:.0e} apart",
    "logits": "logits {:.0e} apart",
    "same_tokens": "{:.1%} of the generated tokens",
    "different_tasks": "",
}
"""How a check is written; the last one only shows that the adapters differ."""


def machines() -> str:
    """Name the machines and releases of all records."""
    found = []
    for name, device in itertools.product(NAMES, DEVICES):
        record = record_of(name, device)
        if record is not None:
            machine = record["machine"]
            units = ", ".join(machine["vector_units"]) or "no vector units known"
            where = machine["accelerator"] or f"{machine['processor']}, {machine['cores']} cores, {units}"
            releases = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
            found.append(f"{where}; {record['threads']} threads; {releases}")
    lines = list(dict.fromkeys(found)) or ["nothing yet"]
    return "Measured on: " + ". And on: ".join(lines) + ".\n"


def filled(text: str) -> str:
    """Return a page with its blocks made anew."""
    return BLOCK.sub(lambda match: match[1] + block(match[2]) + match[3], text)


def main(arguments: Sequence[str]) -> int:
    """Rewrite the page, or only check it."""
    text = PAGE.read_text(encoding="utf-8")
    new = filled(text)
    if "--check" in arguments:
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
