"""From a dataset dict to the model's input."""
