"""``python -m semask``."""

import sys

from semask.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
