"""The ``semask`` command; ``arguments`` defines the arguments of each sub-command."""
