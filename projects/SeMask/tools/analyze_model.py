#!/usr/bin/env python3
"""As ``semask analyze``."""

import sys

from semask.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
