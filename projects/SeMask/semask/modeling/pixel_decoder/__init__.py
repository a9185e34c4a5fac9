"""From the backbone's features to one map."""
