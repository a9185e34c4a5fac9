#!/usr/bin/env python3
"""As ``semask export``."""

import sys

from semask.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
