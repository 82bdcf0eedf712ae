"""`python -m softprompts` is the same as `softprompts`."""

import sys

from softprompts.cli import main

if __name__ == "__main__":
    sys.exit(main())
