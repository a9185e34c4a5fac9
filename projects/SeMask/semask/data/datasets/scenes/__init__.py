"""A synthetic dataset that is rendered on first use."""
