#!/usr/bin/env python3
"""As ``semask plot``."""

import sys

from semask.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plot", *sys.argv[1:]]))
