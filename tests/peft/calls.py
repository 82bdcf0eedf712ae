"""The matrix of calls: what users do with a PEFT model, each as a check that compares numbers.

`CALLS` holds the rows in the order of the table in docs/peft.md. `test_matrix.py` runs them over every method of this
package, `benchmarks/peft_calls.py` over PEFT's own prompt tuning too, for the table's second column.

    python calls.py FOLDER     what `apart` starts
"""

import importlib
import sys
from pathlib import Path

from registry_of_calls import CALLS, Call, apart, call, case_of, outcome, work

for part in ("forward", "generate", "files", "adapters", "training"):
    importlib.import_module(f"calls_{part}")

__all__ = ["CALLS", "Call", "apart", "call", "case_of", "outcome"]

if __name__ == "__main__":
    work(Path(sys.argv[1]))
