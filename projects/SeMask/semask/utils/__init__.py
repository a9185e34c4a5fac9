"""Utilities for all packages: files, text, colours, random numbers."""
