"""Looking at a dataset before it is trained on."""
