#!/usr/bin/env python3
"""As ``semask predict``."""

import sys

from semask.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
