"""The ``semask`` command; ``arguments`` has what each sub-command takes."""
