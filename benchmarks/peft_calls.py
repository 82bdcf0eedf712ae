"""What works with PEFT's own prompt tuning and what with ours: the same checks on both, from the same run.

    python benchmarks/peft_calls.py                 print the table, write results/peft_calls.json
    python benchmarks/peft_calls.py --json FILE     write another file
    python benchmarks/peft_calls.py --docs          also rewrite the table of docs/peft.md

Tiny random T5, Llama and BERT models on the CPU; about two minutes. Both run with a prompt of five vectors and their
defaults otherwise. One defect counts once: where PEFT's logits are longer than the text, every other row compares the
text's. The checks are in tests/peft/calls.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "peft_calls.json"
PAGE = ROOT / "docs" / "peft.md"
BLOCK = re.compile(r"(<!-- calls -->\n).*?(<!-- /calls -->)", re.DOTALL)
METHODS = {"accept": "accept", "peft": "PEFT's prompt tuning"}
ARCHS = {"t5": "T5", "llama": "Llama", "bert": "BERT"}
WIDTH = 100
"""Characters of an outcome in the table; the JSON file has more."""

Outcomes = dict[str, dict[str, dict[str, str]]]


def measure() -> Outcomes:
    """Return the outcome of every call by call, method and architecture."""
    from calls import CALLS, apart, case_of, outcome

    found: Outcomes = {name: {method: {} for method in METHODS} for name in CALLS}
    wanted = [(name, method, arch) for name, row in CALLS.items() for method in METHODS for arch in row.archs]
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, method, arch) in enumerate(wanted):
            if not CALLS[name].processes:
                with contextlib.redirect_stdout(io.StringIO()):
                    said = outcome(CALLS[name], case_of(method, arch), Path(folder) / str(number))
                found[name][method][arch] = said
        for processes in (1, 2):
            theirs = [row for row in wanted if CALLS[row[0]].processes == processes]
            for (name, method, arch), said in apart(processes, theirs, Path(folder) / f"apart-{processes}").items():
                found[name][method][arch] = said
    return found


def versions() -> dict[str, str]:
    """Return the releases that were measured."""
    import peft
    import torch
    import transformers

    import softprompts

    return {
        "softprompts": softprompts.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cell(outcomes: dict[str, str]) -> str:
    """Return what a method's outcomes come to: once if the architectures agree, else each."""
    short = {arch: textwrap.shorten(said, WIDTH, placeholder="...") for arch, said in outcomes.items()}
    if len(set(short.values())) == 1:
        return next(iter(short.values()))
    return "; ".join(f"{ARCHS[arch]} {said}" for arch, said in short.items())


def markdown(found: Outcomes) -> str:
    """Return the table of the page."""
    from calls import CALLS

    lines = ["| call | what is compared | models | ours | PEFT's prompt tuning |", "|---|---|---|---|---|"]
    for name, outcomes in found.items():
        models = ", ".join(ARCHS[arch] for arch in CALLS[name].archs)
        cells = [name, CALLS[name].says, models, *(code(cell(outcomes[method])) for method in METHODS)]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    """Return text without characters that Markdown would take for its own."""
    return re.sub(r"([<>*_\[\]`])", r"\\\1", text)


def plain(found: Outcomes) -> str:
    """Return the table for a terminal."""
    lines = []
    for name, outcomes in found.items():
        lines.append(name)
        lines += [f"    {label:21} {cell(outcomes[method])}" for method, label in METHODS.items()]
    return "\n".join(lines)


def summary(found: Outcomes) -> str:
    """Return how many calls work, by method, and the releases."""
    counts = [
        f"{label} {sum(set(row[method].values()) == {'ok'} for row in found.values())} of {len(found)}"
        for method, label in METHODS.items()
    ]
    releases = ", ".join(f"{name} {release}" for name, release in versions().items())
    return f"Calls that work on every model of their row: {'; '.join(counts)}. Measured with {releases}."


def prepare() -> None:
    """Make the checks importable and keep progress bars and foreign warnings out of the output."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "peft")]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write. The exit code is 1 if a call of ours fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the outcomes go")
    parser.add_argument("--docs", action="store_true", help="rewrite the table of docs/peft.md")
    options = parser.parse_args(arguments)
    prepare()
    found = measure()
    record: dict[str, Any] = {"versions": versions(), "calls": found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(plain(found))
    print(summary(found))
    if options.docs:
        block = f"{summary(found)}\n\n{markdown(found)}"
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(BLOCK.sub(lambda match: match[1] + block + match[2], text), encoding="utf-8")
    return int(any(said != "ok" for row in found.values() for said in row["accept"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
