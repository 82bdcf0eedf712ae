"""How long it takes to begin: `softprompts --help`, and the first training step of `softprompts demo`.

    python benchmarks/start_up.py        print the table, write results/start_up.json

Every round starts fresh processes in turns: the help, the demo until its first optimizer step is done (imports, data,
tokens, backbone, the prompt's start), Python alone, and the import of torch and transformers alone, which nothing that
trains can do without. All modules are compiled, as from the second start on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from common import figure, interleaved, ratio, run_script, spread

ROUNDS = 5
CASES = (
    ("softprompts --help", "help", "Python alone", "python"),
    ("softprompts demo, to the end of its first step", "demo", "import of torch and transformers", "imports"),
)
"""What is measured, its side, and the peer with its side."""
FIRST_STEP = (
    "import os, sys\n"
    "from softprompts import loop\n"
    "step = loop.Run.step\n"
    "def first(self, training):\n"
    "    step(self, training)\n"
    "    os._exit(0)\n"
    "loop.Run.step = first\n"
    "from softprompts.cli import main\n"
    "main()\n"
)
"""The demo, which ends with its first step."""
IMPORTS = "import torch, transformers; transformers.T5ForConditionalGeneration, transformers.AutoTokenizer"


def commands(folder: str) -> dict[str, list[str]]:
    """Return what each side starts."""
    return {
        "help": ["-m", "softprompts", "--help"],
        "demo": ["-c", FIRST_STEP, "demo", "--out", folder],
        "python": ["-c", "pass"],
        "imports": ["-c", IMPORTS],
    }


def measure(options: Namespace) -> dict[str, Any]:
    """Start every process in turns; the help alone if it is to be quick."""
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    cases = CASES[: 1 if options.quick else None]
    wanted = {side for case in cases for side in case[1::2]}
    with tempfile.TemporaryDirectory() as folder:

        def start(arguments: list[str]) -> None:
            environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)

        sides = {name: lambda own=own: start(own) for name, own in commands(folder).items() if name in wanted}
        seconds = interleaved(sides, rounds, "cpu", warmup=0 if options.quick else 1)
    rows = [
        {"case": case, "seconds": spread(seconds[side]), "peer": peer, "to_peer": ratio(seconds[side], seconds[other])}
        for case, side, peer, other in cases
    ]
    return {"rows": rows}


def table(record: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Return columns and cells."""
    cells = [
        [row["case"], figure(row["seconds"]), f"{figure(row['to_peer'])} x {row['peer']}"] for row in record["rows"]
    ]
    return ("", "seconds", "against"), cells


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print and write; return the record."""
    return run_script("start_up", __doc__, measure, table, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
