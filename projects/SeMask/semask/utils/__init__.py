"""What every room may use: files, text, colours, random numbers."""
