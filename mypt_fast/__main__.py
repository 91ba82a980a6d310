"""`python -m mypt_fast` is `mypt-fast`."""

import sys

from mypt_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
