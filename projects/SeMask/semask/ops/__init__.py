"""Faster forms of what :mod:`semask.modeling` computes, each equal to its plain module."""
