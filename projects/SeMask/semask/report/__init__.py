"""Reports and pictures of an evaluation."""
