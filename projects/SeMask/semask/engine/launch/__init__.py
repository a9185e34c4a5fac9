"""Processes of a run: checks before them, their start, and their end."""
