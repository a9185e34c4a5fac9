"""Small layers that several parts of the model use."""
