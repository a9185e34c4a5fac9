"""Pages and pictures about an evaluation."""
