"""The matrix of calls: what users do with a PEFT model, each as a check that compares numbers.

`CALLS` holds the rows in the order of the table in docs/peft.md. `test_matrix.py` runs them over every method of this
package, `benchmarks/peft_calls.py` over PEFT's own prompt tuning too, for the table's second column.

    python calls.py ROW FOLDER METHOD/ARCH ...     one row in this process; see `apart`
"""

import sys

# The order of these imports is the order of the rows.
import calls_forward
import calls_generate
import calls_files  # isort: skip
import calls_adapters  # isort: skip
import calls_training  # isort: skip
from registry_of_calls import CALLS, Call, apart, call, case_of, outcome, work

__all__ = ["CALLS", "Call", "apart", "call", "case_of", "outcome"]

if __name__ == "__main__":
    work(sys.argv[1:])
