"""Run every measurement of this folder, one after the other, each in a process of its own, and rewrite docs/speed.md.

python benchmarks/all.py                  about an hour on two cores, which should do nothing else
python benchmarks/all.py --device cuda
python benchmarks/all.py --quick          whether they run
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from docs import NAMES
from docs import main as write_page

HERE = Path(__file__).parent
WITHOUT_ROUNDS = ("default_run",)
"""Nothing there takes turns."""


def main(arguments: Sequence[str]) -> int:
    """Run all with the given options; return 1 if one of them failed."""
    failed = []
    for name in NAMES:
        print(f"== {name}", flush=True)
        begun = time.perf_counter()
        own = [*arguments]
        if name in WITHOUT_ROUNDS and "--rounds" in own:
            del own[own.index("--rounds") : own.index("--rounds") + 2]
        command = [sys.executable, "-W", "ignore", str(HERE / f"{name}.py"), *own]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"({time.perf_counter() - begun:.0f} s)\n", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    elif not {"--quick", "-h", "--help"} & set(arguments):
        write_page([])
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
