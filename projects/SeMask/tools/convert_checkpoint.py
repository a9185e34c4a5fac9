#!/usr/bin/env python3
"""As ``semask convert``."""

import sys

from semask.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
