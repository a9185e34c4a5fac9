"""Benchmarks: time and memory of the project against the plain form of the same computation.

Every figure is a ratio within one run: the model with its faster forms ("fast") and without
(``MODEL.FAST_PATHS`` "none", "plain") alternate in separate processes. A "unit" is the time of one
product of two 2048 x 2048 matrices in the same number format, measured between the turns, so that
figures of different machines are comparable.
"""
