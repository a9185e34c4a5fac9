"""From a dataset dict to what the model takes."""
