"""`python -m qlora` is the `qlora` command."""

import sys

from qlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
