"""Processes: what is checked before them, how they start, and how they end."""
