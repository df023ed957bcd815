"""What theory says of a trained network: the gap of Theorem 1, the bound on the likelihood.

In order of reading: ``gap``, ``likelihood``, ``pair_terms``.
"""
