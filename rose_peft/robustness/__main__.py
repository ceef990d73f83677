"""`python -m rose_peft.robustness {noise,attack,landscape,consistency,report}`."""

import sys

from .command_line import main

if __name__ == "__main__":
    sys.exit(main())
