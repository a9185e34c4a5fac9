"""How much time and memory the project takes, against the plain form of the same computation.

Every figure is a ratio within one run: the model with its faster forms ("fast") and without
(``MODEL.FAST_PATHS`` "none", "plain") take turns in processes of their own. A "unit" is the time
of one product of two 2048 x 2048 matrices in the same number format, measured between the turns,
so that figures of different machines can be compared.
"""
