"""What kind of run a config describes."""
