#!/usr/bin/env python3
"""As ``semask check``."""

import sys

from semask.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
