"""Faster forms of modules of :mod:`semask.modeling`, each equal to its plain module."""
